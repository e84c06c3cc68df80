"""Command ``python -m skcifar report``: one page about the results in a folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from skcifar._command_line import UsageError, announce, check_writable, replacing
from skcifar.report import write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write one HTML page about the results that compare, sweep and reproduce wrote to DIR or "
        "to folders below it. The page opens from disk and needs no network."
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="results, or a folder that holds some")
    add(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="the page to write; default: report.html in DIR",
    )
    add("--quiet", action="store_true", help="nothing on stderr")


def run(arguments: argparse.Namespace) -> int:
    folder = arguments.folder
    if not folder.is_dir():
        raise UsageError(f"argument DIR: there is no folder {folder}")
    output = arguments.output or folder / "report.html"
    if output.is_dir():
        raise UsageError(f"argument --output: {output} is a folder; name the page, a file in it")
    check_writable(output.parent)
    try:
        with replacing(output) as partial:
            write_report(folder, partial)
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(str(error)) from error
    if not arguments.quiet:
        announce(f"wrote {output}")
    return 0
