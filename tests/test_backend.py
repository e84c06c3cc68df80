"""The joblib backend "skcifar": scikit-learn's own code, its fits trained together."""

import contextlib
import threading

import joblib
import numpy as np
import pandas as pd
import pytest
from joblib.parallel import Parallel
from numpy.testing import assert_allclose
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.decomposition import PCA
from sklearn.ensemble import BaggingClassifier, RandomForestClassifier, StackingClassifier
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.metrics import pairwise_distances
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    HalvingGridSearchCV,
    RandomizedSearchCV,
    cross_val_predict,
    cross_val_score,
    cross_validate,
    learning_curve,
    permutation_test_score,
    validation_curve,
)
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sweeps import EMBEDDER, MLP, RATES, SOFTMAX, X, assert_same_results, in_block, y

from skcifar import SoftmaxRegression, _backend
from skcifar._backend import Backend

# -- results are those of the sequential run -------------------------------------------------------


@pytest.mark.parametrize("n_jobs", [None, 1, 2, -1])
@pytest.mark.parametrize("pre_dispatch", [1, "2*n_jobs"])
def test__grid_search__equals_the_sequential_one(n_jobs, pre_dispatch, met):
    search = GridSearchCV(
        MLP,
        RATES | {"alpha": [1e-4, 0.1]},
        cv=3,
        scoring=["neg_log_loss", "accuracy"],
        refit="accuracy",
        return_train_score=True,
    )
    alone = clone(search).fit(X, y)
    search.set_params(n_jobs=n_jobs, pre_dispatch=pre_dispatch)
    together = in_block(search.fit, X, y)
    assert_same_results(together.cv_results_, alone.cv_results_)
    assert together.best_params_ == alone.best_params_
    assert_allclose(together.predict_proba(X), alone.predict_proba(X), atol=1e-9)
    assert met == [12]


def test__other_seeds__are_told_apart():
    """That equality is asserted at all."""
    results = [
        cross_validate(clone(MLP).set_params(random_state=seed), X, y, scoring="neg_log_loss")
        for seed in (0, 1)
    ]
    with pytest.raises(AssertionError):
        assert_same_results(*results)


RUNS = {
    "cross_validate": lambda: cross_validate(MLP, X, y, cv=3, scoring="neg_log_loss"),
    "scores": lambda: {"test_score": cross_val_score(SOFTMAX, X, y, cv=3, scoring="neg_log_loss")},
    "predictions": lambda: {"p": cross_val_predict(MLP, X, y, cv=3, method="predict_proba")},
    "learning curve": lambda: dict(
        enumerate(learning_curve(MLP, X, y, cv=2, train_sizes=[0.3, 0.6], scoring="neg_log_loss"))
    ),
    "validation curve": lambda: dict(
        enumerate(
            validation_curve(
                MLP, X, y, param_name="alpha", param_range=[0.1, 1], cv=2, scoring="neg_log_loss"
            )
        )
    ),
    "permutations": lambda: dict(
        enumerate(permutation_test_score(SOFTMAX, X, y, cv=2, n_permutations=3, random_state=0))
    ),
    "randomized": lambda: (
        RandomizedSearchCV(
            SOFTMAX,
            {"alpha": [0.0, 0.1, 1.0]},
            n_iter=2,
            cv=2,
            random_state=0,
            scoring="neg_log_loss",
        )
        .fit(X, y)
        .cv_results_
    ),
    "halving": lambda: (
        HalvingGridSearchCV(
            SOFTMAX, {"alpha": [0.0, 0.1, 1.0, 10.0]}, cv=2, min_resources=60, random_state=0
        )
        .fit(X, y)
        .cv_results_
    ),
    "nested": lambda: cross_validate(
        GridSearchCV(MLP, RATES, cv=2, scoring="neg_log_loss"), X, y, cv=2, scoring="neg_log_loss"
    ),
    "bagging": lambda: cross_validate(
        BaggingClassifier(MLP, 3, random_state=0), X, y, cv=2, scoring="neg_log_loss"
    ),
    "one against the rest": lambda: cross_validate(
        OneVsRestClassifier(SOFTMAX), X, y, cv=2, scoring="neg_log_loss"
    ),
    "stacking": lambda: cross_validate(
        StackingClassifier([("a", SOFTMAX), ("b", MLP)], KNeighborsClassifier(), cv=2), X, y, cv=2
    ),
    "calibrated": lambda: cross_validate(
        CalibratedClassifierCV(SOFTMAX, cv=2), X, y, cv=2, scoring="neg_log_loss"
    ),
    "groups": lambda: cross_validate(
        SOFTMAX, X, y, groups=np.arange(len(X)) % 7, cv=GroupKFold(3), scoring="neg_log_loss"
    ),
    "weights": lambda: cross_validate(
        SOFTMAX, X, y, cv=2, params={"sample_weight": 1.0 + np.arange(len(X)) % 3}
    ),
    "data frame": lambda: cross_validate(
        SOFTMAX, pd.DataFrame(X).add_prefix("pixel"), pd.Series(y), cv=2, scoring="neg_log_loss"
    ),
    "foreign": lambda: cross_validate(
        RandomForestClassifier(5, random_state=0, n_jobs=2), X, y, cv=2, scoring="neg_log_loss"
    ),
    "lone": lambda: cross_validate(
        SoftmaxRegression(solver="lbfgs", alpha=0.1), X, y, cv=2, scoring="neg_log_loss"
    ),
    "pipeline": lambda: (
        GridSearchCV(
            make_pipeline(StandardScaler(), PCA(random_state=0), MLP),
            {"pca__n_components": [5, 9], "mlpclassifier__alpha": [0.1, 1.0]},
            cv=2,
            scoring="neg_log_loss",
        )
        .fit(X, y)
        .cv_results_
    ),
    "embedder": lambda: (
        GridSearchCV(
            make_pipeline(EMBEDDER, SOFTMAX),
            {"softmaxregression__alpha": [0.1, 1.0]},
            cv=2,
            scoring="neg_log_loss",
        )
        .fit(X, y)
        .cv_results_
    ),
}


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("run", RUNS)
def test__run__equals_the_sequential_one(run):
    assert_same_results(in_block(RUNS[run]), RUNS[run]())


def test__neighbours_and_distances__work_in_the_block():
    with joblib.parallel_config(backend="skcifar"):
        near = KNeighborsClassifier(n_jobs=2).fit(X, y).kneighbors(X[:20])
        distances = pairwise_distances(X[:20], X, n_jobs=2)
        n_jobs = joblib.effective_n_jobs(-1)
    for a, b in zip(near, KNeighborsClassifier().fit(X, y).kneighbors(X[:20]), strict=True):
        assert_allclose(a, b)
    assert_allclose(distances, pairwise_distances(X[:20], X))
    assert n_jobs == 2


def test__no_jobs__is_joblibs_error():
    with pytest.raises(ValueError, match="n_jobs == 0"):
        in_block(cross_val_score, SOFTMAX, X, y, n_jobs=0)


@pytest.mark.parametrize("return_as", ["generator", "generator_unordered"])
def test__two_generators__give_their_own_results(return_as):
    def fit(alpha):
        return clone(SOFTMAX).set_params(alpha=alpha).fit(X, y).coef_

    with joblib.parallel_config(backend="skcifar"):
        first, second = (
            Parallel(return_as=return_as)(joblib.delayed(fit)(alpha) for alpha in alphas)
            for alphas in ([0.0, 0.5], [1.0, 2.0])
        )
        coefficients = [*second, *first]
    for ours, alpha in zip(coefficients, [1.0, 2.0, 0.0, 0.5], strict=True):
        assert_allclose(ours, fit(alpha), atol=1e-9)


def test__one_parallel_used_twice__works():
    with joblib.parallel_config(backend="skcifar"), Parallel() as parallel:
        for alpha in (0.1, 1.0):
            model = clone(SOFTMAX).set_params(alpha=alpha)
            fitted = parallel(joblib.delayed(model.fit)(X, y) for _ in range(2))
            assert_allclose(fitted[1].coef_, clone(model).fit(X, y).coef_, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.* does not support callbacks")
@pytest.mark.parametrize("steps", [[], [StandardScaler(), PCA(4)]])
def test__scikit_learns_callbacks__follow_the_epochs(steps):
    def events(backend):
        callback = Follows()
        pipeline = make_pipeline(*steps, SOFTMAX)
        grid = {"softmaxregression__alpha": [0.1, 1.0]}
        model = GridSearchCV(pipeline, grid, cv=2, refit=False)
        model.set_callbacks(callback)
        with joblib.parallel_config(backend=backend) if backend else contextlib.nullcontext():
            model.fit(X, y)
        return sorted(callback.tasks)

    alone = events(None)
    assert alone.count("epoch") == 12
    together = events("skcifar")
    # a step that is not fitted again is told of as one without callbacks of its own
    assert len(together) == len(alone)
    for name in set(alone) if not steps else {"epoch", "fit-final-estimator", "fit-transform-pca"}:
        assert together.count(name) == alone.count(name)


class Follows:
    """A callback of scikit-learn's that notes the tasks that end."""

    max_propagation_depth = None

    def __init__(self):
        self.tasks = []

    def setup(self, estimator, context):
        pass

    def teardown(self, estimator, context):
        pass

    def on_fit_task_begin(self, estimator, context, **kwargs):
        pass

    def on_fit_task_end(self, estimator, context, **kwargs):
        self.tasks.append(context.task_name)


# -- threads and processes -------------------------------------------------------------------------


def test__two_user_threads__do_not_meet():
    results = {}

    def run(name, model):
        for _ in range(3):
            results.setdefault(name, []).append(in_block(cross_val_score, model, X, y, cv=3))

    models = {"softmax": SOFTMAX, "mlp": MLP}
    threads = [threading.Thread(target=run, args=item) for item in models.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, model in models.items():
        expected = cross_val_score(model, X, y, cv=3)
        assert_allclose(results[name], [expected] * 3, atol=1e-9)


def search_in_block(alpha):
    search = GridSearchCV(clone(SOFTMAX).set_params(alpha=alpha), RATES, cv=2)
    return in_block(search.fit, X, y).cv_results_["mean_test_score"]


def test__searches_in_processes__train_in_each():
    scores = Parallel(n_jobs=2, backend="loky")(
        joblib.delayed(search_in_block)(a) for a in (0.1, 1.0)
    )
    assert_allclose(scores, [search_in_block(0.1), search_in_block(1.0)], atol=1e-9)


# -- a joblib that has changed ---------------------------------------------------------------------


@pytest.fixture
def first_use(monkeypatch):
    monkeypatch.setattr(_backend, "_probe_passed", None)


def no_context(backend):
    return contextlib.nullcontext()


def other_signature(backend, func, callback, priority):
    raise NotImplementedError


def honours_no_pre_dispatch(backend, n_jobs=1, parallel=None, **_):
    effective = configure(backend, n_jobs, parallel)
    parallel.pre_dispatch = "n_jobs - 1"
    return effective


configure = Backend.configure


CHANGES = {
    "retrieval_context": no_context,
    "submit": other_signature,
    "configure": honours_no_pre_dispatch,
}


@pytest.mark.parametrize("name", CHANGES)
def test__changed_joblib__is_one_warning_and_the_sequential_run(name, first_use, monkeypatch):
    monkeypatch.setattr(Backend, name, CHANGES[name])
    with pytest.warns(RuntimeWarning, match="does not work with joblib") as caught:
        together = in_block(cross_validate, MLP, X, y, cv=3, scoring="neg_log_loss")
        in_block(cross_validate, GridSearchCV(MLP, RATES, cv=2), X, y, cv=2)
    assert len([w for w in caught if "joblib" in str(w.message)]) == 1
    assert_same_results(together, cross_validate(MLP, X, y, cv=3, scoring="neg_log_loss"))


def test__joblib_as_it_is__passes_the_trial(first_use):
    in_block(cross_val_score, SOFTMAX, X, y, cv=2)
    assert _backend._probe_passed is True
