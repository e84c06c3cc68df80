"""Predictions of SoftmaxRegression, MLPClassifier and CNNClassifier against their peers'.

One row of an image as it comes in, and 50,000 of them. Ours predict raw uint8 rows, which they
normalise, or float32 rows, on which they were fitted; the peers predict standardised float32 rows
(skorch's convolutions: images), made outside the clock. All are fitted for one epoch on the first
2,000 images, for how well they predict is not asked. Everything runs on the CPU, with the threads
that torch and NumPy take by themselves. Other names are the estimators' of `_contestants.py`.

latency_MODEL_METHOD_ROWS_PEER
    Times faster than the peer is one call of METHOD with one row, by the medians; these and the
    99th percentiles are in the note. MODEL is softmax (against scikit-learn's LogisticRegression
    and skorch), mlp (200 hidden units; MLPClassifier and skorch) or cnn (convolutions of 32, 64
    and 64 channels and 64 dense units, in float32; skorch); METHOD predict or predict_proba; ROWS
    what ours get. Only softmax has a bound: the perceptron computes a row as it would among many,
    eight of them, to which torch's products take twice as long as to one. A repeat is a block of
    120 calls of each contestant, the first 20 uncounted: threads of the one before, which wait for
    work, disturb them.
throughput_MODEL_PEER
    Times faster than the peer is `predict` with all images, by the medians; images a second are
    in the note. MODEL is also cnn_default, the default CNNClassifier, for which the peer is a bare
    loop: the same network and precision in channels_last and inference mode, in batches of a
    size that is fast here. That of cnn_default is taken over a fifth of the images.

    python benchmarks/bench_predict.py [--only ROW,...] [--check] [--data-home DIR] [--repeats N]
        [--n-train N] [--output DIR]
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from _contestants import COMMON, OURS, TASKS, as_torch_has_them, scikit_learn, skorch
from _measure import (
    Images,
    Result,
    exit_status,
    interleave,
    load_images,
    machine,
    parse_options,
    per_channel,
    record,
    standardised,
    times_faster,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from skcifar import CNNClassifier

N_FITTED = 2_000
CALLS, UNCOUNTED = 100, 20
METHODS = ("predict", "predict_proba")
ROWS = ("uint8", "float32")
PEERS = {
    "softmax": ("scikit_learn", "skorch"),
    "mlp": ("scikit_learn", "skorch"),
    "cnn": ("skorch",),
}
LATENCY = {
    model: [
        f"latency_{model}_{method}_{rows}_{peer}"
        for method in METHODS
        for rows in ROWS
        for peer in PEERS[model]
    ]
    for model in PEERS
}
THROUGHPUT = {model: [f"throughput_{model}_{peer}" for peer in PEERS[model]] for model in PEERS}
BARE = "throughput_cnn_default_bare_loop"
BARE_ROWS = 128  # 64 to 256 are within a tenth of one another, 1,024 takes 1.6 times as long


def main() -> int:
    groups: list[tuple[list[str], Callable[[Images, argparse.Namespace], list[Result]]]] = [
        *((LATENCY[model], partial(latency, model)) for model in PEERS),
        *((THROUGHPUT[model], partial(throughput, model)) for model in PEERS),
        ([BARE], default_cnn),
    ]
    options = parse_options(__doc__, [row for rows, _ in groups for row in rows], repeats=10)
    header = machine()
    images = load_images(options.data_home, "train", options.n_train)
    warnings.simplefilter("ignore", ConvergenceWarning)  # an epoch is what is asked for
    results: list[Result] = []
    for rows, group in groups:
        if set(rows) & set(options.only):
            measured = [r for r in group(images, options) if r.name in options.only]
            record(measured, options.output / "predict.csv", header)
            results += measured
    return exit_status(results, options.check)


def fitted_peer(model: str, peer: str, inputs: np.ndarray, targets: np.ndarray) -> Any:
    if peer == "skorch":
        return skorch(TASKS[model], inputs, targets, 1)
    if model == "softmax":
        return LogisticRegression(max_iter=1).fit(inputs, targets)
    return scikit_learn(TASKS[model], inputs, targets, 1)


# -- one row -------------------------------------------------------------------------------------


def latency(model: str, images: Images, options: argparse.Namespace) -> list[Result]:
    train = images.first(N_FITTED)
    floats = standardised(train.X, *per_channel(train.X))
    inputs = as_torch_has_them(TASKS[model], floats)
    contestants = {
        rows: (OURS[model]("float32", 1, 0).set_params(normalize=rows == "uint8"), X)
        for rows, X in zip(ROWS, (train.X, floats), strict=True)
    }
    for estimator, X in contestants.values():
        estimator.fit(X, train.y)
    for peer in PEERS[model]:
        contestants[peer] = fitted_peer(model, peer, inputs, train.y), inputs
    about: dict[str, Any] = {
        "n": 1, "repeats": CALLS * options.repeats, "data": images.name,
    }  # fmt: skip
    results = []
    for method in METHODS:
        seconds = latencies(
            {name: (getattr(e, method), X) for name, (e, X) in contestants.items()},
            options.repeats,
        )
        results += [
            faster(
                f"latency_{model}_{method}_{rows}_{peer}",
                seconds[rows],
                seconds[peer],
                about | {"at_least": 1.0 if model == "softmax" else None},
            )
            for rows in ROWS
            for peer in PEERS[model]
        ]
    return results


def latencies(
    contestants: dict[str, tuple[Callable[[np.ndarray], Any], np.ndarray]], repeats: int
) -> dict[str, np.ndarray]:
    """Seconds of the counted calls, each with another row, (CALLS * repeats,)."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, (predict, X) in contestants.items():
            for i in range(-UNCOUNTED, CALLS):
                row = X[i + UNCOUNTED : i + UNCOUNTED + 1]
                start = time.perf_counter()
                predict(row)
                if i >= 0:
                    seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def faster(name: str, ours: np.ndarray, peer: np.ndarray, about: dict[str, Any]) -> Result:
    ours_s, peer_s = float(np.median(ours)), float(np.median(peer))
    (o50, o99), (p50, p99) = (1e6 * np.percentile(times, (50, 99)) for times in (ours, peer))
    note = f"p50 and p99 in us: {o50:.0f} and {o99:.0f}, peer {p50:.0f} and {p99:.0f}"
    return Result(
        name, "times faster", peer_s / ours_s, ours_s=ours_s, peer_s=peer_s, note=note, **about
    )


# -- many rows -----------------------------------------------------------------------------------


def throughput(model: str, images: Images, options: argparse.Namespace) -> list[Result]:
    train = images.first(N_FITTED)
    ours = OURS[model]("float32", 1, 0).fit(train.X, train.y)
    rows = standardised(images.X, *per_channel(images.X))
    inputs = as_torch_has_them(TASKS[model], rows)
    contestants: dict[str, Callable[[], Any]] = {"skcifar": lambda: ours.predict(images.X)}
    for peer in PEERS[model]:
        estimator = fitted_peer(model, peer, inputs[:N_FITTED], train.y)
        contestants[peer] = partial(estimator.predict, inputs)
    return images_a_second(model, contestants, images, options.repeats, at_least=1.0)


def default_cnn(images: Images, options: argparse.Namespace) -> list[Result]:
    train, images = images.first(N_FITTED), images.first(max(1, len(images.X) // 5))
    ours = CNNClassifier(max_iter=1, random_state=0, **COMMON).fit(train.X, train.y)
    module = copy.deepcopy(ours.module_)
    shift, factor = (
        torch.tensor(np.tile(values, 32 * 32)).float() for values in (ours.mean_, 1 / ours.scale_)
    )
    bare = partial(
        bare_loop, module, torch.from_numpy(images.X), shift, factor, ours.dtype_ == "bfloat16"
    )
    contestants = {"skcifar": lambda: ours.predict(images.X), "bare_loop": bare}
    results = images_a_second("cnn_default", contestants, images, options.repeats, at_least=0.9)
    for result in results:
        result.note += f", {ours.dtype_}"
    return results


def bare_loop(
    module: nn.Module, pixels: Tensor, shift: Tensor, factor: Tensor, bfloat16: bool
) -> Tensor:
    codes = torch.empty(len(pixels), dtype=torch.int64)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        for start in range(0, len(pixels), BARE_ROWS):
            batch = pixels[start : start + BARE_ROWS].float().sub_(shift).mul_(factor)
            batch = batch.reshape(-1, 32, 32, 3).permute(0, 3, 1, 2)  # channels_last
            codes[start : start + BARE_ROWS] = module(batch).argmax(1)
    return codes


def images_a_second(
    model: str,
    contestants: dict[str, Callable[[], Any]],
    images: Images,
    repeats: int,
    at_least: float,
) -> list[Result]:
    runs = interleave(contestants, repeats)
    n = len(images.X)
    results = []
    for peer in list(runs)[1:]:
        result = times_faster(
            f"throughput_{model}_{peer}",
            runs["skcifar"], runs[peer], n=n, data=images.name, at_least=at_least,
        )  # fmt: skip
        assert result.ours_s is not None and result.peer_s is not None
        ours_a_second, peer_a_second = n / result.ours_s, n / result.peer_s
        result.note = f"images/s: {ours_a_second:,.0f}, peer {peer_a_second:,.0f}"
        results.append(result)
    return results


if __name__ == "__main__":
    sys.exit(main())
