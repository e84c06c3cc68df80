import pickle
import threading

import joblib
import numpy as np
import pandas as pd
import pytest
from scipy.stats import loguniform
from sklearn.base import clone
from sklearn.exceptions import FitFailedWarning
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    HalvingGridSearchCV,
    RandomizedSearchCV,
    ShuffleSplit,
    StratifiedKFold,
    cross_val_score,
)
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sweeps import GRID, LONG, MANY, MLP, X, assert_same_results, interrupt_after, y

from skcifar import SoftmaxRegression
from skcifar._backend import Backend
from skcifar.model_selection import (
    BatchedGridSearchCV,
    BatchedHalvingSearchCV,
    BatchedRandomizedSearchCV,
)

# -- scikit-learn's results ------------------------------------------------------------------------

ADDED = ["seed_std_test_score", "indistinguishable_from_best"]


def test__grid__results_equal_scikit_learns():
    settings = {"cv": 3, "return_train_score": True}
    expected = GridSearchCV(MLP, GRID, **settings).fit(X, y)
    found = BatchedGridSearchCV(MLP, GRID, **settings).fit(X, y)
    assert_same_results(found.cv_results_, expected.cv_results_)
    assert list(found.cv_results_)[len(expected.cv_results_) :] == ADDED
    assert found.best_index_ == expected.best_index_ and found.n_splits_ == 3
    assert found.best_params_ == expected.best_params_
    np.testing.assert_allclose(found.predict_proba(X), expected.predict_proba(X), atol=1e-9)


def test__grid_off_by_a_little__comparison_notices():
    expected = GridSearchCV(MLP, GRID, cv=3, refit=False).fit(X, y).cv_results_
    other = clone(MLP).set_params(random_state=1)
    found = BatchedGridSearchCV(other, GRID, cv=3, refit=False).fit(X, y).cv_results_
    with pytest.raises(AssertionError):
        assert_same_results(found, expected)


def test__randomized__results_equal_scikit_learns():
    drawn = {"learning_rate_init": loguniform(1e-3, 1), "hidden_layer_sizes": [(4,), (8, 4)]}
    settings = {"n_iter": 5, "random_state": 3, "cv": ShuffleSplit(2, random_state=0)}
    expected = RandomizedSearchCV(MLP, drawn, **settings).fit(X, y)
    found = BatchedRandomizedSearchCV(MLP, drawn, **settings).fit(X, y)
    assert_same_results(found.cv_results_, expected.cv_results_)
    assert found.best_params_ == expected.best_params_


def test__several_metrics__results_equal_scikit_learns_and_each_is_compared():
    settings = {"cv": 3, "scoring": ["accuracy", "neg_log_loss"], "refit": "neg_log_loss"}
    expected = GridSearchCV(MLP, GRID, **settings).fit(X, y)
    found = BatchedGridSearchCV(MLP, GRID, **settings).fit(X, y)
    assert_same_results(found.cv_results_, expected.cv_results_)
    assert list(found.cv_results_)[len(expected.cv_results_) :] == [
        "seed_std_test_accuracy",
        "indistinguishable_from_best_accuracy",
        "seed_std_test_neg_log_loss",
        "indistinguishable_from_best_neg_log_loss",
    ]
    assert found.best_params_ == expected.best_params_


def test__halving_over_rows__results_equal_scikit_learns():
    settings = {"resource": "n_samples", "cv": 3, "random_state": 0, "min_resources": 60}
    expected = HalvingGridSearchCV(MLP, GRID, **settings).fit(X, y)
    found = BatchedHalvingSearchCV(MLP, GRID, **settings).fit(X, y)
    assert_same_results(found.cv_results_, expected.cv_results_)
    assert found.n_resources_ == expected.n_resources_
    assert found.best_params_ == expected.best_params_


def test__pipeline_groups_and_weights__results_equal_scikit_learns():
    pipeline = Pipeline([("scale", StandardScaler()), ("mlp", MLP)])
    grid = {f"mlp__{name}": values for name, values in GRID.items()}
    fit = {"groups": np.arange(300) % 7, "mlp__sample_weight": np.linspace(0.1, 2, 300)}
    expected = GridSearchCV(pipeline, grid, cv=GroupKFold(3)).fit(X, y, **fit)
    found = BatchedGridSearchCV(pipeline, grid, cv=GroupKFold(3)).fit(X, y, **fit)
    assert_same_results(found.cv_results_, expected.cv_results_)


def test__foreign_estimator__results_equal_scikit_learns():
    grid = {"C": [0.1, 1]}
    model = LogisticRegression(max_iter=500)
    expected = GridSearchCV(model, grid, cv=3).fit(X, y)
    found = BatchedGridSearchCV(model, grid, cv=3).fit(X, y)
    assert_same_results(found.cv_results_, expected.cv_results_)
    assert found.epoch_results_.empty


def test__seeded_search__leaves_numpys_global_generator_alone():
    before = np.random.get_state(legacy=False)  # noqa: NPY002
    BatchedHalvingSearchCV(MLP, GRID, cv=2, n_repeats=2).fit(X, y)
    after = np.random.get_state(legacy=False)  # noqa: NPY002
    np.testing.assert_equal(after, before)


def test__one_shot_splits__are_gone_through_once():
    splits = list(StratifiedKFold(3).split(X, y))
    expected = BatchedGridSearchCV(MLP, GRID, cv=3).fit(X, y)
    found = BatchedGridSearchCV(MLP, GRID, cv=iter(splits)).fit(X, y)
    assert_same_results(found.cv_results_, expected.cv_results_)


def test__refit_by_callable__sees_what_is_added():
    def simplest(results):
        return int(np.flatnonzero(results["indistinguishable_from_best"])[-1])

    search = BatchedGridSearchCV(MLP, GRID, cv=3, refit=simplest).fit(X, y)
    alike = search.cv_results_["indistinguishable_from_best"]
    assert search.best_index_ == np.flatnonzero(alike)[-1]


@pytest.mark.parametrize(
    "search",
    [
        BatchedGridSearchCV(MLP, GRID, n_repeats=2, journal="j", validate_epochs=True),
        BatchedRandomizedSearchCV(MLP, GRID, n_iter=3, random_state=1),
        BatchedHalvingSearchCV(MLP, GRID, factor=2, max_resources=8),
    ],
)
def test__search__clones_and_shows_its_parameters(search):
    copied = clone(search)
    assert repr(copied) == repr(search)
    given, base = copied.get_params(deep=False), type(search).__mro__[2]
    assert set(given) - set(base(MLP, GRID).get_params(deep=False)) == {
        "journal",
        "n_repeats",
        "validate_epochs",
        "progress",
        "backend",
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_repeats": 0},
        {"journal": 3},
        {"progress": "bar"},
        {"validate_epochs": "yes"},
        {"backend": "ray"},
    ],
)
def test__wrong_parameter__error_names_it(wrong):
    with pytest.raises(ValueError, match=f"'{next(iter(wrong))}' parameter"):
        BatchedGridSearchCV(MLP, GRID, **wrong).fit(X, y)


def test__fitted_search__survives_pickling_without_its_study():
    search = BatchedGridSearchCV(MLP, GRID, cv=2).fit(X, y)
    restored = pickle.loads(pickle.dumps(search))
    assert (restored.predict(X) == search.predict(X)).all()
    pd.testing.assert_frame_equal(restored.epoch_results_, search.epoch_results_)
    assert not hasattr(search, "_study")


def test__search_within_a_block_of_the_backend__is_as_by_itself():
    search = BatchedHalvingSearchCV(MLP, GRID, cv=2, n_repeats=2)
    expected = cross_val_score(search, X, y, cv=2)
    with joblib.parallel_config(backend="skcifar"):
        found = cross_val_score(search, X, y, cv=2)
        alone = clone(search).fit(X, y).cv_results_
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert (alone["seed_std_test_score"] > 0).any()


@pytest.mark.parametrize("asked", [{"n_repeats": 2}, {"validate_epochs": True}])
def test__backend_that_does_not_work__is_an_error_where_results_need_it(monkeypatch, asked):
    monkeypatch.setattr(Backend, "effective_n_jobs", lambda self, n_jobs: 1)
    plain = BatchedGridSearchCV(MLP, GRID, cv=2).fit(X, y)
    assert len(plain.cv_results_["params"]) == 6
    with pytest.raises(RuntimeError, match=f"{next(iter(asked))} of BatchedGridSearchCV need"):
        BatchedGridSearchCV(MLP, GRID, cv=2, **asked).fit(X, y)


# -- halving ---------------------------------------------------------------------------------------


def of_last_round(search):
    results = search.cv_results_
    last = np.flatnonzero(results["iter"] == search.n_iterations_ - 1)
    return [results["params"][i] for i in last], results["mean_test_score"][last]


@pytest.mark.parametrize(
    "model",
    [
        LONG,
        clone(LONG).set_params(solver="adam", learning_rate_init=0.01, learning_rate="cosine"),
        clone(LONG).set_params(early_stopping=True, learning_rate="constant"),
        make_pipeline(StandardScaler(), LONG),
        SoftmaxRegression(max_iter=9),
    ],
    ids=["one_cycle", "adam", "early_stopping", "pipeline", "lbfgs"],
)
@pytest.mark.filterwarnings("ignore:The training has not converged")
def test__survivors__equal_trainings_without_a_pause(model):
    prefix = "mlpclassifier__" if isinstance(model, Pipeline) else ""
    grid = {prefix + name: values for name, values in MANY.items()}
    search = BatchedHalvingSearchCV(model, grid, resource=prefix + "max_iter", cv=3).fit(X, y)
    assert (search.n_candidates_, search.n_resources_) == ([10, 4, 2], [1, 3, 9])
    survivors, scores = of_last_round(search)
    one_each = [{name: [value] for name, value in each.items()} for each in survivors]
    plain = GridSearchCV(model, one_each, cv=3, refit=False).fit(X, y)
    np.testing.assert_allclose(scores, plain.cv_results_["mean_test_score"], rtol=0, atol=1e-9)
    assert search.best_params_[prefix + "max_iter"] == 9


def test__survivors__go_on_and_are_not_trained_anew():
    events = []
    search = BatchedHalvingSearchCV(LONG, MANY, cv=3, progress=events.append).fit(X, y)
    epochs = 3 * (10 * 1 + 4 * (3 - 1) + 2 * (9 - 3))
    assert events[-1]["done_epochs"] == epochs
    table = search.epoch_results_
    lengths = table.groupby(["candidate", "fold"]).size()
    np.testing.assert_array_equal(
        lengths.unstack()[0].to_numpy(), search.cv_results_["n_resources"]
    )
    assert search.best_estimator_.n_iter_ == 9


def test__halving__keys_are_scikit_learns_and_max_resources_stays_auto():
    settings = {"resource": "max_iter", "cv": 3}
    expected = HalvingGridSearchCV(LONG, MANY, max_resources=9, **settings).fit(X, y)
    search = BatchedHalvingSearchCV(LONG, MANY, **settings).fit(X, y)
    assert list(search.cv_results_) == list(expected.cv_results_) + ADDED
    for key in ("iter", "n_resources"):
        np.testing.assert_array_equal(search.cv_results_[key], expected.cv_results_[key])
    assert search.max_resources == "auto" and search.max_resources_ == 9


def test__repeated_first_round__trains_nothing_twice():
    events = []
    settings = {"max_resources": 3, "min_resources": 1, "aggressive_elimination": True}
    search = BatchedHalvingSearchCV(LONG, MANY, cv=2, progress=events.append, **settings)
    search.fit(X, y)
    assert (search.n_candidates_, search.n_resources_) == ([10, 4, 2], [1, 1, 3])
    assert events[-1]["done_epochs"] == events[-1]["expected_epochs"] == 2 * (10 + 0 + 2 * 2)
    survivors, scores = of_last_round(search)
    one_each = [{name: [value] for name, value in each.items()} for each in survivors]
    plain = GridSearchCV(LONG, one_each, cv=2, refit=False).fit(X, y)
    np.testing.assert_allclose(scores, plain.cv_results_["mean_test_score"], rtol=0, atol=1e-9)


def test__halving_with_repeats_and_validation__each_goes_on_by_itself():
    settings = {"cv": 2, "n_repeats": 2, "validate_epochs": True}
    search = BatchedHalvingSearchCV(LONG, MANY, **settings).fit(X, y)
    survivors, scores = of_last_round(search)
    one_each = [{name: [value] for name, value in each.items()} for each in survivors]
    plain = BatchedGridSearchCV(LONG, one_each, **settings).fit(X, y)
    np.testing.assert_allclose(scores, plain.cv_results_["mean_test_score"], rtol=0, atol=1e-9)
    table, whole = search.epoch_results_, plain.epoch_results_
    last = table[table["candidate"] >= 14].reset_index(drop=True)
    for name in ("train_loss", "valid_score", "valid_loss"):
        np.testing.assert_allclose(last[name], whole[name], rtol=0, atol=1e-9)


def test__last_round_below_max_resources__best_is_refitted_with_all():
    search = BatchedHalvingSearchCV(LONG, MANY, cv=2, max_resources=11).fit(X, y)
    assert search.n_resources_ == [1, 3, 9]
    assert search.best_params_["max_iter"] == search.best_estimator_.n_iter_ == 11


def test__halving_over_epochs_of_foreign_estimator__is_scikit_learns():
    model = LogisticRegression(solver="saga", tol=0, random_state=0)
    settings = {"resource": "max_iter", "max_resources": 9, "cv": 2}
    grid = {"C": np.logspace(-3, 1, 9)}
    for each in (HalvingGridSearchCV, BatchedHalvingSearchCV):
        search = each(model, grid, **settings)
        with pytest.warns(match="max_iter was reached"):
            search.fit(X, y)
        if each is HalvingGridSearchCV:
            expected = search
    assert_same_results(search.cv_results_, expected.cv_results_)


def test__halving_without_a_seed__keeps_one_seed_through_all_rounds():
    model = clone(LONG).set_params(random_state=None)
    search = BatchedHalvingSearchCV(model, {"alpha": [0.0] * 9}, cv=2).fit(X, y)
    scores = search.cv_results_["mean_test_score"]
    for number in range(3):
        assert len(set(scores[search.cv_results_["iter"] == number])) == 1
    # networks in one product differ in the last bit
    table = search.epoch_results_.round({"train_loss": 9})
    assert table.groupby(["fold", "epoch"])["train_loss"].nunique().eq(1).all()
    # equal candidates go on each by itself
    lengths = table.groupby(["candidate", "fold"]).size().unstack()
    for fold in (0, 1):
        np.testing.assert_array_equal(lengths[fold], search.cv_results_["n_resources"])


# -- failures --------------------------------------------------------------------------------------


def test__diverging_candidate__costs_its_score_and_not_the_study():
    grid = {"learning_rate_init": [0.1, 1e200]}
    search = BatchedGridSearchCV(MLP, grid, cv=2, error_score=-1.0)
    with pytest.warns(FitFailedWarning, match="2 fits failed out of a total of 4"):
        search.fit(X, y)
    plain = BatchedGridSearchCV(MLP, {"learning_rate_init": [0.1]}, cv=2).fit(X, y)
    score = plain.cv_results_["mean_test_score"][0]
    np.testing.assert_allclose(search.cv_results_["mean_test_score"], [score, -1.0])
    with pytest.raises(ValueError, match="diverged"):
        clone(search).set_params(error_score="raise").fit(X, y)


def test__ctrl_c_within_a_block_of_the_backend__leaves_no_thread():
    search = BatchedGridSearchCV(MLP, GRID, cv=3, progress=interrupt_after(6))
    before = threading.active_count()
    with joblib.parallel_config(backend="skcifar"), pytest.raises(KeyboardInterrupt):
        cross_val_score(search, X, y, cv=2)
    assert threading.active_count() == before


def test__ctrl_c__leaves_what_was_finished():
    search = BatchedGridSearchCV(MLP, GRID, cv=3, progress=interrupt_after(6))
    with pytest.raises(KeyboardInterrupt):
        search.fit(X, y)
    partial = search.partial_results_
    assert 6 <= len(partial) < 18
    whole = clone(search).set_params(progress=None).fit(X, y)
    assert list(partial)[:5] == ["candidate", "params", "fold", "repeat", "test_score"]
    for _, row in partial.iterrows():
        assert row["params"] == whole.cv_results_["params"][row["candidate"]]
        score = whole.cv_results_[f"split{row['fold']}_test_score"][row["candidate"]]
        assert row["test_score"] == pytest.approx(score, abs=1e-9)
        assert row["fit_time"] > 0
    search.set_params(progress=None).fit(X, y)
    assert not hasattr(search, "partial_results_")
