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
    128, three epochs, on the first 10,000 images; against a plain torch loop over the same
    network in NCHW, convolution, ReLU, pooling, float32.
mlp_bfloat16_accuracy, cnn_bfloat16_accuracy
    Test accuracy of float32 less that of bfloat16, in points: means over five seeds of five
    epochs, on the rows of the timing. Only with the real images.
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
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _measure import (
    Images,
    Result,
    exit_status,
    interleave,
    load_images,
    machine,
    median_seconds,
    parse_options,
    per_channel,
    record,
    say,
    standardised,
    times_faster,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier as ScikitLearnMLPClassifier
from skorch import NeuralNetClassifier
from torch import Tensor, nn
from torch.nn import functional as F

from skcifar import CNNClassifier, MLPClassifier, SoftmaxRegression

SOFTMAX_EPOCHS = 10  # skorch's default
MLP_EPOCHS = 5
CNN_EPOCHS = 3
CNN_IMAGES = 10_000
ACCURACY_EPOCHS = 5
SEEDS = 5
RATE = 0.01
PENALTY = 2e-3  # SoftmaxRegression's alpha="auto", per image
COMMON = {"image_shape": (32, 32, 3), "device": "cpu"}


def main() -> int:
    groups: dict[Callable[[Images, argparse.Namespace], list[Result]], tuple[str, ...]] = {
        softmax: ("softmax_epoch", "softmax_step_overhead"),
        mlp: ("mlp_float32", "mlp_bfloat16"),
        mlp_accuracy: ("mlp_bfloat16_accuracy",),
        cnn: ("cnn_float32", "cnn_bfloat16"),
        cnn_accuracy: ("cnn_bfloat16_accuracy",),
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
        return SoftmaxRegression(
            solver="sgd",
            batch_size=256,
            learning_rate_init=RATE,
            max_iter=epochs,
            random_state=0,
            **COMMON,
        ).fit(train.X, train.y)

    contestants = {"skcifar": ours}
    if "softmax_epoch" in options.only:
        rows = standardised(train.X, shift, scale)
        contestants["skorch"] = lambda: skorch_softmax(rows, train.y, epochs)
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


def skorch_softmax(rows: np.ndarray, targets: np.ndarray, epochs: int) -> None:
    NeuralNetClassifier(
        nn.Linear,
        module__in_features=rows.shape[1],
        module__out_features=10,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.SGD,
        optimizer__momentum=0.9,
        optimizer__nesterov=True,
        optimizer__weight_decay=PENALTY,
        lr=RATE,
        max_epochs=epochs,
        batch_size=256,
        iterator_train__shuffle=True,
        train_split=None,
        verbose=0,
    ).fit(rows, targets)


def bare_softmax(rows: Tensor, targets: Tensor, shift: Tensor, factor: Tensor, epochs: int) -> None:
    model = nn.Linear(rows.shape[1], 10)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=RATE,
        momentum=0.9,
        nesterov=True,
        weight_decay=PENALTY,
        fused=True,
    )
    for _ in range(epochs):
        for picked in torch.randperm(len(rows)).split(256):
            batch = rows.index_select(0, picked).float().sub_(shift).mul_(factor)
            optimizer.zero_grad()
            F.cross_entropy(model(batch), targets.index_select(0, picked)).backward()
            optimizer.step()


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
    contestants["scikit-learn"] = lambda: ScikitLearnMLPClassifier(
        (200,),
        solver="sgd",
        batch_size=min(500, len(rows)),
        learning_rate_init=RATE,
        max_iter=MLP_EPOCHS,
        tol=0.0,
    ).fit(rows, train.y)
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


def our_mlp(precision: str, epochs: int, seed: int) -> MLPClassifier:
    return MLPClassifier(
        (200,),
        solver="sgd",
        batch_size=500,
        learning_rate_init=RATE,
        max_iter=epochs,
        precision=precision,
        random_state=seed,
        **COMMON,
    )


def mlp_accuracy(train: Images, options: argparse.Namespace) -> list[Result]:
    return accuracy_lost("mlp_bfloat16_accuracy", our_mlp, train, options)


# -- convolutional network -----------------------------------------------------------------------


def cnn(train: Images, options: argparse.Namespace) -> list[Result]:
    train = train.first(CNN_IMAGES)
    rows = standardised(train.X, *per_channel(train.X)).reshape(-1, 32, 32, 3)
    images = torch.from_numpy(rows).permute(0, 3, 1, 2).contiguous()  # (n, 3, 32, 32)
    targets = torch.from_numpy(train.y)
    bounds = {"cnn_float32": 1.5, "cnn_bfloat16": 2.2}
    contestants = {
        name: lambda name=name: our_cnn(name.removeprefix("cnn_"), CNN_EPOCHS, 0).fit(
            train.X, train.y
        )
        for name in bounds
        if name in options.only
    }
    contestants["plain torch"] = lambda: plain_cnn(images, targets, CNN_EPOCHS)
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


def our_cnn(precision: str, epochs: int, seed: int) -> CNNClassifier:
    return CNNClassifier(
        (32, 64, 64),
        (64,),
        batch_norm=False,
        global_pool=None,
        translate=0,
        solver="adam",
        learning_rate_init=1e-3,
        weight_decay=0.0,
        label_smoothing=0.0,
        batch_size=128,
        max_iter=epochs,
        precision=precision,
        random_state=seed,
        **COMMON,
    )


def plain_cnn(images: Tensor, targets: Tensor, epochs: int) -> None:
    layers: list[nn.Module] = []
    for n_in, n_out in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(64 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for picked in torch.randperm(len(images)).split(128):
            optimizer.zero_grad()
            F.cross_entropy(model(images[picked]), targets[picked]).backward()
            optimizer.step()


def cnn_accuracy(train: Images, options: argparse.Namespace) -> list[Result]:
    return accuracy_lost("cnn_bfloat16_accuracy", our_cnn, train.first(CNN_IMAGES), options)


# -- what both networks share --------------------------------------------------------------------


def per_epoch(result: Result, epochs: int, aim: str = "") -> Result:
    assert result.ours_s is not None and result.peer_s is not None
    result.ours_s /= epochs
    result.peer_s /= epochs
    result.note = ", ".join(filter(None, [f"seconds per epoch of {epochs}", aim]))
    return result


def accuracy_lost(
    name: str,
    make: Callable[[str, int, int], MLPClassifier | CNNClassifier],
    train: Images,
    options: argparse.Namespace,
) -> list[Result]:
    """Points of test accuracy that bfloat16 is below float32, in the mean over the seeds."""
    result = Result(
        name,
        "points of accuracy below float32",
        None,
        at_most=0.5,
        n=len(train.X),
        repeats=SEEDS,
        data=train.name,
    )
    if not train.real:
        result.note = "skipped: random images have no accuracy to speak of"
        return [result]
    test = load_images(options.data_home, "test")
    scores = np.zeros((2, SEEDS))
    for seed in range(SEEDS):
        for i, precision in enumerate(("float32", "bfloat16")):
            classifier = make(precision, ACCURACY_EPOCHS, seed).fit(train.X, train.y)
            scores[i, seed] = 100 * classifier.score(test.X, test.y)
            say(f"{name} {precision} seed {seed}: {scores[i, seed]:.2f}%")
    single, half = scores
    result.figure = float(single.mean() - half.mean())
    error = float(np.std(single - half, ddof=1)) / SEEDS**0.5
    result.note = f"{single.mean():.2f}% and {half.mean():.2f}%, standard error {error:.2f}"
    return [result]


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


def peak_anonymous(program: str) -> int:
    """Most bytes of anonymous memory that a fresh process running `program` has at a time."""
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", program])
    peak = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        for line in status.splitlines():
            if line.startswith("RssAnon:"):
                peak = max(peak, 1024 * int(line.split()[1]))
        time.sleep(0.002)  # touching 10 MB takes about as long
    if process.returncode:
        raise RuntimeError(f"this program ended with status {process.returncode}:\n{program}")
    return peak


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
