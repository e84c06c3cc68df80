import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import Pipeline
from sweeps import GRID, LONG, MANY, MLP, X, y

from skcifar import SoftmaxRegression
from skcifar.model_selection import (
    BatchedGridSearchCV,
    BatchedHalvingSearchCV,
    BatchedRandomizedSearchCV,
)


def test__plan__says_what_is_trained_together_and_trains_nothing(tmp_path, trained):
    search = BatchedGridSearchCV(MLP, GRID, cv=3, journal=tmp_path / "j")
    table = search.plan(X, y)
    assert not trained and not (tmp_path / "j").exists() and not hasattr(search, "cv_results_")
    assert list(table) == [
        *("group", "models", "estimator", "widths", "batch_size"),
        *("epochs", "bytes", "seconds", "reason"),
    ]
    assert table["models"].sum() == 18 and table["models"].max() > 1
    assert set(table["estimator"]) == {"MLPClassifier"} and set(table["widths"]) == {"8-10"}
    assert set(table["batch_size"]) == {50} and set(table["epochs"]) == {4}
    assert (table["seconds"] > 0).all() and table["reason"].isna().all()
    rows = 200 * 64 * 8
    assert (table["bytes"] > rows).all()
    assert table.attrs["total_seconds"] == pytest.approx(table["seconds"].sum())


def test__plan__gives_reasons_for_what_is_trained_alone():
    models = Pipeline([("model", MLP)])
    grid = [
        {"model": [MLP], "model__alpha": [0.0, 0.1]},
        {"model": [SoftmaxRegression(max_iter=3)], "model__alpha": [0.0, 0.1]},
        {"model": [LogisticRegression()], "model__C": [1.0]},
    ]
    table = BatchedGridSearchCV(models, grid, cv=2).plan(X, y)
    assert table["models"].sum() == 10
    alone = table[table["estimator"] == "SoftmaxRegression"].iloc[0]
    assert alone["models"] == 4 and "lbfgs" in alone["reason"]
    foreign = table[table["estimator"] == "LogisticRegression"].iloc[0]
    assert foreign["models"] == 2 and foreign["reason"] == "not an estimator of skcifar"
    assert np.isnan(foreign["seconds"]) and table.attrs["total_seconds"] > 0


@pytest.mark.parametrize(
    "settings", [{}, {"factor": 2}, {"min_resources": 2}, {"aggressive_elimination": True}]
)
def test__plan_of_halving__rounds_are_those_of_the_search(settings):
    search = BatchedHalvingSearchCV(LONG, MANY, cv=2, **settings)
    table = search.plan(X, y)
    later = table[table["estimator"] == "survivors of the round before"]
    search.fit(X, y)
    assert list(later["models"]) == [2 * n for n in search.n_candidates_[1:]]
    n_resources = np.diff([search.n_resources_[0], *search.n_resources_[1:]])
    np.testing.assert_array_equal(later["epochs"], n_resources)
    assert table["models"].sum() == 2 * sum(search.n_candidates_)


def test__plan__takes_fit_parameters_and_leaves_the_search_alone():
    search = BatchedRandomizedSearchCV(MLP, GRID, n_iter=2, cv=GroupKFold(2), random_state=0)
    before = repr(search)
    table = search.plan(X, y, groups=np.arange(300) % 5, sample_weight=np.ones(300))
    assert table["models"].sum() == 4
    assert repr(search) == before and not hasattr(search, "best_params_")
