"""Memory: fifty fits leave no more behind than one does; what is free, and what is kept."""

import gc
import os
import subprocess
import sys

import joblib
import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV

from skcifar import CNNClassifier, MLPClassifier, SoftmaxRegression, TripletEmbedder
from skcifar._memory import _glibc, free_memory

N_FITS = 50
CUDA = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
)
ESTIMATORS = {
    "softmax": SoftmaxRegression(max_iter=2),
    "softmax-sgd": SoftmaxRegression(solver="sgd", max_iter=1),
    "mlp": MLPClassifier((16,), max_iter=1),
    "mlp-early-stopping": MLPClassifier((16,), max_iter=1, early_stopping=True),
    "cnn": CNNClassifier((4, 8), max_iter=1),
    "triplet": TripletEmbedder(4, channels=(4, 8), max_iter=1),
}


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    return X[:100].astype("uint8"), y[:100]


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test__fifty_fits__leave_no_more_tensors_than_two(name, device, digits):
    estimator = ESTIMATORS[name].set_params(device=device, random_state=0)
    held = []
    # Nothing may wait for the garbage collector: what does keeps its memory until then.
    gc.disable()
    gc.freeze()  # what is there already is not looked at, which takes a tenth of a second each time
    try:
        for _ in range(N_FITS):
            estimator.fit(*digits)
            held.append(_tensors_held())
    finally:
        gc.unfreeze()
        gc.enable()
    assert held[1][0] > 0
    assert held[2:] == [held[1]] * (N_FITS - 2)


def test__study__leaves_no_rows_behind_that_wait_for_the_garbage_collector(digits):
    search = GridSearchCV(MLPClassifier((8,), max_iter=2), {"alpha": [0.1, 1.0]}, cv=3, refit=False)
    X, y = digits
    held = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(4):
            with joblib.parallel_config(backend="skcifar"):
                clone(search).fit(np.repeat(X, 20, axis=1), y)  # large enough to be shared
            held.append(_tensors_held())
    finally:
        gc.enable()
    assert held[2:] == [held[1]] * 2


def _tensors_held():
    """Live tensors, the bytes of their memory, and those that CUDA has given out."""
    # not isinstance, which proxies that others left behind may answer to with an import
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage() for one in tensors}
    n_bytes = sum(storage.nbytes() for storage in storages.values())
    on_cuda = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    return len(tensors), n_bytes, on_cuda


@pytest.mark.parametrize(("n_free", "n_counted"), [(10, 50), (80, 80)])
def test__free_memory__is_half_of_all_where_cached_files_fill_it(n_free, n_counted, monkeypatch):
    pages = {"SC_PAGE_SIZE": 4096, "SC_AVPHYS_PAGES": n_free, "SC_PHYS_PAGES": 100}
    monkeypatch.setattr("os.sysconf", pages.__getitem__)
    assert free_memory(torch.device("cpu")) == n_counted * 4096


def output_of(program, **settings):
    """What a fresh process prints that has no other settings of malloc's in its environment."""
    without = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-W", "ignore", "-c", program]
    return subprocess.check_output(command, env=without | settings, text=True, timeout=60)


def test__memory_kept__stays_the_process_s_until_the_end():
    if _glibc() is None:
        pytest.skip("needs glibc")
    # What lies in memory is told everywhere; page faults, which keeping it saves, are not.
    program = """
import os, torch
from skcifar._memory import memory_kept

def resident():
    with open("/proc/self/statm") as file:
        pages = file.read().split()
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")  # files aside

def left_by_a_step(n=160_000_000):  # 640 MB, freed at once
    before = resident()
    torch.ones(n)
    return resident() - before

left_by_a_step()
print(left_by_a_step())
with memory_kept(torch.device("meta")):
    print(left_by_a_step())
before = resident()
with memory_kept(torch.device("cpu")):
    with memory_kept(torch.device("cpu")):
        print(left_by_a_step())
        left_by_a_step()  # aligned otherwise, it may not fit where the first one lay
    print(left_by_a_step())
    print(resident() - before)
print(resident() - before)
print(left_by_a_step(2 * 160_000_000))  # no free part of the heap holds
"""
    output = output_of(program)
    untouched, on_meta, first, third, within, after, again = map(int, output.split())
    assert max(untouched, on_meta, after, again) < 100e6
    assert first > 600e6
    assert within > 600e6
    assert third < 100e6  # the same memory, once more


def test__fork_while_memory_is_kept__begins_anew():
    if _glibc() is None:
        pytest.skip("needs glibc")
    program = """
import os, torch
from skcifar import _memory

with _memory.memory_kept(torch.device("cpu")), _memory._keeping_lock:
    child = os.fork()
    if child == 0:
        free = _memory._keeping_lock.acquire(timeout=5)
        os._exit(0 if free and _memory._n_keeping == 0 else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), _memory._n_keeping)
"""
    output = output_of(program)
    assert output.split() == ["0", "1"]


@pytest.mark.parametrize(
    "variable",
    [{"SKCIFAR_KEEP_MEMORY": "0"}, {"GLIBC_TUNABLES": "glibc.malloc.top_pad=1"}],
    ids=str,
)
def test__environment__can_decline_to_keep_memory(variable, monkeypatch):
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    assert _glibc.__wrapped__() is None


@pytest.mark.parametrize("threshold", [None, 65536])
def test__malloc__goes_back_to_the_settings_of_the_environment(threshold):
    if _glibc() is None:
        pytest.skip("needs glibc")
    program = """
import torch
from skcifar._memory import _resident, memory_kept

before = _resident()
with memory_kept(torch.device("cpu")):
    torch.ones(25_000_000)  # 100 MB
    print(_resident() - before)
print(_resident() - before)
"""
    settings = {} if threshold is None else {"MALLOC_TRIM_THRESHOLD_": str(threshold)}
    output = output_of(program, **settings)
    within, after = map(int, output.split())
    assert within > 90e6
    assert (after > 90e6) == (threshold is None)
    assert (after < 30e6) == (threshold is not None)
