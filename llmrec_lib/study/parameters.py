"""Strict notebook parameters: what a chapter declares, and whether given values fit, checked before anything runs."""

import ast
import contextlib
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from llmrec_lib.splits import PROTOCOLS

Value = str | int | float | bool | list
TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list like the default"}


class ParameterError(ValueError):
    """A parameter that is unknown or has a wrong type or value, or a notebook that does not declare its parameters."""


def declared_parameters(notebook: str | Path) -> dict[str, Value]:
    """Names and defaults in the notebook's one cell tagged ``parameters``, read without executing it.

    ParameterError if the file is no notebook, has no kernelspec, not exactly one such cell, or a line in it that is no
    plain literal: papermill would then run something else than what was asked for, without an error.
    """
    try:
        content = json.loads(Path(notebook).read_text(encoding="utf-8"))
        cells, metadata = content["cells"], content["metadata"]
    except (ValueError, KeyError, TypeError) as error:
        raise ParameterError(f"{notebook} is not a Jupyter notebook of format 4 ({error})") from None
    if not metadata.get("kernelspec", {}).get("name"):
        raise ParameterError(f"{notebook} has no kernelspec: open it in Jupyter, choose the Python 3 kernel and save")
    tagged = [cell for cell in cells if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if len(tagged) != 1:
        raise ParameterError(f"{notebook} has {len(tagged)} cells tagged 'parameters'; exactly one must hold them all")
    return literals("".join(tagged[0]["source"]), f"{notebook}, parameters cell")


def literals(source: str, where: str) -> dict[str, Value]:
    """Values of the one-line assignments ``name = literal`` in `source`; anything else is an error naming the line."""
    try:
        lines = ast.parse(source).body
    except SyntaxError as error:
        raise ParameterError(f"{where}, line {error.lineno}: {error.msg}") from None
    values: dict[str, Value] = {}
    for line in lines:
        name, value = "", None
        match line:
            case ast.Assign(targets=[ast.Name(id=name)]) if line.lineno == line.end_lineno:
                with contextlib.suppress(ValueError):
                    value = ast.literal_eval(line.value)
        if type(value) not in TYPES or name in values:
            needed = "one line `name = value`, each name once, the value a literal text, number, True, False or list"
            raise ParameterError(f"{where}, line {line.lineno}: {ast.unparse(line)!r} must be {needed}")
        values[name] = value
    return values


def require_known(names: Iterable[str], known: Mapping[str, Value], where: str) -> None:
    """Raise ParameterError for the first name that nothing in `where` declares, with the known ones and the nearest."""
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            there = ", ".join(f"{parameter} = {default!r}" for parameter, default in known.items())
            raise ParameterError(f"unknown parameter {name!r} for {where}{hint}\nknown parameters: {there}")


def convert(name: str, value: Any, default: Value, where: str = "", text: bool = True) -> Value:
    """Bring `value` to the type of `default`, or raise ParameterError.

    A whole number may stand for a float. With `text`, text is read as the declared type ("3", "0.5", "true", "[1, 2]"),
    since that is all a command line has. A list must hold what the default holds, if that is of one type.
    """
    kind = type(default)
    if kind not in TYPES:
        raise ParameterError(f"{where}parameter {name!r} must be text, a number, True, False or a list, got {value!r}")
    adapter = TypeAdapter(list[type(default[0])] if kind is list and len({*map(type, default)}) == 1 else kind)
    try:
        if text and isinstance(value, str) and kind is not str:
            return adapter.validate_json(value.lower() if kind is bool else value, strict=True)
        return adapter.validate_python(value, strict=True)
    except ValidationError:
        got = f"got {value!r} ({type(value).__name__})"
        raise ParameterError(f"{where}parameter {name!r} must be {TYPES[kind]} (default {default!r}), {got}") from None


def check_values(
    declared: dict[str, Value], given: Mapping[str, Any], chapter: str, text: bool = True
) -> dict[str, Value]:
    """The declared defaults, replaced by the given values (see `convert`), or ParameterError.

    Checked, too, are those that mean the same in every chapter: protocol, seeds, max_users, dataset.
    """
    require_known(given, declared, chapter)
    where = f"{chapter}: "
    parameters = declared | {name: convert(name, value, declared[name], where, text) for name, value in given.items()}
    for protocol in [parameters.get("protocol", PROTOCOLS[0]), *parameters.get("protocols", [])]:
        if protocol not in PROTOCOLS:
            raise ParameterError(f"{where}protocol {protocol!r} is not one of {', '.join(PROTOCOLS)}")
    for name, least in (("seeds", 1), ("max_users", 0)):
        if parameters.get(name, least) < least:
            raise ParameterError(f"{where}parameter {name!r} must be at least {least}, got {parameters[name]}")
    dataset = parameters.get("dataset", "name")
    if not dataset or Path(dataset).name != dataset:
        raise ParameterError(f"{where}dataset {dataset!r} must be a name; say where it lies with data_dir")
    return parameters


def chapter_values(
    profiles: Path, profile: str, given: dict[str, Any], chapters: Sequence[str], known: Mapping[str, dict[str, Value]]
) -> list[dict[str, Value]]:
    """The values of each of `chapters`: defaults, replaced by the profile's ``all``, the chapter's own, the given ones.

    The file `profiles` reads ``profile: {all: {name: value}, chapter: {name: value}}``. `known` holds the declared
    parameters of every chapter there is, so that a misspelt entry is found (ParameterError). What the profile sets for
    all and what is given goes to each chapter that declares it.
    """
    content = yaml.safe_load(profiles.read_text(encoding="utf-8")) or {}
    if profile not in content:
        raise ParameterError(f"unknown profile {profile!r}; {profiles} has {', '.join(content)}")
    sections = {name: values or {} for name, values in (content[profile] or {}).items()}
    allowed = {"all": {name: value for declared in known.values() for name, value in declared.items()}, **known}
    for section, values in sections.items():
        if section not in allowed:
            raise ParameterError(f"{profiles}, profile {profile!r}: there is no chapter {section!r}")
        require_known(values, allowed[section], f"{section} (profile {profile!r} in {profiles})")
    declared = {name: value for chapter in chapters for name, value in known[chapter].items()}
    require_known(given, declared, ", ".join(chapters))
    wanted = {chapter: sections.get("all", {}) | sections.get(chapter, {}) | given for chapter in chapters}
    own = {chapter: {n: v for n, v in wanted[chapter].items() if n in known[chapter]} for chapter in chapters}
    return [check_values(known[chapter], own[chapter], chapter) for chapter in chapters]
