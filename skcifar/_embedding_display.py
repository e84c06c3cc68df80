"""A Display of rows of features as points in the plane."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.utils import check_consistent_length, resample

from skcifar._display import WIDTH, ClassNames, Display, colours_for, named_legend, names_of
from skcifar._fitted import final_step

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection
    from matplotlib.legend import Legend

MARKERS = "osD^vPX<>p*"
METHODS = {"tsne": "t-SNE", "pca": "PCA", "umap": "UMAP"}


class EmbeddingDisplay(Display):
    """Rows of features as points in the plane, a colour and a marker for each class.

    Create it with `from_estimator` or `from_features`.

    Parameters
    ----------
    points : ndarray of shape (n_points, 2)
        Where the points are.
    labels : ndarray of shape (n_points,)
        Their classes.
    class_names : sequence or mapping of label to str, default=None
        Names of the labels; None shows the labels.
    axis_names : tuple of two str, default=("", "")
        Names of the axes.
    title : str, default=""
        What stands above.

    Attributes
    ----------
    scatters_ : list of matplotlib PathCollection
        The points of each class, in the order of the sorted labels.
    legend_ : matplotlib Legend
        Names of the classes.
    ax_ : matplotlib Axes
        Axes with the points.
    figure_ : matplotlib Figure
        Figure with the axes.

    References
    ----------
    .. [1] L. van der Maaten and G. Hinton, "Visualizing Data using t-SNE", JMLR 9, 2008.
    .. [2] L. McInnes, J. Healy and J. Melville, "UMAP: Uniform Manifold Approximation and
       Projection for Dimension Reduction", 2018, https://arxiv.org/abs/1802.03426

    Examples
    --------
    >>> from skcifar.datasets import load_digits
    >>> from skcifar.plotting import EmbeddingDisplay
    >>> X, y = load_digits(return_X_y=True)
    >>> display = EmbeddingDisplay.from_features(X, y, method="pca", n_samples=500, random_state=0)
    >>> display.ax_.get_title()
    'PCA of the features, 500 of 1,797 rows'
    >>> display.ax_.get_xlabel()
    'component 1 (15% of the variance)'
    """

    scatters_: list[PathCollection]
    legend_: Legend

    def __init__(
        self,
        *,
        points: NDArray[Any],
        labels: NDArray[Any],
        class_names: ClassNames = None,
        axis_names: tuple[str, str] = ("", ""),
        title: str = "",
    ) -> None:
        self.points = points
        self.labels = labels
        self.class_names = class_names
        self.axis_names = axis_names
        self.title = title

    def plot(self, ax: Axes | None = None) -> Self:
        """Draw the points.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        display : EmbeddingDisplay
            This object.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        """
        ax = self._open(ax, WIDTH, 6)
        classes = np.unique(self.labels)
        names = names_of(classes, self.class_names)
        colours = colours_for(len(classes))
        size = np.clip(20_000 / len(self.points), 8, 40)  # points²: few may be large
        self.scatters_ = []
        for i, label in enumerate(classes):
            x, y = self.points[self.labels == label].T
            marker = MARKERS[i % len(MARKERS)]
            style = {"color": colours[i], "marker": marker, "alpha": 0.8, "linewidths": 0}
            self.scatters_.append(ax.scatter(x, y, size, **style))
        ax.set(title=self.title, xlabel=self.axis_names[0], ylabel=self.axis_names[1])
        self.legend_ = named_legend(
            ax,
            [names[label] for label in classes],
            self.scatters_,
            loc="center left",
            bbox_to_anchor=(1, 0.5),
            frameon=False,
            markerscale=2,
        )
        return self

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: ArrayLike,
        y: ArrayLike,
        *,
        layer: int | None = None,
        **kwargs: Any,
    ) -> Self:
        """Draw what a fitted transformer, or a hidden layer of a classifier, makes of rows.

        Parameters
        ----------
        estimator : estimator
            Fitted, with `transform`, or for `layer` with `hidden_layer_output`; a Pipeline whose
            last step has it, or a search.
        X : array-like of shape (n_samples, ...)
            Rows or images, as the estimator takes them; only those that are drawn are transformed.
        y : array-like of shape (n_samples,)
            Their labels.
        layer : int, default=None
            The hidden layer, -1 being the last; None is the output of `transform`.
        **kwargs : dict
            Of `from_features`: `method`, `n_samples`, `random_state`, `class_names`, `source` and
            `ax`.

        Returns
        -------
        display : EmbeddingDisplay
            The display, drawn.

        Raises
        ------
        TypeError
            If the estimator has neither.
        ValueError, ImportError
            As in `from_features`.
        """
        source = "the embedding" if layer is None else f"hidden layer {layer}"
        kwargs = {"source": source, **kwargs}
        return cls._from_rows(X, y, lambda rows: _features_of(estimator, rows, layer), **kwargs)

    @classmethod
    def from_features(
        cls,
        features: ArrayLike,
        y: ArrayLike,
        *,
        method: str = "tsne",
        n_samples: int | None = 2000,
        random_state: Any = None,
        class_names: ClassNames = None,
        source: str = "the features",
        ax: Axes | None = None,
    ) -> Self:
        """Draw rows of features: pixels, or whatever was computed from them.

        Parameters
        ----------
        features : array-like of shape (n_samples, ...)
            The features.
        y : array-like of shape (n_samples,)
            Their labels.
        method : {"tsne", "pca", "umap"}, default="tsne"
            How they become points: t-SNE [1]_ (of more than 50 features the first 50 principal
            components), the first two principal components, or UMAP [2]_, which wants umap-learn.
        n_samples : int, default=2000
            Rows to draw, each class with its share; None draws all.
        random_state : int, RandomState instance or None, default=None
            Seed of the choice of rows and of the method.
        class_names : sequence or mapping of label to str, default=None
            Names of the labels; None shows the labels.
        source : str, default="the features"
            What the features are, for the title.
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        display : EmbeddingDisplay
            The display, drawn.

        Raises
        ------
        ValueError
            If `method` is another or `y` has another length.
        ImportError
            If matplotlib, or for `method="umap"` umap-learn, is not installed.
        """
        return cls._from_rows(
            features,
            y,
            np.asarray,
            method=method,
            n_samples=n_samples,
            random_state=random_state,
            class_names=class_names,
            source=source,
            ax=ax,
        )

    @classmethod
    def _from_rows(
        cls,
        X: ArrayLike,
        y: ArrayLike,
        features_of: Callable[[Any], NDArray[Any]],
        *,
        source: str,
        method: str = "tsne",
        n_samples: int | None = 2000,
        random_state: Any = None,
        class_names: ClassNames = None,
        ax: Axes | None = None,
    ) -> Self:
        cls._pyplot()  # what is missing is complained of before anything takes long
        if method not in METHODS:
            raise ValueError(f"method={method!r} was given, expected one of {', '.join(METHODS)}.")
        if method == "umap":
            _load_umap()
        rows, labels = _stratified(X, y, n_samples, random_state)
        features = features_of(rows)
        points, axis_names = _points(features.reshape(len(features), -1), method, random_state)
        n_rows = len(np.asarray(y))
        subset = "all" if len(points) == n_rows else f"{len(points):,} of"
        return cls(
            points=points,
            labels=labels,
            class_names=class_names,
            axis_names=axis_names,
            title=f"{METHODS[method]} of {source}, {subset} {n_rows:,} rows",
        ).plot(ax)


def _features_of(estimator: Any, X: Any, layer: int | None) -> NDArray[Any]:
    if hasattr(estimator, "best_estimator_"):
        estimator = estimator.best_estimator_
    wanted = "transform" if layer is None else "hidden_layer_output"
    step = final_step(estimator)
    if not hasattr(step, wanted):
        raise TypeError(
            f"{estimator!r} was given with layer={layer}, which has no {wanted}: expected a fitted "
            f"transformer, or a network and its hidden layer, layer=-1 say. Of other features "
            f"draw EmbeddingDisplay.from_features."
        )
    if layer is None:
        return np.asarray(estimator.transform(X))
    if step is not estimator and len(estimator) > 1:
        X = estimator[:-1].transform(X)
    return np.asarray(step.hidden_layer_output(X, layer))


def _stratified(
    X: Any, y: ArrayLike, n_samples: int | None, random_state: Any
) -> tuple[Any, NDArray[Any]]:
    """So many rows, each class with its share, or all."""
    labels = np.asarray(y)
    check_consistent_length(X, labels)
    if n_samples is None or n_samples >= len(labels):
        return X, labels
    rows, kept = resample(
        X, labels, replace=False, n_samples=n_samples, stratify=labels, random_state=random_state
    )
    return rows, np.asarray(kept)


def _points(
    features: NDArray[Any], method: str, random_state: Any
) -> tuple[NDArray[Any], tuple[str, str]]:
    """Points (n, 2) and what their axes are."""
    if method == "pca":
        pca = PCA(2, random_state=random_state)
        points = pca.fit_transform(features)
        first, second = (f"{share:.0%}" for share in pca.explained_variance_ratio_)
        return points, (
            f"component 1 ({first} of the variance)",
            f"component 2 ({second} of the variance)",
        )
    axis_names = f"{METHODS[method]} 1 (no unit)", f"{METHODS[method]} 2 (no unit)"
    if method == "umap":
        return _load_umap().UMAP(random_state=random_state).fit_transform(features), axis_names
    if min(features.shape) > 50:  # what t-SNE's authors do: less noise, and faster
        features = PCA(50, random_state=random_state).fit_transform(features)
    # a perplexity must be less than the number of points
    perplexity = min(30.0, (len(features) - 1) / 3)
    return TSNE(perplexity=perplexity, random_state=random_state).fit_transform(
        features
    ), axis_names


def _load_umap() -> Any:
    try:
        return import_module("umap")
    except Exception as error:
        raise ImportError(
            "method='umap' was given, which wants umap-learn: pip install umap-learn, or use "
            "method='tsne' or 'pca'."
        ) from error
