"""Tasks have the surroundings of their call, and errors, warnings and times of their own."""

import sys
import threading
import time
import warnings

import joblib
import numpy as np
import pytest
import sklearn
import torch
from joblib.parallel import Parallel
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.exceptions import FitFailedWarning
from sklearn.model_selection import GridSearchCV, cross_val_score, cross_validate
from skorch.callbacks import Callback
from sweeps import MLP, SOFTMAX, X, in_block, y

from skcifar import _tasks

# -- random numbers --------------------------------------------------------------------------------


def test__random_state_none__is_one_seed_of_the_call():
    model = clone(SOFTMAX).set_params(random_state=None)
    folds = [(np.arange(200), np.arange(200, 300))] * 2

    def fits():
        return [
            estimator.coef_
            for estimator in in_block(cross_validate, model, X, y, cv=folds, return_estimator=True)[
                "estimator"
            ]
        ]

    generator = np.random.mtrand._rand  # what scikit-learn takes None for
    state = generator.get_state()
    expected = model.fit(X[:200], y[:200]).coef_
    after = generator.randint(1000)
    generator.set_state(state)
    first, second = fits()
    assert generator.randint(1000) == after
    assert_allclose(first, second, rtol=0, atol=1e-9)
    assert_allclose(first, expected, rtol=0, atol=1e-9)
    assert np.abs(first - fits()[0]).max() > 1e-6  # another call, another seed


def test__fixed_random_state__leaves_global_generator_alone():
    before = np.random.mtrand._rand.get_state()[1].copy(), torch.get_rng_state()
    in_block(cross_val_score, SOFTMAX, X, y, cv=2)
    assert_array_equal(np.random.mtrand._rand.get_state()[1], before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


# -- what belongs to a thread ----------------------------------------------------------------------


def test__tasks__have_the_callers_surroundings():
    def task():
        SOFTMAX.fit(X, y)
        return torch.is_grad_enabled(), sklearn.get_config()["assume_finite"]

    with (
        torch.no_grad(),
        sklearn.config_context(assume_finite=True),
        joblib.parallel_config(backend="skcifar"),
    ):
        found = Parallel()(joblib.delayed(task)() for _ in range(2))
    assert found == [(False, True)] * 2


def test__warning_filters__stay_with_their_task():
    def task(number):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always" if number % 2 else "ignore")
            clone(SOFTMAX).set_params(alpha=float(number)).fit(X, y)
            warnings.warn(f"of {number}", UserWarning, stacklevel=1)
        return [str(warning.message) for warning in caught]

    before = list(warnings.filters), warnings.showwarning
    with joblib.parallel_config(backend="skcifar"):
        caught = Parallel()(joblib.delayed(task)(number) for number in range(4))
    assert caught == [[], ["of 1"], [], ["of 3"]]
    assert (list(warnings.filters), warnings.showwarning) == before


def test__warnings_in_training__go_by_the_fits_own_filters():
    class Warns(Callback):
        def on_epoch_end(self, net, **kwargs):
            warnings.warn("an epoch", UserWarning, stacklevel=1)

    model = clone(SOFTMAX).set_params(skorch_callbacks=[Warns()])

    def task(action):
        with warnings.catch_warnings():
            warnings.simplefilter(action)
            model.fit(X, y)

    with joblib.parallel_config(backend="skcifar"):
        Parallel()(joblib.delayed(task)("ignore") for _ in range(2))
        with pytest.warns(UserWarning, match="an epoch"):
            Parallel()(joblib.delayed(task)("default") for _ in range(2))


def test__fit_in_a_thread_of_the_task__is_trained_there(met):
    def task():
        model = clone(SOFTMAX)
        thread = threading.Thread(target=model.fit, args=(X, y))
        thread.start()
        thread.join()
        return model.coef_

    with joblib.parallel_config(backend="skcifar"):
        coefficients = Parallel()(joblib.delayed(task)() for _ in range(2))
    assert met == []
    assert_array_equal(coefficients, [clone(SOFTMAX).fit(X, y).coef_] * 2)


# -- errors ----------------------------------------------------------------------------------------


class Fails(ClassifierMixin, BaseEstimator):
    """Fits one of ours, then fails."""

    def __init__(self, fails=True):
        self.fails = fails

    def fit(self, X, y):
        self.model_ = clone(SOFTMAX).fit(X, y)
        self.classes_ = self.model_.classes_
        if self.fails:
            raise ZeroDivisionError("in fit")
        return self

    def predict(self, X):
        return self.model_.predict(X)


@pytest.mark.parametrize("nested", [False, True])
def test__error__reaches_the_caller_with_its_traceback(nested):
    search = GridSearchCV(Fails(), {"fails": [False, True, False]}, cv=2, error_score="raise")
    model = GridSearchCV(search, {"cv": [2, 3]}, cv=2, error_score="raise") if nested else search
    with pytest.raises(ZeroDivisionError, match="in fit") as caught:
        in_block(model.fit, X, y)
    assert any(
        entry.name == "fit" and "test_tasks" in str(entry.path) for entry in caught.traceback
    )
    assert len(in_block(cross_val_score, SOFTMAX, X, y, cv=2)) == 2


@pytest.mark.filterwarnings("ignore:One or more of the test scores are non-finite")
def test__error_score__is_the_failing_candidates():
    search = GridSearchCV(Fails(), {"fails": [False, True]}, cv=2)
    with pytest.warns(FitFailedWarning, match="ZeroDivisionError"):
        in_block(search.fit, X, y)
    assert np.isnan(search.cv_results_["mean_test_score"]).tolist() == [False, True]


@pytest.mark.filterwarnings("ignore:One or more of the test scores are non-finite")
def test__diverging_fit__costs_its_own_score_only():
    search = GridSearchCV(SOFTMAX, {"learning_rate_init": [0.1, 1e300]}, cv=2)
    with pytest.warns(FitFailedWarning, match="diverged"):
        in_block(search.fit, X, y)
    assert np.isnan(search.cv_results_["mean_test_score"]).tolist() == [False, True]


def test__exit__is_no_end_of_a_task_but_the_callers():
    with joblib.parallel_config(backend="skcifar"), pytest.raises(SystemExit, match="7"):
        Parallel()(joblib.delayed(sys.exit)(7) for _ in range(2))


# -- times -----------------------------------------------------------------------------------------


def test__times__are_of_the_tasks_own_work():
    # a fit from 10 to 20 that waits from 12 to 17 while others work 2 s for it; a score to 26,
    # with a wait from 21 to 25 at 1 s
    absences = [_tasks._Absence(12, 17, 2), _tasks._Absence(21, 25, 1)]
    value = [{"fit_time": 10.0, "score_time": 6.0, "test_scores": 1.0}]
    corrected = _tasks.with_own_times(value, 9.99, absences)
    assert corrected == [{"fit_time": 7.0, "score_time": 3.0, "test_scores": 1.0}]


def test__values_without_times__stay():
    absences = [_tasks._Absence(12, 17, 2)]
    for value in ([1.0], [{"score": 1.0}], 3, [(1, 2)]):
        assert _tasks.with_own_times(value, 9.0, absences) == value


def test__fit_times__sum_to_no_more_than_the_whole():
    search = GridSearchCV(MLP, {"alpha": [0.1, 1.0, 10.0]}, cv=3, refit=False)
    start = time.time()
    in_block(search.fit, X, y)
    whole = time.time() - start
    times = [search.cv_results_[f"mean_{name}_time"].sum() * 3 for name in ("fit", "score")]
    assert 0 < sum(times) <= whole
