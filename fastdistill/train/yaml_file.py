"""YAML as a configuration may have it: no deeper, larger or more often repeated than any configuration is.

A few hundred bytes of aliases stand for gigabytes, and a few thousand brackets for more calls than Python allows: all
of it is measured before anything is built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fastdistill.settings import ConfigError, short

MOST_BYTES, MOST_VALUES, MOST_LEVELS, MOST_DIGITS = 2**20, 10_000, 40, 100


def load_yaml(path: Path) -> Any:
    """Return the content of a YAML file.

    Raises:
        ConfigError: it can't be read, is no YAML, names a field twice, or exceeds the sizes above; one line, which
            names the file.
    """
    text = _read_text(path)
    try:
        _refuse_deep(text, path)
        node = yaml.compose(text, yaml.SafeLoader)
        if node is not None:
            _measure(node, {}, path)
        return yaml.safe_load(text)
    except ConfigError:
        raise
    except yaml.MarkedYAMLError as error:
        place = f" in line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise ConfigError(f"{path} is no YAML: {error.problem or error.context}{place}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    except (ValueError, KeyError, AttributeError, TypeError, ArithmeticError, RecursionError) as error:
        reason = f"{type(error).__name__}: {short(str(error))}"  # of a tag or a number that YAML can't make
        raise ConfigError(f"{path} is no YAML: a value can't be read ({reason})") from error


def _read_text(path: Path) -> str:
    try:
        if (size := path.stat().st_size) > MOST_BYTES:
            raise ConfigError(f"{path}: expected a configuration of at most {MOST_BYTES:,} bytes, got {size:,}")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no YAML: byte {error.start} is no UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror or error}") from error


def _refuse_deep(text: str, path: Path) -> None:
    """Refuse deep nesting by the parser's events, one by one: what builds values calls itself at each level."""
    levels = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        levels += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if levels > MOST_LEVELS:
            line = event.start_mark.line + 1 if event.start_mark is not None else 1
            raise ConfigError(f"{path}: expected fields nested at most {MOST_LEVELS} deep, got more in line {line}")


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]], path: Path) -> tuple[int, int]:
    """Return how many values and how many levels a node stands for, with its aliases written out."""
    if id(node) in known:
        return known[id(node)]
    line = node.start_mark.line + 1
    if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":int") and len(node.value) > MOST_DIGITS:
        raise ConfigError(
            f"{path}: expected numbers of at most {MOST_DIGITS} digits, got {len(node.value)} in line {line}"
        )
    known[id(node)] = (MOST_VALUES + 1, 0)  # met again before it is measured, it contains itself
    children = list(node.value) if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name in names:
            if name != "<<" and names.count(name) > 1:
                raise ConfigError(f"{path}: expected each field once, got {short(name)} twice below line {line}")
        children = [part for pair in node.value for part in pair]
    values, levels = 1, 1
    for child in children:
        below = _measure(child, known, path)
        values, levels = values + below[0], max(levels, 1 + below[1])
        if values > MOST_VALUES or levels > MOST_LEVELS:
            raise ConfigError(
                f"{path}: expected at most {MOST_VALUES:,} values nested at most {MOST_LEVELS} deep, got more by the "
                f"aliases (*name) in line {line}"
            )
    known[id(node)] = values, levels
    return values, levels
