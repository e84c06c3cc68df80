"""Test accuracy and seconds of the defaults: `Estimator(random_state=0).fit(X, y)` on raw pixels.

MNIST (60,000 images) and CIFAR-10 (50,000), official test split, one fit each; scikit-learn's
digits by 5-fold cross-validation beside its scaled LogisticRegression and MLPClassifier. The
defaults were chosen looking at these figures, so expect a little less on other images. Where the
images of CIFAR-10 are not those of the official archive, strong networks lose some points.

    python benchmarks/bench_defaults.py [--data-home DIR] [--only ROW,...] [--check]

takes a quarter of an hour on two cores, nearly all of it for the convolutional networks.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np
from _measure import Result, exit_status, machine, parse_options, record, say
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.neural_network import MLPClassifier as SklearnMLP
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skcifar import CNNClassifier, MLPClassifier, SoftmaxRegression
from skcifar.datasets import fetch_cifar10, fetch_mnist

FLIPS = {"horizontal_flip": True, "tta": True}
# name: (data, estimator, least test accuracy, most seconds)
DEFAULTS: dict[str, tuple[str, object, float, float | None]] = {
    "mnist-softmax": ("mnist", SoftmaxRegression(random_state=0), 0.925, None),
    "mnist-mlp": ("mnist", MLPClassifier(random_state=0), 0.982, None),
    "cifar10-softmax": ("cifar10", SoftmaxRegression(random_state=0), 0.40, None),
    "cifar10-mlp": ("cifar10", MLPClassifier(random_state=0), 0.52, None),
    "cifar10-cnn": ("cifar10", CNNClassifier(random_state=0), 0.85, 360),
    "cifar10-cnn-flip-tta": ("cifar10", CNNClassifier(random_state=0, **FLIPS), 0.88, 360),
    "mnist-cnn": ("mnist", CNNClassifier(random_state=0), 0.993, 360),
}
PEERS = {
    "scaled LogisticRegression": make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
    "scaled MLPClassifier": make_pipeline(
        StandardScaler(), SklearnMLP(random_state=0, max_iter=500)
    ),
}


def main() -> int:
    rows = [*DEFAULTS, "digits"]
    options = parse_options(__doc__, rows, repeats=1)
    header = machine()
    results: list[Result] = []
    for name in options.only:
        found = digits() if name == "digits" else official_test_split(name, options.data_home)
        record(found, options.output / "defaults.csv", header)
        results += found
    return exit_status(results, options.check)


def official_test_split(name: str, data_home: str | None) -> list[Result]:
    data, estimator, least_accuracy, most_seconds = DEFAULTS[name]
    fetch: Callable = fetch_mnist if data == "mnist" else fetch_cifar10
    X, y = fetch(data_home=data_home, return_X_y=True)
    X_test, y_test = fetch(data_home=data_home, subset="test", return_X_y=True)
    start = time.perf_counter()
    estimator.fit(X, y)
    seconds = time.perf_counter() - start
    say(f"{name}: {seconds:.1f} s")
    about = {"n": len(X), "repeats": 1, "data": data}
    accuracy = estimator.score(X_test, y_test)
    return [
        Result(name, "test accuracy", accuracy, at_least=least_accuracy, ours_s=seconds, **about),
        Result(f"{name}-seconds", "s", seconds, at_most=most_seconds, **about),
    ]


def digits() -> list[Result]:
    """Five folds in the data's own order, as pixels and as floats that are not normalised."""
    X, y = load_digits(return_X_y=True)
    about = {"n": len(X), "repeats": 5, "data": "digits"}
    peer_scores = {name: cross_val_score(peer, X, y, cv=5) for name, peer in PEERS.items()}
    best_peer = {
        "softmax": peer_scores["scaled LogisticRegression"].mean(),
        "mlp": peer_scores["scaled MLPClassifier"].mean(),
        "cnn": max(scores.mean() for scores in peer_scores.values()),
    }
    ours = {
        "softmax": SoftmaxRegression(random_state=0),
        "mlp": MLPClassifier(random_state=0),
        "cnn": CNNClassifier(random_state=0),
    }
    results = [
        Result(f"digits-{name}", "5-fold accuracy", scores.mean(), **about)
        for name, scores in peer_scores.items()
    ]
    for name, model in ours.items():
        for form in (np.uint8, np.float64):
            accuracy = cross_val_score(model, X.astype(form), y, cv=5).mean()
            results.append(
                Result(
                    f"digits-{name}-{np.dtype(form).name}",
                    "5-fold accuracy",
                    accuracy,
                    # floats are not normalised inside: no fair race against scaled peers
                    at_least=best_peer[name] if form is np.uint8 else None,
                    **about,
                )
            )
    return results


if __name__ == "__main__":
    sys.exit(main())
