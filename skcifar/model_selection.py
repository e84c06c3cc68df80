"""Searches whose fits are trained together, and the comparison of classifiers in one table."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student_t
from sklearn.base import BaseEstimator, clone
from sklearn.metrics import check_scoring, get_scorer
from sklearn.model_selection import BaseCrossValidator, check_cv, cross_validate
from sklearn.utils import _safe_indexing, check_consistent_length

from skcifar._fitted import describe, epoch_records, fitted_model
from skcifar._search import (
    BatchedGridSearchCV,
    BatchedHalvingSearchCV,
    BatchedRandomizedSearchCV,
)

__all__ = [
    "BatchedGridSearchCV",
    "BatchedHalvingSearchCV",
    "BatchedRandomizedSearchCV",
    "compare",
]

Split = tuple[NDArray[Any], NDArray[Any]]  # rows to train on, rows to score

SUMMARY_COLUMNS = [
    "model",
    "parameters",
    "cv_mean",
    "cv_std",
    "difference",
    "difference_low",
    "difference_high",
    "train_score",
    "test_score",
    "fit_seconds",
    "predict_seconds",
    "epochs",
    "error",
]


def compare(
    estimators: Mapping[str, BaseEstimator] | Iterable[tuple[str, BaseEstimator]],
    X: ArrayLike,
    y: ArrayLike,
    *,
    cv: int | BaseCrossValidator | Iterable[Split] | None = 5,
    X_test: ArrayLike | None = None,
    y_test: ArrayLike | None = None,
    scoring: str | Callable[..., float] | None = None,
    n_jobs: int | None = None,
    verbose: int = 0,
) -> pd.DataFrame:
    r"""Compare classifiers on the same cross-validation splits.

    Each estimator is cloned and run through
    :func:`sklearn.model_selection.cross_validate`; the splits are drawn once, so that the
    scores of two models in one fold come from the same images and can be subtracted. A model
    that raises costs its own row only.

    Parameters
    ----------
    estimators : mapping of str to estimator, or iterable of (str, estimator) pairs
        The models and the names of their rows. Any scikit-learn classifier, Pipeline or search
        will do. Names must be unique. The estimators themselves are not fitted.
    X : array-like of shape (n_samples, ...)
        Training images: flat rows, or whatever else all estimators accept.
    y : array-like of shape (n_samples,)
        Their labels.
    cv : int, cross-validation generator or iterable of splits, default=5
        As in :func:`sklearn.model_selection.cross_validate`: an integer is a number of
        stratified folds. For grouped data pass the splits, e.g.
        ``GroupKFold().split(X, y, groups)``.
    X_test : array-like of shape (n_test_samples, ...), default=None
        Held-out images. When given, each model is fitted once more on all of `X` and scored on
        these.
    y_test : array-like of shape (n_test_samples,), default=None
        Their labels.
    scoring : str or callable, default=None
        One metric, greater is better: a name that :func:`sklearn.metrics.get_scorer` knows or a
        callable ``scorer(estimator, X, y)``. None is the estimator's own ``score``, which is
        accuracy for classifiers.
    n_jobs : int, default=None
        Folds of one model fitted at a time, as in :class:`joblib.Parallel`.
    verbose : int, default=0
        Progress on standard error: 1 writes a line for each finished model, 2 also one for
        each fold as it starts.

    Returns
    -------
    table : pandas.DataFrame
        One row a model, in the order given:

        - ``model``, ``parameters``: the name, and the estimator with those parameters that
          differ from its defaults; the steps of a Pipeline are joined by ``" | "``.
        - ``cv_mean``, ``cv_std``: mean and standard deviation (divisor k, as in
          ``cv_results_``) of the k scores on the rows that each fold leaves out.
        - ``difference``, ``difference_low``, ``difference_high``: mean over the folds of the
          score minus that of the model with the highest ``cv_mean``, and its 95% interval,
          corrected as described in the Notes. 0 for that model itself.
        - ``train_score``: mean over the folds of the score on the rows trained on.
        - ``test_score``: score on `X_test` of the model fitted on all of `X`; NaN without
          `X_test`.
        - ``fit_seconds``, ``predict_seconds``: mean seconds over the folds to fit, and to score
          the rows left out.
        - ``epochs``: mean over the folds of ``n_iter_``; NaN for a model without one.
        - ``error``: type and message of the exception that stopped the model, else missing.
          What was measured before it is kept.
        - ``split0_score``, ``split1_score``, …: the score of each fold.

        ``table.attrs["histories"]`` is a list with one dict for each model, fold (from 0) and
        epoch (from 1), taken from a fitted ``history_`` or else from ``loss_curve_``:
        ``pandas.DataFrame(table.attrs["histories"])`` plots. ``table.attrs["tracebacks"]`` maps
        each failed model to its traceback.

        ``table.attrs["predictions"]`` maps each model that was fitted to what it predicts, as
        columns of ``pandas.DataFrame(table.attrs["predictions"][name])``: ``part`` is "test" for
        rows of `X_test`, predicted by the model fitted on all of `X`; without `X_test` it is
        "left out", for rows of `X`, predicted by the models of the folds that leave them out,
        fold after fold. ``row`` counts the rows of that part from 0, ``actual`` and
        ``predicted`` are labels, ``confidence`` is the probability of the predicted one, None
        where the model gives none: it has no probabilities, or they cannot be computed, or the
        label is not among its ``classes_``. A model whose ``predict`` raises keeps its row and
        scores, and is not in this mapping. Apart from ``part``, which is one text, they are
        lists of Python's own values.

    Raises
    ------
    TypeError
        If `estimators` is neither a mapping nor pairs of a name and an estimator.
    ValueError
        If there are no estimators or two have one name, if only one of `X_test` and `y_test` is
        given, if lengths differ, or if `scoring` or `cv` is not known to scikit-learn.

    Notes
    -----
    Folds share most of their training rows, so the plain t-test on fold scores rejects far too
    often. The interval takes the variance of a mean of k differences as
    :math:`(1/k + n_{test}/n_{train})\,s^2` with k - 1 degrees of freedom, the corrected
    resampled t-test of [1]_. It is about a pair of models: it allows neither for choosing the
    best after seeing the scores nor for looking at many pairs.

    References
    ----------
    .. [1] C. Nadeau and Y. Bengio, "Inference for the Generalization Error", Machine Learning,
       52, 239-281, 2003.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn.dummy import DummyClassifier
    >>> from sklearn.naive_bayes import GaussianNB
    >>> from skcifar.model_selection import compare
    >>> X, y = load_digits(return_X_y=True)
    >>> table = compare({"bayes": GaussianNB(), "dummy": DummyClassifier()}, X, y, cv=3)
    >>> table[["model", "cv_mean", "difference", "error"]].round(3)
       model  cv_mean  difference error
    0  bayes    0.814       0.000   NaN
    1  dummy    0.101      -0.712   NaN
    """
    named = _check_estimators(estimators)
    check_consistent_length(X, y)
    if (X_test is None) != (y_test is None):
        given, missing = ("X_test", "y_test") if y_test is None else ("y_test", "X_test")
        raise ValueError(f"{given} was given without {missing}; pass both or neither")
    check_consistent_length(X_test, y_test)  # None has no length and passes
    if isinstance(scoring, str):
        get_scorer(scoring)  # an unknown name is an error of the call, not of every model
    elif scoring is not None and not callable(scoring):
        raise ValueError(f"scoring must be one metric, a name or a callable, got {scoring!r}")
    splits: list[Split] = list(check_cv(cv, y, classifier=True).split(X, y))

    protocol = _Protocol(X, y, splits, X_test, y_test, scoring, n_jobs, verbose)

    studies = []
    for position, (name, estimator) in enumerate(named, start=1):
        study = _Study(name, estimator, prefix=f"[{position}/{len(named)}] {name}: ")
        study.run(protocol)
        studies.append(study)

    fold_columns = [f"split{fold}_score" for fold in range(len(splits))]
    table = pd.DataFrame([study.row for study in studies], columns=SUMMARY_COLUMNS + fold_columns)
    numbers = [c for c in table.columns if c not in ("model", "parameters", "error")]
    table = table.astype({**dict.fromkeys(numbers, float), "error": "str"})
    test_to_train = sum(len(test) for _, test in splits) / sum(len(train) for train, _ in splits)
    _add_differences(table, fold_columns, test_to_train)
    table.attrs = {
        "histories": [record for study in studies for record in study.history],
        "tracebacks": {s.name: s.traceback for s in studies if s.traceback is not None},
        "predictions": {s.name: s.predictions for s in studies if s.predictions is not None},
    }
    return table


def _check_estimators(
    estimators: Mapping[str, BaseEstimator] | Iterable[tuple[str, BaseEstimator]],
) -> list[tuple[str, BaseEstimator]]:
    expected = "estimators must be a dict of name to estimator or (name, estimator) pairs"
    if isinstance(estimators, Mapping):
        pairs = list(estimators.items())
    elif isinstance(estimators, Iterable) and not isinstance(estimators, str | BaseEstimator):
        pairs = list(estimators)
    else:
        raise TypeError(f"{expected}, got {estimators!r}")
    if not pairs:
        raise ValueError(f"{expected}, got none")
    for pair in pairs:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise TypeError(f"{expected}, got {pair!r} among them")
    names = [name for name, _ in pairs]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise ValueError(f"model names must be unique, got {duplicates} more than once: rename")
    return [(name, estimator) for name, estimator in pairs]


@dataclass(frozen=True)
class _Protocol:
    """What is the same for every model."""

    X: ArrayLike
    y: ArrayLike
    splits: list[Split]
    X_test: ArrayLike | None
    y_test: ArrayLike | None
    scoring: str | Callable[..., float] | None
    n_jobs: int | None
    verbose: int


class _Study:
    """What is measured of one model; an exception ends it and is kept."""

    def __init__(self, name: str, estimator: BaseEstimator, *, prefix: str) -> None:
        self.name = name
        self.estimator = estimator
        self.prefix = prefix
        self.row: dict[str, Any] = {"model": name}
        self.history: list[dict[str, Any]] = []
        self.traceback: str | None = None
        self.predictions: dict[str, Any] | None = None
        self.no_predictions: str | None = None  # why not, of a model that was scored

    def run(self, protocol: _Protocol) -> None:
        def announce(level: int, text: str) -> None:
            if protocol.verbose >= level:
                print(self.prefix + text, file=sys.stderr, flush=True)

        start = time.perf_counter()
        try:
            self.row["parameters"] = describe(self.estimator)
            self._cross_validate(protocol, announce=partial(announce, 2))
            if protocol.X_test is not None:
                announce(2, "fit on all training rows")
                self._score_held_out(protocol)
        except Exception as error:  # KeyboardInterrupt is none and ends the comparison
            self.row["error"] = _in_one_line(error)
            self.traceback = traceback.format_exc()
            outcome = f"failed with {self.row['error']}"
        else:
            outcome = "{cv_mean:.4f} ± {cv_std:.4f}".format(**self.row)
            if self.no_predictions is not None:
                outcome += f", without predictions: {self.no_predictions}"
        announce(1, f"{outcome} ({time.perf_counter() - start:.1f} s)")

    def _cross_validate(self, protocol: _Protocol, announce: Callable[[str], None]) -> None:
        results = cross_validate(
            self.estimator,
            protocol.X,
            protocol.y,
            cv=_AnnouncedSplits(protocol.splits, announce),
            scoring=protocol.scoring,
            n_jobs=protocol.n_jobs,
            return_train_score=True,
            return_estimator=True,
            error_score="raise",
        )
        scores = results["test_score"]  # (n_folds,)
        self.row |= {f"split{fold}_score": score for fold, score in enumerate(scores)}
        self.row |= {
            "cv_mean": scores.mean(),
            "cv_std": scores.std(),
            "train_score": results["train_score"].mean(),
            "fit_seconds": results["fit_time"].mean(),
            "predict_seconds": results["score_time"].mean(),
        }
        fitted = [fitted_model(estimator) for estimator in results["estimator"]]
        # scikit-learn has a number, or an array with one for each class.
        epochs = [np.max(m.n_iter_) for m in fitted if getattr(m, "n_iter_", None) is not None]
        if len(epochs) == len(fitted):
            self.row["epochs"] = np.mean(epochs)
        for fold, model in enumerate(fitted):
            self.history += [
                {"model": self.name, "fold": fold, "epoch": epoch, **record}
                for epoch, record in enumerate(epoch_records(model), start=1)
            ]
        if protocol.X_test is None:
            self._predict("left out", results["estimator"], protocol.X, protocol.y, protocol.splits)

    def _score_held_out(self, protocol: _Protocol) -> None:
        fitted = clone(self.estimator).fit(protocol.X, protocol.y)
        scorer = check_scoring(fitted, scoring=protocol.scoring)
        self.row["test_score"] = scorer(fitted, protocol.X_test, protocol.y_test)
        every_row = np.arange(len(np.asarray(protocol.y_test)))
        self._predict("test", [fitted], protocol.X_test, protocol.y_test, [(every_row, every_row)])

    def _predict(self, part: str, fitted: list[Any], X: Any, y: Any, splits: list[Split]) -> None:
        """Keep what each model says of the rows that its split scores.

        A scorer may want nothing of `predict`, so that scores are no worse where it fails.
        """
        if not hasattr(fitted[0], "predict"):
            return
        rows = [np.arange(len(np.asarray(y)))[scored] for _, scored in splits]  # of masks, too
        try:
            said = [
                _predictions(model, _safe_indexing(X, scored))
                for model, scored in zip(fitted, rows, strict=True)
            ]
        except Exception as error:
            self.no_predictions = _in_one_line(error)
            return
        row = np.concatenate(rows)
        self.predictions = {
            "part": part,
            "row": row.tolist(),
            "actual": np.asarray(y)[row].tolist(),
            "predicted": [one for labels, _ in said for one in labels],
            "confidence": [one for _, confidences in said for one in confidences],
        }


def _in_one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _predictions(model: Any, X: Any) -> tuple[list[Any], list[float | None]]:
    """Labels, and the probability of each, None where there is none."""
    labels = np.asarray(model.predict(X)).tolist()
    try:
        return labels, _confidences(model, X, labels)
    except Exception:  # predict_proba need not work where predict does
        return labels, [None] * len(labels)


def _confidences(model: Any, X: Any, labels: list[Any]) -> list[float | None]:
    # By label, for classes_ need not be sorted, and a label need not be among them (that of
    # outliers). Not the largest of each row: a tuned threshold may predict another class.
    column_of = {label: column for column, label in enumerate(np.asarray(model.classes_).tolist())}
    probabilities = np.asarray(model.predict_proba(X))
    if probabilities.shape != (len(labels), len(column_of)):  # several outputs
        return [None] * len(labels)
    columns = [column_of.get(label) for label in labels]
    return [
        None if column is None else float(row[column])
        for row, column in zip(probabilities, columns, strict=True)
    ]


class _AnnouncedSplits:
    """Fixed splits that tell of each fold as it is handed out to be fitted."""

    def __init__(self, splits: list[Split], announce: Callable[[str], None]) -> None:
        self.splits = splits
        self.announce = announce

    def get_n_splits(self, X: Any = None, y: Any = None, groups: Any = None) -> int:
        return len(self.splits)

    def split(self, X: Any = None, y: Any = None, groups: Any = None) -> Iterator[Split]:
        for fold, split in enumerate(self.splits, start=1):
            self.announce(f"fold {fold} of {len(self.splits)}")
            yield split


def _add_differences(table: pd.DataFrame, fold_columns: list[str], test_to_train: float) -> None:
    """Fill in each model's paired difference to the best and its corrected 95% interval."""
    if table["cv_mean"].isna().all():
        return
    best = table["cv_mean"].argmax()
    scores = table[fold_columns].to_numpy()  # (n_models, n_folds)
    differences = scores - scores[best]
    n_folds = len(fold_columns)
    center = differences.mean(axis=1)
    if n_folds > 1:
        variance = (1 / n_folds + test_to_train) * differences.var(axis=1, ddof=1)
        half_width = student_t.ppf(0.975, n_folds - 1) * np.sqrt(variance)
    else:
        half_width = np.full(len(table), np.nan)  # one difference says nothing of its spread
    table["difference"] = center
    table["difference_low"] = center - half_width
    table["difference_high"] = center + half_width
