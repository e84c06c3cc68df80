"""What bfloat16 costs in test accuracy: the table that decides what precision="auto" may be.

Each row fits the same estimator in float32 and in bfloat16 with the same seeds (`random_state` 0
to 4: the same initial weights, order of rows, dropout and augmentation), and compares accuracies
on the official 10,000 test images. The figure is the mean of float32's less bfloat16's, in points;
the note holds both means, the standard error of the difference, and whether it is within noise: no
more than two standard errors, or no more than 0.1 point. `ours_s` are the median seconds of a fit
in bfloat16, `peer_s` in float32. Only with the real images.

mlp_bfloat16_accuracy
    200 hidden units, SGD with Nesterov momentum, batches of 500, five epochs on CIFAR-10.
cnn_bfloat16_accuracy
    3x3 convolutions of 32, 64 and 64 channels and 64 dense units, Adam, batches of 128, five
    epochs on the first 10,000 images of CIFAR-10.
default_mlp_mnist, default_mlp_cifar10
    MLPClassifier(random_state=seed) on the first 50,000 training images.
default_cnn_mnist, default_cnn_cifar10
    CNNClassifier(max_iter=3, random_state=seed) on the first 10,000 training images.

    python benchmarks/bench_precision.py [--only ROW,...] [--check] [--data-home DIR]
        [--repeats SEEDS] [--n-train N] [--output DIR]

takes a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from _contestants import our_cnn, our_mlp
from _measure import (
    Images,
    Result,
    exit_status,
    load_images,
    machine,
    parse_options,
    record,
    say,
)
from sklearn.exceptions import ConvergenceWarning

from skcifar import CNNClassifier, MLPClassifier

EPOCHS = 5  # of the first two rows
CNN_EPOCHS = 3  # of the default network: float32 takes about 25 s
CNN_IMAGES = 10_000
PRECISIONS = ("float32", "bfloat16")
Classifier = MLPClassifier | CNNClassifier


@dataclass(frozen=True)
class Row:
    """A comparison.

    Attributes
    ----------
    make : callable
        The estimator, from a precision and a seed.
    data : {"CIFAR-10", "MNIST"}
    n_images : int
        The first so many training images.
    at_most : float or None
        Points that bfloat16 may cost.
    """

    make: Callable[[str, int], Classifier]
    data: str
    n_images: int = 50_000
    at_most: float | None = None


def default_mlp(precision: str, seed: int) -> MLPClassifier:
    return MLPClassifier(precision=precision, random_state=seed, device="cpu")


def default_cnn(precision: str, seed: int) -> CNNClassifier:
    return CNNClassifier(max_iter=CNN_EPOCHS, precision=precision, random_state=seed, device="cpu")


ROWS = {
    "mlp_bfloat16_accuracy": Row(
        lambda precision, seed: our_mlp(precision, EPOCHS, seed), "CIFAR-10", at_most=0.5
    ),
    "cnn_bfloat16_accuracy": Row(
        lambda precision, seed: our_cnn(precision, EPOCHS, seed), "CIFAR-10", CNN_IMAGES, 0.5
    ),
    "default_mlp_mnist": Row(default_mlp, "MNIST"),
    "default_mlp_cifar10": Row(default_mlp, "CIFAR-10"),
    "default_cnn_mnist": Row(default_cnn, "MNIST", CNN_IMAGES),
    "default_cnn_cifar10": Row(default_cnn, "CIFAR-10", CNN_IMAGES),
}


def main() -> int:
    options = parse_options(__doc__, list(ROWS), repeats=5)
    header = machine()
    warnings.simplefilter("ignore", ConvergenceWarning)  # a few epochs are what is asked for
    results: list[Result] = []
    for name in options.only:
        measured = [accuracy_lost(name, ROWS[name], options)]
        record(measured, options.output / "precision.csv", header)
        results += measured
    return exit_status(results, options.check)


def accuracy_lost(name: str, row: Row, options: argparse.Namespace) -> Result:
    """Points of test accuracy that bfloat16 is below float32, in the mean over the seeds."""
    train = load_images(options.data_home, "train", min(row.n_images, options.n_train), row.data)
    result = Result(
        name,
        "points of accuracy below float32",
        None,
        n=len(train.X),
        repeats=options.repeats,
        data=train.name,
        at_most=row.at_most,
    )
    if not train.real:
        result.note = "not measured: random images have no accuracy to speak of"
        return result
    test = load_images(options.data_home, "test", name=row.data)
    scores, seconds = fits(name, row, train, test, options.repeats)
    result.figure = float((scores[0] - scores[1]).mean())
    result.peer_s, result.ours_s = np.median(seconds, axis=1).tolist()
    result.note = verdict(*scores)
    return result


def fits(
    name: str, row: Row, train: Images, test: Images, n_seeds: int
) -> tuple[np.ndarray, np.ndarray]:
    """Test accuracies in per cent and seconds, both (2, n_seeds), of float32 and bfloat16."""
    scores, seconds = np.zeros((2, n_seeds)), np.zeros((2, n_seeds))
    for seed in range(n_seeds):
        for i, precision in enumerate(PRECISIONS):
            classifier = row.make(precision, seed)
            start = time.perf_counter()
            classifier.fit(train.X, train.y)
            seconds[i, seed] = time.perf_counter() - start
            scores[i, seed] = 100 * classifier.score(test.X, test.y)
            say(
                f"{name} {precision} seed {seed}: {scores[i, seed]:.2f}% "
                f"in {seconds[i, seed]:.1f} s"
            )
    return scores, seconds


def verdict(single: np.ndarray, half: np.ndarray) -> str:
    """What the accuracies of float32 and of bfloat16, seed by seed, say of their difference."""
    means = f"{single.mean():.2f}% and {half.mean():.2f}%"
    if len(single) < 2:
        return f"{means}, of one seed: no standard error"
    difference = single - half
    error = float(np.std(difference, ddof=1)) / len(difference) ** 0.5
    within = abs(difference.mean()) <= max(2 * error, 0.1)
    return f"{means}, standard error {error:.2f}, {'' if within else 'not '}within noise"


if __name__ == "__main__":
    sys.exit(main())
