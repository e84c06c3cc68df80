"""Fits in worker processes: their share of the cores, and a warning of a GPU that is shared."""

import multiprocessing
import os
import subprocess
import sys
import warnings

import joblib
import pytest
import torch
from joblib import Parallel, cpu_count, delayed
from joblib.parallel import ParallelBackendBase
from sklearn.model_selection import cross_validate
from skorch.callbacks import Callback
from sweeps import X, in_block, y

from skcifar import MLPClassifier
from skcifar._processes import shares_gpu, warn_if_gpu_is_shared

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


class Threads(Callback):
    """Counts them in the middle of a training."""

    def on_epoch_end(self, net, **kwargs):
        self.n_threads_ = torch.get_num_threads()


def threads_while_fitting(backend):
    model = MLPClassifier((8,), max_iter=1, random_state=0, skorch_callbacks=[Threads()])
    results = in_block(
        cross_validate, model, X, y, cv=4, n_jobs=2, return_estimator=True, backend=backend
    )
    return [callback.n_threads_ for e in results["estimator"] for callback in e.skorch_callbacks_]


def test__loky_worker__trains_on_its_share_of_the_cores(monkeypatch):
    for variable in ParallelBackendBase.MAX_NUM_THREADS_VARS:
        monkeypatch.delenv(variable, raising=False)
    assert threads_while_fitting("loky") == [max(1, cpu_count() // 2)] * 4


def test__multiprocessing_worker__trains_on_one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert threads_while_fitting("multiprocessing") == [1] * 4
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


FORKED_AFTER_THREADS = """
import joblib, numpy, torch
from sklearn.model_selection import cross_val_score
from skcifar import MLPClassifier

torch.set_num_threads(2)
X = numpy.random.default_rng(0).random((5000, 200))
y = numpy.arange(5000) % 2
model = MLPClassifier((64,), max_iter=1, random_state=0).fit(X, y)
with joblib.parallel_config(backend="multiprocessing", n_jobs=2):
    print(joblib.Parallel(timeout=30)(joblib.delayed(model.score)(X, y) for _ in range(2)))
    print(cross_val_score(model, X, y, cv=2))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are not forked")
def test__forked_worker__does_not_wait_for_threads_of_its_parent():
    environment = os.environ | {"JOBLIB_START_METHOD": "fork", "PYTHONWARNINGS": "ignore"}
    environment.pop("OMP_NUM_THREADS", None)
    run = [sys.executable, "-c", FORKED_AFTER_THREADS]
    found = subprocess.run(run, env=environment, timeout=120, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("[") == 2


# -- a GPU that is shared --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "process, device, shared",
    [
        ("LokyProcess-1", CUDA, True),
        ("ForkPoolWorker-2", CUDA, True),
        ("SpawnPoolWorker-1", torch.device("cuda"), True),
        ("LokyProcess-1", CPU, False),
        ("MainProcess", CUDA, False),
        ("Process-1", CUDA, False),  # one that a user starts, perhaps with nothing beside it
        ("Dask Worker process (from Nanny)", CUDA, False),
    ],
)
def test__gpu__is_shared_by_workers_of_a_pool_only(process, device, shared, monkeypatch):
    monkeypatch.delenv("SKCIFAR_DEVICE", raising=False)
    assert shares_gpu(process, device) is shared


def test__gpu_given_to_a_worker__is_not_shared(monkeypatch):
    monkeypatch.setenv("SKCIFAR_DEVICE", "cuda:1")
    assert not shares_gpu("LokyProcess-2", torch.device("cuda:1"))


def warned_of(device, times):
    """What this process warns of when so many fits begin on a device."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            warn_if_gpu_is_shared(device)
    return multiprocessing.current_process().pid, [(w.category, str(w.message)) for w in caught]


@pytest.mark.parametrize("backend", ["loky", "multiprocessing"])
def test__workers_on_one_gpu__each_warn_once(backend, monkeypatch):
    monkeypatch.delenv("SKCIFAR_DEVICE", raising=False)
    with joblib.parallel_config(backend=backend):
        told = Parallel(n_jobs=2, pre_dispatch="all", batch_size=1)(
            delayed(warned_of)(CUDA, 3) for _ in range(6)
        )
    by_process = {}
    for process, warned in told:
        by_process.setdefault(process, []).extend(warned)
    for (category, message), *more in by_process.values():
        assert category is UserWarning and not more
        assert "cuda:0" in message and 'backend="skcifar"' in message and "Dask" in message


def test__fit__tells_its_device(monkeypatch):
    devices = []
    monkeypatch.setattr("skcifar._supervised.warn_if_gpu_is_shared", devices.append)
    MLPClassifier((8,), max_iter=1, device="cpu").fit(X, y)
    assert devices == [CPU]


def test__process_of_its_own__warns_of_nothing():
    assert warned_of(CUDA, 2)[1] == []
