"""Fits that meet are trained together, whatever the calls they are in; or are only planned."""

import contextlib
import os
import signal
import subprocess
import sys

import joblib
import numpy as np
import pytest
from joblib.parallel import Parallel
from numpy.testing import assert_allclose
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sweeps import MLP, RATES, SOFTMAX, X, assert_same_results, in_block, y

from skcifar import SoftmaxRegression, _backend, _meeting, _stack
from skcifar._backend import Backend, collect
from skcifar._tasks import Study, Task
from skcifar._training import train_alone

# -- groups ----------------------------------------------------------------------------------------


def test__nested_search__is_one_group_and_its_refits_another(met):
    in_block(cross_val_score, GridSearchCV(SOFTMAX, RATES, cv=3), X[:180], y[:180], cv=3)
    assert met == [18, 3]


@pytest.mark.parametrize("limit", [{"MOST_WAITING": 2}, {"MEMORY_BUDGET": 1}])
def test__waves__do_not_change_results(limit, met, monkeypatch):
    for name, value in limit.items():
        monkeypatch.setattr(_meeting, name, value)
    search = GridSearchCV(MLP, RATES | {"alpha": [0.1, 1.0]}, cv=2, scoring="neg_log_loss")
    alone = clone(search).fit(X, y)
    assert_same_results(in_block(search.fit, X, y).cv_results_, alone.cv_results_)
    assert met == ([2] * 4 if "MOST_WAITING" in limit else [1] * 8)


def test__group_that_raises__is_trained_one_by_one_with_a_warning(monkeypatch):
    def train_half_and_raise(jobs):
        if len(jobs) > 1:
            train_alone(jobs[0])
            raise RuntimeError("out of luck")
        return train_group(jobs)

    train_group = _stack.train_group
    monkeypatch.setattr(_stack, "train_group", train_half_and_raise)
    search = GridSearchCV(MLP, {"alpha": [0.1, 1.0, 10.0]}, cv=2, scoring="neg_log_loss")
    alone = clone(search).fit(X, y)
    with pytest.warns(RuntimeWarning, match="fits could not be .* out of luck"):
        in_block(search.fit, X, y)
    assert_same_results(search.cv_results_, alone.cv_results_)


def test__tasks_that_wait_for_nobody__are_an_error_not_a_hang(monkeypatch):
    monkeypatch.setattr(_meeting.Coordinator, "_form_groups", lambda self: self.parked.clear())
    monkeypatch.setattr(_meeting.Coordinator, "_train", lambda self, works: None)
    monkeypatch.setattr(_backend, "_probe_passed", True)
    monkeypatch.setattr(_stack, "why_alone", lambda job: "for this test")
    with pytest.raises(RuntimeError, match="wait for each other"):
        in_block(cross_val_score, SOFTMAX, X, y, cv=2)


def test__two_thousand_tasks__equal_fits_alone_and_leave_no_thread():
    model = SoftmaxRegression(solver="sgd", max_iter=1, random_state=0)
    rows, labels = X[:20], y[:20]
    alphas = np.linspace(0.01, 1, 2000)
    with joblib.parallel_config(backend="skcifar"):
        fitted = Parallel()(
            joblib.delayed(clone(model).set_params(alpha=alpha).fit)(rows, labels)
            for alpha in alphas
        )
    for i in (0, 777, 1999):
        expected = clone(model).set_params(alpha=alphas[i]).fit(rows, labels)
        assert_allclose(fitted[i].coef_, expected.coef_, atol=1e-9)


# -- Ctrl-C ----------------------------------------------------------------------------------------

INTERRUPTED = """
import sys, threading
import joblib
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, cross_val_score
import skcifar
from skcifar._backend import Backend
from skcifar._tasks import Study

X, y = load_digits(return_X_y=True)
where = sys.argv[1]

def scorer(model, X, y):
    if where == "scoring":
        print("begun", flush=True)
        while True:
            sum(range(1000))
    return model.score(X, y)

class Tells(Study):
    def epoch(self, task, row):
        if where != "scoring":
            print("begun", flush=True)

model = skcifar.MLPClassifier(
    (8,), max_iter=1 if where == "scoring" else 10**6, n_iter_no_change=10**6, batch_size=20
)
search = GridSearchCV(model, {"alpha": [0.1, 1.0]}, cv=2, scoring=scorer)
try:
    with joblib.parallel_config(backend=Backend(Tells())):
        if where == "nested":
            cross_val_score(search, X, y, cv=2)
        else:
            search.fit(X, y)
except KeyboardInterrupt:
    print("interrupted", threading.active_count())
with joblib.parallel_config(backend="skcifar"):
    scores = cross_val_score(skcifar.SoftmaxRegression(solver="sgd", max_iter=1), X, y, cv=2)
print("then", len(scores), threading.active_count())
"""


@pytest.mark.skipif(os.name == "nt", reason="signals are sent the POSIX way")
@pytest.mark.parametrize("where", ["training", "scoring", "nested"])
def test__ctrl_c__ends_the_call_and_leaves_no_thread(where):
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", INTERRUPTED, where],
        stdout=subprocess.PIPE,
        text=True,
    )
    with contextlib.closing(process.stdout):
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        rest = [line for line in process.stdout.read().splitlines() if line != "begun"]
    assert process.wait() == 0
    assert rest == ["interrupted 1", "then 2 1"]


# -- what a search is told -------------------------------------------------------------------------


class Notes(Study):
    def __init__(self):
        self.known_values = {}
        self.events = []

    def known(self, task):
        return self.known_values.get(task)

    def seed(self, task, seed):
        return seed + task.position % 2

    def job(self, task, job):
        self.events.append(("job", task.position))
        return job

    def epoch(self, task, row):
        self.events.append(("epoch", task.position, row["epoch"]))

    def trained(self, task, job, result):
        self.events.append(("trained", task.position))

    def finished(self, task, value):
        self.events.append(("finished", task.position, value))
        assert value[0]["fit_time"] >= 0


def test__study__is_told_of_all_that_its_tasks_do():
    study = Notes()
    result = in_block(cross_validate, SOFTMAX, X, y, cv=2, backend=Backend(study))
    names = [event[:2] for event in study.events]
    assert names[:2] == [("job", 0), ("job", 1)]
    for position in (0, 1):
        epochs = [e[2] for e in study.events if e[:2] == ("epoch", position)]
        assert epochs == [1, 2, 3]
        assert names.index(("trained", position)) < names.index(("finished", position))
    values = [event[2][0]["test_scores"] for event in study.events if event[0] == "finished"]
    assert values == result["test_score"].tolist()


def test__study__gives_seeds():
    folds = [(np.arange(200), np.arange(200, 300))] * 2
    a, b = in_block(
        cross_validate, SOFTMAX, X, y, cv=folds, return_estimator=True, backend=Backend(Notes())
    )["estimator"]
    assert_allclose(a.coef_, clone(SOFTMAX).fit(X[:200], y[:200]).coef_, atol=1e-9)
    assert np.abs(a.coef_ - b.coef_).max() > 1e-6


def test__known_tasks__do_not_run_again():
    study = Notes()
    known = {"test_scores": 0.25, "fit_time": 1.0, "score_time": 2.0, "fit_error": None}
    study.known_values[Task(0, 1)] = [known | {"n_test_samples": 100}]
    result = in_block(cross_validate, SOFTMAX, X, y, cv=3, backend=Backend(study))
    assert result["test_score"][1] == 0.25
    assert result["fit_time"][1] == 1.0
    assert {event[1] for event in study.events} == {0, 2}


def test__nested_fits__count_as_their_tasks():
    study = Notes()
    search = GridSearchCV(SOFTMAX, {"alpha": [0.1, 1.0]}, cv=2)
    in_block(cross_validate, search, X, y, cv=2, backend=Backend(study))
    trained = [event[1] for event in study.events if event[0] == "trained"]
    assert sorted(trained) == [0] * 5 + [1] * 5
    assert len([event for event in study.events if event[0] == "finished"]) == 2


def test__calls__are_numbered():
    study = Notes()
    tasks = []
    study.finished = lambda task, value: tasks.append(task)
    with joblib.parallel_config(backend=Backend(study)):
        for _ in range(2):
            cross_val_score(SOFTMAX, X, y, cv=2)
    assert tasks == [Task(0, 0), Task(0, 1), Task(1, 0), Task(1, 1)]


# -- plans -----------------------------------------------------------------------------------------


def test__collect__gives_the_fits_and_trains_none(monkeypatch):
    monkeypatch.setattr(_stack, "train_group", None)
    lone = clone(SOFTMAX).set_params(solver="lbfgs")
    search = GridSearchCV(make_pipeline(StandardScaler(), SOFTMAX), {}, cv=2)
    search.param_grid = {"softmaxregression": [SOFTMAX, lone, LogisticRegression()]}
    assert _backend._works_with_joblib()
    fits = collect(lambda: search.fit(X, y))
    assert [fit.task for fit in fits] == [Task(0, i) for i in range(6)]
    solvers = [fit.job and fit.job.recipe.solver for fit in fits]
    assert solvers == ["sgd", "sgd", "lbfgs", "lbfgs", None, None]
    assert not hasattr(search, "best_score_")


def test__collect__sees_nested_fits_and_the_study_of_an_inner_block():
    study = Notes()
    study.known_values[Task(0, 0)] = [{}]
    search = GridSearchCV(SOFTMAX, {"alpha": [0.1, 1.0]}, cv=3)
    fits = collect(lambda: in_block(cross_val_score, search, X, y, cv=2, backend=Backend(study)))
    assert [fit.task for fit in fits] == [Task(0, 1)] * 6
    assert {event[0] for event in study.events} == {"job"}


def test__collect__takes_up_more_fits_than_may_wait(monkeypatch):
    monkeypatch.setattr(_meeting, "MOST_WAITING", 2)
    assert len(collect(lambda: cross_val_score(SOFTMAX, X, y, cv=5))) == 5


def test__error_while_collecting__is_raised():
    with pytest.raises(ValueError, match="alpha"):
        model = clone(SOFTMAX).set_params(alpha=-1)
        collect(lambda: cross_val_score(model, X, y, error_score="raise"))
