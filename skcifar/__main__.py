"""Command line: ``python -m skcifar compare`` and ``python -m skcifar fetch``."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TextIO

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.datasets import get_data_home
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier as SklearnMLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import resample

from skcifar import (
    CNNClassifier,
    FineTunedClassifier,
    MLPClassifier,
    PretrainedFeatures,
    SoftmaxRegression,
    TripletEmbedder,
)
from skcifar._device import resolve_device
from skcifar.datasets import Subset, fetch_cifar10, fetch_mnist, load_digits
from skcifar.model_selection import compare

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _pretrained(backbone: str, device: str) -> BaseEstimator:
    return make_pipeline(
        PretrainedFeatures(backbone, device=device),
        StandardScaler(),
        MLPClassifier(device=device),
    )


MODELS: dict[str, Callable[[str], BaseEstimator]] = {
    "softmax": lambda device: SoftmaxRegression(device=device),
    "mlp": lambda device: MLPClassifier(device=device),
    "cnn": lambda device: CNNClassifier(device=device),
    "triplet": lambda device: make_pipeline(TripletEmbedder(device=device), KNeighborsClassifier()),
    "finetuned": lambda device: FineTunedClassifier(TripletEmbedder(device=device), device=device),
    "alexnet": partial(_pretrained, "alexnet"),
    "resnet18": partial(_pretrained, "resnet18"),
    "sklearn-logistic": lambda _: make_pipeline(
        StandardScaler(), LogisticRegression(max_iter=1000)
    ),
    "sklearn-mlp": lambda _: make_pipeline(StandardScaler(), SklearnMLPClassifier(max_iter=500)),
    "dummy": lambda _: DummyClassifier(),
}
FETCHERS = {"cifar10": fetch_cifar10, "mnist": fetch_mnist}
# scikit-learn's own take minutes a fold on CIFAR-10, and ImageNet's weights are a download: those
# run when they are named.
DEFAULT_MODELS = {
    "digits": ["softmax", "mlp", "cnn", "triplet", "sklearn-logistic", "sklearn-mlp", "dummy"],
    "mnist": ["softmax", "mlp", "cnn", "triplet", "dummy"],
    "cifar10": ["softmax", "mlp", "cnn", "triplet", "dummy"],
}
TABLE_WIDTH = 110
# What a column of the histories begins with, and how its curve is drawn: the blue and the
# vermilion of Okabe and Ito, told apart by colour-blind eyes, and by their dashes in print.
CURVES = {"train": "training rows", "valid": "validation rows"}
CURVE_STYLES: list[dict[str, Any]] = [
    {"color": "#0072B2", "linestyle": "-"},
    {"color": "#D55E00", "linestyle": "--"},
]


class UsageError(Exception):
    """Something the user can put right: one line on stderr and exit status 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, default=None
        The arguments after the program's name; None takes them from ``sys.argv``.

    Returns
    -------
    status : int
        0, or 1 if every model failed, 2 for wrong arguments or missing data, 130 after Ctrl-C.

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
    """
    arguments = _parser().parse_args(argv)
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


# -- arguments -----------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"skcifar: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="skcifar", description="Small-image classifiers, compared.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    compare_parser = commands.add_parser(
        "compare",
        help="cross-validate several classifiers and print one table",
        description="Cross-validate several classifiers on the same folds and print one table. "
        "triplet is TripletEmbedder and nearest neighbours, finetuned FineTunedClassifier on a "
        "TripletEmbedder; alexnet and resnet18 are ImageNet features, whose weights are "
        "downloaded, and MLPClassifier: they keep the features in the data home. "
        "For mnist and cifar10 the official training split is cross-validated, then each model "
        "is fitted to all of it and scored on the official test split.",
    )
    add = compare_parser.add_argument
    add("--data", choices=list(DEFAULT_MODELS), default="digits", help="default: digits")
    add("--data-home", metavar="DIR", help="where data are kept; default: scikit-learn's data home")
    add(
        "--models",
        metavar="A,B,...",
        help=f"of {', '.join(MODELS)}; default: {', '.join(DEFAULT_MODELS['cifar10'])}, and "
        "scikit-learn's for digits",
    )
    add(
        "--n-train",
        type=_integer_from(1),
        metavar="N",
        help="train on a random subset with the same shares of classes; default: all",
    )
    add("--cv", type=_integer_from(2), default=5, metavar="K", help="stratified folds; default: 5")
    add("--device", default="auto", metavar="D", help="auto, cpu, cuda, cuda:1; default: auto")
    add(
        "--seed",
        type=_integer_from(0, 2**32 - 1),
        default=0,
        metavar="S",
        help="of the subset and of every model; default: 0",
    )
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="write table.csv, histories.csv and, with matplotlib, learning_curves.png to DIR",
    )
    add("--quiet", action="store_true", help="no progress on stderr")
    compare_parser.set_defaults(run=_compare)

    fetch_parser = commands.add_parser("fetch", help="download a data set and check its files")
    fetch_parser.add_argument("name", choices=list(FETCHERS), metavar="NAME", help="mnist, cifar10")
    fetch_parser.add_argument("--data-home", metavar="DIR", help="where to keep it")
    fetch_parser.set_defaults(run=_fetch)
    return parser


def _integer_from(low: int, high: float = float("inf")) -> Callable[[str], int]:
    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
        if not low <= value <= high:
            bounds = f"at least {low}" + (f" and at most {high}" if high < float("inf") else "")
            raise argparse.ArgumentTypeError(f"{value} is out of range: give {bounds}")
        return value

    return integer


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


# -- python -m skcifar fetch ---------------------------------------------------------------------


def _fetch(arguments: argparse.Namespace) -> int:
    _announce(f"reading {arguments.name}, downloading what is missing")
    y = _read(arguments.name, arguments.data_home, "all", verbose=True).y
    home = get_data_home(arguments.data_home)
    print(f"{arguments.name}: {len(y):,} images of {len(np.unique(y))} classes in {home}")
    return 0


def _announce(text: str) -> None:
    print(f"skcifar: {text}", file=sys.stderr, flush=True)


# -- python -m skcifar compare -------------------------------------------------------------------


class _Images(NamedTuple):
    X: NDArray[np.uint8]  # (n_samples, n_features)
    y: NDArray[np.generic]


def _compare(arguments: argparse.Namespace) -> int:
    announce = (lambda text: None) if arguments.quiet else _announce
    estimators = _estimators(arguments)
    if arguments.output is not None:
        _check_writable(arguments.output)

    announce(f"reading {arguments.data}")
    held_out = None
    if arguments.data == "digits":
        train = _Images(*load_digits(return_X_y=True))
    else:
        read = partial(_read, arguments.data, arguments.data_home, verbose=not arguments.quiet)
        train, held_out = read("train"), read("test")
    train = _subset(train, arguments)

    table = compare(
        estimators,
        *train,
        cv=arguments.cv,
        X_test=held_out.X if held_out else None,
        y_test=held_out.y if held_out else None,
        verbose=0 if arguments.quiet else 2,
    ).sort_values("cv_mean", ascending=False, kind="stable")

    title = (
        f"{arguments.data}: {len(train.y):,} images of {len(np.unique(train.y))} classes, "
        f"{arguments.cv} folds, seed {arguments.seed}"
    )
    print(f"{title}\n\n{_format(table)}", flush=True)
    if arguments.output is not None:
        try:
            _write_results(table, arguments.output, title, announce)
        except OSError as error:
            raise UsageError(f"cannot write the results: {error}") from error
    return 1 if table["cv_mean"].isna().all() else 0


def _estimators(arguments: argparse.Namespace) -> dict[str, BaseEstimator]:
    try:
        resolve_device(arguments.device)
    except ValueError as error:
        raise UsageError(f"argument --device: {error}") from error
    if arguments.models is None:
        names = DEFAULT_MODELS[arguments.data]
    else:
        names = [name.strip() for name in arguments.models.split(",")]
    for name in names:
        if name not in MODELS:
            raise UsageError(
                f"argument --models: unknown model {name!r}; choose from {', '.join(MODELS)}"
            )
        if names.count(name) > 1:
            raise UsageError(f"argument --models: {name!r} is named more than once")
    return {name: _configured(MODELS[name](arguments.device), arguments) for name in names}


def _configured(estimator: BaseEstimator, arguments: argparse.Namespace) -> BaseEstimator:
    """Set the seed, and of pretrained features where they are kept and whether they report."""
    values: dict[str, Callable[[], Any]] = {
        "random_state": lambda: arguments.seed,
        "data_home": lambda: arguments.data_home,
        "pretrainedfeatures__verbose": lambda: not arguments.quiet,
        # one pass over the images, not one for each fold
        "pretrainedfeatures__memory": lambda: (
            Path(get_data_home(arguments.data_home)) / "skcifar-features"
        ),
    }
    for name in estimator.get_params():
        for ending, value in values.items():
            if name == ending or name.endswith(f"__{ending}"):
                estimator.set_params(**{name: value()})
    return estimator


def _read(name: str, data_home: str | None, subset: Subset, *, verbose: bool) -> _Images:
    fetch = FETCHERS[name]
    try:
        X, y = fetch(data_home=data_home, subset=subset, return_X_y=True, verbose=verbose)
        return _Images(X, y)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {name}: {error}") from error


def _subset(images: _Images, arguments: argparse.Namespace) -> _Images:
    n_images, n_train = len(images.y), arguments.n_train
    if n_train is not None:
        if n_train > n_images:
            raise UsageError(
                f"argument --n-train: {n_train:,} is more than the {n_images:,} training images "
                f"of {arguments.data}"
            )
        rows = resample(
            np.arange(n_images),
            replace=False,
            n_samples=n_train,
            stratify=images.y,
            random_state=arguments.seed,
        )
        images = _Images(images.X[rows], images.y[rows])
    smallest = np.unique(images.y, return_counts=True)[1].min()
    if smallest < arguments.cv:
        raise UsageError(
            f"{len(images.y):,} training images hold a class of {smallest}, fewer than the "
            f"{arguments.cv} folds: raise --n-train or lower --cv"
        )
    return images


# -- results -------------------------------------------------------------------------------------


def _format(table: pd.DataFrame) -> str:
    """Lay the table out in columns; an error follows its row."""
    header = ["model", "cv accuracy", "difference, 95% interval"]
    header += ["train", "test", "fit s", "predict s", "epochs"]
    lines = [header, *(_cells(row) for row in table.to_dict("records"))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line, error in zip(lines, [None, *table["error"]], strict=True):
        words = [word.ljust(width) for word, width in zip(line[:3], widths[:3], strict=True)]
        words += [word.rjust(width) for word, width in zip(line[3:], widths[3:], strict=True)]
        text.append("  ".join(words).rstrip())
        if isinstance(error, str):
            text.append("  " + textwrap.shorten(f"failed: {error}", TABLE_WIDTH - 2))
    return "\n".join(text)


def _cells(row: dict[Hashable, Any]) -> list[str]:
    def number(column: str, digits: int) -> str:
        return "-" if np.isnan(row[column]) else f"{row[column]:.{digits}f}"

    if np.isnan(row["cv_mean"]):
        accuracy, difference = "-", "-"
    else:
        accuracy = "{cv_mean:.4f} ± {cv_std:.4f}".format_map(row)
        interval = "{difference:+.4f} [{difference_low:+.4f}, {difference_high:+.4f}]"
        difference = "best" if row["difference"] == 0 else interval.format_map(row)
    return [
        row["model"],
        accuracy,
        difference,
        number("train_score", 4),
        number("test_score", 4),
        number("fit_seconds", 2),
        number("predict_seconds", 3),
        number("epochs", 0),
    ]


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"argument --output: cannot write to {folder}: {error}") from error


def _write_results(
    table: pd.DataFrame, folder: Path, title: str, announce: Callable[[str], None]
) -> None:
    columns = None if table.attrs["histories"] else ["model", "fold", "epoch"]
    histories = pd.DataFrame(table.attrs["histories"], columns=columns)
    with _replacing(folder / "table.csv") as path:
        tracebacks = table["model"].map(table.attrs["tracebacks"])
        table.assign(traceback=tracebacks).to_csv(path, index=False)
    with _replacing(folder / "histories.csv") as path:
        histories.to_csv(path, index=False)
    announce(f"wrote table.csv and histories.csv to {folder}")
    if histories.empty:
        announce("no learning_curves.png: no model recorded its epochs")
    elif _has_matplotlib():
        with _replacing(folder / "learning_curves.png") as path:
            _draw_learning_curves(histories, table, title).savefig(path, dpi=120)
        announce(f"wrote learning_curves.png to {folder}")
    else:
        announce("no learning_curves.png: install matplotlib (pip install 'skcifar[plot]')")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a file beside `path` to write to, which takes its place once it is whole."""
    partial = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _has_matplotlib() -> bool:
    try:
        import matplotlib.figure  # noqa: F401
    except Exception:  # a broken installation is as good as none, and may raise anything
        return False
    return True


def _draw_learning_curves(histories: pd.DataFrame, table: pd.DataFrame, title: str) -> Figure:
    """Draw loss above accuracy, one column a model: the mean over folds in their range."""
    from matplotlib.figure import Figure

    models = [model for model in table["model"] if model in set(histories["model"])]
    figure = Figure(figsize=(1.5 + 2.9 * len(models), 6), layout="constrained")
    figure.suptitle(f"{title}\nmean over folds, shaded from lowest to highest")
    axes = figure.subplots(2, len(models), squeeze=False, sharex="col", sharey="row")
    axes[0, 0].set_ylabel("loss (nats)")
    axes[1, 0].set_ylabel("accuracy (share of images)")
    for model, (upper, lower) in zip(models, axes.T, strict=True):
        epochs = histories[histories["model"] == model]
        upper.set_title(model)
        lower.set_xlabel("epoch")
        for axis, quantity in [(upper, "loss"), (lower, "accuracy")]:
            axis.grid(alpha=0.3)
            for (part, label), style in zip(CURVES.items(), CURVE_STYLES, strict=True):
                column = f"{part}_{quantity}"
                if column in epochs and epochs[column].notna().any():
                    curves = epochs.pivot(index="epoch", columns="fold", values=column)
                    low, high = curves.min(axis=1), curves.max(axis=1)
                    axis.plot(curves.index, curves.mean(axis=1), label=label, **style)
                    axis.fill_between(curves.index, low, high, color=style["color"], alpha=0.2)
        final = table.loc[table["model"] == model, "cv_mean"].item()
        lower.axhline(final, color="black", linestyle=":", label="left-out folds, after training")
    handles = dict(
        (label, handle)
        for axis in axes.flat
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    )
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    return figure


if __name__ == "__main__":
    sys.exit(main())
