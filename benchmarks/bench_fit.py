"""Fits of SoftmaxRegression, MLPClassifier and CNNClassifier on CIFAR-10 against their peers.

Seconds are those of the public call: `fit` for several epochs, divided by their number, nothing
subtracted. Checking the rows, their statistics and building the network are in it, on both sides.
Our estimators get raw uint8 rows and normalise every batch; the peers get the same rows as
standardised float32, made outside the clock, but for the bare loop. Everything runs on the CPU,
with the threads that torch and NumPy take by themselves.

softmax_epoch
    SoftmaxRegression(solver="sgd", batch_size=256) against skorch's NeuralNetClassifier with its
    own DataLoader and callbacks, both for ten epochs. skorch's default of holding out a fifth of
    the rows is off, and it shuffles, as ours does.
softmax_step_overhead
    The same against a loop over index batches of the same uint8 rows with the same optimizer
    (fused) and penalty, which records nothing. Here the epochs' own seconds, `history_`, count,
    for what is asked is the cost of a step; the cost of a fit is in the note.
mlp_float32, mlp_bfloat16
    200 hidden units, SGD with Nesterov momentum, batches of 500, five epochs, against
    scikit-learn's MLPClassifier.
cnn_float32, cnn_bfloat16
    3x3 convolutions of 32, 64 and 64 channels, each pooled, and 64 dense units; Adam, batches of
    128, three epochs, on the first 10,000 images; against a plain torch loop (in a process of
    its own, as malloc is in a better state where ours has trained) over the same
    network in NCHW, convolution, ReLU, pooling, float32.
memory
    Anonymous memory of a fresh process that loads n images and fits one epoch, at its highest,
    watched from outside; the slope from 25,000 images (five classes) to 50,000 is the growth, the
    rest the fixed part. scikit-learn's estimators get float32 rows / 255 from a memory map, which
    itself is not anonymous. With fewer or synthetic images the rows come from a file.
import_time
    `import skcifar` against `import torch, sklearn` in fresh processes, without Python's start.

    python benchmarks/bench_fit.py [--only ROW,...] [--check] [--data-home DIR] [--repeats N]
        [--n-train N] [--output DIR]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _contestants import (
    TASKS,
    as_torch_has_them,
    bare_softmax,
    our_cnn,
    our_mlp,
    our_softmax,
    plain_torch,
    scikit_learn,
    skorch,
)
from _measure import (
    Images,
    InProcessOfItsOwn,
    Result,
    exit_status,
    interleave,
    load_images,
    machine,
    median_seconds,
    parse_options,
    peak_anonymous,
    per_channel,
    record,
    say,
    standardised,
    times_faster,
)
from sklearn.exceptions import ConvergenceWarning

from skcifar import SoftmaxRegression

SOFTMAX_EPOCHS = 10  # skorch's default
MLP_EPOCHS = 5
CNN_EPOCHS = 3
CNN_IMAGES = 10_000


def main() -> int:
    groups: dict[Callable[[Images, argparse.Namespace], list[Result]], tuple[str, ...]] = {
        softmax: ("softmax_epoch", "softmax_step_overhead"),
        mlp: ("mlp_float32", "mlp_bfloat16"),
        cnn: ("cnn_float32", "cnn_bfloat16"),
        memory: ("memory",),
        import_time: ("import_time",),
    }
    options = parse_options(__doc__, [row for rows in groups.values() for row in rows], repeats=5)
    header = machine()
    train = load_images(options.data_home, "train", options.n_train)
    warnings.simplefilter("ignore", ConvergenceWarning)  # a few epochs are what is asked for
    results: list[Result] = []
    for group, rows in groups.items():
        if set(rows) & set(options.only):
            measured = group(train, options)
            record(measured, options.output / "fit.csv", header)
            results += measured
    return exit_status(results, options.check)


# -- softmax regression --------------------------------------------------------------------------


def softmax(train: Images, options: argparse.Namespace) -> list[Result]:
    epochs, n = SOFTMAX_EPOCHS, len(train.X)
    shift, scale = per_channel(train.X)

    def ours() -> SoftmaxRegression:
        return our_softmax("auto", epochs, 0).fit(train.X, train.y)

    contestants = {"skcifar": ours}
    if "softmax_epoch" in options.only:
        rows = standardised(train.X, shift, scale)
        contestants["skorch"] = lambda: skorch(TASKS["softmax"], rows, train.y, epochs)
    if "softmax_step_overhead" in options.only:
        raw, targets = torch.from_numpy(train.X), torch.from_numpy(train.y)
        statistics = torch.tensor(shift).float(), torch.tensor(1 / scale).float()
        contestants["bare loop"] = lambda: bare_softmax(raw, targets, *statistics, epochs)
    runs = interleave(contestants, options.repeats)
    about = {"n": n, "data": train.name}
    results = []
    if "skorch" in runs:
        speed = times_faster(
            "softmax_epoch", runs["skcifar"], runs["skorch"], at_least=2.5, **about
        )
        results.append(per_epoch(speed, epochs))
    if "bare loop" in runs:
        loops = [sum(row["seconds"] for row in run.outcome.history_) for run in runs["skcifar"]]
        loop_s = float(np.median(loops)) / epochs
        bare_s = median_seconds(runs["bare loop"]) / epochs
        rest = median_seconds(runs["skcifar"]) - float(np.median(loops))
        overhead = 1000 * (loop_s - bare_s) / -(-n // 256)
        results.append(
            Result(
                "softmax_step_overhead",
                "ms a step over a bare loop",
                overhead,
                at_most=0.1,
                ours_s=loop_s,
                peer_s=bare_s,
                repeats=options.repeats,
                note=f"a fit costs {rest:.3f} s besides its steps",
                **about,
            )
        )
    return results


# -- multilayer perceptron -----------------------------------------------------------------------


def mlp(train: Images, options: argparse.Namespace) -> list[Result]:
    rows = standardised(train.X, *per_channel(train.X))
    bounds = {"mlp_float32": 1.0, "mlp_bfloat16": 2.0}
    contestants = {
        name: lambda name=name: our_mlp(name.removeprefix("mlp_"), MLP_EPOCHS, 0).fit(
            train.X, train.y
        )
        for name in bounds
        if name in options.only
    }
    contestants["scikit-learn"] = lambda: scikit_learn(TASKS["mlp"], rows, train.y, MLP_EPOCHS)
    runs = interleave(contestants, options.repeats)
    about = {"n": len(rows), "data": train.name}
    return [
        per_epoch(
            times_faster(name, runs[name], runs["scikit-learn"], at_least=bound, **about),
            MLP_EPOCHS,
            "aim 1.5" if name == "mlp_float32" else "",
        )
        for name, bound in bounds.items()
        if name in runs
    ]


# -- convolutional network -----------------------------------------------------------------------


def cnn(train: Images, options: argparse.Namespace) -> list[Result]:
    train = train.first(CNN_IMAGES)
    rows = standardised(train.X, *per_channel(train.X))
    images = as_torch_has_them(TASKS["cnn"], rows)
    bounds = {"cnn_float32": 1.5, "cnn_bfloat16": 2.2}
    contestants = {
        name: lambda name=name: our_cnn(name.removeprefix("cnn_"), CNN_EPOCHS, 0).fit(
            train.X, train.y
        )
        for name in bounds
        if name in options.only
    }
    contestants["plain torch"] = InProcessOfItsOwn(
        plain_torch, TASKS["cnn"], images, train.y, CNN_EPOCHS
    )
    runs = interleave(contestants, options.repeats)
    about = {"n": len(rows), "data": train.name}
    return [
        per_epoch(
            times_faster(name, runs[name], runs["plain torch"], at_least=bound, **about),
            CNN_EPOCHS,
        )
        for name, bound in bounds.items()
        if name in runs
    ]


# -- what both networks share --------------------------------------------------------------------


def per_epoch(result: Result, epochs: int, aim: str = "") -> Result:
    assert result.ours_s is not None and result.peer_s is not None
    result.ours_s /= epochs
    result.peer_s /= epochs
    result.note = ", ".join(filter(None, [f"seconds per epoch of {epochs}", aim]))
    return result


# -- memory --------------------------------------------------------------------------------------

# name: (is ours, import, estimator)
FITS = {
    "SoftmaxRegression": (True, "skcifar", "SoftmaxRegression(max_iter=1)"),
    "SoftmaxRegression_sgd": (True, "skcifar", "SoftmaxRegression(solver='sgd', max_iter=1)"),
    "MLPClassifier": (True, "skcifar", "MLPClassifier(max_iter=1)"),
    "CNNClassifier": (True, "skcifar", "CNNClassifier(max_iter=1)"),
    "sklearn_LogisticRegression": (
        False,
        "sklearn.linear_model",
        "LogisticRegression(max_iter=1)",
    ),
    "sklearn_MLPClassifier": (False, "sklearn.neural_network", "MLPClassifier(max_iter=1)"),
}
READ_CIFAR10 = """
from skcifar.datasets import fetch_cifar10
X, y = fetch_cifar10(data_home={home!r}, classes=range({n} // 5000), return_X_y=True)
"""
READ_FILE = """
import numpy as np
X, y = np.load({rows!r}), np.load({targets!r})
"""
READ_FILE_AS_FLOAT = """
import numpy as np
X, y = np.load({rows!r}, mmap_mode="r").astype("float32"), np.load({targets!r})
X /= 255
"""


def memory(train: Images, options: argparse.Namespace) -> list[Result]:
    if not Path("/proc/self/status").exists():
        say("memory is skipped: it is read from /proc, which this system does not have")
        return []
    complete = train.real and len(train.X) == 50_000
    sizes = len(train.X) // 2, len(train.X)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for n in sizes:
            np.save(f"{folder}/rows{n}.npy", train.X[:n])
            np.save(f"{folder}/targets{n}.npy", train.y[:n])
        for name, (ours, module, estimator) in FITS.items():
            read = (READ_CIFAR10 if complete else READ_FILE) if ours else READ_FILE_AS_FLOAT
            peaks = []
            for n in sizes:
                program = read.format(
                    home=options.data_home,
                    n=n,
                    rows=f"{folder}/rows{n}.npy",
                    targets=f"{folder}/targets{n}.npy",
                )
                program += f"from {module} import *\n{estimator}.fit(X, y)\n"
                peaks.append(peak_anonymous(program))
                say(f"{name} {n} images: {peaks[-1] / 1e6:.0f} MB")
            growth = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])  # bytes an image
            about = {"n": sizes[1], "repeats": 1, "data": train.name}
            results += [
                Result(
                    f"memory_growth_{name}",
                    "times the uint8 bytes of an image",
                    growth / train.X.shape[1],
                    at_most=1.5 if ours else None,
                    **about,
                ),
                Result(
                    f"memory_fixed_{name}",
                    "MB",
                    (peaks[1] - growth * sizes[1]) / 1e6,
                    note=f"peak {peaks[1] / 1e6:.0f} MB",
                    **about,
                ),
            ]
    return results


# -- import --------------------------------------------------------------------------------------


def import_time(train: Images, options: argparse.Namespace) -> list[Result]:
    def seconds(what: str) -> float:
        program = (
            f"import time; t = time.perf_counter(); import {what}; print(time.perf_counter() - t)"
        )
        return float(subprocess.check_output([sys.executable, "-c", program], text=True))

    names = {"skcifar": "skcifar", "torch and sklearn": "torch, sklearn"}
    contestants = {
        f"import {label}": lambda what=what: seconds(what) for label, what in names.items()
    }
    runs = interleave(contestants, options.repeats)
    ours_s, peer_s = (float(np.median([run.outcome for run in part])) for part in runs.values())
    return [
        Result(
            "import_time",
            "s more than torch and sklearn",
            ours_s - peer_s,
            ours_s=ours_s,
            peer_s=peer_s,
            n=0,
            repeats=options.repeats,
            data="",
        )
    ]


if __name__ == "__main__":
    sys.exit(main())
