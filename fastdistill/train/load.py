"""Load a configuration from a YAML file, or a shipped name, and the command line; check it as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import tyro

from fastdistill.settings import ConfigError, nearest, short
from fastdistill.train.checks import check_config
from fastdistill.train.config import TrainConfig, parse_config, read_yaml
from fastdistill.train.data_settings import DataSettings
from fastdistill.train.methods import METHODS

SHIPPED = Path(__file__).parents[1] / "configs"


def shipped_configs() -> list[str]:
    """Return the names of the configurations that come with fastdistill."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load_config(source: str | Path, overrides: Sequence[str] = (), *, out: Path | None = None) -> TrainConfig:
    """Read a configuration, apply command line overrides and check it all.

    Args:
        source: a YAML file, or the name of a shipped one (`shipped_configs()`).
        overrides: command line arguments, e.g. ["--optim.lr", "3e-4"]; "--help" prints them all and exits.
        out: the run folder, before overrides; None: the file's own, or runs/<its name>.

    Raises:
        ConfigError: naming each field that is unknown, missing or wrong.
        SystemExit: with status 2, by tyro, for a wrong override, which it explains on stderr.
    """
    path = find_config(source)
    given = read_yaml(path)
    recipes = take_recipes(given, path)
    name, overrides = take_option(overrides, "--method.name")
    stem, method = path.stem, given.get("method")
    if name is not None and not (isinstance(method, Mapping) and method.get("name") == name):
        given, stem = choose_method(given, name, recipes), f"{path.stem}-{name}"
    data, overrides = take_option(overrides, "--data.name")
    if data is not None:
        given = given | {"data": choose_data(given.get("data"), data)}
    recipe, overrides = take_option(overrides, "--method.recipe")
    if recipe is not None:
        given = given | {"method": choose_recipe(given.get("method") or {}, recipe)}
    given = {"out": f"runs/{stem}"} | given | ({"out": str(out)} if out else {})
    config = parse_config(given, str(path))
    if overrides:
        config = tyro.cli(
            TrainConfig,
            args=list(overrides),
            default=config,
            prog=f"fastdistill train {source}",
            description=f"Train as {path.name} says, by {config.method.name}, with any of its fields changed. Another "
            f"method comes first, as --method.name {'|'.join(METHODS)}:",
            config=(tyro.conf.AvoidSubcommands,),
        )
    check_config(config)
    return config


def choose_data(data: Any, name: str) -> dict[str, Any]:
    """Return the fields of another data set: those that all sets have, and where it is the same, all."""
    data = data if isinstance(data, Mapping) else {}
    same = data.get("name") == name
    kept = data if same else {field: data[field] for field in data if field in DataSettings.model_fields}
    return {**kept, "name": name}


def choose_recipe(method: Mapping[str, Any], recipe: str) -> dict[str, Any]:
    """Put the fields of a named recipe in the place of those that it fills in."""
    kind = METHODS.get(str(method.get("name")))
    filled = {field for fields in (kind.presets if kind else {}).values() for field in fields}
    return {name: value for name, value in method.items() if name not in filled} | {"recipe": recipe}


def find_config(source: str | Path) -> Path:
    """Find the file of a configuration, given by path or by shipped name."""
    with suppress(OSError, ValueError):  # of a name that no file can have
        for path in (Path(source), SHIPPED / f"{source}.yaml"):
            if path.is_file():
                return path
    name, there = str(source), ", ".join(shipped_configs())
    name = name if len(name) < 200 else short(name)
    raise ConfigError(f"{name}: no such file, and no shipped configuration; there are {there}")


def take_recipes(given: dict[str, Any], path: Path) -> dict[str, Mapping[str, Any]]:
    """Remove the section `methods` of a file and return it, checked: a mapping of fields for each method.

    In the place of the section may stand the name under which the methods themselves say what they change.
    """
    recipes = given.pop("methods", None)
    if recipes is None:
        return {}
    if isinstance(recipes, str):
        return named_recipes(recipes, path)
    if not isinstance(recipes, Mapping):
        raise ConfigError(f"{path}: methods: expected names of methods, each with its fields, got {short(recipes)}")
    for name, recipe in recipes.items():
        if name not in METHODS:
            raise ConfigError(f"{path}: methods: unknown method {short(name)}; {nearest(name, METHODS)}")
        _refuse_no_fields(recipe, f"{path}: methods.{name}")
        _refuse_no_fields((recipe or {}).get("method"), f"{path}: methods.{name}.method")
    return {name: recipe or {} for name, recipe in recipes.items()}


def named_recipes(name: str, path: Path) -> dict[str, Mapping[str, Any]]:
    """Return what each method itself changes in a configuration that names these recipes."""
    known = {name: None for method in METHODS.values() for name in method.row.recipes}
    if name not in known:
        raise ConfigError(
            f"{path}: methods: expected names of methods, each with its fields, got {short(name)}; those of a shipped "
            f"configuration are called {' or '.join(known)}"
        )
    return {method: kind.row.recipes[name] for method, kind in METHODS.items() if name in kind.row.recipes}


def _refuse_no_fields(value: Any, place: str) -> None:
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{place}: expected fields and their values, got {short(value)}")


def take_option(overrides: Sequence[str], option: str) -> tuple[str | None, list[str]]:
    """Return the last value of `--option value` or `--option=value`, and the arguments without it."""
    value, rest, arguments = None, [], iter(overrides)
    for argument in arguments:
        if argument == option:
            value = next(arguments, None)
            if value is None:
                raise ConfigError(f"{option.lstrip('-')}: expected a value after {option}")
        elif argument.startswith(f"{option}="):
            value = argument.removeprefix(f"{option}=")
        else:
            rest.append(argument)
    return value, rest


def choose_method(given: Mapping[str, Any], name: str, recipes: Mapping[str, Any]) -> dict[str, Any]:
    """Put another method in place of a file's own: the file's recipe for it, else its defaults."""
    if name not in METHODS:
        expected = ", ".join(METHODS)
        raise ConfigError(f"method.name: expected one of {expected}, got {short(name)}; {nearest(name, METHODS)}")
    chosen = {**given, "method": {}}
    for group, fields in recipes.get(name, {}).items():
        nested = isinstance(fields, Mapping) and isinstance(chosen.get(group), Mapping)
        chosen[group] = {**chosen[group], **fields} if nested else fields
    chosen["method"] = {**(chosen["method"] or {}), "name": name}
    return chosen
