"""Command ``python -m skcifar reproduce``: the systems of five course reports."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator, Mapping
from functools import partial
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
    add("--rows", action="append", metavar="NAME", help=_ROWS_HELP)
    add("--quick", action="store_true", help="few images and epochs: shows that it runs, no more")
    add("--data-home", metavar="DIR", help="where data are kept; default: scikit-learn's data home")
    add("--device", default="auto", metavar="D", help="auto, cpu, cuda, cuda:1; default: auto")
    add("--seed", type=integer_from(0, 2**32 - 1), default=0, metavar="S", help="default: 0")
    add("--output", type=Path, metavar="DIR", help="write ID.json (ID.quick.json) and pictures")
    add("--quiet", action="store_true", help="no progress on stderr")


_ROWS_HELP = f'run only rows whose names begin so, such as "{REPORT}" or "{OURS}"; may be repeated'


def run(arguments: argparse.Namespace) -> int:
    if arguments.list:
        print(_listed())
        return 0
    if arguments.table:
        if arguments.output is None:
            raise UsageError("argument --table: name the folder of the records with --output")
        if not arguments.output.is_dir():
            raise UsageError(f"argument --output: there is no folder {arguments.output}")
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
            not_run[name] = f"it has no rows that begin so, only {list(SYSTEMS[name].rows)}"
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
                keep=None if folder is None else partial(_write, folder),
            )
        except UsageError:
            raise
        except Exception as error:  # of one system, which costs the others nothing
            not_run[name] = f"{type(error).__name__}: {error}"
            # data or weights that cannot be had are no fault of the system's
            failed = failed or not isinstance(error, OSError)
            continue
        print("\n".join(_described(record)), flush=True)
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


def _rows(name: str, beginnings: list[str] | None) -> list[str]:
    rows = SYSTEMS[name].rows
    return [row for row in rows if beginnings is None or row.startswith(tuple(beginnings))]


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
    if "accuracy" in name:
        return f"{value:.2%}"
    return f"{value:,.0f}" if "images" in name else f"{value:.4g}"


# -- records as files ------------------------------------------------------------------------------


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    """Put a record's rows into its file, beside those of earlier runs that it has not."""
    name = record["id"]
    path = folder / f"{name}{'.quick' if record['quick'] else ''}.json"
    rows = {row["name"]: row for row in record["rows"]}
    if path.exists():
        earlier = _read(path)
        if earlier["provenance"]["data"]["sha256"] != record["provenance"]["data"]["sha256"]:
            raise UsageError(f"{path} is of other images: name another --output, or remove it")
        rows = {row["name"]: row for row in earlier["rows"]} | rows
    if not record["rows"]:  # nothing is run yet: it was only to be seen that it can be written
        return
    order = [row for row in SYSTEMS[name].rows if row in rows]
    merged = dict(record, rows=[rows[row] for row in order])
    merged["pictures"] = [file for row in merged["rows"] for file in row["pictures"]]
    text = json.dumps(merged, indent=1, ensure_ascii=False)
    try:
        with replacing(path) as partial_file:
            partial_file.write_text(text + "\n", encoding="utf-8")
    except OSError as error:  # not to be taken for data that are missing
        raise UsageError(f"cannot write {path}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["provenance"]["data"]["sha256"], [row["pictures"] for row in record["rows"]]
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{path} is no record ({error!r}): remove it or mend it") from error
    return record


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
        of_report = [row for row in system.rows if row.startswith(REPORT)]
        ours = [row for row in system.rows if not row.startswith(REPORT)]
        cells = [_cells(system.headline, record, rows) for rows in (of_report, ours)]
        lines.append(
            f"| {name}: {system.title} | {data} | {system.reported}{minutes} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines)


def _record_of(name: str, folder: Path) -> dict[str, Any] | None:
    paths = [folder / f"{name}.json", folder / f"{name}.quick.json"]
    return next((_read(path) for path in paths if path.exists()), None)


def _cells(headline: str, record: Mapping[str, Any] | None, names: list[str]) -> str:
    return "; ".join(_cell(headline, record, name) for name in names)


def _cell(headline: str, record: Mapping[str, Any] | None, name: str) -> str:
    """A row's headline figure and its seconds, behind what sets the row apart, if anything."""
    apart = name.removeprefix(REPORT).removeprefix(OURS).lstrip(", ")
    apart = f"{apart}: " if apart else ""
    rows = [] if record is None else [row for row in record["rows"] if row["name"] == name]
    if not rows:
        return f"{apart}not yet run"
    assert record is not None
    row = rows[0]
    if headline in row["figures"]:
        text = _named_figure(headline, row["figures"][headline])
    elif row["pictures"]:
        text = "picture"
    else:
        text = _named_figure(*next(iter(row["figures"].items())))
    text += f", {row['seconds']:.0f} s" if row["seconds"] >= 1 else ", under 1 s"
    return f"{apart}{text}{' (scaled down)' if record['quick'] else ''}"


def _named_figure(name: str, value: float) -> str:
    text = f"{value:.2%}" if "accuracy" in name else f"{value:.3g}"
    return text if name == "test accuracy" else f"{name}: {text}"
