"""How well an embedding retrieves rows of the same class, as metrics and as `scoring=`."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import pairwise_distances_chunked
from sklearn.neighbors import NearestNeighbors
from sklearn.utils._param_validation import Interval, validate_params
from sklearn.utils.validation import check_X_y

__all__ = [
    "make_embedding_scorer",
    "map_at_r_score",
    "map_at_r_scorer",
    "recall_at_1_scorer",
    "recall_at_k_score",
]

Metric = str | Callable[..., float]


@validate_params(
    {
        "X": ["array-like"],
        "y": ["array-like"],
        "k": [Interval(Integral, 1, None, closed="left")],
        "metric": [str, callable],
        "n_jobs": [Integral, None],
    },
    prefer_skip_nested_validation=True,
)
def recall_at_k_score(
    X: ArrayLike,
    y: ArrayLike,
    *,
    k: int = 1,
    metric: Metric = "euclidean",
    n_jobs: int | None = None,
) -> float:
    """Compute the share of samples with one of their label among the k nearest others.

    Every sample queries all others. The measure of metric learning [1]_ [2]_: for k=1 the
    accuracy of the nearest neighbour, left one out. A sample whose label no other has counts as
    not found.

    Parameters
    ----------
    X : array-like of shape (n_samples, n_components)
        The embedding.
    y : array-like of shape (n_samples,)
        Labels.
    k : int, default=1
        Neighbours to look at, at most n_samples - 1.
    metric : str or callable, default="euclidean"
        Distance, as in :class:`sklearn.neighbors.NearestNeighbors`.
    n_jobs : int, default=None
        Threads of the search for neighbours, as in :class:`sklearn.neighbors.NearestNeighbors`.

    Returns
    -------
    score : float
        Between 0 and 1, best.

    Raises
    ------
    ValueError
        If there are fewer than 2 samples, if `k` is not between 1 and n_samples - 1, or if no
        label occurs twice.

    See Also
    --------
    map_at_r_score : Looks at all neighbours that could be right, and at their order.

    References
    ----------
    .. [1] H. Jégou, M. Douze and C. Schmid, "Product Quantization for Nearest Neighbor Search",
       IEEE TPAMI 33(1), 2011, https://doi.org/10.1109/TPAMI.2010.57
    .. [2] K. Musgrave, S. Belongie and S.-N. Lim, "A Metric Learning Reality Check", ECCV 2020,
       https://arxiv.org/abs/2003.08505

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn.decomposition import PCA
    >>> from skcifar.metrics import recall_at_k_score
    >>> X, y = load_digits(return_X_y=True)
    >>> embedding = PCA(n_components=2).fit_transform(X)
    >>> round(recall_at_k_score(embedding, y), 2), round(recall_at_k_score(embedding, y, k=5), 2)
    (0.59, 0.86)
    """
    embedding, labels, _ = _check_embedding(X, y, "recall_at_k_score")
    if k > len(labels) - 1:
        raise ValueError(
            f"k={k} neighbours were asked for, expected at most n_samples - 1 = {len(labels) - 1}: "
            f"lower k, or score more samples."
        )
    search = NearestNeighbors(n_neighbors=k, metric=metric, n_jobs=n_jobs).fit(embedding)
    neighbors = search.kneighbors(return_distance=False)  # (n_samples, k), never the sample itself
    return float(np.mean((labels[neighbors] == labels[:, None]).any(axis=1)))


@validate_params(
    {
        "X": ["array-like"],
        "y": ["array-like"],
        "metric": [str, callable],
        "n_jobs": [Integral, None],
    },
    prefer_skip_nested_validation=True,
)
def map_at_r_score(
    X: ArrayLike,
    y: ArrayLike,
    *,
    metric: Metric = "euclidean",
    n_jobs: int | None = None,
) -> float:
    r"""Compute the mean average precision at R of an embedding.

    For a sample with R others of its label, its R nearest neighbours are asked for [1]_:

    .. math:: \frac{1}{R} \sum_{i=1}^{R} P(i) \, [\text{neighbour } i \text{ has the label}]

    where P(i) is the share of the label among the first i neighbours. The score is the mean over
    the samples; those whose label no other has, R = 0, are left out of it, though not out of the
    others' neighbours. It is 1 only where every class is apart from all others.

    Parameters
    ----------
    X : array-like of shape (n_samples, n_components)
        The embedding.
    y : array-like of shape (n_samples,)
        Labels.
    metric : str or callable, default="euclidean"
        Distance, as in :func:`sklearn.metrics.pairwise_distances`.
    n_jobs : int, default=None
        Jobs that compute distances, as in :func:`sklearn.metrics.pairwise_distances`.

    Returns
    -------
    score : float
        Between 0 and 1, best.

    Raises
    ------
    ValueError
        If there are fewer than 2 samples, or if no label occurs twice.

    See Also
    --------
    recall_at_k_score : Whether any of the k nearest neighbours has the label.

    Notes
    -----
    Distances are computed a chunk of samples at a time, in the memory that
    :func:`sklearn.set_config` calls `working_memory`.

    References
    ----------
    .. [1] K. Musgrave, S. Belongie and S.-N. Lim, "A Metric Learning Reality Check", ECCV 2020,
       https://arxiv.org/abs/2003.08505

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.neighbors import NeighborhoodComponentsAnalysis
    >>> from skcifar.metrics import map_at_r_score
    >>> X, y = load_iris(return_X_y=True)
    >>> nca = NeighborhoodComponentsAnalysis(n_components=2, random_state=0)
    >>> round(map_at_r_score(X, y), 2), round(map_at_r_score(nca.fit_transform(X, y), y), 2)
    (0.77, 0.87)
    """
    embedding, labels, n_relevant = _check_embedding(X, y, "map_at_r_score")

    def average_precisions(distances: NDArray[Any], start: int) -> list[float]:
        # One sample at a time: the positions of a whole chunk would take its memory once more.
        scores = []
        for sample, row in enumerate(distances, start):
            row[sample] = np.inf  # behind all others, the sample is not among the first R
            neighbors = _nearest(row, n_relevant[sample])
            scores.append(_average_precision(labels[neighbors] == labels[sample]))
        return scores

    chunks = pairwise_distances_chunked(
        embedding, reduce_func=average_precisions, metric=metric, n_jobs=n_jobs
    )
    return float(np.concatenate(list(chunks))[n_relevant > 0].mean())


def make_embedding_scorer(score_func: Callable[..., float], **kwargs: Any) -> _EmbeddingScorer:
    """Make a scorer of transformers from a metric of embeddings.

    Parameters
    ----------
    score_func : callable
        ``score_func(embedding, y, **kwargs)``, greater is better: one of those here, or
        scikit-learn's :func:`~sklearn.metrics.silhouette_score`, say.
    **kwargs : dict
        Further arguments of `score_func`.

    Returns
    -------
    scorer : callable
        ``scorer(estimator, X, y)`` scores ``estimator.transform(X)``. For `scoring` of
        :func:`~sklearn.model_selection.cross_val_score`,
        :class:`~sklearn.model_selection.GridSearchCV` and the like, of transformers and of
        Pipelines that end in one. It can be pickled if `score_func` can.

    Raises
    ------
    TypeError
        If `score_func` cannot be called; from the scorer, if the estimator has no `transform`.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn.decomposition import PCA
    >>> from sklearn.model_selection import GridSearchCV
    >>> from skcifar.metrics import make_embedding_scorer, recall_at_k_score
    >>> X, y = load_digits(return_X_y=True)
    >>> scorer = make_embedding_scorer(recall_at_k_score, k=3)
    >>> scorer
    make_embedding_scorer(recall_at_k_score, k=3)
    >>> search = GridSearchCV(PCA(), {"n_components": [2, 8]}, scoring=scorer).fit(X, y)
    >>> search.best_params_
    {'n_components': 8}
    """
    if not callable(score_func):
        raise TypeError(
            f"score_func={score_func!r} was given, expected a function of an embedding and its "
            f"labels: give recall_at_k_score, say."
        )
    return _EmbeddingScorer(score_func, kwargs)


class _EmbeddingScorer:
    """Score what a fitted transformer makes of images, by their labels.

    Parameters
    ----------
    estimator : estimator
        A fitted transformer, or a Pipeline that ends in one.
    X : array-like of shape (n_samples, ...)
        What it transforms.
    y : array-like of shape (n_samples,)
        Labels.

    Returns
    -------
    score : float
        Greater is better.

    Raises
    ------
    TypeError
        If the estimator has no `transform`.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn.decomposition import PCA
    >>> from sklearn.model_selection import cross_val_score
    >>> from skcifar.metrics import recall_at_1_scorer
    >>> X, y = load_digits(return_X_y=True)
    >>> scores = cross_val_score(PCA(n_components=16), X, y, scoring=recall_at_1_scorer)
    >>> round(float(scores.mean()), 2)
    0.98
    """

    def __init__(self, score_func: Callable[..., float], kwargs: dict[str, Any]) -> None:
        self._score_func = score_func
        self._kwargs = kwargs

    def __call__(self, estimator: Any, X: Any, y: Any) -> float:
        if not hasattr(estimator, "transform"):
            raise TypeError(
                f"{self!r} was given {estimator!r}, which has no transform: expected a fitted "
                f"transformer, or a Pipeline that ends in one. Score a classifier by its "
                f'predictions: scoring="accuracy".'
            )
        return self._score_func(estimator.transform(X), y, **self._kwargs)

    def __repr__(self) -> str:
        name = getattr(self._score_func, "__name__", repr(self._score_func))
        arguments = [name, *(f"{key}={value!r}" for key, value in self._kwargs.items())]
        return f"make_embedding_scorer({', '.join(arguments)})"


recall_at_1_scorer = make_embedding_scorer(recall_at_k_score, k=1)
map_at_r_scorer = make_embedding_scorer(map_at_r_score)


def _check_embedding(
    X: ArrayLike, y: ArrayLike, metric_name: str
) -> tuple[NDArray[Any], NDArray[np.intp], NDArray[np.intp]]:
    """Return the embedding, the labels as codes, and of each sample how many others share its."""
    embedding, names = check_X_y(X, y, dtype=[np.float64, np.float32], ensure_min_samples=2)
    classes, labels, counts = np.unique(names, return_inverse=True, return_counts=True)
    if counts.max() < 2:
        raise ValueError(
            f"{metric_name} was given {len(names)} samples of {len(classes)} labels, expected one "
            f"that occurs twice at least: there is nothing to retrieve. Pass class labels, and "
            f"more samples of each."
        )
    return embedding, labels, counts[labels] - 1


def _nearest(distances: NDArray[Any], n: int) -> NDArray[np.intp]:
    """Return the positions of the n smallest distances, in their order."""
    some = np.argpartition(distances, n)[:n]
    return some[np.argsort(distances[some])]


def _average_precision(hits: NDArray[np.bool_]) -> float:
    """Return the mean over ranks of the precision where there is a hit, else 0."""
    if not len(hits):
        return 0.0  # not counted
    precisions = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float(np.mean(precisions * hits))
