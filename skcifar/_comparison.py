"""Which candidates chance alone may set apart from the best, and how far seeds spread."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

_LEVEL = 0.05  # of the test for indistinguishable_from_best


def comparison(
    results: dict, splits: list[tuple[NDArray[Any], NDArray[Any]]], n_repeats: int
) -> dict[str, NDArray[Any]]:
    """What cv_results_ has beyond scikit-learn's."""
    test_to_train = sum(len(test) for _, test in splits) / sum(len(train) for train, _ in splits)
    n_candidates = len(results["params"])
    rounds = np.asarray(results.get("iter", np.zeros(n_candidates)))
    added = {}
    for metric in [key.removeprefix("rank_test_") for key in results if "rank_test_" in key]:
        scores = np.stack(
            [results[f"split{i}_test_{metric}"] for i in range(len(splits) * n_repeats)], axis=1
        )  # (n_candidates, n_splits)
        by_repeat = scores.reshape(n_candidates, n_repeats, len(splits))
        means = by_repeat.mean(axis=2)
        # repeats are of the same splits: they say nothing more of other data
        by_fold = by_repeat.mean(axis=1)
        undefined = np.full(n_candidates, np.nan)
        added[f"seed_std_test_{metric}"] = means.std(axis=1, ddof=1) if n_repeats > 1 else undefined
        alike = np.zeros(n_candidates, dtype=bool)
        for number in np.unique(rounds):
            of_folds = by_fold[rounds == number]
            alike[rounds == number] = _like_the_best(of_folds, test_to_train)
        suffix = "" if metric == "score" else f"_{metric}"
        added[f"indistinguishable_from_best{suffix}"] = alike
    return added


def _like_the_best(scores: NDArray[Any], test_to_train: float) -> NDArray[np.bool_]:
    """Which rows of scores (n_candidates, n_splits) the corrected t-test cannot tell from the best.

    A candidate that failed on some split is not among them.
    """
    n_splits = scores.shape[1]
    means = scores.mean(axis=1)
    if np.isnan(means).all():
        return np.zeros(len(means), dtype=bool)
    if n_splits == 1:  # one difference says nothing of its spread
        return ~np.isnan(means)
    differences = scores - scores[np.nanargmax(means)]
    variance = (1 / n_splits + test_to_train) * differences.var(axis=1, ddof=1)
    quantile = student_t.ppf(1 - _LEVEL / 2, n_splits - 1)
    return np.abs(differences.mean(axis=1)) <= quantile * np.sqrt(variance)
