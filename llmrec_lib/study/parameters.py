"""Strict notebook parameters: what a chapter declares, and whether given values fit, checked before anything runs."""

from __future__ import annotations

import ast
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

Value = str | int | float | bool | list
PROTOCOLS = ("temporal_ratio", "random_ratio", "leave_one_out", "global_temporal")
TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}


class ParameterError(ValueError):
    """A parameter that is unknown or has a wrong type or value, or a notebook that does not declare its parameters."""


def declared_parameters(notebook: str | Path) -> dict[str, Value]:
    """Names and defaults in the notebook's one cell tagged ``parameters``, read without executing it.

    Raises
    ------
    ParameterError
        The file is no notebook, has no kernelspec, not exactly one parameters cell, or a line in it that is not a plain
        literal: papermill would then run something else than what was asked for, without an error.
    """
    notebook = Path(notebook)
    try:
        content = json.loads(notebook.read_text(encoding="utf-8"))
        cells, metadata = content["cells"], content["metadata"]
    except (ValueError, KeyError, TypeError) as error:
        raise ParameterError(f"{notebook} is not a Jupyter notebook of format 4 ({error})") from None
    if not metadata.get("kernelspec", {}).get("name"):
        raise ParameterError(
            f"{notebook} has no kernelspec: open it once in Jupyter, choose the Python 3 kernel and save"
        )
    tagged = [cell for cell in cells if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if len(tagged) != 1:
        raise ParameterError(
            f"{notebook} has {len(tagged)} cells tagged 'parameters'; exactly one must hold all defaults"
        )
    return literals("".join(tagged[0]["source"]), f"{notebook}, parameters cell")


def literals(source: str, where: str) -> dict[str, Value]:
    """Values of the one-line assignments ``name = literal`` in `source`; anything else is an error naming the line."""
    try:
        lines = ast.parse(source).body
    except SyntaxError as error:
        raise ParameterError(f"{where}, line {error.lineno}: {error.msg}") from None
    values: dict[str, Value] = {}
    for line in lines:
        try:
            if not (isinstance(line, ast.Assign) and len(line.targets) == 1 and isinstance(line.targets[0], ast.Name)):
                raise ValueError
            value = ast.literal_eval(line.value)
            if type(value) not in TYPES or line.end_lineno != line.lineno:
                raise ValueError
        except ValueError:
            raise ParameterError(
                f"{where}, line {line.lineno}: {ast.unparse(line)!r} must be one line `name = value` without "
                "annotation, the value a literal text, number, True, False or list"
            ) from None
        if line.targets[0].id in values:
            raise ParameterError(f"{where}, line {line.lineno}: {line.targets[0].id!r} is set twice")
        values[line.targets[0].id] = value
    return values


def check_parameters(notebook: str | Path, given: Mapping[str, Any]) -> dict[str, Value]:
    """Effective parameters of a notebook: its defaults, replaced by the given values.

    Parameters
    ----------
    notebook : path
    given : dict
        Values of the declared type; a whole number may stand for a float, and text is read as the declared type ("3",
        "0.5", "true", "[1, 2]"), since that is all a command line has.

    Raises
    ------
    ParameterError
        Names the parameter, what was expected, what was given, and the parameters that there are.
    """
    declared = declared_parameters(notebook)
    if unknown := [name for name in given if name not in declared]:
        raise unknown_parameter(unknown[0], declared, Path(notebook).stem)
    where = f"{Path(notebook).stem}: "
    effective = declared | {name: convert(name, value, declared[name], where) for name, value in given.items()}
    check_values(effective, where)
    return effective


def unknown_parameter(name: str, known: Mapping[str, Value], where: str) -> ParameterError:
    """The error for a name that no chapter in `where` declares: it lists the known ones and the nearest."""
    close = difflib.get_close_matches(name, known, n=1)
    return ParameterError(
        f"unknown parameter {name!r} for {where}"
        + (f"; did you mean {close[0]!r}?" if close else "")
        + "\nknown parameters: "
        + ", ".join(f"{parameter} = {default!r}" for parameter, default in known.items())
    )


def convert(name: str, value: Any, default: Value, where: str = "", text: bool = True) -> Value:
    """Bring `value` to the type of `default`, or raise ParameterError; text is read as that type only if `text`."""
    kind = type(default)
    if kind not in TYPES:
        raise ParameterError(f"{where}parameter {name!r} must be text, a number, True, False or a list, got {value!r}")
    parsed = value
    if text and isinstance(value, str) and kind is not str:
        try:
            parsed = json.loads(value.lower() if kind is bool else value)
        except ValueError:
            parsed = value
    if kind is float and type(parsed) is int:
        parsed = float(parsed)
    elements = {type(element) for element in default} if kind is list else set()
    if type(parsed) is not kind or (len(elements) == 1 and not {type(element) for element in parsed} <= elements):
        expected = TYPES[kind] + (f" of {next(iter(elements)).__name__} values" if len(elements) == 1 else "")
        raise ParameterError(
            f"{where}parameter {name!r} must be {expected} (default {default!r}), "
            f"got {value!r} ({type(value).__name__})"
        )
    return parsed


def check_values(parameters: Mapping[str, Any], where: str = "") -> None:
    """Check the values that mean the same in every chapter: protocol, seeds, max_users, dataset.

    Raises
    ------
    ParameterError
        Names the parameter and what is allowed.
    """
    for protocol in [parameters.get("protocol", PROTOCOLS[0]), *parameters.get("protocols", [])]:
        if protocol not in PROTOCOLS:
            raise ParameterError(f"{where}protocol {protocol!r} is not one of {', '.join(PROTOCOLS)}")
    for name, least in (("seeds", 1), ("max_users", 0)):
        if parameters.get(name, least) < least:
            raise ParameterError(f"{where}parameter {name!r} must be at least {least}, got {parameters[name]}")
    dataset = parameters.get("dataset", "name")
    if not dataset or Path(dataset).name != dataset:
        raise ParameterError(f"{where}dataset {dataset!r} must be a name; say where it lies with data_dir")


def profile_values(profiles: Path, profile: str, known: Mapping[str, Mapping[str, Value]]) -> dict[str, dict[str, Any]]:
    """What a profile sets for each chapter: its ``all`` values where a chapter declares them, then the chapter's own.

    Parameters
    ----------
    profiles : Path to profiles.yaml, ``profile: {all: {name: value}, chapter: {name: value}}``
    profile : str
    known : chapter -> its declared parameters, for every chapter there is, so that a misspelt entry is found.
    """
    content = yaml.safe_load(profiles.read_text(encoding="utf-8")) or {}
    if profile not in content:
        raise ParameterError(f"unknown profile {profile!r}; {profiles} has {', '.join(content)}")
    sections = {name: values or {} for name, values in (content[profile] or {}).items()}
    everywhere = sections.pop("all", {})
    union = {name: value for declared in known.values() for name, value in declared.items()}
    for name in everywhere:
        if name not in union:
            raise unknown_parameter(name, union, f"all chapters (profile {profile!r} in {profiles})")
    for chapter, values in sections.items():
        if chapter not in known:
            raise ParameterError(f"{profiles}, profile {profile!r}: there is no chapter {chapter!r}")
        for name in values:
            if name not in known[chapter]:
                raise unknown_parameter(name, known[chapter], f"{chapter} (profile {profile!r} in {profiles})")
    return {
        chapter: {name: value for name, value in everywhere.items() if name in declared} | sections.get(chapter, {})
        for chapter, declared in known.items()
    }
