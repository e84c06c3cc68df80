"""Command ``python -m skcifar reproduce``: the systems of five course reports."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sklearn.callback import ProgressBar

from skcifar._command_line import (
    TABLE_WIDTH,
    UsageError,
    announce,
    check_device,
    check_writable,
    has_matplotlib,
    integer_from,
    replacing,
)
from skcifar.reproduce import OURS, REPORT, SYSTEMS, reproduce

ROWS = {"report": REPORT, "ours": OURS}
DATA_NAMES = {"cifar10": "CIFAR-10", "mnist": "MNIST"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run systems of five course reports and print the reports' figures beside ours: as the "
        "report describes them, and as skcifar would build the same architecture."
    )
    parser.epilog = "example: skcifar reproduce 003-mlp 002-linear --output reproduced"
    add = parser.add_argument
    add("ids", nargs="*", metavar="ID", help="such as 003-mlp; --list shows them")
    add("--all", action="store_true", help="run every system")
    add("--list", action="store_true", help="print the systems, and run nothing")
    add("--table", action="store_true", help="print the records in --output as Markdown")
    add("--rows", choices=list(ROWS), help="run only what the report describes, or only ours")
    add("--quick", action="store_true", help="few images and epochs: shows that it runs, no more")
    add("--data-home", metavar="DIR", help="where data are kept; default: scikit-learn's data home")
    add("--device", default="auto", metavar="D", help="auto, cpu, cuda, cuda:1; default: auto")
    add("--seed", type=integer_from(0, 2**32 - 1), default=0, metavar="S", help="default: 0")
    add("--output", type=Path, metavar="DIR", help="write ID.json (ID.quick.json) and pictures")
    add("--quiet", action="store_true", help="no progress on stderr")


def run(arguments: argparse.Namespace) -> int:
    if arguments.list:
        print(_listed())
        return 0
    if arguments.table:
        if arguments.output is None:
            raise UsageError("argument --table: name the folder of the records with --output")
        print(markdown_table(arguments.output))
        return 0
    tell = (lambda text: None) if arguments.quiet else announce
    names = _names(arguments)
    check_device(arguments.device)
    folder = arguments.output
    if folder is not None:
        check_writable(folder)
        if not has_matplotlib():
            tell("no pictures: install matplotlib (pip install 'skcifar[plot]')")
    not_run: dict[str, str] = {}
    failed = False
    for position, name in enumerate(names, start=1):
        tell(f"[{position}/{len(names)}] {name}: {SYSTEMS[name].title}")
        rows = _rows(name, arguments.rows)
        if not rows:
            not_run[name] = f'it has no row "{ROWS[arguments.rows]}"'
            continue
        try:
            record = reproduce(
                name,
                rows=rows,
                quick=arguments.quick,
                data_home=arguments.data_home,
                device=arguments.device,
                seed=arguments.seed,
                folder=folder if has_matplotlib() else None,
                progress=lambda row: tell(f"  {row}"),
                callbacks=[] if arguments.quiet else _progress_bars(),
            )
        except OSError as error:  # data or weights that cannot be had
            not_run[name] = str(error)
            continue
        except (ValueError, RuntimeError) as error:
            not_run[name] = f"{type(error).__name__}: {error}"
            failed = True
            continue
        print("\n".join(_described(record)), flush=True)
        if folder is not None:
            _write(record, folder)
    for name, why in not_run.items():
        print(textwrap.shorten(f"{name}: not run: {why}", 3 * TABLE_WIDTH))
    return 1 if failed or len(not_run) == len(names) else 0


def _progress_bars() -> list[Any]:
    """Of epochs and candidates, on a terminal, where rich is installed."""
    if not sys.stdout.isatty():
        return []
    try:
        return [ProgressBar()]
    except ImportError:
        return []


def _names(arguments: argparse.Namespace) -> list[str]:
    if arguments.all == bool(arguments.ids):
        raise UsageError("name systems or give --all, one of the two; --list shows the systems")
    for name in arguments.ids:
        if name not in SYSTEMS:
            raise UsageError(f"there is no system {name!r}; choose from {', '.join(SYSTEMS)}")
    return list(SYSTEMS) if arguments.all else list(dict.fromkeys(arguments.ids))


def _rows(name: str, kind: str | None) -> list[str]:
    rows = SYSTEMS[name].rows
    return list(rows) if kind is None else [row for row in rows if row == ROWS[kind]]


def _listed() -> str:
    return "\n".join(
        f"{name:16} {DATA_NAMES[system.data]:9} {system.title}\n{'':26} {system.reported}"
        for name, system in SYSTEMS.items()
    )


# -- a record as text ------------------------------------------------------------------------------


def _described(record: Mapping[str, Any]) -> Iterator[str]:
    data = record["provenance"]["data"]
    minutes = record["reported_minutes"]
    yield f"\n{record['id']}  {record['title']}"
    yield f"  {DATA_NAMES[data['name']]}, {data['variant']}; " + (
        f"the report: {record['reported']}" + (f", {minutes:g} minutes" if minutes else "")
    )
    for row in record["rows"]:
        scaled = f", scaled down to {row['scaled']}" if row["scaled"] else ""
        yield f"  {row['name']}: {row['seconds']:.1f} s{scaled}"
        for name, figure in row["figures"].items():
            reported = row["reported_figures"].get(name)
            beside = "" if reported is None else f"   report {_figure(name, reported)}"
            yield f"    {name:44} {_figure(name, figure):>9}{beside}"
        if row["note"]:
            yield textwrap.fill(
                row["note"], TABLE_WIDTH, initial_indent="    ", subsequent_indent="    "
            )
    if record["note"]:
        yield textwrap.fill(
            record["note"], TABLE_WIDTH, initial_indent="  ", subsequent_indent="  "
        )


def _figure(name: str, value: float) -> str:
    return f"{value:.2%}" if "accuracy" in name else f"{value:.4g}"


# -- records as files ------------------------------------------------------------------------------


def _write(record: dict[str, Any], folder: Path) -> None:
    """Put the rows into the system's record, beside those that were not run again."""
    name = record["id"]
    path = folder / f"{name}{'.quick' if record['quick'] else ''}.json"
    if path.exists():
        run_again = {row["name"] for row in record["rows"]}
        kept = [row for row in _read(path)["rows"] if row["name"] not in run_again]
        order = list(SYSTEMS[name].rows)
        rows = [row for row in record["rows"] + kept if row["name"] in order]
        record["rows"] = sorted(rows, key=lambda row: order.index(row["name"]))
        record["pictures"] = [file for row in record["rows"] for file in row["pictures"]]
    with replacing(path) as partial:
        partial.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"{path} is no record: {error}; remove it") from error


def markdown_table(folder: Path) -> str:
    """Every system, with what the records in a folder say of it."""
    lines = [
        "| system | data | the report | as in the report | as skcifar would do it |",
        "|---|---|---|---|---|",
    ]
    for name, system in SYSTEMS.items():
        record = _record_of(name, folder)
        data = DATA_NAMES[system.data]
        if record is not None and record["provenance"]["data"]["variant"] == "recoded as JPEG":
            data += " (JPEG)"
        minutes = f", {system.minutes:g} min" if system.minutes else ""
        cells = [_cell(name, record, row) for row in (REPORT, OURS)]
        lines.append(
            f"| {name}: {system.title} | {data} | {system.reported}{minutes} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines)


def _record_of(name: str, folder: Path) -> dict[str, Any] | None:
    paths = [folder / f"{name}.json", folder / f"{name}.quick.json"]
    return next((_read(path) for path in paths if path.exists()), None)


def _cell(name: str, record: Mapping[str, Any] | None, row_name: str) -> str:
    if row_name not in SYSTEMS[name].rows:
        return ""
    rows = [] if record is None else [row for row in record["rows"] if row["name"] == row_name]
    if not rows:
        return "not yet run"
    assert record is not None
    row = rows[0]
    figure = row["figures"].get(record["headline"])
    text = "picture" if figure is None else _figure(record["headline"], figure)
    text += f", {row['seconds']:.0f} s"
    return f"{text} (scaled down)" if record["quick"] else text
