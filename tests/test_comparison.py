import numpy as np
import pytest
from scipy.stats import t as student_t
from sklearn.model_selection import ShuffleSplit
from sweeps import GRID, MLP, X, y

from skcifar._comparison import _like_the_best
from skcifar.model_selection import BatchedGridSearchCV


def test__spread_and_comparison__equal_slow_loops():
    cv = ShuffleSplit(3, test_size=0.2, random_state=0)
    search = BatchedGridSearchCV(MLP, GRID, cv=cv, n_repeats=2, refit=False).fit(X, y)
    results = search.cv_results_
    scores = [[results[f"split{i}_test_score"][c] for i in range(6)] for c in range(6)]
    best = max(range(6), key=lambda c: sum(scores[c]))
    for c in range(6):
        first, second = sum(scores[c][:3]) / 3, sum(scores[c][3:]) / 3
        spread = abs(first - second) / np.sqrt(2)
        assert results["seed_std_test_score"][c] == pytest.approx(spread)
        of_folds = [[(s[fold] + s[fold + 3]) / 2 for fold in range(3)] for s in scores]
        differences = [a - b for a, b in zip(of_folds[c], of_folds[best], strict=True)]
        mean = sum(differences) / 3
        variance = sum((d - mean) ** 2 for d in differences) / 2
        if variance:
            statistic = mean / np.sqrt((1 / 3 + 60 / 240) * variance)
            p_value = 2 * student_t.sf(abs(statistic), 2)
            assert results["indistinguishable_from_best"][c] == (p_value >= 0.05)
    alike = results["indistinguishable_from_best"]
    assert alike[best] and not alike.all()


def test__comparison__failed_candidates_are_never_like_the_best():
    scores = np.array([[0.9, 0.9], [np.nan, 0.9], [0.9, 0.9], [0.1, 0.1]])
    np.testing.assert_array_equal(_like_the_best(scores, 0.25), [True, False, True, False])
    assert not _like_the_best(np.full((2, 3), np.nan), 0.25).any()
    assert _like_the_best(np.array([[0.9], [0.1]]), 0.25).all()
