"""What the commands share: models, data, options, files and how to say what is wrong."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
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
DATA = ["digits", "mnist", "cifar10"]
TABLE_WIDTH = 110


class UsageError(Exception):
    """Something the user can put right: one line on stderr and exit status 2."""


# -- options ---------------------------------------------------------------------------------------


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Say which images, where they are, and what all models get."""
    add = parser.add_argument
    add("--data", choices=DATA, default="digits", help="default: digits")
    add("--data-home", metavar="DIR", help="where data are kept; default: scikit-learn's data home")
    add(
        "--n-train",
        type=integer_from(1),
        metavar="N",
        help="train on a random subset with the same shares of classes; default: all",
    )
    add("--device", default="auto", metavar="D", help="auto, cpu, cuda, cuda:1; default: auto")
    add(
        "--seed",
        type=integer_from(0, 2**32 - 1),
        default=0,
        metavar="S",
        help="of the subset and of every model; default: 0",
    )


def integer_from(low: int, high: float = float("inf")) -> Callable[[str], int]:
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


# -- models and data -------------------------------------------------------------------------------


def check_device(name: str) -> None:
    try:
        resolve_device(name)
    except ValueError as error:
        raise UsageError(f"argument --device: {error}") from error


def configured(estimator: BaseEstimator, arguments: argparse.Namespace) -> BaseEstimator:
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


class Images(NamedTuple):
    X: NDArray[np.uint8]  # (n_samples, n_features)
    y: NDArray[np.generic]


def read_splits(
    arguments: argparse.Namespace, classes: list[int | str] | None = None
) -> tuple[Images, Images | None]:
    """The images to train on, as many as are asked for, and the official test split, if any."""
    if arguments.data == "digits":
        return _subset(_load(load_digits, "digits", classes=classes), arguments), None
    parts: list[Subset] = ["train", "test"]
    train, held_out = (
        read(arguments.data, arguments.data_home, part, classes, verbose=not arguments.quiet)
        for part in parts
    )
    return _subset(train, arguments), held_out


def read(
    name: str,
    data_home: str | None,
    subset: Subset,
    classes: list[int | str] | None = None,
    *,
    verbose: bool,
) -> Images:
    return _load(
        FETCHERS[name], name, data_home=data_home, subset=subset, classes=classes, verbose=verbose
    )


def _load(load: Callable[..., Any], name: str, **options: Any) -> Images:
    try:
        return Images(*load(return_X_y=True, **options))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {name}: {error}") from error


def _subset(images: Images, arguments: argparse.Namespace) -> Images:
    n_images, n_train = len(images.y), arguments.n_train
    if n_train is None:
        return images
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
    return Images(images.X[rows], images.y[rows])


def check_folds(y: NDArray[Any], n_folds: int) -> None:
    smallest = np.unique(y, return_counts=True)[1].min()
    if smallest < n_folds:
        raise UsageError(
            f"{len(y):,} training images hold a class of {smallest}, fewer than the "
            f"{n_folds} folds: raise --n-train or lower --cv"
        )


# -- files -----------------------------------------------------------------------------------------


def check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"argument --output: cannot write to {folder}: {error}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a file beside `path` to write to, which takes its place once it is whole."""
    partial = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_learning_curves(
    folder: Path, draw: Callable[[], Figure], tell: Callable[[str], None], *, why_none: str | None
) -> None:
    """Write what `draw` gives to learning_curves.png, or tell why there is no such picture."""
    if why_none is not None:
        tell(f"no learning_curves.png: {why_none}")
    elif has_matplotlib():
        with replacing(folder / "learning_curves.png") as path:
            draw().savefig(path, dpi=120)
        tell(f"wrote learning_curves.png to {folder}")
    else:
        tell("no learning_curves.png: install matplotlib (pip install 'skcifar[plot]')")


def has_matplotlib() -> bool:
    try:
        import matplotlib.figure  # noqa: F401
    except Exception:  # a broken installation is as good as none, and may raise anything
        return False
    return True


def announce(text: str) -> None:
    print(f"skcifar: {text}", file=sys.stderr, flush=True)
