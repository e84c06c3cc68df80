"""Grids of parameters as text: ``"alpha=0,0.1 hidden_layer_sizes=20,(256,128)"``."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sklearn.base import BaseEstimator, clone

from skcifar._base import hidden_widths
from skcifar._command_line import UsageError
from skcifar._supervised import SupervisedEstimator

Grid = dict[str, list[Any]]


def parse_grid(text: str) -> Grid:
    """Read what the user typed, names as they are.

    A value is a Python literal where it reads as one, else a string. What stands in brackets or
    quotes is not split.

    Raises
    ------
    UsageError
        If a name or a value is missing, or given twice.
    """
    grid: Grid = {}
    for assignment in filter(None, _split(text, str.isspace)):
        name, equals, listed = assignment.partition("=")
        if not (name and equals):
            raise UsageError(f"{assignment!r} is not of the form name=value,value,...")
        if name in grid:
            raise UsageError(f"{name} is given more than once: list all its values in one place")
        values = _split(listed, ",".__eq__)
        if "" in values:
            raise UsageError(f"{assignment!r} lacks a value: give {name}=value,value,...")
        grid[name] = []
        for value in map(_literal, values):
            # True is not 1 to an estimator
            if any(
                value == v and isinstance(value, bool) == isinstance(v, bool) for v in grid[name]
            ):
                raise UsageError(f"{name} has the value {value!r} more than once")
            grid[name].append(value)
    if not grid:
        raise UsageError("no parameter is given: write name=value,value,...")
    return grid


def _split(text: str, separates: Callable[[str], bool]) -> list[str]:
    """Cut at separators outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        if separates(character) and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    if depth or quote:
        raise UsageError(f"{text!r} has a bracket or a quote without its other half")
    return parts


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return float(text) if text in ("inf", "-inf") else text


def with_full_names(grid: Grid, estimator: BaseEstimator, model: str) -> Grid:
    """Name parameters as the estimator does: of a step whose parameter is like no other's, `alpha`
    is enough.

    Raises
    ------
    UsageError
        If there is no such parameter, or several are meant, or one is named twice.
    """
    named: Grid = {}
    for name, values in grid.items():
        full_name = _full_name(name, list(estimator.get_params()), model)
        if full_name in named:
            raise UsageError(f"{full_name} is given more than once")
        named[full_name] = values
    return named


def _full_name(name: str, known: list[str], model: str) -> str:
    if name in known:
        return name
    endings = [each for each in known if each.endswith(f"__{name}")]
    if len(endings) == 1:
        return endings[0]
    if endings:
        raise UsageError(f"{name!r} may be any of {', '.join(endings)} of {model}: say which")
    last_parts = {each.rpartition("__")[2]: each for each in known}
    close = difflib.get_close_matches(name, [*known, *(n for n in last_parts if n not in known)])
    remedy = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(known)}"
    raise UsageError(f"{model} has no parameter {name!r}; {remedy}")


def check_values(estimator: BaseEstimator, settings: Iterable[Mapping[str, Any]]) -> None:
    """Let the estimator refuse settings now, which otherwise it does when it is fitted.

    Raises
    ------
    UsageError
        With what the estimator says: the parameter, its value and what it takes.
    """
    for setting in settings:
        try:
            candidate = clone(estimator).set_params(**setting)
            for part in [candidate, *candidate.get_params().values()]:
                if isinstance(part, BaseEstimator):
                    part._validate_params()
                if isinstance(part, SupervisedEstimator):
                    part._check_parameters(incremental=False)
                    hidden_widths(getattr(part, "hidden_layer_sizes", ()))
        except (ValueError, TypeError, AttributeError) as error:
            raise UsageError(str(error)) from error
