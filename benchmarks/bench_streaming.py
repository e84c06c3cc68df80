"""More images than memory: what fits and predictions on a memory-mapped file take.

The file has n uint8 images of 32x32x3 (10 GB with the default n), random pixels with a mean for
each class; it lies in --folder, is read once before the clock starts and removed in the end. That
it then lies in the system's cache is what the comparison with rows in memory is about; a file that
does not is read at the disk's speed.

memory_softmax_sgd, memory_mlp, memory_cnn, memory_softmax_lbfgs
    Most anonymous memory of a fresh process that fits the whole file, in MB above that of one that
    has imported skcifar and read the labels: an epoch of SoftmaxRegression(solver="sgd") and of an
    MLP of 200 units, an iteration of SoftmaxRegression(), an epoch of the small CNN of bench_fit.py
    on the first 5% of the file. What is mapped is not anonymous: the system may drop it any time.
memory_partial_fit
    The same with partial_fit of the MLP over chunks of 65,536 images.
memory_predict, memory_transform
    The same with predict of the whole file by an MLP, and with features of the first 5% by an
    untrained CNN that transform writes into another memory-mapped file.
throughput_softmax_sgd, throughput_mlp, throughput_cnn, throughput_partial_fit, throughput_predict
    How many times as fast as with the same rows in memory, by the medians: `fit` of an epoch (of
    the first 500,000 images; the CNN of 50,000), and so on. Windows are made small enough that the
    CNN's images are several, too.
gpu_streaming
    With a GPU only: an epoch of the MLP on rows in the host's memory of which the device is told to
    hold none, so that they stream, against rows that are on the device.

    python benchmarks/bench_streaming.py [--only ROW,...] [--check] [--repeats N] [--n-images N]
        [--folder DIR] [--output DIR]

takes 8 minutes on two cores, 10 GB of disk, and as much memory for the cache.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _contestants import our_cnn, our_mlp, our_softmax
from _measure import (
    Result,
    exit_status,
    interleave,
    machine,
    parse_options,
    peak_anonymous,
    record,
    say,
    times_faster,
)
from sklearn.exceptions import ConvergenceWarning

from skcifar import MLPClassifier, SoftmaxRegression, _stored_rows

N_IMAGES = 3_300_000
CHUNK = 65_536
COMPARED = {"softmax_sgd": 500_000, "mlp": 500_000, "cnn": 50_000, "partial_fit": 500_000,
            "predict": 500_000}  # fmt: skip
LEAST_SPEED = 0.85
MOST_MEGABYTES = 1024

START = """
import sys, warnings
sys.path.insert(0, {benchmarks!r})
import bench_streaming
X, y = bench_streaming.opened({folder!r})
"""
WORK = {
    "softmax_sgd": lambda X, y: our_softmax("auto", 1, 0).fit(X, y),
    "mlp": lambda X, y: our_mlp("auto", 1, 0).fit(X, y),
    "cnn": lambda X, y: our_cnn("auto", 1, 0).fit(*first(X, y, 20)),
    "softmax_lbfgs": lambda X, y: SoftmaxRegression(max_iter=1, random_state=0).fit(X, y),
    "partial_fit": lambda X, y: partly_fitted(X, y),
    "predict": lambda X, y: fitted_mlp(X, y).predict(X),
    "transform": lambda X, y: transformed(*first(X, y, 20)),
}


def main() -> int:
    rows = [f"memory_{name}" for name in WORK]
    rows += [f"throughput_{name}" for name in COMPARED]
    options = parse_options(__doc__, [*rows, "gpu_streaming"], repeats=3, add_options=add_options)
    header = machine()
    warnings.simplefilter("ignore", ConvergenceWarning)  # an epoch is what is asked for
    results: list[Result] = []

    def keep(measured: list[Result]) -> None:
        record(measured, options.output / "streaming.csv", header)
        results.extend(measured)

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if any(row in options.only for row in rows):
            write(Path(folder), options.n_images)
        for name in COMPARED:
            if f"throughput_{name}" in options.only:
                keep([throughput(name, folder, options.repeats)])
        if any(row.startswith("memory") for row in options.only):
            keep(memory(folder, options))
    if "gpu_streaming" in options.only:
        keep([on_gpu(options.repeats)])
    return exit_status(results, options.check)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, default=None, help="where the file lies")
    parser.add_argument("--n-images", type=int, default=N_IMAGES, help="of it: %(default)s")


# -- the file ------------------------------------------------------------------------------------


def write(folder: Path, n: int) -> None:
    start = time.perf_counter()
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, n)
    np.save(folder / "y.npy", y)
    means = rng.integers(0, 16, (10, 3072), dtype=np.uint8)
    noise = rng.integers(0, 240, (20_000, 3072), dtype=np.uint8)
    X = np.lib.format.open_memmap(folder / "X.npy", "w+", np.uint8, (n, 3072))
    for first_row in range(0, n, len(noise)):
        part = slice(first_row, first_row + len(noise))
        X[part] = noise[: len(y[part])] + means[y[part]]
    X.flush()
    say(f"{n:,} images, {X.nbytes / 1e9:.1f} GB, written in {time.perf_counter() - start:.0f} s")


def opened(folder: str) -> tuple[np.ndarray, np.ndarray]:
    warnings.simplefilter("ignore", ConvergenceWarning)
    return np.load(f"{folder}/X.npy", mmap_mode="r"), np.load(f"{folder}/y.npy")


def first(X: np.ndarray, y: np.ndarray, share: int) -> tuple[np.ndarray, np.ndarray]:
    n = len(y) // share
    return X[:n], y[:n]


# -- what is done --------------------------------------------------------------------------------


def partly_fitted(X: np.ndarray, y: np.ndarray) -> MLPClassifier:
    model = our_mlp("auto", 1, 0)
    for start in range(0, len(y), CHUNK):
        part = slice(start, start + CHUNK)
        model.partial_fit(X[part], y[part], classes=np.arange(10))
    return model


def fitted_mlp(X: np.ndarray, y: np.ndarray) -> MLPClassifier:
    return our_mlp("auto", 1, 0).fit(np.array(X[:2000]), y[:2000])


def transformed(X: np.ndarray, y: np.ndarray) -> None:
    from skcifar import TripletEmbedder

    embedder = TripletEmbedder(64, channels=(16, 32), max_iter=1, random_state=0)
    embedder.fit(np.array(X[:1000]), y[:1000])
    with tempfile.TemporaryDirectory() as folder:
        out = np.lib.format.open_memmap(f"{folder}/Z.npy", "w+", np.float32, (len(X), 64))
        embedder.transform(X, out=out)


# -- memory --------------------------------------------------------------------------------------


def memory(folder: str, options: argparse.Namespace) -> list[Result]:
    if not Path("/proc/self/status").exists():
        say("memory is skipped: it is read from /proc, which this system does not have")
        return []
    start = START.format(benchmarks=str(Path(__file__).parent), folder=folder)
    base = peak_anonymous(start)
    results = []
    for name in WORK:
        if f"memory_{name}" not in options.only:
            continue
        began = time.perf_counter()
        peak = peak_anonymous(f"{start}\nbench_streaming.WORK[{name!r}](X, y)\n")
        seconds = time.perf_counter() - began
        note = f"{peak / 1e6:.0f} MB less {base / 1e6:.0f} MB; the process took {seconds:.0f} s"
        results.append(
            Result(
                f"memory_{name}", "MB above the interpreter's", (peak - base) / 2**20,
                at_most=MOST_MEGABYTES, n=options.n_images, repeats=1, data="synthetic", note=note,
            )
        )  # fmt: skip
        say(str(results[-1]))
    return results


# -- throughput ----------------------------------------------------------------------------------


def throughput(name: str, folder: str, repeats: int) -> Result:
    X, y = opened(folder)
    n = min(COMPARED[name], len(y))
    stored, y = X[:n], y[:n]
    within = np.array(stored)
    kept = _stored_rows._LEAST_STORED_BYTES, _stored_rows._WINDOW_BYTES
    if name != "partial_fit":  # its chunks are read in place, as anybody's are
        _stored_rows._LEAST_STORED_BYTES = 0
    if stored.nbytes < 4 * _stored_rows._WINDOW_BYTES:
        _stored_rows._WINDOW_BYTES = stored.nbytes // 5
    work: Callable[[Any, Any], Any] = WORK[name]
    if name == "cnn":
        work = lambda X, y: our_cnn("auto", 1, 0).fit(X, y)  # noqa: E731
    if name == "predict":
        model = fitted_mlp(within, y)
        work = lambda X, y: model.predict(X)  # noqa: E731
    try:
        runs = interleave(
            {"stored": partial(work, stored, y), "in memory": partial(work, within, y)}, repeats
        )
    finally:
        _stored_rows._LEAST_STORED_BYTES, _stored_rows._WINDOW_BYTES = kept
    return times_faster(
        f"throughput_{name}", runs["stored"], runs["in memory"], at_least=LEAST_SPEED, n=n,
        data="synthetic",
    )  # fmt: skip


def on_gpu(repeats: int) -> Result:
    about: dict[str, Any] = {"n": 500_000, "data": "synthetic"}
    if not torch.cuda.is_available():
        return Result(
            "gpu_streaming", "times as fast as on the device", None, at_least=LEAST_SPEED,
            repeats=repeats, note="not measured on a GPU", **about,
        )  # fmt: skip
    rng = np.random.default_rng(0)
    X = rng.integers(0, 256, (about["n"], 3072), dtype=np.uint8)
    y = rng.integers(0, 10, about["n"])

    def fit(share: float) -> Any:
        _stored_rows._MOST_OF_DEVICE = share
        return MLPClassifier((200,), batch_size=500, max_iter=5, random_state=0).fit(X, y)

    kept = _stored_rows._MOST_OF_DEVICE
    try:
        runs = interleave(
            {"streamed": partial(fit, 0.0), "on the device": partial(fit, 1.0)}, repeats
        )
    finally:
        _stored_rows._MOST_OF_DEVICE = kept
    return times_faster(
        "gpu_streaming", runs["streamed"], runs["on the device"], at_least=LEAST_SPEED, **about
    )


if __name__ == "__main__":
    sys.exit(main())
