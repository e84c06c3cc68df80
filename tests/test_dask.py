"""scikit-learn's own tools on Dask's workers, by way of joblib: real processes, one killed."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import uuid
from concurrent.futures import CancelledError
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import cloudpickle
import dask
import joblib
import numpy as np
import pytest
import torch
from distributed import Client, LocalCluster
from numpy.testing import assert_allclose
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.metrics import log_loss
from sklearn.model_selection import (
    GridSearchCV,
    StratifiedKFold,
    cross_val_score,
    cross_validate,
)
from sklearn.pipeline import make_pipeline
from skorch.callbacks import Callback
from sweeps import X, assert_same_results, in_block, y

from skcifar import (
    CNNClassifier,
    FineTunedClassifier,
    MLPClassifier,
    SoftmaxRegression,
    TripletEmbedder,
)
from skcifar._processes import shares_gpu
from skcifar.model_selection import compare

FLOAT64 = {"precision": "float64", "random_state": 0}
MLP = MLPClassifier((8,), max_iter=4, batch_size=50, **FLOAT64)
IMAGES = {"image_shape": (8, 8, 1), "max_iter": 1}
EMBEDDER = TripletEmbedder(4, channels=(4,), **IMAGES, **FLOAT64)
# estimator, and a grid for it
STUDIES = {
    "softmax": (SoftmaxRegression(**FLOAT64), {"alpha": [0.1, 1.0]}),
    "mlp": (MLP, {"learning_rate_init": [0.1, 0.01]}),
    "cnn": (CNNClassifier((4,), **IMAGES, **FLOAT64), {"alpha": [0.0, 0.1]}),
    "embedding": (
        make_pipeline(EMBEDDER, SoftmaxRegression(**FLOAT64)),
        {"tripletembedder__margin": [0.1, 0.4], "softmaxregression__alpha": [0.1, 1.0]},
    ),
    "fine-tuned": (FineTunedClassifier(EMBEDDER, max_iter=1, **FLOAT64), {"alpha": [0.0, 0.1]}),
}


@pytest.fixture(scope="module")
def client():
    """Two worker processes of one thread each."""
    # a worker that is absent for longer is not started again; a busy machine may take 15 seconds
    settings = dask.config.set({"distributed.deploy.lost-worker-timeout": "60s"})
    local = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0")
    with settings, local as cluster, Client(cluster) as client:
        client.wait_for_workers(2)
        yield client


# -- results are the local ones --------------------------------------------------------------------


@pytest.mark.parametrize("name", STUDIES)
def test__grid_search__equals_the_local_one(name, client):
    estimator, grid = STUDIES[name]
    search = GridSearchCV(estimator, grid, cv=2, scoring="neg_log_loss")
    local = clone(search).fit(X, y)
    found = in_block(search.fit, X, y, backend="dask")
    assert_same_results(found.cv_results_, local.cv_results_)
    assert_allclose(found.predict_proba(X), local.predict_proba(X), atol=1e-9)


@pytest.mark.parametrize("name", ["mlp", "embedding"])
def test__cross_val_score__equals_the_local_one(name, client):
    arguments = {"cv": 3, "scoring": "neg_log_loss"}
    local = cross_val_score(STUDIES[name][0], X, y, **arguments)
    found = in_block(cross_val_score, STUDIES[name][0], X, y, **arguments, backend="dask")
    assert_allclose(found, local, rtol=0, atol=1e-9)


def test__compare__equals_the_local_one(client):
    models = {name: estimator for name, (estimator, _) in STUDIES.items() if name != "fine-tuned"}
    local = compare(models, X, y, cv=2, scoring="neg_log_loss")
    found = in_block(compare, models, X, y, cv=2, scoring="neg_log_loss", backend="dask")
    assert not found["error"].notna().any()
    for column in local.columns:
        if local[column].dtype.kind == "f" and not column.endswith("_seconds"):
            assert_allclose(found[column], local[column], rtol=0, atol=1e-9, err_msg=column)
    assert [r["train_loss"] for r in found.attrs["histories"]] == pytest.approx(
        [r["train_loss"] for r in local.attrs["histories"]], abs=1e-9
    )


# -- what is sent ----------------------------------------------------------------------------------


@pytest.fixture
def sent(client, monkeypatch):
    """What is scattered, value by value, and the bytes of each call's tasks."""
    scattered, sizes = [], []
    scatter, submit = client.scatter, client.submit

    def recorded_scatter(data, **kwargs):
        scattered.extend(data if isinstance(data, list) else [data])
        return scatter(data, **kwargs)

    def recorded_submit(*args, **kwargs):
        sizes.append(len(cloudpickle.dumps((args, kwargs))))
        return submit(*args, **kwargs)

    monkeypatch.setattr(client, "scatter", recorded_scatter)
    monkeypatch.setattr(client, "submit", recorded_submit)
    return scattered, sizes


@pytest.mark.parametrize("n_candidates", [2, 12])
def test__search__sends_rows_and_folds_once_however_many_its_tasks(n_candidates, client, sent):
    scattered, sizes = sent
    grid = {"alpha": np.geomspace(1e-4, 1, n_candidates)}
    in_block(GridSearchCV(MLP, grid, cv=2, refit=False).fit, X, y, backend="dask")
    assert sum(value is X for value in scattered) == sum(value is y for value in scattered) == 1
    folds = [value for value in scattered if value is not X and value is not y]
    assert len(folds) == 4  # rows to train on and rows to score, twice
    assert len(sizes) >= 2 and max(sizes) < X.nbytes / 5
    assert sum(np.asarray(value).nbytes for value in folds) == 2 * 8 * len(X)


def test__rows_named_for_scattering__are_sent_once_for_all_models_of_a_comparison(client, sent):
    models = {"softmax": STUDIES["softmax"][0], "mlp": MLP}
    with joblib.parallel_config(backend="dask", scatter=[X, y]):
        table = compare(models, X, y, cv=2)
    assert not table["error"].notna().any()
    assert sum(value is X for value in sent[0]) == 1


# -- threads ---------------------------------------------------------------------------------------


class Threads(Callback):
    """Counts them in the middle of a training."""

    def on_epoch_end(self, net, **kwargs):
        self.n_threads_ = torch.get_num_threads()


def test__dask_worker__trains_on_one_thread(client):
    model = clone(MLP).set_params(skorch_callbacks=[Threads()])
    found = in_block(cross_validate, model, X, y, cv=2, return_estimator=True, backend="dask")
    threads = [c.n_threads_ for e in found["estimator"] for c in e.skorch_callbacks_]
    assert threads == [1, 1]
    assert client.submit(os.getpid).result() != os.getpid()


def test__dask_worker_on_a_gpu__is_not_taken_for_one_of_several(client):
    name = client.submit(lambda: multiprocessing.current_process().name).result()
    assert not shares_gpu(name, torch.device("cuda"))


# -- what goes wrong -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Killing:
    """A scorer whose first call, in whatever process, kills one: its own or that of `pid`.

    Each call leaves a file.
    """

    folder: Path
    pid: int | None = None

    def __call__(self, estimator, X, y):
        with suppress(FileExistsError):
            (self.folder / "killed").touch(exist_ok=False)
            os.kill(self.pid or os.getpid(), signal.SIGKILL)
        (self.folder / uuid.uuid4().hex).touch()
        return -log_loss(y, estimator.predict_proba(X))


@pytest.fixture
def copies_stay(client):
    """Dask's memory manager, which drops copies that other workers hold too, is stopped."""
    client.amm.stop()
    yield
    client.amm.start()


def test__worker_killed_in_the_middle__search_has_all_results(client, copies_stay, sent, tmp_path):
    digits, labels = load_digits(return_X_y=True)
    digits, labels = digits[:600] / 16, labels[:600]
    folds = list(StratifiedKFold(3).split(digits, labels))
    assert min(rows.nbytes for fold in folds for rows in fold) > 1000  # joblib scatters such
    search = GridSearchCV(MLP, {"alpha": [0.0, 0.1, 0.2, 0.3]}, cv=folds, refit=False)
    local = clone(search).set_params(scoring="neg_log_loss").fit(digits, labels)
    search.set_params(scoring=Killing(tmp_path), error_score="raise")
    with joblib.parallel_config(backend="dask", scatter=[digits, labels, *sum(folds, ())]):
        search.fit(digits, labels)
    assert (tmp_path / "killed").exists()
    assert len(list(tmp_path.iterdir())) >= 1 + 12
    assert_same_results(search.cv_results_, local.cv_results_)
    assert len(sent[0]) == 2 + 2 * 3  # nothing besides, which one worker alone would hold
    client.wait_for_workers(2, timeout=60)  # the nanny has started another in its place


@pytest.fixture
def lonely(tmp_path):
    """The process of the current client's scheduler, with one worker of two threads."""
    place = str(tmp_path / "scheduler.json")
    common = ["--no-dashboard", "--scheduler-file", place]
    # what a worker cannot import joblib would wait for
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with ExitStack() as stack:

        def start(module, *options):
            run = [sys.executable, "-m", f"distributed.cli.{module}", *common, *options]
            process = subprocess.Popen(
                run, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        scheduler = start("dask_scheduler", "--host", "127.0.0.1", "--port", "0")
        start("dask_worker", "--no-nanny", "--nthreads", "2", "--death-timeout", "60")
        with Client(scheduler_file=place, timeout=30) as client:
            client.wait_for_workers(1, timeout=60)
            yield scheduler


def test__scheduler_gone__search_raises_and_says_so(lonely, tmp_path):
    (tmp_path / "scores").mkdir()
    scorer = Killing(tmp_path / "scores", pid=lonely.pid)
    search = GridSearchCV(MLP, {"alpha": [0.0, 0.1, 0.2, 0.3]}, scoring=scorer)
    errors = []

    def run():
        with pytest.raises(CancelledError) as raised:
            in_block(search.fit, X, y, backend="dask")
        errors.append(str(raised.value))

    thread = threading.Thread(target=run, daemon=True)  # which could wait for ever
    thread.start()
    thread.join(120)
    assert len(errors) == 1
    assert "lost the connection to the scheduler" in errors[0]
