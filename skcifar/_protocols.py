"""How a system is run: data, splits, figures and pictures of the protocols that studies follow."""

from __future__ import annotations

import inspect
import io
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import joblib
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix
from sklearn.model_selection import (
    LearningCurveDisplay,
    PredefinedSplit,
    StratifiedShuffleSplit,
    learning_curve,
    train_test_split,
)

from skcifar import plotting
from skcifar._fitted import epoch_records, fitted_model
from skcifar.model_selection import BatchedGridSearchCV

# Of the training rows, those whose accuracy is told: enough for half a point, and quickly scored.
TRAIN_ROWS_SCORED = 10_000


class Images(NamedTuple):
    """One data set with its official split.

    Attributes
    ----------
    X, X_test : uint8 arrays of shape (n, height * width * channels)
    y, y_test : arrays of shape (n,)
    class_names : list of str
        By code.
    image_shape : (height, width, channels)
    """

    X: NDArray[np.uint8]
    y: NDArray[Any]
    X_test: NDArray[np.uint8]
    y_test: NDArray[Any]
    class_names: list[str]
    image_shape: tuple[int, int, int]

    def names(self) -> list[str]:
        """Of the classes that occur, in the order of their codes."""
        return [self.class_names[code] for code in np.unique(self.y)]


@dataclass(frozen=True)
class Scale:
    """How much of a study is run: at most so many images and epochs."""

    n_train: int
    n_test: int
    epochs: int
    n_pictured: int  # points of a t-SNE

    def images(self, images: Images) -> Images:
        train = _some(images.y, self.n_train)
        test = _some(images.y_test, self.n_test)
        return images._replace(
            X=images.X[train], y=images.y[train], X_test=images.X_test[test],
            y_test=images.y_test[test],
        )  # fmt: skip

    def estimator(self, estimator: BaseEstimator) -> BaseEstimator:
        shorter = {
            name: self.epochs
            for name, value in estimator.get_params().items()
            if name.rpartition("__")[2] == "max_iter"
            # "auto" is some number of epochs, too, and more than those of any quick run
            and (value > self.epochs if isinstance(value, int) else self is not FULL)
        }
        return clone(estimator).set_params(**shorter)


FULL = Scale(n_train=10**9, n_test=10**9, epochs=10**9, n_pictured=5_000)
QUICK = Scale(n_train=600, n_test=300, epochs=2, n_pictured=300)


def _some(y: NDArray[Any], n: int) -> NDArray[np.intp]:
    """Rows, at most n of them, with the same shares of classes; always the same."""
    rows = np.arange(len(y))
    if n >= len(y):
        return rows
    return np.sort(train_test_split(rows, train_size=n, stratify=y, random_state=0)[0])


@dataclass
class Outcome:
    """What running a system gave.

    Attributes
    ----------
    figures : dict of str to float
    seconds : float
        Of all trainings; those of searches and of shares of the images with their scoring.
    epochs : float or None
    curve : list of dict
        A row an epoch, and a model where there are several.
    classes : dict of str to float
        Test accuracy of each class.
    confusion : list of list of int, or None
        Test images by actual and by predicted class.
    pictures : list of functions
        Each draws, and returns a Display.
    note : str
    """

    figures: dict[str, float]
    seconds: float
    epochs: float | None = None
    curve: list[dict[str, Any]] = field(default_factory=list)
    classes: dict[str, float] = field(default_factory=dict)
    confusion: list[list[int]] | None = None
    pictures: list[Callable[[], Any]] = field(default_factory=list)
    note: str = ""


class Protocol:
    """From an estimator (or None), images and a scale to an outcome.

    Attributes
    ----------
    fits_as_given : bool
        Whether `fit` is called of the estimator itself, not of clones.
    """

    fits_as_given: ClassVar[bool] = False

    def __call__(self, estimator: Any, images: Images, scale: Scale) -> Outcome:
        raise NotImplementedError


def joined(outcomes: Mapping[str, Outcome]) -> Outcome:
    """One outcome of several models, whose names follow the figures'."""
    whole = Outcome({}, 0.0)
    for name, outcome in outcomes.items():
        whole.figures |= {f"{quantity}, {name}": x for quantity, x in outcome.figures.items()}
        whole.seconds += outcome.seconds
        whole.curve += [{"model": name, **row} for row in outcome.curve]
        whole.note += f"{name}: {outcome.note}\n" if outcome.note else ""
    if whole.curve:
        histories = {name: outcome.curve for name, outcome in outcomes.items() if outcome.curve}
        whole.pictures.append(lambda: plotting.LearningCurvesDisplay.from_histories(histories))
    return whole


# -- protocols -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Holdout(Protocol):
    """Fit, score on 10,000 training images, on those held out and on the test split.

    Attributes
    ----------
    validation : float
        Share of the training images held out, stratified. The estimator is shown them as `X_val`
        if it takes such.
    saved : bool
        Whether the estimator goes through a file before it is scored.
    pictured : bool
        Whether confusion, accuracies of classes and confident predictions are drawn.
    """

    fits_as_given: ClassVar[bool] = True
    validation: float = 0.0
    saved: bool = False
    pictured: bool = False

    def __call__(self, estimator: BaseEstimator, images: Images, scale: Scale) -> Outcome:
        X, y, X_val, y_val = _held_out(images, self.validation)
        shown = {}
        if self.validation and "X_val" in inspect.signature(estimator.fit).parameters:
            shown = {"X_val": X_val, "y_val": y_val}
        with timed() as seconds:
            estimator.fit(X, y, **shown)
        if self.saved:
            estimator = _through_a_file(estimator)
        some = _some(y, TRAIN_ROWS_SCORED)
        figures = {"train accuracy": estimator.score(X[some], y[some])}
        if self.validation:
            figures["validation accuracy"] = estimator.score(X_val, y_val)
        predicted = estimator.predict(images.X_test)
        figures["test accuracy"] = float(np.mean(predicted == images.y_test))
        model = fitted_model(estimator)
        confusion = confusion_matrix(images.y_test, predicted, labels=np.unique(images.y))
        outcome = Outcome(
            figures,
            sum(seconds),
            epochs=getattr(model, "n_iter_", None),
            curve=epoch_records(model),
            classes=_by_class(confusion, images.names()),
            confusion=confusion.tolist(),
        )
        if self.pictured:
            outcome.pictures += _of_predictions(estimator, images, confusion)
        return outcome


@dataclass(frozen=True)
class UntilTrainAccuracy(Protocol):
    """Train epoch by epoch, until the training images are recognised this well."""

    accuracy: float
    most_epochs: int = 100

    def __call__(self, estimator: Any, images: Images, scale: Scale) -> Outcome:
        seconds: list[float] = []
        reached = 0.0
        most = min(self.most_epochs, scale.epochs)
        while len(seconds) < most and reached <= self.accuracy:
            with timed() as took:
                estimator.partial_fit(images.X, images.y, classes=np.unique(images.y))
            seconds += took
            reached = estimator.score(images.X, images.y)
        figures = {
            "train accuracy": reached,
            "test accuracy": estimator.score(images.X_test, images.y_test),
        }
        return Outcome(figures, sum(seconds), len(seconds), epoch_records(estimator))


@dataclass(frozen=True)
class Sweep(Protocol):
    """Try all settings of a grid, trained together.

    Attributes
    ----------
    grid : dict of str to list
    cv : int or float
        Folds, or below 1 the share that one stratified split holds out.
    losses_of : str or None
        The parameter for whose values the mean losses on training and validation rows, at the end
        of training, are the figures. With None the best setting is, fitted to all training
        images and scored on the test split.
    """

    grid: Mapping[str, list]
    cv: int | float
    losses_of: str | None = None

    def __call__(self, estimator: BaseEstimator, images: Images, scale: Scale) -> Outcome:
        cv = (
            self.cv if self.cv > 1 else StratifiedShuffleSplit(1, test_size=self.cv, random_state=0)
        )
        grid = {name: list(values) for name, values in self.grid.items()}
        if "max_iter" in grid:
            grid["max_iter"] = sorted({min(epochs, scale.epochs) for epochs in grid["max_iter"]})
        search: Any = BatchedGridSearchCV(
            estimator, grid, cv=cv, validate_epochs=True, refit=self.losses_of is None
        )
        with timed() as seconds:
            search.fit(images.X, images.y)
        figures = self._losses(search) if self.losses_of else _of_the_best(search, images)
        outcome = Outcome(figures, sum(seconds), note=_five_best(search, grid))
        if len(grid) > 1:
            outcome.pictures.append(lambda: plotting.ParallelCoordinatesDisplay.from_search(search))
        else:
            outcome.curve = _mean_curves(search)
            histories = {
                str(name): rows.drop(columns="model")
                for name, rows in pd.DataFrame(outcome.curve).groupby("model", sort=False)
            }
            outcome.pictures.append(
                lambda: plotting.LearningCurvesDisplay.from_histories(histories)
            )
        return outcome

    def _losses(self, search: Any) -> dict[str, float]:
        epochs = search.epoch_results_
        last = epochs.groupby(["candidate", "fold", "repeat"]).tail(1)
        means = last.groupby("candidate")[["train_loss", "valid_loss"]].mean()
        names = {"train_loss": "train loss", "valid_loss": "validation loss"}
        values = [params[self.losses_of] for params in search.cv_results_["params"]]
        return {
            f"{names[column]}, {value}": float(means.loc[candidate, column])
            for candidate, value in enumerate(values)
            for column in names
        }


@dataclass(frozen=True)
class TrainingSizes(Protocol):
    """Train on shares of the training images, score on the test split."""

    shares: tuple[float, ...]

    def __call__(self, estimator: BaseEstimator, images: Images, scale: Scale) -> Outcome:
        X = np.concatenate([images.X, images.X_test])
        y = np.concatenate([images.y, images.y_test])
        fold = np.repeat([-1, 0], [len(images.X), len(images.X_test)])
        with timed() as seconds:
            sizes, train, test = learning_curve(
                estimator, X, y, cv=PredefinedSplit(fold), train_sizes=list(self.shares),
                shuffle=True, random_state=0,
            )  # fmt: skip
        figures = {
            f"test accuracy, {share:.0%} of the images": float(score)
            for share, score in zip(self.shares, test[:, 0], strict=True)
        }

        def draw() -> Any:
            display = LearningCurveDisplay(
                train_sizes=sizes, train_scores=train, test_scores=test, score_name="accuracy"
            ).plot()
            display.ax_.set(title="Accuracy by number of training images")
            return display

        return Outcome(figures, sum(seconds), pictures=[draw])


@dataclass(frozen=True)
class Projection(Protocol):
    """Fit, then draw the images' positions in the plane by t-SNE.

    Attributes
    ----------
    layer : int or None
        Whose output is projected, of a classifier; None takes what the estimator transforms to.
    """

    fits_as_given: ClassVar[bool] = True
    layer: int | None = None

    def __call__(self, estimator: BaseEstimator, images: Images, scale: Scale) -> Outcome:
        outcome = Holdout()(estimator, images, scale)
        projected = estimator[:-1] if self.layer is None else estimator
        outcome.pictures.append(
            lambda: plotting.EmbeddingDisplay.from_estimator(
                projected,
                images.X,
                np.array(images.class_names)[images.y],
                n_samples=min(scale.n_pictured, len(images.X)),
                layer=self.layer,
                random_state=0,
            )
        )
        return outcome


@dataclass(frozen=True)
class Look(Protocol):
    """Count the images and draw the first of them and their principal components."""

    def __call__(self, estimator: None, images: Images, scale: Scale) -> Outcome:
        figures: dict[str, float] = {
            "training images": len(images.X),
            "test images": len(images.X_test),
        }
        names = np.array(images.class_names)[images.y]
        with timed() as seconds:
            counts = pd.Series(names).value_counts()
        figures |= {f"training images, {name}": int(n) for name, n in counts.items()}

        def first() -> Any:
            return plotting.ImageGridDisplay.from_images(
                images.X[:16], titles=list(names[:16]), image_shape=images.image_shape
            )

        def components() -> Any:
            n = min(2_000, len(names))
            return plotting.EmbeddingDisplay.from_features(
                images.X, names, method="pca", n_samples=n, random_state=0
            )

        def classes() -> Any:
            return plotting.ClassCountsDisplay.from_labels(names)

        return Outcome(figures, sum(seconds), pictures=[first, components, classes])


# -- what protocols are made of --------------------------------------------------------------------


@contextmanager
def timed() -> Iterator[list[float]]:
    """Add the seconds that the block takes to the list it is given.

    An open-ended schedule that is stopped after a set number of epochs is what these studies are.
    """
    seconds: list[float] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        # of a Pipeline's steps that have nothing to tell
        warnings.filterwarnings("ignore", "The estimator .* does not support callbacks")
        start = time.perf_counter()
        try:
            yield seconds
        finally:
            seconds.append(time.perf_counter() - start)


def _held_out(images: Images, share: float) -> tuple[Any, Any, Any, Any]:
    """X, y to train on and X, y to validate on."""
    if not share:
        return images.X, images.y, None, None
    X, X_val, y, y_val = train_test_split(
        images.X, images.y, test_size=share, stratify=images.y, random_state=0
    )
    return X, y, X_val, y_val


def _through_a_file(estimator: BaseEstimator) -> BaseEstimator:
    file = io.BytesIO()
    joblib.dump(estimator, file)
    file.seek(0)
    return joblib.load(file)


def _by_class(confusion: NDArray[np.int64], names: list[str]) -> dict[str, float]:
    accuracies = confusion.diagonal() / confusion.sum(axis=1).clip(1)
    return dict(zip(names, map(float, accuracies), strict=True))


def _of_predictions(
    estimator: Any, images: Images, confusion: NDArray[np.int64]
) -> list[Callable[[], Any]]:
    probabilities = estimator.predict_proba(images.X_test)
    predicted = estimator.classes_[probabilities.argmax(1)]

    def matrix() -> Any:
        display = ConfusionMatrixDisplay(confusion, display_labels=images.names())
        display.plot(xticks_rotation=45, colorbar=False, cmap="Blues")
        display.figure_.set_size_inches(7, 7)
        display.ax_.set_title(f"{len(predicted):,} test images")
        display.figure_.set_layout_engine("constrained")
        return display

    def classes() -> Any:
        return plotting.ClassAccuracyDisplay.from_predictions(
            images.y_test, predicted, class_names=images.class_names
        )

    def grid(kind: str) -> Any:
        return plotting.ImageGridDisplay.from_predictions(
            images.X_test,
            images.y_test,
            predicted,
            probabilities.max(1),
            kind=kind,
            class_names=images.class_names,
            image_shape=images.image_shape,
        )

    return [matrix, classes, lambda: grid("wrong"), lambda: grid("right")]


def _of_the_best(search: Any, images: Images) -> dict[str, float]:
    predicted = search.predict(images.X_test)
    right = pd.Series(predicted == images.y_test)
    by_class = right.groupby(np.array(images.class_names)[images.y_test]).mean()
    some = _some(images.y, TRAIN_ROWS_SCORED)
    return {
        "train accuracy": search.score(images.X[some], images.y[some]),
        "validation accuracy": float(search.best_score_),
        "test accuracy": float(right.mean()),
        f"test accuracy of the best class, {by_class.idxmax()}": float(by_class.max()),
        f"test accuracy of the worst class, {by_class.idxmin()}": float(by_class.min()),
    }


def _five_best(search: Any, grid: Mapping[str, list]) -> str:
    results = pd.DataFrame(search.cv_results_).sort_values("rank_test_score", kind="stable").head(5)
    lines = [
        ", ".join(f"{name}={params[name]}" for name in grid) + f": {score:.2%}"
        for params, score in zip(results["params"], results["mean_test_score"], strict=True)
    ]
    return "best on validation images: " + "; ".join(lines)


def _mean_curves(search: Any) -> list[dict[str, Any]]:
    """Means over the folds, a row for each candidate and epoch."""
    epochs = search.epoch_results_
    means = epochs.groupby(["candidate", "epoch"]).mean(numeric_only=True).reset_index()
    names = [
        ", ".join(f"{name} {value}" for name, value in params.items())
        for params in search.cv_results_["params"]
    ]
    columns = [c for c in ("train_loss", "valid_loss") if c in means]
    return [
        {"model": names[int(row["candidate"])], "epoch": int(row["epoch"])}
        | {column: float(row[column]) for column in columns}
        for row in means.to_dict("records")
    ]


def with_everywhere(estimator: BaseEstimator, **values: Any) -> BaseEstimator:
    """A clone in which every step that has these parameters has these values."""
    names = estimator.get_params()
    return clone(estimator).set_params(
        **{name: values[end] for name in names if (end := name.rpartition("__")[2]) in values}
    )


def smaller(images: Images, scale: Scale) -> tuple[Images, str | None]:
    """The images at that scale, and what became fewer."""
    less = scale.images(images)
    if len(less.X) == len(images.X):
        return less, None
    return less, f"{len(less.X):,} of {len(images.X):,} images, at most {scale.epochs} epochs"
