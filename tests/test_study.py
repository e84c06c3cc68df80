import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.callback import ProgressBar, ScoringMonitor
from sklearn.ensemble import BaggingClassifier
from sklearn.exceptions import FitFailedWarning
from sklearn.model_selection import GridSearchCV, KFold, cross_validate
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sweeps import GRID, LONG, MANY, MLP, RATES, X, assert_same_results, interrupt_after, y

from skcifar import SoftmaxRegression, TripletEmbedder
from skcifar.model_selection import BatchedGridSearchCV, BatchedHalvingSearchCV

# -- epochs ----------------------------------------------------------------------------------------


def test__epoch_results__are_the_histories_of_the_same_fits():
    search = BatchedGridSearchCV(MLP, GRID, cv=3).fit(X, y)
    table = search.epoch_results_
    assert list(table)[:7] == [
        *("candidate", "fold", "repeat", "fit", "epoch", "train_loss", "valid_score")
    ]
    assert len(table) == 6 * 3 * 4 and table["valid_score"].isna().all()
    for candidate, parameters in enumerate(search.cv_results_["params"]):
        estimators = cross_validate(
            clone(MLP).set_params(**parameters), X, y, cv=3, return_estimator=True
        )["estimator"]
        for fold, estimator in enumerate(estimators):
            rows = table[(table["candidate"] == candidate) & (table["fold"] == fold)]
            assert list(rows["epoch"]) == [1, 2, 3, 4]
            np.testing.assert_allclose(rows["train_loss"], estimator.loss_curve_, atol=1e-9)


@pytest.mark.filterwarnings("ignore:The training has not converged")
def test__validate_epochs__scores_are_those_of_fits_that_end_there():
    # at a constant rate an epoch does not depend on how many are to follow
    model = clone(MLP).set_params(learning_rate="constant", n_iter_no_change=np.inf)
    search = BatchedGridSearchCV(model, GRID, cv=3, validate_epochs=True).fit(X, y)
    assert_same_results(
        search.cv_results_, BatchedGridSearchCV(model, GRID, cv=3).fit(X, y).cv_results_
    )
    means = search.epoch_results_.groupby(["epoch", "candidate"])["valid_score"].mean().unstack()
    for epoch in (1, 3):
        expected = GridSearchCV(clone(model).set_params(max_iter=epoch), GRID, cv=3, refit=False)
        expected.fit(X, y)
        np.testing.assert_allclose(means.loc[epoch], expected.cv_results_["mean_test_score"])


def test__validate_epochs__images_and_frames_and_labels_of_any_kind_are_read():
    names = np.array([f"class {i}" for i in range(10)])[y]
    for data in (X.reshape(-1, 8, 8), pd.DataFrame(X).rename(columns="pixel {}".format)):
        search = BatchedGridSearchCV(MLP, {"alpha": [0.0]}, cv=3, validate_epochs=True)
        table = search.fit(data, names).epoch_results_
        last = table[table["epoch"] == 4].sort_values("fold")["valid_score"]
        found = [search.cv_results_[f"split{i}_test_score"][0] for i in range(3)]
        np.testing.assert_allclose(last, found)


def test__validate_epochs__rows_of_early_stopping_are_kept():
    model = clone(MLP).set_params(early_stopping=True)
    table = BatchedGridSearchCV(model, GRID, cv=2, validate_epochs=True).fit(X, y).epoch_results_
    plain = BatchedGridSearchCV(model, GRID, cv=2).fit(X, y).epoch_results_
    pd.testing.assert_frame_equal(table.drop(columns="seconds"), plain.drop(columns="seconds"))


def test__validate_epochs__of_a_pipeline_or_unseen_class_is_missing():
    pipeline = make_pipeline(StandardScaler(), MLP)
    search = BatchedGridSearchCV(
        pipeline, {"mlpclassifier__alpha": [0.0]}, cv=2, validate_epochs=True
    )
    assert search.fit(X, y).epoch_results_["valid_score"].isna().all()
    by_class = [(np.flatnonzero(y != 3), np.flatnonzero(y == 3))]
    search = BatchedGridSearchCV(MLP, {"alpha": [0.0]}, cv=by_class, validate_epochs=True)
    assert search.fit(X, y).epoch_results_["valid_score"].isna().all()


def test__callbacks__follow_the_epochs_as_in_scikit_learns_search():
    logs = []
    for search in (GridSearchCV, BatchedGridSearchCV):
        monitor = ScoringMonitor(scoring="accuracy")
        search(clone(MLP).set_callbacks(monitor), GRID, cv=2, refit=False).fit(X, y)
        logs.append(monitor.get_logs().data_as_pandas["accuracy"].sort_values())
    np.testing.assert_allclose(logs[0], logs[1], rtol=0, atol=1e-9)
    assert len(logs[0]) >= 12 * 4


def test__progress_bar__is_shown_with_paused_fits(capsys):
    search = BatchedHalvingSearchCV(MLP, {"alpha": [0.0, 0.1, 1.0]}, cv=2, min_resources=1)
    search.set_callbacks(ProgressBar(max_propagation_depth=None)).fit(X, y)
    assert "MLPClassifier" in capsys.readouterr().out


# -- several seeds ---------------------------------------------------------------------------------


def test__repeats__first_is_the_search_without_and_others_differ():
    plain = BatchedGridSearchCV(MLP, GRID, cv=3).fit(X, y)
    search = BatchedGridSearchCV(MLP, GRID, cv=3, n_repeats=3).fit(X, y)
    again = BatchedGridSearchCV(MLP, GRID, cv=3, n_repeats=3).fit(X, y)
    results = search.cv_results_
    assert search.n_splits_ == 9
    scores = np.stack([results[f"split{i}_test_score"] for i in range(9)], axis=1)
    for i in range(3):
        np.testing.assert_allclose(scores[:, i], plain.cv_results_[f"split{i}_test_score"])
    assert_same_results(again.cv_results_, results)
    repeats = scores.reshape(6, 3, 3)
    assert not np.array_equal(repeats[:, 0], repeats[:, 1])
    assert not np.array_equal(repeats[:, 1], repeats[:, 2])
    assert np.isnan(plain.cv_results_["seed_std_test_score"]).all()
    table = search.epoch_results_
    assert len(table) == 6 * 9 * 4
    assert set(zip(table["repeat"], table["fold"], strict=True)) == {
        (repeat, fold) for repeat in range(3) for fold in range(3)
    }


def test__repeats_without_a_seed__share_one_seed_a_repeat():
    model = clone(MLP).set_params(random_state=None)
    search = BatchedGridSearchCV(model, {"alpha": [0.0, 0]}, cv=2, n_repeats=2, refit=False)
    results = search.fit(X, y).cv_results_
    scores = np.stack([results[f"split{i}_test_score"] for i in range(4)], axis=1)
    np.testing.assert_array_equal(scores[0], scores[1])  # two candidates that are the same
    assert (scores[:, :2] != scores[:, 2:]).any()


def test__repeats_of_a_pipeline__seed_its_first_steps_too():
    embedder = TripletEmbedder(4, channels=(4,), max_iter=1, image_shape=(8, 8), random_state=0)
    pipeline = Pipeline([("embed", embedder), ("softmax", SoftmaxRegression())])
    search = BatchedGridSearchCV(pipeline, {"softmax__alpha": [0.1, 1.0]}, cv=2, n_repeats=2)
    results = search.fit(X, y).cv_results_
    plain = GridSearchCV(pipeline, {"softmax__alpha": [0.1, 1.0]}, cv=2).fit(X, y).cv_results_
    scores = np.stack([results[f"split{i}_test_score"] for i in range(4)], axis=1)
    for i in range(2):
        np.testing.assert_allclose(scores[:, i], plain[f"split{i}_test_score"])
    assert (scores[:, :2] != scores[:, 2:]).any()


def test__seeds_that_a_meta_estimator_gives__are_kept():
    bagged = BaggingClassifier(clone(MLP).set_params(random_state=None), 3, random_state=0)
    grid = {"estimator__alpha": [0.0, 0.1]}
    expected = GridSearchCV(bagged, grid, cv=2).fit(X, y)
    found = BatchedGridSearchCV(bagged, grid, cv=2).fit(X, y)
    assert_same_results(found.cv_results_, expected.cv_results_)
    assert set(found.epoch_results_["fit"]) == {0, 1, 2}


# -- progress --------------------------------------------------------------------------------------


def test__progress__counts_up_to_the_totals():
    events = []
    search = BatchedGridSearchCV(MLP, GRID, cv=3, n_repeats=2, progress=events.append).fit(X, y)
    for name in ("done_fits", "done_epochs", "seconds"):
        values = [event[name] for event in events]
        assert values == sorted(values)
    last = events[-1]
    assert last["done_fits"] == last["total_fits"] == 36
    assert last["done_epochs"] == last["expected_epochs"] == 36 * 4
    assert last["best_score"] == pytest.approx(search.best_score_)
    assert events[0]["best_score"] is None and events[0]["expected_epochs"] == 36 * 4


def test__progress_that_raises__is_an_error_of_the_search_not_of_its_fits():
    def progress(event):
        raise ZeroDivisionError("no bar")

    with pytest.raises(ZeroDivisionError, match="no bar"):
        BatchedGridSearchCV(MLP, GRID, cv=2, progress=progress).fit(X, y)


def test__progress_of_halving__expects_what_survivors_have_left():
    events = []
    BatchedHalvingSearchCV(LONG, MANY, cv=3, progress=events.append).fit(X, y)
    expected = dict.fromkeys(event["expected_epochs"] for event in events)
    assert list(expected) == [3 * 10, 3 * (10 + 4 * 2), 3 * (10 + 4 * 2 + 2 * 6)]


def test__progress_of_fits_that_end_early__expects_what_is_left():
    model = clone(MLP).set_params(learning_rate="constant", tol=10.0, n_iter_no_change=1)
    model.set_params(max_iter=50)
    events = []
    BatchedGridSearchCV(model, GRID, cv=2, progress=events.append).fit(X, y)
    assert events[0]["expected_epochs"] == 12 * 50
    assert events[-1]["done_epochs"] == events[-1]["expected_epochs"] < 12 * 50


# -- the journal -----------------------------------------------------------------------------------


def without_times(frame):
    return frame.drop(columns=[name for name in frame if "time" in name or name == "seconds"])


def test__finished_journal__is_read_and_nothing_is_trained(tmp_path, trained):
    settings = {"cv": 3, "journal": tmp_path / "j", "return_train_score": True, "n_repeats": 2}
    first = BatchedGridSearchCV(MLP, GRID, **settings).fit(X, y)
    n_trained = len(trained)
    again = BatchedGridSearchCV(MLP, GRID, **settings).fit(X, y)
    assert n_trained == len(trained) == 36
    for key, values in first.cv_results_.items():
        # times too: each float is read as it was
        np.testing.assert_array_equal(again.cv_results_[key], values, err_msg=key)
    pd.testing.assert_frame_equal(again.epoch_results_, first.epoch_results_)


def test__interrupted_search__repeats_only_what_is_not_in_the_journal(tmp_path, trained):
    search = BatchedGridSearchCV(MLP, GRID, cv=3, journal=tmp_path / "j", validate_epochs=True)
    whole = clone(search).set_params(journal=None).fit(X, y)
    trained.clear()
    with pytest.raises(KeyboardInterrupt):
        search.set_params(progress=interrupt_after(6)).fit(X, y)
    n_journalled = len((tmp_path / "j").read_text().splitlines()) - 1
    assert 6 <= n_journalled < 18
    trained.clear()
    search.set_params(progress=None).fit(X, y)
    assert len(trained) == len(set(trained)) == 18 - n_journalled
    assert_same_results(search.cv_results_, whole.cv_results_)
    pd.testing.assert_frame_equal(
        without_times(search.epoch_results_), without_times(whole.epoch_results_), atol=1e-9
    )


def test__interrupted_search_without_a_seed__goes_on_with_its_seed(tmp_path):
    model = clone(MLP).set_params(random_state=None)
    settings = {"cv": 2, "journal": tmp_path / "j", "refit": False}
    search = BatchedGridSearchCV(model, {"alpha": [0.0] * 3}, **settings)
    with pytest.raises(KeyboardInterrupt):
        search.set_params(progress=interrupt_after(3)).fit(X, y)
    results = search.set_params(progress=None).fit(X, y).cv_results_
    assert len(set(results["mean_test_score"])) == 1


def test__interrupted_halving__ends_as_if_uninterrupted(tmp_path, trained):
    search = BatchedHalvingSearchCV(LONG, MANY, cv=2, journal=tmp_path / "j")
    whole = clone(search).set_params(journal=None).fit(X, y)

    def progress(event):  # in the second of three rounds
        if event["done_fits"] >= 22:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search.set_params(progress=progress).fit(X, y)
    trained.clear()
    search.set_params(progress=None).fit(X, y)
    assert not [task for task in trained if task[0] == 0]
    assert_same_results(search.cv_results_, whole.cv_results_)
    assert search.best_params_ == whole.best_params_
    pd.testing.assert_frame_equal(
        without_times(search.epoch_results_), without_times(whole.epoch_results_), atol=1e-9
    )


def test__failed_fits__are_journalled_with_their_errors(tmp_path, trained):
    grid = {"learning_rate_init": [0.1, 1e200]}
    search = BatchedGridSearchCV(MLP, grid, cv=2, journal=tmp_path / "j")
    for n_trained in (2, 2):
        with (
            pytest.warns(FitFailedWarning, match="diverged"),
            pytest.warns(UserWarning, match="non-finite"),
        ):
            search.fit(X, y)
        np.testing.assert_array_equal(np.isnan(search.cv_results_["mean_test_score"]), [0, 1])
        assert len(trained) == n_trained


def several_scores(estimator, X, y):
    return {"right": estimator.score(X, y), "rows": len(y)}


def test__dict_of_scores__is_journalled(tmp_path, trained):
    settings = {"cv": 2, "journal": tmp_path / "j", "refit": "right", "scoring": several_scores}
    first = BatchedGridSearchCV(MLP, GRID, **settings).fit(X, y)
    again = BatchedGridSearchCV(MLP, GRID, **settings).fit(X, y)
    assert len(trained) == 12
    for key, values in first.cv_results_.items():
        np.testing.assert_array_equal(again.cv_results_[key], values, err_msg=key)


def complex_score(estimator, X, y):
    return 1j


def test__score_json_cannot_hold__error_names_it(tmp_path):
    settings = {"cv": 2, "journal": tmp_path / "j", "scoring": complex_score}
    with pytest.raises(TypeError, match=r"\['test_scores'\] = 1j of type complex"):
        BatchedGridSearchCV(MLP, GRID, **settings).fit(X, y)


OTHERS = {
    "data.X": {"X": X + 1e-12},
    "data.y": {"y": y[::-1]},
    "fit parameters.sample_weight": {"sample_weight": np.ones(300)},
    "grid": {"param_grid": {**GRID, "alpha": [0.0, 0.02]}},
    "estimator.tol": {"estimator": clone(MLP).set_params(tol=1e-3)},
    "estimator.class": {"estimator": SoftmaxRegression(solver="sgd", max_iter=2)},
    "cv splits": {"cv": KFold(2)},
    "scoring": {"scoring": "balanced_accuracy"},
    "search.n_repeats": {"n_repeats": 2},
    "search.return_train_score": {"return_train_score": True},
}


@pytest.mark.parametrize("what", OTHERS)
def test__journal_of_another_search__error_says_what_differs(tmp_path, what):
    path = tmp_path / "j"
    settings = {"estimator": MLP, "param_grid": GRID, "cv": 2, "refit": False, "journal": path}
    BatchedGridSearchCV(**settings).fit(X, y)
    before = path.read_bytes()
    data = {"X": X, "y": y}
    fitted_with = {k: v for k, v in OTHERS[what].items() if k in ("X", "y", "sample_weight")}
    settings |= {k: v for k, v in OTHERS[what].items() if k not in fitted_with}
    with pytest.raises(ValueError, match=f"what differs: .*{re.escape(what)}.*another path"):
        BatchedGridSearchCV(**settings).fit(**data | fitted_with)
    assert path.read_bytes() == before


def test__journal_of_another_version__error_says_which(tmp_path, monkeypatch):
    search = BatchedGridSearchCV(MLP, GRID, cv=2, refit=False, journal=tmp_path / "j").fit(X, y)
    monkeypatch.setattr("skcifar.__version__", "0.0.9")
    with pytest.raises(ValueError, match=r'versions\.skcifar \(was ".*", is "0\.0\.9"\)'):
        search.fit(X, y)


def test__damaged_journal__error_names_the_line(tmp_path):
    path = tmp_path / "j"
    search = BatchedGridSearchCV(MLP, GRID, cv=2, refit=False, journal=path).fit(X, y)
    lines = path.read_text().splitlines(keepends=True)
    lines[4] = lines[4].replace('"fold": 0', '"fold": 1').replace('"fold": 1', '"fold": 0', 0)
    lines[4] = lines[4].replace("train_loss", "train_lost")
    path.write_text("".join(lines))
    with pytest.raises(ValueError, match="line 5: damaged"):
        search.fit(X, y)


def test__unseeded_shuffle__is_another_search(tmp_path):
    search = BatchedGridSearchCV(MLP, GRID, cv=KFold(2, shuffle=True), journal=tmp_path / "j")
    search.fit(X, y)
    with pytest.raises(ValueError, match="cv splits"):
        search.fit(X, y)


ROOT = Path(__file__).resolve().parents[1]


KILLED = """
import sys, time
from sklearn.base import clone
sys.path[:0] = [{tests!r}, {root!r}]
from test_study import SEARCHES, X, y

def wait_in_training(event):  # with some fits finished and others in training
    if event["done_fits"] >= {n_fits} and event["done_epochs"] % 5 == 1:
        time.sleep(600)

search = clone(SEARCHES[{name!r}])
search.set_params(journal={path!r}, progress=wait_in_training).fit(X, y)
"""


SEARCHES = {
    "grid": BatchedGridSearchCV(clone(MLP).set_params(max_iter=5), GRID, cv=4),
    "halving": BatchedHalvingSearchCV(LONG, MANY, cv=2),
}


@pytest.mark.parametrize(("name", "n_fits"), [("grid", 6), ("halving", 22)])
def test__killed_process__search_goes_on_with_what_it_finished(tmp_path, trained, name, n_fits):
    path = tmp_path / "j"
    text = KILLED.format(
        tests=str(ROOT / "tests"), root=str(ROOT), n_fits=n_fits, name=name, path=str(path)
    )
    process = subprocess.Popen([sys.executable, "-c", text])
    try:
        while not path.exists() or path.read_bytes().count(b"\n") < 1 + n_fits:
            assert process.poll() is None, "it ended by itself"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    finished = [json.loads(line)["record"]["task"] for line in path.read_text().splitlines()[1:]]
    search = clone(SEARCHES[name])
    whole = clone(search).fit(X, y)
    n_tasks = len(trained)
    trained.clear()
    search.set_params(journal=path).fit(X, y)
    assert n_fits <= len(finished) < n_tasks
    assert len(trained) == n_tasks - len(finished)
    assert_same_results(search.cv_results_, whole.cv_results_)
    pd.testing.assert_frame_equal(
        without_times(search.epoch_results_), without_times(whole.epoch_results_), atol=1e-9
    )


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test__validate_epochs__decides_on_nothing():
    def plateau(optimizer):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0)

    model = clone(MLP).set_params(learning_rate=plateau, max_iter=8)
    losses = []
    for validate in (False, True):
        search = BatchedGridSearchCV(model, RATES, cv=2, refit=False, validate_epochs=validate)
        losses.append(search.fit(X, y).epoch_results_["train_loss"].to_numpy())
    np.testing.assert_array_equal(*losses)
