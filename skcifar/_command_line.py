"""What the commands share: models, data, options, files and how to say what is wrong."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
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
from sklearn.utils import Bunch, resample

from skcifar import (
    CNNClassifier,
    FineTunedClassifier,
    MLPClassifier,
    PretrainedFeatures,
    SoftmaxRegression,
    TripletEmbedder,
)
from skcifar._device import resolve_device
from skcifar._provenance import data_provenance, provenance, variant_of
from skcifar.datasets import Subset, fetch_cifar10, fetch_mnist, load_digits, load_image_folder

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
IMAGE_SIZE = 32  # of folders; all models take rows of square images from 8 pixels on
TABLE_WIDTH = 110


class UsageError(Exception):
    """Something the user can put right: one line on stderr and exit status 2."""


# -- options ---------------------------------------------------------------------------------------


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Say which images, where they are, and what all models get."""
    add = parser.add_argument
    add("--data", type=_data, default="digits", metavar="D", help=_DATA_HELP)
    add("--image-size", type=integer_from(8), metavar="N", help=_IMAGE_SIZE_HELP)
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


_DATA_HELP = (
    f"one of {', '.join(DATA)}, or a folder that has one for each class (pets/cat/1.png), or these "
    "in its folders train and test; default: digits"
)
_IMAGE_SIZE_HELP = (
    "the images of a folder are resized to cover N x N pixels and cut about their centre; "
    f"default: {IMAGE_SIZE}"
)


def _data(text: str) -> str:
    if text in DATA:
        return text
    if not (text and Path(text).is_dir()):
        raise argparse.ArgumentTypeError(
            f"invalid choice: {text!r} (choose from {', '.join(DATA)}, or name a folder of "
            "images: there is no such folder)"
        )
    name = Path(text).resolve().name
    try:
        (text + name).encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(
            f"the name of the folder {os.fsencode(text)!r} ({os.fsencode(name)!r}) is not UTF-8, "
            "so that results could not name it; rename the folder"
        ) from error
    return text


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


class Splits(NamedTuple):
    """What a command works on.

    Attributes
    ----------
    name : str
        As titles have it: "mnist", "folder pets".
    variant : str
        Which pixels these are; looked at only if there is an output to note it in.
    train : Images
        As many as are asked for.
    held_out : Images or None
        The official test split, or the folder's.
    class_names : list of str
        By code, all of the data set.
    image_shape : (h, w) or (h, w, c)
    """

    name: str
    variant: str
    train: Images
    held_out: Images | None
    class_names: list[str]
    image_shape: tuple[int, ...]

    def provenance(self) -> dict[str, Any]:
        """With the names of those classes that there are images of."""
        codes = [part.y for part in (self.train, self.held_out) if part is not None]
        return data_provenance(
            self.name,
            *self.train,
            *(self.held_out or (None, None)),
            image_shape=self.image_shape,
            class_names=[self.class_names[code] for code in np.unique(np.concatenate(codes))],
            variant=self.variant,
        )


def read_splits(arguments: argparse.Namespace, classes: list[int | str] | None = None) -> Splits:
    """The images to train on, as many as are asked for, and the test split, if any."""
    name, held_out = arguments.data, None
    if name not in DATA:
        return _read_folder(arguments, classes)
    if arguments.image_size is not None:
        raise UsageError(f"argument --image-size: it is for folders; those of {name} have a size")
    load = partial(_load, name, classes=classes)
    if name == "digits":
        train = load(load_digits)
    else:
        options = {"data_home": arguments.data_home, "verbose": not arguments.quiet}
        train, held_out = (load(FETCHERS[name], subset=s, **options) for s in ("train", "test"))
    variant = ""
    if arguments.output is not None:
        variant = variant_of(train.data, train.target, train.images.shape[1:])
    return _splits(name, variant, train, held_out, arguments)


def _read_folder(arguments: argparse.Namespace, classes: list[int | str] | None) -> Splits:
    path = Path(arguments.data)
    load = partial(
        _load,
        f"the folder {path}",
        partial(load_image_folder, path),
        image_size=arguments.image_size or IMAGE_SIZE,
        # by name only: a folder's classes may have numbers for names, and have no codes to see
        classes=None if classes is None else [str(one) for one in classes],
        verbose=not arguments.quiet,
    )
    with _each_warning_once():
        train = load(subset="train")
        held_out = load(subset="test") if "test" in train.subsets else None
    name = f"folder {path.resolve().name}"
    return _splits(name, f"folder {path}", train, held_out, arguments)


@contextmanager
def _each_warning_once() -> Iterator[None]:
    """Tell what is warned of within at its end: of the whole folder it is warned with each part."""
    with warnings.catch_warnings(record=True) as caught:
        yield
    for text in dict.fromkeys(str(warning.message) for warning in caught):
        warnings.warn(text, UserWarning, stacklevel=1)


def _splits(
    name: str, variant: str, train: Bunch, held_out: Bunch | None, arguments: argparse.Namespace
) -> Splits:
    return Splits(
        name,
        variant,
        _subset(Images(train.data, train.target), arguments),
        None if held_out is None else Images(held_out.data, held_out.target),
        [str(each) for each in train.target_names],
        train.images.shape[1:],
    )


def read(
    name: str,
    data_home: str | None,
    subset: Subset,
    classes: list[int | str] | None = None,
    *,
    verbose: bool,
) -> Images:
    options = {"data_home": data_home, "subset": subset, "classes": classes, "verbose": verbose}
    bunch = _load(name, FETCHERS[name], **options)
    return Images(bunch.data, bunch.target)


def _load(name: str, load: Callable[..., Bunch], **options: Any) -> Bunch:
    try:
        return load(**options)
    except (OSError, ValueError, ImportError) as error:
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


def write_provenance(
    arguments: argparse.Namespace, kind: str, title: str, splits: Splits, **more: Any
) -> None:
    """Write provenance.json to the folder of --output."""
    # the words of this process's own call, where main was not given others
    words = getattr(arguments, "argv", sys.argv[1:])
    data = splits.provenance()
    record = provenance(kind, title, arguments.seed, data, command=words, **more)
    with replacing(arguments.output / "provenance.json") as path:
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def write_learning_curves(
    folder: Path, draw: Callable[[], Figure], tell: Callable[[str], None], *, why_none: str | None
) -> None:
    """Write what `draw` gives to learning_curves.png, or tell why there is no such picture."""
    if why_none is not None:
        tell(f"no learning_curves.png: {why_none}")
    elif has_matplotlib():
        import matplotlib.pyplot as plt

        figure = draw()
        with replacing(folder / "learning_curves.png") as path:
            figure.savefig(path, dpi=120)
        plt.close(figure)
        tell(f"wrote learning_curves.png to {folder}")
    else:
        tell("no learning_curves.png: install matplotlib (pip install 'skcifar[plot]')")


def has_matplotlib() -> bool:
    """Whether there is matplotlib, which is told that pictures are written and not shown."""
    try:
        import matplotlib.pyplot

        matplotlib.use("agg")  # whatever window or notebook MPLBACKEND names
    except Exception:  # a broken installation is as good as none, and may raise anything
        return False
    return True


def announce(text: str) -> None:
    print(f"skcifar: {text}", file=sys.stderr, flush=True)
