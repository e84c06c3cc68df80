"""One epoch of three networks in skcifar, skorch, scikeras, scikit-learn and plain torch.

CIFAR-10, the same network, batches, optimizer, constant rate, penalty and epochs for all; the
seconds are those of the public call that fits, divided by the epochs. Ours gets raw uint8 rows, the
others standardised float32, made outside the clock. Everything runs
on the CPU. Notes hold the test accuracy of the last run of ours and of the peer, which shows that
both train; a few epochs of it are no accuracy to speak of.

softmax
    Softmax regression on 50,000 images, SGD with Nesterov's momentum, batches of 256, five epochs.
mlp
    200 hidden units, the same in batches of 500, three epochs.
cnn
    3x3 convolutions of 32, 64 and 64 channels, each pooled, and 64 dense units; Adam, batches of
    128, two epochs, on 10,000 images.

Each of them in rows

..._scikit-learn
    MLPClassifier; without hidden layers for softmax regression. It has no convolutions.
..._skorch
    NeuralNetClassifier with its own DataLoader and callbacks, NCHW.
..._scikeras
    KerasClassifier, NCHW, on Keras's torch backend, or that which KERAS_BACKEND names. Wants
    `pip install scikeras keras`; not measured where they are missing.
..._torch
    A loop over index batches of float32 tensors, NCHW.
..._bfloat16
    Ours with precision="bfloat16", against ours in float32. Softmax regression has hardly any
    arithmetic to save by it, and no bound.

cuML is not here: it needs an NVIDIA GPU, and of these three it has softmax regression alone, as
LogisticRegression (full-batch quasi-Newton) and MBSGDClassifier (mini-batches, of two classes or
one against the rest).

    python benchmarks/bench_peers.py [--only ROW,...] [--check] [--data-home DIR] [--repeats N]
        [--n-train N] [--output DIR]

takes 7 minutes on two cores.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from _contestants import (
    OURS,
    TASKS,
    as_torch_has_them,
    import_keras,
    plain_torch,
    scikeras,
    scikit_learn,
    skorch,
)
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
from sklearn.metrics import accuracy_score

EPOCHS = {"softmax": 5, "mlp": 3, "cnn": 2}
CNN_IMAGES = 10_000
PEERS = ("scikit-learn", "skorch", "scikeras", "torch", "bfloat16")

# Trains, and gives what then predicts the test images.
Contestant = Callable[[], Callable[[], np.ndarray]]


def main() -> int:
    rows = [f"{task}_{peer}" for task in TASKS for peer in PEERS]
    rows.remove("cnn_scikit-learn")
    options = parse_options(__doc__, rows, repeats=5)
    header = machine()
    train = load_images(options.data_home, "train", options.n_train)
    test = load_images(options.data_home, "test")
    warnings.simplefilter("ignore", ConvergenceWarning)  # a few epochs are what is asked for
    results: list[Result] = []
    for task in TASKS:
        peers = [row.removeprefix(f"{task}_") for row in options.only if row.startswith(task)]
        if peers:
            measured = side_by_side(task, peers, train, test, options)
            record(measured, options.output / "peers.csv", header)
            results += measured
    return exit_status(results, options.check)


def side_by_side(
    name: str, peers: list[str], train: Images, test: Images, options: argparse.Namespace
) -> list[Result]:
    if name == "cnn":
        train = train.first(CNN_IMAGES)
    contestants = {"float32": ours(name, "float32", train, test)}
    shift, scale = per_channel(train.X)
    rows, test_rows = (standardised(images.X, shift, scale) for images in (train, test))
    missing = {peer: reason for peer in peers if (reason := why_not(peer))}
    for peer in peers:
        if peer == "bfloat16":
            contestants[peer] = ours(name, peer, train, test)
        elif peer not in missing:
            contestants[peer] = theirs(peer, name, rows, train.y, test_rows)
    runs = interleave(contestants, options.repeats)
    accuracy = {
        contestant: accuracy_score(test.y, part[-1].outcome()) for contestant, part in runs.items()
    }
    about: dict[str, Any] = {"n": len(train.X), "data": train.name}
    results = []
    for peer in peers:
        row = f"{name}_{peer}"
        if peer in missing:
            note = f"not measured: {missing[peer]}"
            results.append(Result(row, "times faster", None, repeats=0, note=note, **about))
            continue
        pair = ("float32", peer) if peer != "bfloat16" else (peer, "float32")
        bound = None if row == "softmax_bfloat16" else 1.0
        result = times_faster(row, *(runs[one] for one in pair), at_least=bound, **about)
        assert result.ours_s is not None and result.peer_s is not None
        result.ours_s /= EPOCHS[name]
        result.peer_s /= EPOCHS[name]
        shown = [f"seconds per epoch of {EPOCHS[name]}", *about_versions(peer)]
        if train.real:
            shown.append("test accuracy " + " and ".join(f"{accuracy[one]:.4f}" for one in pair))
        result.note = ", ".join(shown)
        results.append(result)
    return results


def why_not(peer: str) -> str:
    """Why a peer cannot take part; empty where it can."""
    if peer != "scikeras":
        return ""
    for package in ("scikeras", "keras"):
        if find_spec(package) is None:
            return f"{package} is not installed"
    try:
        import_keras()
    except Exception as error:  # the backend that KERAS_BACKEND names may be missing
        return f"keras does not import: {type(error).__name__}"
    return ""


def about_versions(peer: str) -> list[str]:
    if peer != "scikeras":
        return []
    keras = import_keras()
    return [
        f"scikeras {version('scikeras')}, keras {keras.__version__} on {keras.backend.backend()}"
    ]


def ours(name: str, precision: str, train: Images, test: Images) -> Contestant:
    def fit() -> Callable[[], np.ndarray]:
        estimator = OURS[name](precision, EPOCHS[name], 0).set_params(learning_rate="constant")
        return partial(estimator.fit(train.X, train.y).predict, test.X)

    return fit


def theirs(
    peer: str, name: str, rows: np.ndarray, targets: np.ndarray, test_rows: np.ndarray
) -> Contestant:
    task, epochs = TASKS[name], EPOCHS[name]
    train_fn = {
        "scikit-learn": scikit_learn,
        "skorch": skorch,
        "scikeras": scikeras,
        "torch": plain_torch,
    }[peer]
    images, test_images = as_torch_has_them(task, rows), as_torch_has_them(task, test_rows)

    def fit() -> Callable[[], np.ndarray]:
        fitted = train_fn(task, images, targets, epochs)
        if peer == "torch":
            return partial(predicted_by, fitted, test_images)
        return partial(fitted.predict, test_images)

    return fit


def predicted_by(model: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        parts = [model(batch).argmax(1) for batch in torch.from_numpy(images).split(1000)]
    return torch.cat(parts).numpy()


if __name__ == "__main__":
    sys.exit(main())
