"""Command line: ``python -m skcifar compare``, ``sweep``, ``reproduce``, ``report``, ``fetch``."""

from __future__ import annotations

import argparse
import sys
import textwrap
import warnings
from collections.abc import Sequence
from typing import NoReturn, TextIO

import numpy as np
from sklearn.datasets import get_data_home

from skcifar import _compare_command, _report_command, _reproduce_command, _sweep_command
from skcifar._command_line import FETCHERS, UsageError, announce, read


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, default=None
        The arguments after the program's name; None takes them from ``sys.argv``.

    Returns
    -------
    status : int
        0, or 1 if every model or candidate failed, 2 for wrong arguments or missing data, 130
        after Ctrl-C.

    Raises
    ------
    SystemExit
        With status 2 for arguments that cannot be parsed, and with 0 after ``--help``.

    Examples
    --------
    >>> from skcifar.__main__ import main
    >>> main(["compare", "--models", "dummy", "--quiet"])
    digits: 1,797 images of 10 classes, 5 folds, seed 0
    <BLANKLINE>
    model  cv accuracy      difference, 95% interval   train  test  fit s  predict s  epochs
    dummy  0.1013 ± 0.0015  best                      0.1018     -   ...
    0
    >>> main(["sweep", "--model", "dummy", "--grid", "strategy=uniform,prior", "--quiet"])
    digits: 1,797 images of 10 classes, 3 folds, seed 0; dummy, 2 candidates
    <BLANKLINE>
    rank  strategy  accuracy         difference  fit s
       1  uniform   0.1057 ± 0.0075        best   ...
       2  prior     0.1013 ± 0.0008   ~ -0.0045   ...
    ~ within chance of the best (corrected resampled t-test, 5%)
    0
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(argv, argparse.Namespace(argv=argv))
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning_on_one_line
        try:
            return arguments.run(arguments)
        except UsageError as error:
            print(f"skcifar: error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("skcifar: interrupted", file=sys.stderr)
            return 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"skcifar: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="skcifar", description="Small-image classifiers, compared and tuned.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    compare_parser = commands.add_parser(
        "compare", help="cross-validate several classifiers and print one table"
    )
    _compare_command.add_arguments(compare_parser)
    compare_parser.set_defaults(run=_compare_command.run)

    sweep_parser = commands.add_parser(
        "sweep", help="try all settings of one classifier, trained together, and print the best"
    )
    _sweep_command.add_arguments(sweep_parser)
    sweep_parser.set_defaults(run=_sweep_command.run)

    reproduce_parser = commands.add_parser(
        "reproduce", help="run the systems of five course reports beside the reports' figures"
    )
    _reproduce_command.add_arguments(reproduce_parser)
    reproduce_parser.set_defaults(run=_reproduce_command.run)

    report_parser = commands.add_parser(
        "report", help="make a page of what compare, sweep and reproduce have written"
    )
    _report_command.add_arguments(report_parser)
    report_parser.set_defaults(run=_report_command.run)

    fetch_parser = commands.add_parser("fetch", help="download a data set and check its files")
    fetch_parser.add_argument("name", choices=list(FETCHERS), metavar="NAME", help="mnist, cifar10")
    fetch_parser.add_argument("--data-home", metavar="DIR", help="where to keep it")
    fetch_parser.set_defaults(run=_fetch)
    return parser


def _fetch(arguments: argparse.Namespace) -> int:
    announce(f"reading {arguments.name}, downloading what is missing")
    y = read(arguments.name, arguments.data_home, "all", verbose=True).y
    home = get_data_home(arguments.data_home)
    print(f"{arguments.name}: {len(y):,} images of {len(np.unique(y))} classes in {home}")
    return 0


def _show_warning_on_one_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    text = textwrap.shorten(str(message), 300)
    print(f"skcifar: warning: {category.__name__}: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
