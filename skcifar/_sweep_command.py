"""Command ``python -m skcifar sweep``: all settings of one classifier, trained together."""

from __future__ import annotations

import argparse
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import FitFailedWarning
from sklearn.model_selection import ParameterGrid, StratifiedKFold, StratifiedShuffleSplit

from skcifar._base import TorchEstimator
from skcifar._command_line import (
    DATA,
    MODELS,
    Images,
    Splits,
    UsageError,
    add_data_options,
    announce,
    check_device,
    check_folds,
    check_writable,
    configured,
    integer_from,
    read_splits,
    write_provenance,
)
from skcifar._grid_argument import Grid, check_values, parse_grid, with_full_names
from skcifar._sweep_results import format_table, partial_table, results_table, write_results
from skcifar.model_selection import BatchedGridSearchCV, BatchedHalvingSearchCV

PLAN_LINES = 12
LINE_SECONDS = 10.0  # between two lines of progress where they stay
REDRAW_SECONDS = 0.1  # between two where one takes the place of the other


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Cross-validate all settings of a grid, the fits of one architecture trained as one "
        "program, and print the best. Where there is a test split (of mnist, cifar10 and folders "
        "with train and test) the training split is cross-validated; then the best setting is "
        "fitted to all of it and scored on the test split."
    )
    parser.epilog = (
        'example: skcifar sweep --data mnist --model mlp --grid "learning_rate_init=0.01,0.001 '
        'hidden_layer_sizes=20,(256,128)" --set "solver=sgd max_iter=50" --journal sweep.jsonl'
    )
    add_data_options(parser)
    add = parser.add_argument
    add("--model", choices=list(MODELS), default="mlp", metavar="M", help=_MODEL_HELP)
    several: dict[str, Any] = {"nargs": "+", "action": "extend"}  # quoted or not
    add("--grid", required=True, metavar="NAME=A,B", help=_GRID_HELP, **several)
    add("--set", metavar="NAME=A", help="parameters that all candidates share", **several)
    add("--classes", metavar="A,B,...", help=_CLASSES_HELP)
    add("--cv", type=_folds, default=3, metavar="K", help=_CV_HELP)
    add("--repeats", type=integer_from(1), default=1, metavar="R", help="seeds per candidate")
    add("--halving", action="store_true", help=_HALVING_HELP)
    add("--journal", type=Path, metavar="FILE", help=_JOURNAL_HELP)
    add("--top", type=integer_from(1), default=5, metavar="N", help="rows to print; default: 5")
    add("--output", type=Path, metavar="DIR", help=_OUTPUT_HELP)
    add("--dry-run", action="store_true", help="print the plan, and train nothing")
    add("--quiet", action="store_true", help="no plan and no progress on stderr")


_MODEL_HELP = f"one of {', '.join(MODELS)}; default: mlp"
_GRID_HELP = (
    "parameters and the values to try, in all combinations; numbers, True, None and (tuples) are "
    "read as in Python, other values as text"
)
_CV_HELP = "stratified folds, or below 1 the share that one stratified split holds out; default: 3"
_CLASSES_HELP = "only images of these classes, by code or name; of a folder by name"
_HALVING_HELP = (
    "successive halving: a third of the candidates goes on after each round, with three times the "
    "epochs, up to max_iter; survivors are not trained anew"
)
_JOURNAL_HELP = "keep finished fits in FILE; the same command goes on from there"
_OUTPUT_HELP = (
    "write table.csv, epochs.csv, provenance.json and, with matplotlib, learning_curves.png to DIR"
)


def _folds(text: str) -> int | float:
    try:
        share = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if 0 < share < 1:
        return share
    if share < 2 or share != int(share):
        raise argparse.ArgumentTypeError(
            f"{text} is neither a number of folds from 2 nor a share between 0 and 1"
        )
    return int(share)


def run(arguments: argparse.Namespace) -> int:
    tell = (lambda text: None) if arguments.quiet else announce
    estimator, grid = _candidates(arguments)
    if arguments.output is not None:
        check_writable(arguments.output)
    if arguments.journal is not None and not arguments.journal.parent.is_dir():
        raise UsageError(f"argument --journal: there is no folder {arguments.journal.parent}")

    tell(f"reading {arguments.data}")
    splits = read_splits(arguments, _classes(arguments.classes))
    train = splits.train
    search = _search(arguments, estimator, grid, train.y)
    if arguments.dry_run:
        print("\n".join(_described(search.plan(*train))))
        return 0
    if not arguments.quiet:
        for line in _described(search.plan(*train)):
            announce(line)
    title = _title(arguments, splits, len(ParameterGrid(grid)))
    watch = _Watch(search, None if arguments.quiet else sys.stderr)
    try:
        with watch.during():
            search.fit(*train)
    except KeyboardInterrupt:
        _print_partial(search, watch, title, arguments)
        announce(f"{watch.n_done} of {watch.n_fits} fits are done; {_how_to_go_on(arguments)}")
        raise
    except (ValueError, RuntimeError, OSError) as error:
        if not watch.all_failed():
            raise UsageError(str(error)) from error
        _print_partial(search, watch, title, arguments)
        return 1

    table = results_table(search, watch.errors())
    print(f"{title}\n\n{format_table(table, arguments.top)}", flush=True)
    if arguments.output is not None:
        try:
            write_results(table, search.epoch_results_, arguments.output, title, tell)
            parameters = table.attrs["parameters"]
            write_provenance(arguments, "sweep", title, splits, parameters=parameters)
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot write the results: {error}") from error
    if table["score_mean"].isna().all():
        return 1
    if splits.held_out is not None:
        tell(f"fitting the best to all {len(train.y):,} training images")
        print(f"\n{_on_test_split(search, splits, splits.held_out)}")
    return 0


# -- what is searched ------------------------------------------------------------------------------


def _candidates(arguments: argparse.Namespace) -> tuple[BaseEstimator, Grid]:
    """The estimator with what --set says, and the grid by its names of parameters; both checked."""
    check_device(arguments.device)
    estimator = configured(MODELS[arguments.model](arguments.device), arguments)
    with _naming("--set"):
        given: Grid = {} if arguments.set is None else parse_grid(" ".join(arguments.set))
        shared = with_full_names(given, estimator, arguments.model)
        for name, values in shared.items():
            if len(values) > 1:
                raise UsageError(f"{name} has {len(values)} values, which belong in --grid")
        setting = {name: values[0] for name, values in shared.items()}
        check_values(estimator, [setting])
        estimator.set_params(**setting)
    with _naming("--grid"):
        grid = with_full_names(parse_grid(" ".join(arguments.grid)), estimator, arguments.model)
        for name in grid:
            if name in shared:
                raise UsageError(f"{name} is given by --set, too")
        check_values(estimator, ParameterGrid(grid))
    return estimator, grid


@contextmanager
def _naming(argument: str) -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        raise UsageError(f"argument {argument}: {error}") from error


def _classes(text: str | None) -> list[int | str] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if len(set(names)) < max(2, len(names)):
        raise UsageError(
            f"argument --classes: {text!r} does not name two or more different classes"
        )
    return [int(name) if name.isdecimal() else name for name in names]


def _search(
    arguments: argparse.Namespace, estimator: BaseEstimator, grid: Grid, y: NDArray[Any]
) -> Any:
    options: dict[str, Any] = {
        "cv": _splitter(arguments, y),
        "journal": arguments.journal,
        "n_repeats": arguments.repeats,
        "refit": False,
        "return_train_score": False,
        # of a Pipeline, whose first steps change the rows, there are no such scores
        "validate_epochs": isinstance(estimator, TorchEstimator),
    }
    if not arguments.halving:
        return BatchedGridSearchCV(estimator, grid, **options)
    epochs = [name for name in estimator.get_params() if name.rpartition("__")[2] == "max_iter"]
    if not epochs:
        raise UsageError(f"argument --halving: {arguments.model} has no epochs (max_iter)")
    resource = "max_iter" if "max_iter" in epochs else epochs[-1]
    if resource in grid:
        raise UsageError(
            f"argument --halving: it hands out {resource}, which is in --grid; give the most "
            f"that a candidate may have as --set {resource}=N"
        )
    return BatchedHalvingSearchCV(estimator, grid, resource=resource, **options)


def _splitter(
    arguments: argparse.Namespace, y: NDArray[Any]
) -> StratifiedKFold | StratifiedShuffleSplit:
    if isinstance(arguments.cv, int):
        check_folds(y, arguments.cv)
        return StratifiedKFold(arguments.cv)
    cv = StratifiedShuffleSplit(1, test_size=arguments.cv, random_state=arguments.seed)
    try:
        next(cv.split(y, y))
    except ValueError as error:
        raise UsageError(f"argument --cv: {arguments.cv} of {len(y):,} images: {error}") from error
    return cv


def _title(arguments: argparse.Namespace, data: Splits, n_candidates: int) -> str:
    train = data.train
    splits = f"{arguments.cv} folds" if arguments.cv > 1 else f"{arguments.cv:.0%} held out"
    repeats = f", {arguments.repeats} seeds from {arguments.seed}"
    return (
        f"{data.name}: {len(train.y):,} images of {len(np.unique(train.y))} classes, {splits}"
        f"{repeats if arguments.repeats > 1 else f', seed {arguments.seed}'}; "
        f"{arguments.model}, {n_candidates:,} candidate{'s' if n_candidates > 1 else ''}"
    )


# -- the plan --------------------------------------------------------------------------------------


def _described(plan: pd.DataFrame) -> list[str]:
    """The plan in lines: all of it, then each kind of group."""
    seconds, size = plan.attrs["total_seconds"], plan.attrs["total_bytes"]
    total = f"{plan['models'].sum():,} fits in {len(plan):,} group{'s' if len(plan) > 1 else ''}"
    if plan["seconds"].notna().any():
        total += f", about {_duration(seconds)} of training, {max(size / 2**20, 1):,.0f} MiB"
    if plan["seconds"].isna().any():
        total += f"; no estimate for {plan.loc[plan['seconds'].isna(), 'models'].sum():,} of them"
    kinds = Counter(_group(row) for row in plan.to_dict("records"))
    lines = [
        f"  {f'{n} groups of ' if n > 1 else ''}{text}"
        for text, n in list(kinds.items())[:PLAN_LINES]
    ]
    if len(kinds) > PLAN_LINES:
        lines.append(f"  and {len(kinds) - PLAN_LINES} more kinds of groups")
    return [f"plan: {total}", *lines]


def _group(row: dict[Any, Any]) -> str:
    described = [f"{row['models']} × {row['estimator']}"]
    if isinstance(row["widths"], str):
        widths = row["widths"].split("; ")
        described[0] += " " + "; ".join(widths[:3]) + ("; …" if len(widths) > 3 else "")
    if not pd.isna(row["batch_size"]):
        described.append(f"batches of {row['batch_size']:.0f}")
    if not pd.isna(row["epochs"]):
        described.append(f"{row['epochs']:.0f} epochs")
    if not pd.isna(row["seconds"]):
        described.append(_duration(row["seconds"]))
    if isinstance(row["reason"], str):
        described.append(f"each by itself: {row['reason']}")
    return ", ".join(described)


def _duration(seconds: float) -> str:
    if seconds < 1:
        return "1 s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


# -- progress --------------------------------------------------------------------------------------


class _Watch:
    """Hears of every epoch and fit of a search; shows them on `stream`, if there is one."""

    def __init__(self, search: Any, stream: TextIO | None) -> None:
        self.search = search
        self.stream = stream
        self.rewrites = stream is not None and stream.isatty()
        self.n_done = self.n_fits = 0
        self.results: dict[Any, dict] = {}  # of each finished fit, by its place
        self.n_epochs = self.n_known_epochs = 0
        self.shown_at = -np.inf if self.rewrites else 0.0
        self.on_screen = 0  # characters of the line that the next one takes the place of

    @contextmanager
    def during(self) -> Iterator[None]:
        # a function, for a search copies what it is given, and streams cannot be copied
        self.search.set_params(progress=lambda event: self._hear(event))
        show = warnings.showwarning
        shown: set[tuple[str, type[Warning]]] = set()

        def show_once(message: Any, category: type[Warning], *where: Any, **options: Any) -> None:
            if (str(message), category) not in shown:
                shown.add((str(message), category))
                self._end_line()
                show(message, category, *where, **options)

        with warnings.catch_warnings():
            # the table says which candidates failed, and why
            warnings.simplefilter("ignore", FitFailedWarning)
            warnings.filterwarnings("ignore", "One or more of the test scores are non-finite")
            warnings.showwarning = show_once
            try:
                yield
            finally:
                self._end_line()

    def errors(self) -> dict[int, str]:
        """The first error of each candidate with a failed fit."""
        failed = {place: r["fit_error"] for place, r in self.results.items() if r["fit_error"]}
        return {place.candidate: _last_words(failed[place]) for place in reversed(failed)}

    def all_failed(self) -> bool:
        return bool(self.results) and all(each["fit_error"] for each in self.results.values())

    def _hear(self, event: dict[str, Any]) -> None:
        # What scikit-learn tells in a warning only, the study of our own search knows by fit.
        self.results = self.search._study.values
        self.n_done, self.n_fits = event["done_fits"], event["total_fits"]
        if event["done_epochs"] > self.n_epochs + 1:  # of a fit in the journal, taking no time
            self.n_known_epochs += event["done_epochs"] - self.n_epochs
        self.n_epochs = event["done_epochs"]
        pause = REDRAW_SECONDS if self.rewrites else LINE_SECONDS
        is_last = self.n_done == self.n_fits and self.rewrites
        if event["seconds"] - self.shown_at >= pause or is_last:
            self.shown_at = event["seconds"]
            self._show(self._line(event))

    def _line(self, event: dict[str, Any]) -> str:
        text = f"{self.n_done:,}/{self.n_fits:,} fits"
        done, left = self.n_epochs - self.n_known_epochs, event["expected_epochs"] - self.n_epochs
        if event["expected_epochs"]:
            text += f", {self.n_epochs:,}/{event['expected_epochs']:,} epochs"
        else:
            done, left = self.n_done, self.n_fits - self.n_done
        if event["best_score"] is not None:
            text += f", best so far {event['best_score']:.4f}"
        if done and left:
            text += f", about {_duration(event['seconds'] / done * left)} left"
        return text

    def _show(self, line: str) -> None:
        if self.stream is None:
            return
        if not self.rewrites:
            print(f"skcifar: {line}", file=self.stream, flush=True)
            return
        line = f"skcifar: {line}"[: shutil.get_terminal_size().columns - 1]
        print(f"\r{line:{self.on_screen}}", end="", file=self.stream, flush=True)
        self.on_screen = len(line)

    def _end_line(self) -> None:
        if self.on_screen:
            print(file=self.stream, flush=True)
            self.on_screen = 0


def _last_words(traceback: str) -> str:
    """The error at the end of a traceback, behind its last indented line."""
    lines = traceback.rstrip().splitlines()
    last_call = max((i for i, line in enumerate(lines) if line.startswith("  ")), default=-1)
    return " ".join(lines[last_call + 1 :])


# -- what came of it -------------------------------------------------------------------------------


def _print_partial(search: Any, watch: _Watch, title: str, arguments: argparse.Namespace) -> None:
    finished = getattr(search, "partial_results_", pd.DataFrame())
    if finished.empty:
        return
    n_splits = search.cv.get_n_splits() * arguments.repeats
    table = partial_table(search, n_splits, watch.errors())
    print(f"{title}\n\n{format_table(table, arguments.top)}", flush=True)


def _how_to_go_on(arguments: argparse.Namespace) -> str:
    if arguments.journal is None:
        return "with --journal FILE a sweep can go on from there"
    return f"the same command goes on from there, which {arguments.journal} keeps"


def _on_test_split(search: Any, splits: Splits, held_out: Images) -> str:
    """The accuracies of the best candidate, fitted to all training rows."""
    official = "official test split" if splits.name in DATA else "test split"
    name = f"{official}, {len(held_out.y):,} images"
    best = clone(search.estimator).set_params(**search.best_params_)
    try:
        best.fit(*splits.train)
    except ValueError as error:
        return f"{name}: the best failed when fitted to all training images: {error}"
    right = best.predict(held_out.X) == held_out.y
    by_class = pd.Series(right).groupby(held_out.y).mean()
    by_class.index = [splits.class_names[code] for code in by_class.index]
    return (
        f"{name}: accuracy {right.mean():.4f}; best class {by_class.idxmax()} with "
        f"{by_class.max():.4f}, worst class {by_class.idxmin()} with {by_class.min():.4f}"
    )
