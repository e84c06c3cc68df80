"""Displays of images, and of weights as images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import issparse
from sklearn.utils import check_consistent_length, column_or_1d

from skcifar._display import WIDTH, ClassNames, Display, names_of
from skcifar._fitted import final_step

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage
    from matplotlib.text import Text

TILE = 1.3  # inches: an image is no larger
LINE = 0.155  # inches: a line of a caption


class ImageGridDisplay(Display):
    """Images side by side, with captions: samples, or the most confident predictions.

    Create it with `from_images`, `from_predictions` or `from_estimator`.

    Parameters
    ----------
    images : ndarray of shape (n_images, height, width) or (n_images, height, width, 3)
        Grey or colour images.
    captions : list of str, default=None
        What stands above each.
    n_columns : int, default=None
        Images side by side; None chooses.
    title : str, default=""
        What stands above all.
    limits : tuple of two floats, default=None
        Values drawn as black and as full brightness; None is the least and the greatest of
        `images`, but 0 and 255 of colour images in uint8, and 0 and 1 of floats between them.

    Attributes
    ----------
    images_ : list of matplotlib AxesImage
        The images.
    texts_ : list of matplotlib Text
        Their captions; empty without.
    ax_ : matplotlib Axes
        Axes with the images, one unit wide and high each.
    figure_ : matplotlib Figure
        Figure with the axes.

    See Also
    --------
    WeightImagesDisplay : Weights, whose sign counts.

    Examples
    --------
    >>> from skcifar.datasets import load_digits
    >>> from skcifar.plotting import ImageGridDisplay
    >>> X, y = load_digits(return_X_y=True)
    >>> display = ImageGridDisplay.from_images(X[:16], y[:16])
    >>> len(display.images_), display.texts_[3].get_text()
    (16, '3')
    """

    images_: list[AxesImage]
    texts_: list[Text]

    def __init__(
        self,
        *,
        images: NDArray[Any],
        captions: Sequence[str] | None = None,
        n_columns: int | None = None,
        title: str = "",
        limits: tuple[float, float] | None = None,
    ) -> None:
        self.images = images
        self.captions = captions
        self.n_columns = n_columns
        self.title = title
        self.limits = limits

    def plot(self, ax: Axes | None = None) -> Self:
        """Draw the images.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        display : ImageGridDisplay
            This object.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        """
        low, high = self.limits or _limits(self.images)
        style = {"cmap": "gray", "vmin": low, "vmax": high}
        images = self.images
        if images.ndim == 4:  # matplotlib scales grey values only
            images = np.clip((images.astype(np.float64) - low) / (high - low), 0, 1)
        grid = Grid(images, self.captions, self.n_columns)
        ax = self._open(ax, *grid.figure_size)
        ax.set_title(self.title)
        self.images_, self.texts_ = grid.draw(ax, style)
        return self

    @classmethod
    def from_images(
        cls,
        images: ArrayLike,
        titles: Sequence[Any] | NDArray[Any] | None = None,
        *,
        n_columns: int | None = None,
        title: str = "",
        image_shape: Sequence[int] | None = None,
        layout: str = "HWC",
        ax: Axes | None = None,
    ) -> Self:
        """Draw images as they come.

        Parameters
        ----------
        images : array-like of shape (n_images, n_features), (n_images, height, width) or \
                (n_images, height, width, channels)
            Rows or images, of one or three channels.
        titles : sequence of shape (n_images,), default=None
            What stands above each: labels, say.
        n_columns : int, default=None
            Images side by side; None chooses.
        title : str, default=""
            What stands above all.
        image_shape : tuple (height, width) or (height, width, channels), default=None
            Of rows; None takes rows of s² or 3s² features for square images.
        layout : {"HWC", "CHW"}, default="HWC"
            Order of the values of a row or image: channels last, or first.
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        display : ImageGridDisplay
            The display, drawn.

        Raises
        ------
        ValueError
            If the rows are not images of that shape, if there is none, or if `titles` are more or
            fewer.
        """
        array = as_images(images, image_shape, layout)
        captions = None if titles is None else [str(name) for name in titles]
        return cls(images=array, captions=captions, n_columns=n_columns, title=title).plot(ax)

    @classmethod
    def from_predictions(
        cls,
        images: ArrayLike,
        y_true: ArrayLike,
        y_pred: ArrayLike,
        confidence: ArrayLike | None = None,
        *,
        kind: str = "wrong",
        n_images: int = 12,
        class_names: ClassNames = None,
        n_columns: int | None = None,
        image_shape: Sequence[int] | None = None,
        layout: str = "HWC",
        ax: Axes | None = None,
    ) -> Self:
        """Draw the most confident wrong, or right, predictions.

        Parameters
        ----------
        images : array-like of shape (n_samples, n_features), (n_samples, height, width) or \
                (n_samples, height, width, channels)
            All images that were predicted, as in `from_images`.
        y_true : array-like of shape (n_samples,)
            Their labels.
        y_pred : array-like of shape (n_samples,)
            The labels predicted.
        confidence : array-like of shape (n_samples,), default=None
            Probability of the label predicted, between 0 and 1. None takes the first rows.
        kind : {"wrong", "right"}, default="wrong"
            Which predictions.
        n_images : int, default=12
            How many at most.
        class_names : sequence or mapping of label to str, default=None
            Names of the labels; None shows the labels.
        n_columns : int, default=None
            Images side by side; None chooses.
        image_shape : tuple (height, width) or (height, width, channels), default=None
            As in `from_images`.
        layout : {"HWC", "CHW"}, default="HWC"
            As in `from_images`.
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        display : ImageGridDisplay
            The display, drawn.

        Raises
        ------
        ValueError
            If `kind` is another, if there is none of it, if the arguments have different lengths,
            if `confidence` is not between 0 and 1, or if the rows are no images.
        """
        if kind not in ("wrong", "right"):
            raise ValueError(f"kind={kind!r} was given, expected 'wrong' or 'right'.")
        check_consistent_length(images, y_true, y_pred, confidence)
        array = as_images(images, image_shape, layout)
        true, predicted = column_or_1d(y_true), column_or_1d(y_pred)
        rows = np.flatnonzero((true == predicted) == (kind == "right"))
        n_all = len(rows)
        percent = {}
        if confidence is not None:
            certain = _probabilities(confidence)
            rows = rows[np.argsort(-certain[rows], kind="stable")]
            percent = {row: f", {100 * certain[row]:.1f}%" for row in rows[:n_images]}
        rows = rows[:n_images]
        if n_all == 0:
            raise ValueError(f"None of the {len(true)} predictions is {kind}; there is no image.")
        names = names_of(np.unique([*true[rows], *predicted[rows]]), class_names)
        captions = [names[predicted[row]] + percent.get(row, "") for row in rows]
        if kind == "wrong":
            pairs = zip(captions, rows, strict=True)
            captions = [f"{text}\nactually {names[true[row]]}" for text, row in pairs]
        which = "most confident" if confidence is not None else "first"
        return cls(
            images=array[rows],
            captions=captions,
            n_columns=n_columns,
            title=f"The {len(rows)} {which} of {n_all:,} {kind} predictions",
            limits=_limits(array),
        ).plot(ax)

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: ArrayLike,
        y: ArrayLike,
        *,
        image_shape: Sequence[int] | None = None,
        layout: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """Predict images, and draw the most confident wrong, or right, predictions.

        Parameters
        ----------
        estimator : estimator
            A fitted classifier, Pipeline or search. Its confidence is what its `predict_proba`
            gives the label that it predicts, which need not be the most probable one; without
            probabilities the first rows are drawn.
        X : array-like of shape (n_samples, n_features), (n_samples, height, width) or \
                (n_samples, height, width, channels)
            Images, as the estimator takes them.
        y : array-like of shape (n_samples,)
            Their labels.
        image_shape : tuple (height, width) or (height, width, channels), default=None
            Of rows; None is the estimator's own, else as in `from_images`.
        layout : {"HWC", "CHW"}, default=None
            Order of the values; None is the estimator's own, else "HWC".
        **kwargs : dict
            Of `from_predictions`: `kind`, `n_images`, `class_names`, `n_columns` and `ax`.

        Returns
        -------
        display : ImageGridDisplay
            The display, drawn.

        Raises
        ------
        ValueError
            As in `from_predictions`.
        """
        cls._pyplot()
        predicted, confidence = estimator.predict(X), None
        if hasattr(estimator, "predict_proba"):
            columns = np.searchsorted(estimator.classes_, column_or_1d(predicted))
            confidence = estimator.predict_proba(X)[np.arange(len(columns)), columns]
        image_shape, layout = image_format(estimator, np.shape(X), image_shape, layout)
        return cls.from_predictions(
            X, y, predicted, confidence, image_shape=image_shape, layout=layout, **kwargs
        )


class WeightImagesDisplay(Display):
    """Weights of a linear model, or of a network's first layer, as images.

    Grey weights are drawn from blue (negative) over white to red, colour weights as red, green
    and blue around a mid grey; all on one scale, symmetrical about 0. Create it with
    `from_estimator`.

    Parameters
    ----------
    weights : ndarray of shape (n_images, height, width) or (n_images, height, width, 3)
        The weights.
    captions : list of str, default=None
        What stands above each.
    n_columns : int, default=None
        Images side by side; None chooses.
    title : str, default=""
        What stands above all.

    Attributes
    ----------
    images_ : list of matplotlib AxesImage
        The images.
    texts_ : list of matplotlib Text
        Their captions; empty without.
    colorbar_ : matplotlib Colorbar or None
        The scale of grey weights.
    ax_ : matplotlib Axes
        Axes with the images, one unit wide and high each.
    figure_ : matplotlib Figure
        Figure with the axes.

    See Also
    --------
    ImageGridDisplay : Images whose values are brightness.

    Examples
    --------
    >>> from skcifar import SoftmaxRegression
    >>> from skcifar.datasets import load_digits
    >>> from skcifar.plotting import WeightImagesDisplay
    >>> classifier = SoftmaxRegression().fit(*load_digits(return_X_y=True))
    >>> display = WeightImagesDisplay.from_estimator(classifier)
    >>> display.weights.shape, display.texts_[3].get_text()
    ((10, 8, 8), '3')
    """

    images_: list[AxesImage]
    texts_: list[Text]
    colorbar_: Any

    def __init__(
        self,
        *,
        weights: NDArray[Any],
        captions: Sequence[str] | None = None,
        n_columns: int | None = None,
        title: str = "",
    ) -> None:
        self.weights = weights
        self.captions = captions
        self.n_columns = n_columns
        self.title = title

    def plot(self, ax: Axes | None = None) -> Self:
        """Draw the weights.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        display : WeightImagesDisplay
            This object.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        """
        largest = float(np.abs(self.weights).max()) or 1.0
        is_grey = self.weights.ndim == 3
        images = self.weights if is_grey else 0.5 + self.weights / (2 * largest)
        grid = Grid(images, self.captions, self.n_columns)
        width, height = grid.figure_size
        ax = self._open(ax, min(width + is_grey, WIDTH), height)  # the scale takes an inch
        ax.set_title(self.title)
        style = {"cmap": "RdBu_r", "vmin": -largest, "vmax": largest}
        self.images_, self.texts_ = grid.draw(ax, style)
        self.colorbar_ = None
        if is_grey:
            self.colorbar_ = self.figure_.colorbar(
                self.images_[0], ax=ax, label="weight", shrink=0.8, aspect=15, pad=0.02
            )
        return self

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        *,
        n_images: int = 20,
        class_names: ClassNames = None,
        n_columns: int | None = None,
        image_shape: Sequence[int] | None = None,
        layout: str | None = None,
        ax: Axes | None = None,
    ) -> Self:
        """Draw the first weights of a fitted estimator.

        These are, of what it has, `coef_` (an image for each class, or of an SVC for each pair of
        classes), the columns of `coefs_[0]` or the first convolution of `module_` (an image for
        each unit or filter).

        Parameters
        ----------
        estimator : estimator
            Fitted; of a Pipeline the last step is meant, of a search the best estimator.
            Where the steps before change the number of features, its weights are those of images
            only if you say `image_shape`.
        n_images : int, default=20
            How many at most, the first.
        class_names : sequence or mapping of label to str, default=None
            Names of the labels; None shows the labels.
        n_columns : int, default=None
            Images side by side; None chooses.
        image_shape : tuple (height, width) or (height, width, channels), default=None
            Of the rows that the estimator was fitted to; None is its own, else rows of s² or 3s²
            features are taken for square images.
        layout : {"HWC", "CHW"}, default=None
            Order of the values of a row; None is the estimator's own, else "HWC".
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        display : WeightImagesDisplay
            The display, drawn.

        Raises
        ------
        TypeError
            If the estimator has no such weights.
        ValueError
            If they are no images of one or three channels, or may be none, because a step of the
            Pipeline changes the number of features.
        """
        step = final_step(estimator)
        if hasattr(step, "coef_"):
            rows = np.atleast_2d(step.coef_.toarray() if issparse(step.coef_) else step.coef_)
            captions, title = _class_captions(step, len(rows), class_names), "Weights"
            title += " per class" if captions else ""
        elif hasattr(step, "coefs_"):
            rows = np.asarray(step.coefs_[0]).T  # (n_units, n_features)
            captions, title = None, "Weights of the first layer"
        else:
            rows = _first_filters(step)  # (n_filters, channels, height, width)
            image_shape, layout = None, "CHW"
            captions, title = None, "Filters of the first convolution"
        if rows.ndim == 2:
            if image_shape is None:
                _check_features(estimator, step)
            image_shape, layout = image_format(step, rows.shape, image_shape, layout)
        if n_images < len(rows):
            title += f", {n_images} of {len(rows)}"
        return cls(
            weights=as_images(rows[:n_images], image_shape, layout or "HWC"),
            captions=captions and captions[:n_images],
            n_columns=n_columns,
            title=title,
        ).plot(ax)


# -- images side by side ---------------------------------------------------------------------------


def as_images(rows: ArrayLike, image_shape: Sequence[int] | None, layout: str) -> NDArray[Any]:
    """Return images (n, height, width), or (n, height, width, 3) where they have colours."""
    array = np.asarray(rows)
    if layout not in ("HWC", "CHW"):
        raise ValueError(f"layout={layout!r} was given, expected 'HWC' or 'CHW'.")
    if array.ndim == 2:
        height, width, channels = _shape_of_rows(array.shape[1], image_shape)
        shape = (channels, height, width) if layout == "CHW" else (height, width, channels)
        array = array.reshape(len(array), *shape)
    if array.ndim == 4:
        array = array.transpose(0, 2, 3, 1) if layout == "CHW" else array
        array = array[..., 0] if array.shape[3] == 1 else array
    if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[3] != 3):
        raise ValueError(
            f"Images of shape {np.shape(rows)} were given with layout={layout!r}, expected rows "
            f"(n, features), or images of 1 or 3 channels: (n, height, width) or "
            f"(n, height, width, channels), with layout='CHW' (n, channels, height, width)."
        )
    if len(array) == 0:
        raise ValueError("No image was given or is left to draw, expected at least one.")
    return array


def _shape_of_rows(n_features: int, image_shape: Sequence[int] | None) -> tuple[int, int, int]:
    if image_shape is None:
        for channels in (1, 3):
            side = math.isqrt(n_features // channels)
            if side**2 * channels == n_features:
                return side, side, channels
        raise ValueError(
            f"Rows of {n_features} features were given, which are no square images of 1 or 3 "
            f"channels; say image_shape=(height, width, channels)."
        )
    height, width, channels = (*image_shape, 1)[:3]
    if height * width * channels != n_features:
        raise ValueError(
            f"image_shape={tuple(image_shape)} has {height * width * channels} values, but the "
            f"rows have {n_features} features; say the shape of these."
        )
    return height, width, channels


def _limits(images: NDArray[Any]) -> tuple[float, float]:
    low, high = float(images.min()), float(images.max())
    if images.ndim == 4 and images.dtype == np.uint8:
        return 0.0, 255.0
    if images.ndim == 4 and images.dtype.kind == "f" and low >= 0 and high <= 1:
        return 0.0, 1.0
    return low, high if high > low else low + 1


def _probabilities(confidence: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(confidence, dtype=np.float64)
    if values.ndim != 1 or not ((values >= 0) & (values <= 1 + 1e-6)).all():
        raise ValueError(
            f"confidence of shape {values.shape}, from {values.min():g} to {values.max():g}, was "
            f"given, expected a probability between 0 and 1 for each row: that of the label "
            "predicted."
        )
    return values


class Grid:
    """Images in one pair of axes, each a unit wide and high, with captions above them."""

    def __init__(
        self, images: NDArray[Any], captions: Sequence[str] | None, n_columns: int | None
    ) -> None:
        if captions is not None and len(captions) != len(images):
            raise ValueError(
                f"{len(captions)} captions were given for {len(images)} images, expected one each."
            )
        self.images = images
        self.captions = captions or []
        self.n_columns = n_columns or _columns(len(images))
        self.n_rows = math.ceil(len(images) / self.n_columns)
        self.pitch = 1.08  # units from one image to the next
        self.tile = min(TILE, WIDTH / self.n_columns / self.pitch)
        n_lines = max((text.count("\n") + 1 for text in self.captions), default=0)
        self.pitch_down = 1.08 + n_lines * LINE / self.tile

    @property
    def figure_size(self) -> tuple[float, float]:
        width = max(self.n_columns * self.pitch * self.tile, WIDTH / 2)
        return width, self.n_rows * self.pitch_down * self.tile + 0.45

    def draw(self, ax: Axes, style: dict[str, Any]) -> tuple[list[AxesImage], list[Text]]:
        artists, texts = [], []
        for i, image in enumerate(self.images):
            row, column = divmod(i, self.n_columns)
            left, top = column * self.pitch, row * self.pitch_down
            extent = (left, left + 1, top + 1, top)
            artists.append(ax.imshow(image, extent=extent, interpolation="nearest", **style))
            if self.captions:
                text = ax.text(left + 0.5, top - 0.03, self.captions[i], ha="center", va="bottom")
                text.set(fontsize=8.5, linespacing=1.1, parse_math=False)
                texts.append(text)
        # rows differ in size from figure to figure, so limits come from all images at once
        bottom = (self.n_rows - 1) * self.pitch_down + 1
        ax.set(
            xlim=(0, (self.n_columns - 1) * self.pitch + 1),
            ylim=(bottom, 1.08 - self.pitch_down),
            aspect="equal",
        )
        ax.set_axis_off()
        return artists, texts


def _columns(n_images: int) -> int:
    """So many that no row is left half empty, where that can be had."""
    if n_images <= 6:
        return max(n_images, 1)
    return next((n for n in (6, 5, 8, 7, 4) if n_images % n == 0), 6)


# -- what estimators have --------------------------------------------------------------------------


def image_format(
    estimator: Any, shape: tuple[int, ...], image_shape: Sequence[int] | None, layout: str | None
) -> tuple[Sequence[int] | None, str]:
    """Shape and layout of rows: as given, else the estimator's, if it took them for images."""
    step = final_step(estimator)
    if image_shape is None and len(shape) == 2:
        height, width, channels = getattr(step, "image_shape_", (1, 1, 1))
        if height * width > 1 and height * width * channels == shape[1]:
            image_shape = (height, width, channels)
    return image_shape, layout or str(getattr(step, "layout", "HWC"))


def _class_captions(step: Any, n_rows: int, class_names: ClassNames) -> list[str] | None:
    classes = getattr(step, "classes_", None)
    if classes is None:
        return None
    names = names_of(classes, class_names)
    if len(classes) == 2 and n_rows == 1:
        return ["positive: {1}\nnegative: {0}".format(*(names[label] for label in classes))]
    # dual coefficients: an SVC, with a row for each pair, and three classes have three pairs
    is_row_a_class = len(classes) == n_rows and not hasattr(step, "dual_coef_")
    return [names[label] for label in classes] if is_row_a_class else None


def _check_features(estimator: Any, step: Any) -> None:
    given, taken = (getattr(each, "n_features_in_", None) for each in (estimator, step))
    if None not in (given, taken) and given != taken:
        raise ValueError(
            f"The steps before {step!r} make {taken} features of {given}, so its weights may not "
            f"be those of pixels; if they are, say image_shape=(height, width, channels)."
        )


def _first_filters(step: Any) -> NDArray[Any]:
    """Weights of the first convolution of `module_`, (n_filters, channels, height, width)."""
    modules = step.module_.modules() if hasattr(step, "module_") else ()
    for module in modules:
        weight = getattr(module, "weight", None)
        if weight is not None and weight.ndim == 4:
            return weight.detach().float().cpu().numpy()
    raise TypeError(
        f"{step!r} was given, which has no weights to draw: expected a fitted estimator with "
        f"coef_, coefs_ or a convolution in module_."
    )
