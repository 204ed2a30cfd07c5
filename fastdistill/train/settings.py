"""Define the base of every settings class, and its errors in words: which field, what was expected, what came."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from fastdistill.settings import nearest, short

SHOWN = 10  # how many wrong fields an error lists


class Settings(BaseModel):
    """Settings: a frozen, typed group. A field that it doesn't know is an error that suggests the nearest one."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_fields(cls, fields: Any) -> Any:
        if isinstance(fields, Mapping):
            for name in fields:
                if name not in cls.model_fields:
                    raise ValueError(f"unknown field {short(name)}; {nearest(name, cls.model_fields)}")
        return fields


def explain(error: ValidationError, given: Mapping[str, Any]) -> str:
    """Explain each problem in a line, led by the dotted name of the field as it stands in what was given."""
    problems = error.errors(include_url=False)
    lines = [_explain_one(problem, given) for problem in problems[:SHOWN]]
    return "\n".join([*lines, *[f"and {len(problems) - SHOWN} more"] * (len(problems) > SHOWN)])


def _explain_one(problem: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    name = _place(problem["loc"], given, is_missing=kind == "missing")
    if kind == "missing":
        return f"{name}: this field is required"
    if kind == "union_tag_not_found":
        return f"{name}.{context['discriminator'].strip(chr(39))}: this field is required"
    if kind == "union_tag_invalid":
        expected, got = context["expected_tags"], str(context["tag"])
        tags = {tag.strip(" '"): None for tag in expected.split(",")}
        guess = nearest(got, tags)
        guess = f"; {guess}" if guess.startswith("did you mean") else ""
        return f"{name}.{context['discriminator'].strip(chr(39))}: expected one of {expected}, got {short(got)}{guess}"
    if kind == "value_error":
        return f"{name}: {context['error']}" if name else str(context["error"])
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{name}: {message.replace('input should be', 'expected')}, got {short(problem['input'])}"


def _place(loc: tuple[int | str, ...], given: Any, is_missing: bool) -> str:
    """Return the dotted name of a place, without the tags that pydantic adds for the kinds of a union."""
    parts = []
    for depth, part in enumerate(loc):
        absent = isinstance(given, Mapping) and part not in given
        if absent and not (is_missing and depth == len(loc) - 1):
            continue  # a tag: the user wrote no such level
        parts.append(str(part))
        given = given[part] if isinstance(given, Mapping) and not absent else None
    return ".".join(parts)
