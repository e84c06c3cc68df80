"""Hyperparameter studies with all their fits trained as one program, against separate fits.

A study is scikit-learn's `GridSearchCV` with 3 learning rates, 3 penalties and 3 folds, 27 fits,
without the refit; ours run inside `joblib.parallel_config(backend="skcifar")`. Seconds are those of
`GridSearchCV.fit`: copies, checks and scores are in it, on both sides. All get the same float32
rows, and the same epochs, batches, optimizer and seed.

mlp_32_batch_200, mlp_32_batch_32, mlp_100_batch_200
    One hidden layer of 32 or 100 units on 10,000 images of MNIST (pixels / 255), SGD with Nesterov
    momentum, 10 epochs, against scikit-learn's MLPClassifier with n_jobs=2.
..._own
    The same against our own fits one by one (two threads, without the backend); with one thread
    in the note.
..._skorch
    The same against skorch's NeuralNetClassifier, one by one: its processes cannot share a GPU, and
    on two cores its own two threads serve it as well.
mlp_32_bfloat16, mlp_100_bfloat16
    precision="bfloat16", batches of 200, against scikit-learn's; `..._score` is the best mean
    score of float32 less that of bfloat16, in points.
softmax_own, softmax_sgdclassifier
    SoftmaxRegression(solver="sgd") on 10,000 images of CIFAR-10 in batches of 256, 10 epochs,
    against our own fits one by one, and against scikit-learn's SGDClassifier(loss="log_loss",
    n_jobs=2 in the search), which takes single rows.
equality_float64, equality_float32, equality_unstable
    The largest difference of any weight between a network trained with others and the same trained
    alone, after 10 epochs on 3,000 images: 9 candidates, 3 folds. "unstable" is float64 with a rate
    of 0.5 and a momentum of 0.9, where a difference in the last digit grows from step to step.
scaling
    Milliseconds for each network and epoch of 1, 2, 4, ... 256 candidates on one fold of MNIST (32
    units, batches of 200), written to sweep_scaling.csv. The figure is the ratio of one candidate
    to the best.

gpu_27, gpu_135, gpu_cnn_27
    With a GPU only: 27 and 135 fits of the first study (9 and 45 candidates) and 27 of a small CNN
    (32 and 64 channels, 3 epochs), against skorch's one by one on the same GPU.

    python benchmarks/bench_sweep.py [--only ROW,...] [--check] [--data-home DIR] [--repeats N]
        [--output DIR]

takes a quarter of an hour on two cores. On a GPU everything of ours runs there by itself;
scikit-learn's does not.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import joblib
import numpy as np
import pandas as pd
import torch
from _measure import (
    Images,
    Result,
    Run,
    exit_status,
    interleave,
    load_images,
    machine,
    median_seconds,
    parse_options,
    record,
    standardised,
    times_faster,
)
from sklearn.base import BaseEstimator
from sklearn.ensemble import VotingClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import SGDClassifier
from sklearn.model_selection import GridSearchCV, ShuffleSplit, cross_validate
from sklearn.neural_network import MLPClassifier as ScikitLearnMLPClassifier
from skorch import NeuralNetClassifier
from torch import nn

from skcifar import CNNClassifier, MLPClassifier, SoftmaxRegression

N_IMAGES = 10_000
EPOCHS = 10
RATES = [0.1, 0.01, 0.001]
PENALTIES = [1e-4, 1e-3, 1e-2]
FOLDS = 3
# of the studies of perceptrons: units, rows of a batch, bounds against our own and scikit-learn's
STUDIES = {
    "mlp_32_batch_200": (32, 200, 2.4, 2.0),
    "mlp_32_batch_32": (32, 32, 5.0, 3.0),
    "mlp_100_batch_200": (100, 200, None, 1.4),
}
BFLOAT16 = {"mlp_32_bfloat16": (32, 3.0), "mlp_100_bfloat16": (100, 2.0)}
# dtype, learning rates, bound on the difference
EQUALITIES: dict[str, tuple[type, list[float], float | None]] = {
    "equality_float64": (np.float64, RATES, 1e-9),
    "equality_float32": (np.float32, RATES, None),
    "equality_unstable": (np.float64, [0.5], None),
}
# penalties of the grid, bound against skorch
ON_GPU = {"gpu_27": (3, 30.0), "gpu_135": (15, 30.0), "gpu_cnn_27": (3, 3.0)}
SCALES = [1, 2, 4, 8, 16, 32, 64, 128, 256]


def main() -> int:
    rows = [row for name in STUDIES for row in (name, f"{name}_own", f"{name}_skorch")]
    rows += [row for name in BFLOAT16 for row in (name, f"{name}_score")]
    rows += ["softmax_own", "softmax_sgdclassifier", *EQUALITIES, "scaling", *ON_GPU]
    options = parse_options(__doc__, rows, repeats=5)
    header = machine()
    warnings.simplefilter("ignore", ConvergenceWarning)  # ten epochs are what is asked for
    digits = load_images(options.data_home, "train", N_IMAGES, "MNIST")
    digits = Images((digits.X / 255).astype(np.float32), digits.y, digits.name)
    results: list[Result] = []

    def keep(measured: list[Result]) -> None:
        record(measured, options.output / "sweep.csv", header)
        results.extend(measured)

    for name in STUDIES:
        if any(row.startswith(name) for row in options.only):
            keep(perceptrons(name, digits, options))
    for name in BFLOAT16:
        if any(row.startswith(name) for row in options.only):
            keep(bfloat16(name, digits, options))
    if any(row.startswith("softmax") for row in options.only):
        keep(softmax(options))
    for name in EQUALITIES:
        if name in options.only:
            keep([equality(name, digits)])
    if "scaling" in options.only:
        keep(scaling(digits, options, header))
    for name in ON_GPU:
        if name in options.only:
            keep([on_gpu(name, digits)])
    return exit_status(results, options.check)


# -- perceptrons ---------------------------------------------------------------------------------


def study(estimator: BaseEstimator, grid: dict, images: Images, n_jobs: int | None = None) -> float:
    """Best mean score."""
    search = GridSearchCV(estimator, grid, cv=FOLDS, refit=False, n_jobs=n_jobs)
    search.fit(images.X, images.y)
    return float(search.cv_results_["mean_test_score"].max())


def together(*arguments: Any) -> float:
    with joblib.parallel_config(backend="skcifar"):
        return study(*arguments)


def on_one_thread(*arguments: Any) -> float:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return study(*arguments)
    finally:
        torch.set_num_threads(n_threads)


def ours(units: int, batch_size: int, **others: Any) -> MLPClassifier:
    return MLPClassifier(
        (units,), learning_rate="constant", **others, **_common(batch_size, EPOCHS)
    )


def scikit_learn(units: int, batch_size: int) -> ScikitLearnMLPClassifier:
    return ScikitLearnMLPClassifier((units,), **_common(batch_size, EPOCHS))


def _common(batch_size: int, epochs: int) -> dict[str, Any]:
    return {
        "solver": "sgd",
        "momentum": 0.9,
        "batch_size": batch_size,
        "max_iter": epochs,
        "n_iter_no_change": 10 * epochs,  # all of them
        "random_state": 0,
    }


GRID = {"learning_rate_init": RATES, "alpha": PENALTIES}


def skorch(units: int, batch_size: int) -> NeuralNetClassifier:
    torch.manual_seed(0)
    return NeuralNetClassifier(
        lambda: nn.Sequential(nn.Linear(784, units), nn.ReLU(), nn.Linear(units, 10)),
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.SGD,
        optimizer__momentum=0.9,
        optimizer__nesterov=True,
        iterator_train__shuffle=True,
        train_split=None,
        max_epochs=EPOCHS,
        batch_size=batch_size,
        device="cuda" if torch.cuda.is_available() else "cpu",
        verbose=0,
    )


def perceptrons(name: str, images: Images, options: argparse.Namespace) -> list[Result]:
    units, batch_size, own_bound, peer_bound = STUDIES[name]
    contestants: dict[str, Callable[[], float]] = {
        "together": partial(together, ours(units, batch_size), GRID, images)
    }
    if name in options.only:
        contestants["scikit-learn"] = partial(
            study, scikit_learn(units, batch_size), GRID, images, 2
        )
    if f"{name}_own" in options.only:
        contestants["one by one"] = partial(study, ours(units, batch_size), GRID, images)
        contestants["one thread"] = partial(on_one_thread, ours(units, batch_size), GRID, images)
    runs = interleave(contestants, options.repeats)
    if f"{name}_skorch" in options.only:  # once: it takes ten times as long as all the others
        grid = {"lr": RATES, "optimizer__weight_decay": [p / batch_size for p in PENALTIES]}
        peer = partial(study, skorch(units, batch_size), grid, images)
        runs |= interleave({"skorch": peer}, 1, warm_up=False)
    about = {"n": len(images.X), "data": images.name}
    results = []
    for row, contestant, bound in [
        (name, "scikit-learn", peer_bound),
        (f"{name}_own", "one by one", own_bound),
        (f"{name}_skorch", "skorch", None),
    ]:
        if contestant in runs:
            note = _scores(runs, "together", contestant)
            if contestant == "one by one":
                note += f"; on one thread {median_seconds(runs['one thread']):.2f} s"
            results.append(
                times_faster(
                    row, runs["together"], runs[contestant], at_least=bound, note=note, **about
                )
            )
    return results


def _scores(runs: dict[str, list[Run]], *contestants: str) -> str:
    best = [f"{name} {runs[name][-1].outcome:.4f}" for name in contestants]
    return "best score: " + ", ".join(best)


def bfloat16(name: str, images: Images, options: argparse.Namespace) -> list[Result]:
    units, bound = BFLOAT16[name]
    narrow = ours(units, 200, precision="bfloat16")
    runs = interleave(
        {
            "together": partial(together, narrow, GRID, images),
            "scikit-learn": partial(study, scikit_learn(units, 200), GRID, images, 2),
        },
        options.repeats,
    )
    wide = together(ours(units, 200), GRID, images)
    loss = 100 * (wide - runs["together"][-1].outcome)
    about = {"n": len(images.X), "data": images.name}
    speed = times_faster(
        name, runs["together"], runs["scikit-learn"], at_least=bound,
        note=_scores(runs, "together", "scikit-learn"), **about,
    )  # fmt: skip
    quantity = "points lost to float32"
    score = Result(f"{name}_score", quantity, loss, repeats=1, at_most=0.3, **about)
    return [speed, score]


# -- softmax regression --------------------------------------------------------------------------


def softmax(options: argparse.Namespace) -> list[Result]:
    images = load_images(options.data_home, "train", N_IMAGES)
    shift, scale = images.X.mean(0), images.X.std(0)
    images = Images(standardised(images.X, shift, scale), images.y, images.name)
    estimator = SoftmaxRegression(learning_rate="constant", normalize=False, **_common(256, EPOCHS))
    grid = {"learning_rate_init": [1e-3, 1e-4, 1e-5], "alpha": [1.0, 10.0, 100.0]}
    contestants = {
        "together": partial(together, estimator, grid, images),
        "one by one": partial(study, estimator, grid, images),
    }
    runs = interleave(contestants, options.repeats)
    about = {"n": len(images.X), "data": images.name}
    own = times_faster(
        "softmax_own", runs["together"], runs["one by one"], at_least=3.0,
        note=_scores(runs, "together", "one by one"), **about,
    )  # fmt: skip
    if "softmax_sgdclassifier" not in options.only:
        return [own]
    peer = SGDClassifier(
        loss="log_loss", learning_rate="constant", max_iter=EPOCHS, tol=None, random_state=0
    )
    grid = {"eta0": [1e-3, 1e-4, 1e-5], "alpha": [1e-4, 1e-3, 1e-2]}
    runs |= interleave({"SGDClassifier": partial(study, peer, grid, images, 2)}, 1, warm_up=False)
    sgd = times_faster(
        "softmax_sgdclassifier", runs["together"], runs["SGDClassifier"],
        note=_scores(runs, "together", "SGDClassifier"), **about,
    )  # fmt: skip
    return [own, sgd]


# -- on a GPU ------------------------------------------------------------------------------------


def on_gpu(name: str, images: Images) -> Result:
    n_penalties, bound = ON_GPU[name]
    about: dict[str, Any] = {"n": len(images.X), "data": images.name}
    if not torch.cuda.is_available():
        quantity, note = "times faster", "not measured on a GPU"
        return Result(name, quantity, None, repeats=0, at_least=bound, note=note, **about)
    penalties = np.geomspace(1e-5, 1e-1, n_penalties)
    grid = {"learning_rate_init": RATES, "alpha": penalties}
    peer_grid = {"lr": RATES, "optimizer__weight_decay": penalties / 200}
    model: BaseEstimator = ours(32, 200)
    peer = skorch(32, 200)
    if name == "gpu_cnn_27":
        model = CNNClassifier(
            (32, 64), batch_norm=False, learning_rate="constant", **_common(200, 3)
        )
        peer.set_params(module=small_cnn, max_epochs=3)
    runs = interleave({"together": partial(together, model, grid, images)}, 3)
    runs |= interleave({"skorch": partial(study, peer, peer_grid, images)}, 1, warm_up=False)
    note = _scores(runs, "together", "skorch")
    return times_faster(name, runs["together"], runs["skorch"], at_least=bound, note=note, **about)


def small_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


# -- equality ------------------------------------------------------------------------------------


def equality(name: str, images: Images) -> Result:
    dtype, rates, bound = EQUALITIES[name]
    X, y = images.X[:3000].astype(dtype), images.y[:3000]

    def fitted() -> list[np.ndarray]:
        """Weights of each layer, candidate and fold."""
        candidates = [
            ours(32, 200).set_params(learning_rate_init=rate, alpha=alpha)
            for rate in rates
            for alpha in PENALTIES
        ]
        vote = VotingClassifier([(str(i), c) for i, c in enumerate(candidates)])
        found = cross_validate(vote, X, y, cv=FOLDS, return_estimator=True)["estimator"]
        return [w for vote in found for one in vote.estimators_ for w in one.coefs_]

    alone = fitted()
    with joblib.parallel_config(backend="skcifar"):
        together = fitted()
    largest = max(np.abs(a - b).max() for a, b in zip(alone, together, strict=True))
    return Result(
        name, "largest difference of a weight", float(largest), n=len(X), repeats=1,
        data=images.name, at_most=bound,
    )  # fmt: skip


# -- scaling -------------------------------------------------------------------------------------


def scaling(images: Images, options: argparse.Namespace, header: dict[str, Any]) -> list[Result]:
    """Of one fold: what a network costs as others come to it."""
    fold = ShuffleSplit(1, train_size=2 / 3, random_state=0)
    estimator = ours(32, 200)

    def search(n: int) -> float:
        grid = {"learning_rate_init": np.geomspace(1e-3, 1e-1, n)}
        with joblib.parallel_config(backend="skcifar"):
            search = GridSearchCV(estimator, grid, cv=fold, refit=False)
            search.fit(images.X, images.y)
        return float(search.cv_results_["mean_fit_time"].sum())

    rows = []
    for n in SCALES:
        runs = interleave({f"{n} networks": partial(search, n)}, options.repeats)
        seconds = np.median([run.outcome for run in runs[f"{n} networks"]])
        rows.append({"networks": n, "ms_per_network_epoch": 1e3 * seconds / n / EPOCHS})
    table = pd.DataFrame(rows)
    for name, value in header.items():
        table[name] = value
    table.to_csv(options.output / "sweep_scaling.csv", index=False)
    cost = table["ms_per_network_epoch"]
    note = ", ".join(f"{row['networks']}: {row['ms_per_network_epoch']:.1f} ms" for row in rows)
    return [
        Result(
            "scaling", "times cheaper than one", float(cost[0] / cost.min()), n=len(images.X),
            repeats=options.repeats, data=images.name, note=note,
        )
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
