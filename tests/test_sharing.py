"""Tasks share rows and fitted steps, as far as nobody can tell."""

import numpy as np
import pandas as pd
import pytest
import sklearn
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin, clone
from sklearn.decomposition import PCA
from sklearn.model_selection import (
    GridSearchCV,
    cross_val_score,
    cross_validate,
    permutation_test_score,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sweeps import EMBEDDER, RATES, SOFTMAX, X, assert_same_results, in_block, y

from skcifar import SoftmaxRegression
from skcifar._backend import Backend, collect
from skcifar._tasks import Study

# -- steps -----------------------------------------------------------------------------------------


class Records(TransformerMixin, BaseEstimator):
    """A step that counts its fits, and adds noise where it is to."""

    fits = []

    def __init__(self, factor=1.0, noise=0.0):
        self.factor = factor
        self.noise = noise

    def fit(self, X, y=None):
        self.fits.append((self.factor, X.shape))
        self.mean_ = X.mean(axis=0)
        if self.noise:
            self.mean_ = self.mean_ + np.random.mtrand._rand.normal(size=X.shape[1])
        return self

    def transform(self, X):
        return (X - self.mean_) * self.factor


class Scales(StandardScaler):
    """A step of somebody else's that says so when its input is not its own."""

    def fit(self, X, y=None, sample_weight=None):
        assert X.flags.writeable
        return super().fit(X, y, sample_weight)


@pytest.fixture
def fits(monkeypatch):
    monkeypatch.setattr(Records, "fits", [])
    return Records.fits


def test__steps__are_fitted_once_per_fold_and_setting(fits):
    pipeline = make_pipeline(Records(), Scales(), SOFTMAX)
    grid = {"records__factor": [1.0, 2.0], "softmaxregression__alpha": [0.1, 1.0, 10.0]}
    search = GridSearchCV(pipeline, grid, cv=3, scoring="neg_log_loss", return_train_score=True)
    alone = clone(search).fit(X, y)
    assert len(fits) == 18 + 1
    fits.clear()
    in_block(search.fit, X, y)
    assert len(fits) == 6 + 1
    assert_same_results(search.cv_results_, alone.cv_results_)


def test__steps_in_nested_searches__are_fitted_once_too(fits):
    pipeline = make_pipeline(Records(), SOFTMAX)
    search = GridSearchCV(pipeline, {"softmaxregression__alpha": [0.1, 1.0]}, cv=2)
    in_block(cross_val_score, search, X, y, cv=2)
    assert len(fits) == 2 * (2 + 1)


def test__steps__are_shared_with_data_frames_and_memory_of_the_users_own(fits, tmp_path):
    pipeline = make_pipeline(StandardScaler(), PCA(4), SOFTMAX).set_output(transform="pandas")
    grid = {"softmaxregression__alpha": [0.1, 1.0]}
    frame = pd.DataFrame(X).add_prefix("pixel")
    search = GridSearchCV(pipeline, grid, cv=2, scoring="neg_log_loss")
    alone = clone(search).fit(frame, y).cv_results_
    assert_same_results(in_block(search.fit, frame, y).cv_results_, alone)
    pipeline = make_pipeline(Records(), SOFTMAX, memory=str(tmp_path))
    in_block(GridSearchCV(pipeline, grid, cv=2).fit, X, y)
    assert len(fits) == 2 + 1


def test__step_of_ours__is_trained_once_for_the_tasks_that_wait_for_it(met):
    pipeline = make_pipeline(EMBEDDER, SOFTMAX)
    search = GridSearchCV(pipeline, {"softmaxregression__alpha": [0.1, 1.0, 10.0]}, cv=2)
    trained = []

    class Tells(Study):
        def trained(self, task, job, result):
            trained.append(task)

    in_block(search.fit, X, y, backend=Backend(Tells()))
    assert len(trained) == 2 + 6


def test__step_that_draws__is_fitted_for_each_candidate(fits):
    pipeline = make_pipeline(Records(noise=1.0), SOFTMAX)
    search = GridSearchCV(pipeline, {"softmaxregression__alpha": [0.1, 1.0]}, cv=2)
    in_block(search.fit, X, y)
    assert len(fits) == 4 + 1


def test__step_that_writes_to_its_input__is_not_shared(fits):
    pipeline = make_pipeline(Records(), StandardScaler(copy=False), SOFTMAX)
    search = GridSearchCV(pipeline, {"softmaxregression__alpha": [0.1, 1.0]}, cv=2)
    alone = clone(search).fit(X, y).cv_results_
    fits.clear()
    assert_same_results(in_block(search.fit, X, y).cv_results_, alone)
    assert len(fits) == 4 + 1


def test__return_estimator__gives_fitted_ones_of_their_own():
    pipeline = make_pipeline(StandardScaler(), SOFTMAX)
    folds = [(np.arange(200), np.arange(200, 300))] * 2
    a, b = in_block(cross_validate, pipeline, X, y, cv=folds, return_estimator=True)["estimator"]
    assert a.memory is None
    assert a[0] is not b[0]
    expected = clone(pipeline).fit(X[:200], y[:200])
    assert_allclose(a.predict_proba(X), expected.predict_proba(X), atol=1e-9)
    assert_array_equal(a[0].mean_, expected[0].mean_)


# -- rows ------------------------------------------------------------------------------------------


class Writes(ClassifierMixin, BaseEstimator):
    """Writes to its X."""

    def __init__(self, alpha=1.0):
        self.alpha = alpha

    def fit(self, X, y):
        X[:] = 0
        self.classes_ = np.unique(y)
        return self

    def predict(self, X):
        return np.full(len(X), self.classes_[0])


@pytest.fixture
def large():
    return np.tile(X, (1, 10)), y  # 1.5 MB


def test__equal_folds__share_their_rows(large):
    fits = collect(lambda: in_block(GridSearchCV(SOFTMAX, RATES, cv=3).fit, *large))
    addresses = {fit.job.train.rows.data_ptr() for fit in fits}
    assert (len(fits), len(addresses)) == (6, 3)


def test__equal_folds_after_a_step__share_their_rows():
    grid = {"softmaxregression__alpha": [0.1, 1.0]}
    search = GridSearchCV(make_pipeline(StandardScaler(), SOFTMAX), grid, cv=3)
    fits = collect(lambda: in_block(search.fit, X, y))
    addresses = {fit.job.train.rows.data_ptr() for fit in fits}
    assert (len(fits), len(addresses)) == (6, 3)


def test__foreign_estimator__may_write_to_its_rows(large):
    search = GridSearchCV(Writes(), {"alpha": [0.1, 1.0]}, cv=3, error_score="raise", refit=False)
    before = large[0].copy()
    in_block(search.fit, *large)
    assert_array_equal(large[0], before)
    mixed = GridSearchCV(
        make_pipeline(StandardScaler(), SOFTMAX),
        {"softmaxregression": [SOFTMAX, Writes()]},
        cv=3,
        error_score="raise",
        refit=False,
    )
    together, alone = in_block(clone(mixed).fit, *large), clone(mixed).fit(*large)
    for name in ("mean_test_score", "std_test_score"):
        assert_allclose(together.cv_results_[name], alone.cv_results_[name], atol=1e-9)


def test__shared_rows__are_plain_arrays_to_scorers_and_others(large):
    kinds = set()

    def scorer(model, X, y):
        kinds.add(type(X))
        return model.score(X, y)

    class Looks(SoftmaxRegression):
        def fit(self, X, y):
            kinds.add(type(X))
            return super().fit(X, y)

    in_block(cross_validate, Looks(**SOFTMAX.get_params()), *large, cv=3, scoring=scorer)
    assert kinds == {np.ndarray}
    with sklearn.config_context(assume_finite=True):
        scores = in_block(permutation_test_score, SOFTMAX, *large, cv=2, n_permutations=2)
    assert len(scores[1]) == 2


class FitsHead(SoftmaxRegression):
    """Fits the first rows only."""

    def __init__(self, n_rows=100, solver="sgd", max_iter=3, normalize=True, random_state=0):
        super().__init__(
            solver=solver, max_iter=max_iter, normalize=normalize, random_state=random_state
        )
        self.n_rows = n_rows

    def fit(self, X, y):
        return super().fit(X[: self.n_rows], y[: self.n_rows])


def test__part_of_shared_rows__has_statistics_of_its_own(large):
    search = GridSearchCV(
        FitsHead(), {"n_rows": [40, 100, 150]}, cv=2, refit=False, scoring="neg_log_loss"
    )
    found = in_block(clone(search).fit, *large).cv_results_
    assert_same_results(found, search.fit(*large).cv_results_)
