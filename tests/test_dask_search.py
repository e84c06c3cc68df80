"""Searches on a real Dask cluster of several processes."""

import ast
import contextlib
import copy
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.callback import ScoringMonitor
from sklearn.exceptions import ConvergenceWarning, FitFailedWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sweeps import EMBEDDER, GRID, LONG, MANY, MLP, RATES, SOFTMAX, X, assert_same_results, y

from skcifar import _groups, _memory
from skcifar._dask import _Cluster, run_on_worker
from skcifar._groups import Needs, cut
from skcifar.model_selection import (
    BatchedGridSearchCV,
    BatchedHalvingSearchCV,
    BatchedRandomizedSearchCV,
)

distributed = pytest.importorskip("distributed")

ROOT = Path(__file__).resolve().parents[1]
DASK = {"cloudpickle", "dask", "distributed"}
SECONDS = 60  # until a test gives up waiting for other processes


@contextlib.contextmanager
def client_of(cluster, **settings):
    """A client of a cluster, quiet about workers that are killed.

    What starting them writes to this process's environment goes in the end.
    """
    levels = {name: logging.getLogger(name).level for name in ("distributed", "tornado")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with (
            patch.dict(os.environ),
            cluster(**settings) as started,
            distributed.Client(started) as client,
        ):
            yield client
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def local_cluster(n_workers, **settings):
    settings = {"threads_per_worker": 1, "memory_limit": "4GiB", **settings}
    return client_of(
        distributed.LocalCluster,
        n_workers=n_workers,
        dashboard_address=":0",
        silence_logs=logging.CRITICAL,
        **settings,
    )


@pytest.fixture(scope="module")
def client_of_two():
    """Of two processes, each with a device of its own."""
    options = {"nthreads": 1, "memory_limit": "4GiB", "silence_logs": logging.CRITICAL}
    workers = {
        device: {
            "cls": distributed.Nanny,
            "options": {**options, "env": {"SKCIFAR_DEVICE": device}},
        }
        for device in ("cpu", "cpu:0")
    }
    scheduler = {"cls": distributed.Scheduler, "options": {"dashboard_address": ":0"}}
    with client_of(distributed.SpecCluster, workers=workers, scheduler=scheduler) as client:
        yield client


@pytest.fixture(scope="module")
def client_of_one():
    """Of a single process, for tests that kill it."""
    with local_cluster(1) as client:
        yield client


@pytest.fixture
def client(client_of_two):
    with client_of_two.as_current():
        yield client_of_two


@pytest.fixture
def lone_client(client_of_one):
    with client_of_one.as_current():
        yield client_of_one


def wait_for(condition):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.01)


def executing(client):
    """Keys of groups that workers are busy with."""
    found = client.run(
        lambda dask_worker: [str(task.key) for task in dask_worker.state.executing.copy()]
    )
    return [key for keys in found.values() for key in keys if key.startswith("skcifar-run")]


def assert_same_epochs(found, expected):
    found, expected = (
        table.drop(columns="seconds", errors="ignore") for table in (found, expected)
    )
    pd.testing.assert_frame_equal(found, expected, rtol=0, atol=1e-9)


def assert_same_searches(search, **fit):
    """That a search gives here and on the cluster what scikit-learn's results are made of."""
    expected = copy.copy(search).set_params(backend="skcifar").fit(X, y, **fit)
    found = copy.copy(search).set_params(backend="dask").fit(X, y, **fit)
    assert_same_results(found.cv_results_, expected.cv_results_)
    assert list(found.cv_results_) == list(expected.cv_results_)
    assert_same_epochs(found.epoch_results_, expected.epoch_results_)
    assert found.best_params_ == expected.best_params_
    return found


# -- results are those of this process -------------------------------------------------------------


@pytest.mark.parametrize("model", [MLP, SOFTMAX])
def test__grid__results_and_epochs_equal_those_of_this_process(client, model):
    settings = {"cv": 3, "n_repeats": 2, "validate_epochs": True, "return_train_score": True}
    found = assert_same_searches(BatchedGridSearchCV(model, GRID, **settings))
    assert found.epoch_results_["valid_score"].notna().all()


def test__pipeline_groups_and_weights__results_equal_those_of_this_process(client):
    pipeline = Pipeline([("scale", StandardScaler()), ("mlp", MLP)])
    grid = {f"mlp__{name}": values for name, values in GRID.items()}
    fit = {"groups": np.arange(300) % 7, "mlp__sample_weight": np.linspace(0.1, 2, 300)}
    assert_same_searches(BatchedGridSearchCV(pipeline, grid, cv=GroupKFold(3)), **fit)


def test__halving__results_equal_those_of_this_process(client):
    found = assert_same_searches(BatchedHalvingSearchCV(LONG, MANY, cv=3, random_state=0))
    assert found.n_resources_ == [1, 3, 9]


def test__randomized_over_foreign_estimators__results_equal_those_of_this_process(client):
    models = [LogisticRegression(max_iter=500), clone(MLP).set_params(solver="adam")]
    search = BatchedRandomizedSearchCV(
        Pipeline([("model", MLP)]), {"model": models}, n_iter=2, cv=2, random_state=0
    )
    assert_same_searches(search)


@pytest.mark.parametrize(
    "model",
    [
        clone(SOFTMAX).set_params(random_state=None),
        # whose first step has no seed, either
        make_pipeline(clone(EMBEDDER).set_params(random_state=None), SOFTMAX),
    ],
)
def test__unseeded__draws_from_numpys_generator_what_this_process_draws(client, model):
    name = [name for name in model.get_params() if name.endswith("alpha")][-1]
    grid = {name: [0.0, 0.1]}
    results, after = [], []
    for backend in ("skcifar", "dask"):
        np.random.seed(3)  # noqa: NPY002
        search = BatchedGridSearchCV(model, grid, cv=2, refit=False, backend=backend)
        results.append(search.fit(X, y).cv_results_)
        after.append(np.random.get_state(legacy=False))  # noqa: NPY002
    assert_same_results(results[1], results[0])
    np.testing.assert_equal(after[1], after[0])


def where(estimator, X, y):
    return float(os.getpid())


def test__fits__are_those_of_both_workers_and_none_of_this_process(client):
    search = BatchedGridSearchCV(MLP, GRID, cv=3, scoring=where, refit=False, backend="dask")
    results = search.fit(X, y).cv_results_
    pids = {pid for i in range(3) for pid in results[f"split{i}_test_score"]}
    assert pids == set(client.run(os.getpid).values())


# -- what travels ----------------------------------------------------------------------------------


@pytest.fixture
def sent(monkeypatch):
    """What each group that is sent has: its number of tasks and its bytes, data apart."""
    groups = []
    original = _Cluster._sent

    def record(self, function, packed):
        if function is run_on_worker:
            groups.append((len(packed.tasks), len(packed.payload)))
        return original(self, function, packed)

    monkeypatch.setattr(_Cluster, "_sent", record)
    return groups


def keys_on_scheduler(client):
    """Sizes of all that the cluster holds."""
    return client.run_on_scheduler(
        lambda dask_scheduler: {str(k): task.nbytes for k, task in dask_scheduler.tasks.items()}
    )


def test__rows_and_weights__are_scattered_once_for_all_rounds(client, sent):
    weights = np.linspace(0.1, 2, 300).repeat(10)
    rows, labels = X.repeat(10, axis=0), y.repeat(10)
    seen = []

    def progress(event):
        held = keys_on_scheduler(client)
        seen.append({key: n_bytes for key, n_bytes in held.items() if n_bytes >= weights.nbytes})

    search = BatchedHalvingSearchCV(LONG, MANY, cv=2, progress=progress, backend="dask")
    search.fit(rows, labels, sample_weight=weights)
    assert search.n_resources_ == [1, 3, 9]
    by_key = {key: n_bytes for each in seen for key, n_bytes in each.items()}
    sizes = sorted(by_key.values())
    assert [n for n in sizes if n >= rows.nbytes] == [rows.nbytes]
    assert sizes.count(weights.nbytes) == 2  # weights and labels
    assert sum(n_tasks for n_tasks, _ in sent) == 2 * (10 + 4 + 2)
    assert max(n_bytes for _, n_bytes in sent) < labels.nbytes


def test__finished_search__leaves_nothing_on_the_cluster(client):
    BatchedGridSearchCV(MLP, RATES, cv=2, refit=False, backend="dask").fit(X, y)
    wait_for(lambda: not keys_on_scheduler(client))


@pytest.mark.parametrize(
    ("n_folds", "n_candidates", "n_groups"),
    [(3, 6, 8), (3, 7, 2), (2, 1, 9), (10, 4, 4), (1, 9, 1)],
)
def test__groups__are_neighbours_of_nearly_equal_size(n_folds, n_candidates, n_groups):
    lanes = np.repeat(np.arange(n_folds), n_candidates).tolist()
    groups = cut(lanes, n_groups, Needs(), 0.0)
    assert [i for group in groups for i in group] == list(range(len(lanes)))
    assert len(groups) >= min(n_groups, len(lanes))
    sizes = [len(group) for group in groups]
    assert max(sizes) - min(sizes) <= 1
    if n_groups > n_folds:  # each group sees the batches of one fold
        assert all(len({lanes[i] for i in group}) == 1 for group in groups)


def test__groups__are_as_large_as_the_memory_of_a_worker_allows():
    lanes, needs = [0] * 20 + [1] * 20, Needs(fit=10, rows=100)
    assert cut(lanes, 2, needs, room=300) == [list(range(20)), list(range(20, 40))]
    for room in (299, 170, 111):
        groups = cut(lanes, 2, needs, room)
        taken = [10 * len(g) + 100 * len({lanes[i] for i in g}) for g in groups]
        assert max(taken) <= room
        assert sorted(i for group in groups for i in group) == list(range(40))
    assert [len(group) for group in cut(lanes, 1, needs, room=0)] == [1] * 40


def test__groups_of_a_search__follow_the_memory_of_the_smallest_worker(client, sent, monkeypatch):
    search = BatchedGridSearchCV(MLP, GRID, cv=2, refit=False, backend="dask")
    search.fit(X, y)
    assert [n_tasks for n_tasks, _ in sent] == [1, 2, 1, 2] * 2
    sent.clear()
    workers = _Cluster._workers
    # the rows of a fold are 75 KiB, so the half of 200 suffices for a fit or two of 1 to 20
    monkeypatch.setattr(
        _Cluster, "_workers", lambda self: [replace(w, free=200 * 2**10) for w in workers(self)]
    )
    search.fit(X, y)
    assert max(n_tasks for n_tasks, _ in sent) == 1


# -- devices ---------------------------------------------------------------------------------------


def has_index(estimator, X, y):
    return float({"cpu": 0, "cpu:0": 1}[estimator.device_])


def test__device_map__each_worker_uses_its_own(client):
    scoring = {"device": has_index, "process": where}
    search = BatchedGridSearchCV(
        MLP, GRID, cv=3, scoring=scoring, refit=False, error_score="raise", backend="dask"
    )
    results = search.fit(X, y).cv_results_
    used = {
        (results[f"split{i}_test_process"][k], results[f"split{i}_test_device"][k])
        for i in range(3)
        for k in range(6)
    }
    assert sorted(device for _, device in used) == [0.0, 1.0]
    assert len({process for process, _ in used}) == 2


def test__worker_of_several_threads__trains_a_group_at_a_time_with_all_of_them(monkeypatch):
    running, seen = [], []
    original = _groups._run

    def record(group):
        running.append(group)
        seen.append((len(running), torch.get_num_threads()))
        try:
            return original(group)
        finally:
            running.remove(group)

    monkeypatch.setattr(_groups, "_run", record)
    # no limit to what is the memory of this process
    with local_cluster(1, processes=False, threads_per_worker=2, memory_limit=0):
        assert_same_searches(BatchedGridSearchCV(MLP, GRID, cv=3))
    assert len(seen) >= 4
    assert set(seen) == {(1, 2)}


# -- workers, schedulers and users that end it -----------------------------------------------------


class Held:
    """A scorer that says which process it is in, and goes on once a file is there."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, estimator, X, y):
        (self.folder / str(os.getpid())).touch()
        wait_for((self.folder / "open").exists)
        return float(estimator.score(X, y))

    def processes(self):
        return [int(path.name) for path in self.folder.iterdir() if path.name.isdigit()]


@contextlib.contextmanager
def meanwhile(function):
    """Call it in another thread, and have what it raises be raised here."""
    errors = []

    def run():
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        if errors:
            raise errors[0]


def fit_while_one_is_killed(n_workers, folder):
    """A search, in whose middle one of so many workers is killed; its results are right."""
    held = Held(folder)

    def kill_one():
        wait_for(lambda: len(held.processes()) == n_workers)
        os.kill(held.processes()[0], signal.SIGKILL)
        (folder / "open").touch()

    expected = BatchedGridSearchCV(MLP, GRID, cv=3).fit(X, y)
    search = BatchedGridSearchCV(MLP, GRID, cv=3, scoring=held, backend="dask")
    with meanwhile(kill_one):
        search.fit(X, y)
    assert_same_results(search.cv_results_, expected.cv_results_)
    assert_same_epochs(search.epoch_results_, expected.epoch_results_)


def test__worker_killed__another_runs_its_group(client, sent, tmp_path):
    fit_while_one_is_killed(2, tmp_path)
    assert sum(n_tasks for n_tasks, _ in sent) == 18  # the scheduler sends it on


def test__only_worker_killed__data_and_groups_are_sent_again(lone_client, sent, tmp_path):
    fit_while_one_is_killed(1, tmp_path)
    assert sum(n_tasks for n_tasks, _ in sent) > 18


class Deadly:
    """A scorer that ends the process it is in."""

    def __call__(self, estimator, X, y):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("n_failures", "n_tries", "message"),
    [(0, 4, "group of 1 fits was given up, most often"), (3, 1, r"was lost 1 times in the Dask")],
)
def test__group_that_ends_its_workers__is_given_up(
    lone_client, monkeypatch, n_failures, n_tries, message
):
    def allow(n, dask_scheduler):
        before, dask_scheduler.allowed_failures = dask_scheduler.allowed_failures, n
        return before

    monkeypatch.setattr("skcifar._dask._MOST_TRIES", n_tries)
    before = lone_client.run_on_scheduler(partial(allow, n_failures))
    search = BatchedGridSearchCV(MLP, RATES, cv=2, scoring=Deadly(), backend="dask")
    with pytest.raises(RuntimeError, match=message) as caught:
        search.fit(X, y)
    lone_client.run_on_scheduler(partial(allow, before))
    assert "0 of 4 fits had come back" in str(caught.value)
    assert search.partial_results_.empty


START = """
import sys
from distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()
"""


@contextlib.contextmanager
def scheduler_of_its_own():
    """A process with a scheduler, and its address."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    with subprocess.Popen(
        [sys.executable, "-c", START],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    ) as process:
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def test__scheduler_killed__error_says_so_and_the_journal_resumes_here(tmp_path, trained):
    journal = tmp_path / "journal"
    search = BatchedGridSearchCV(MLP, GRID, cv=3, journal=journal, validate_epochs=True)
    expected = clone(search).set_params(journal=None).fit(X, y)
    with scheduler_of_its_own() as (process, address):

        def progress(event):
            process.kill()

        search.set_params(backend="dask", progress=progress)
        with distributed.Client(address), pytest.raises(RuntimeError) as caught:
            search.fit(X, y)
    n_back = len(search.partial_results_)
    assert 0 < n_back < 18
    assert str(caught.value).startswith(f"The connection to the Dask cluster at {address} is lost.")
    assert f"{n_back} of 18 fits had come back" in str(caught.value)
    assert f"in the journal {journal}: the same call goes on" in str(caught.value)
    trained.clear()
    search.set_params(backend="skcifar", progress=None).fit(X, y)
    assert len(trained) == 18 - n_back
    assert_same_results(search.cv_results_, expected.cv_results_)
    assert_same_epochs(search.epoch_results_, expected.epoch_results_)


def test__cluster_closed__is_an_error_that_names_the_remedy():
    with local_cluster(1, processes=False) as client:

        def progress(event):
            client.cluster.close()

        search = BatchedGridSearchCV(MLP, GRID, cv=3, progress=progress, backend="dask")
        with pytest.raises(RuntimeError, match=r"is lost\. .* with journal=FILE"):
            search.fit(X, y)


def test__journal_begun_here__is_gone_on_with_on_the_cluster(client, tmp_path, sent):
    search = BatchedGridSearchCV(MLP, GRID, cv=3, journal=tmp_path / "journal")
    expected = clone(search).set_params(journal=None).fit(X, y)

    def progress(event):
        if event["done_fits"] == 7:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        clone(search).set_params(progress=progress).fit(X, y)
    search.set_params(backend="dask").fit(X, y)
    assert 0 < sum(n_tasks for n_tasks, _ in sent) <= 18 - 7
    assert_same_results(search.cv_results_, expected.cv_results_)
    assert_same_epochs(search.epoch_results_, expected.epoch_results_)
    sent.clear()
    search.fit(X, y)
    assert not sent
    assert_same_results(search.cv_results_, expected.cv_results_)


ENDLESS = clone(MLP).set_params(
    max_iter=10**9, learning_rate="constant", tol=0, n_iter_no_change=10**9
)


def test__ctrl_c__ends_what_workers_are_busy_with(client):
    def interrupt():
        wait_for(lambda: len(executing(client)) == 2)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    search = BatchedGridSearchCV(ENDLESS, GRID, cv=3, backend="dask")
    with pytest.raises(KeyboardInterrupt), meanwhile(interrupt):
        search.fit(X, y)
    wait_for(lambda: not executing(client))
    assert search.partial_results_.empty
    assert_same_searches(BatchedGridSearchCV(MLP, RATES, cv=2))


class Unlucky:
    """A scorer that fails for one setting."""

    def __call__(self, estimator, X, y):
        if estimator.alpha == 0.01:
            raise LookupError("no luck")
        return float(estimator.score(X, y))


def test__scorer_that_fails__is_scikit_learns_matter(client):
    search = BatchedGridSearchCV(MLP, GRID, cv=3, scoring=Unlucky(), refit=False)
    results = []
    for backend in ("skcifar", "dask"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            results.append(search.set_params(backend=backend).fit(X, y).cv_results_)
        assert any("no luck" in str(warning.message) for warning in caught)
    assert_same_results(results[1], results[0])
    search.set_params(error_score="raise")
    with pytest.raises(LookupError, match="no luck") as error:
        search.fit(X, y)
    assert "Raised in a worker" in error.value.__notes__[0]
    wait_for(lambda: not keys_on_scheduler(client))


def test__fits_that_diverge__are_scored_as_in_this_process(client):
    grid = {"learning_rate_init": [0.1, 1e200]}
    results = []
    for backend in ("skcifar", "dask"):
        search = BatchedGridSearchCV(MLP, grid, cv=2, error_score=-1.0, backend=backend)
        with pytest.warns(FitFailedWarning, match="2 fits failed"):
            results.append(search.fit(X, y).cv_results_)
    assert_same_results(results[1], results[0])


def test__warnings_of_workers__are_given_here_once(client):
    model = clone(MLP).set_params(learning_rate="constant", n_iter_no_change=10, tol=0.1)
    search = BatchedGridSearchCV(model, RATES, cv=3, refit=False, backend="dask")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        search.fit(X, y)
    of_fits = [w for w in caught if issubclass(w.category, ConvergenceWarning)]
    assert len(of_fits) == 1, [str(w.message) for w in caught]


def test__scikit_learns_callbacks__follow_fits_on_the_same_machine(client):
    logs = []
    for backend in ("skcifar", "dask"):
        monitor = ScoringMonitor(scoring="accuracy")
        model = clone(MLP).set_callbacks(monitor)
        BatchedGridSearchCV(model, RATES, cv=2, refit=False, backend=backend).fit(X, y)
        logs.append(np.sort(monitor.get_logs().data_as_pandas["accuracy"]))
    np.testing.assert_allclose(logs[1], logs[0], rtol=0, atol=1e-9)
    assert len(logs[0]) >= 2 * 2 * 4


# -- searches within tasks -------------------------------------------------------------------------


def test__search_within_a_search__is_that_of_this_process(client):
    inner = BatchedGridSearchCV(MLP, {"alpha": [0.0, 0.01]}, cv=2, backend="dask")
    assert_same_searches(BatchedGridSearchCV(inner, {"estimator__max_iter": [1, 4]}, cv=2))


def test__search_within_a_task__uses_the_clusters_other_threads(client):
    search = BatchedGridSearchCV(MLP, RATES, cv=2, backend="dask")
    tasks = [client.submit(cross_val_score, search, X, y, cv=2, pure=False) for _ in range(3)]
    expected = cross_val_score(clone(search).set_params(backend="skcifar"), X, y, cv=2)
    for task in tasks:
        np.testing.assert_allclose(task.result(timeout=SECONDS), expected, rtol=0, atol=1e-9)


def keeps_memory():
    return _memory._glibc() is not None


def test__workers__keep_memory_from_step_to_step_where_this_process_does(client):
    assert set(client.run(keeps_memory).values()) == {keeps_memory()}
    settings = client.run(os.environ.get, "MALLOC_TRIM_THRESHOLD_")
    assert set(settings.values()) == {"65536"}  # as Dask has it


# -- what is missing -------------------------------------------------------------------------------


def test__no_client__error_says_how_to_get_one(monkeypatch):
    def none_there():
        raise ValueError("No global client found and no address provided")

    monkeypatch.setattr(distributed, "get_client", none_there)
    with pytest.raises(RuntimeError, match=r"(?s)Three lines .* client = Client\(cluster\)"):
        BatchedGridSearchCV(MLP, RATES, backend="dask").fit(X, y)


def test__plan__needs_no_cluster(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    search = BatchedGridSearchCV(MLP, RATES, cv=2, backend="dask")
    assert search.plan(X, y)["models"].sum() == 4


def not_there():
    raise ModuleNotFoundError("No module named 'skcifar'")


def test__skcifar_that_is_missing_on_workers__error_says_where_to_install_it(client, monkeypatch):
    monkeypatch.setattr("skcifar._dask._be_there", not_there)
    with pytest.raises(RuntimeError, match=r"No module named 'skcifar'\)\. Install the same"):
        BatchedGridSearchCV(MLP, RATES, backend="dask").fit(X, y)


def test__no_workers__is_an_error(monkeypatch):
    monkeypatch.setattr("skcifar._dask._SECONDS_FOR_A_WORKER", 0.2)
    with local_cluster(0), pytest.raises(RuntimeError, match="no worker in the Dask cluster"):
        BatchedGridSearchCV(MLP, RATES, backend="dask").fit(X, y)


def test__workers_of_another_version__are_an_error(client, monkeypatch):
    monkeypatch.setattr("skcifar.__version__", "0.0.1")
    with pytest.raises(RuntimeError, match=r"this process has 0\.0\.1"):
        BatchedGridSearchCV(MLP, RATES, backend="dask").fit(X, y)


def test__dask_that_is_not_installed__error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImportError, match=r"pip install 'skcifar\[dask\]'"):
        BatchedGridSearchCV(MLP, RATES, backend="dask").fit(X, y)


def test__import_of_the_package__does_not_import_dask():
    for path in (ROOT / "skcifar").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            assert not isinstance(node, ast.Import) or node.names[0].name.split(".")[0] not in DASK
            assert not isinstance(node, ast.ImportFrom) or node.module.split(".")[0] not in DASK


def test__scorer_that_cannot_be_pickled__error_says_what_is_wrong(client):
    lock = threading.Lock()

    def scorer(estimator, X, y):
        with lock:
            return 0.0

    with pytest.raises(TypeError, match="cannot be sent to other processes"):
        BatchedGridSearchCV(MLP, RATES, scoring=scorer, backend="dask").fit(X, y)
