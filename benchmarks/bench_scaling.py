"""Whether cost grows linearly in rows, epochs and candidates, to 500,000 synthetic images.

The images are uint8 of 32x32x3, a mean of each class and noise. Seconds are those of the public
call, checks and statistics included. A line for each size has the cost of a unit (an image, an
epoch, a candidate); the line without a size has the cost of a unit at the largest size relative to
that at the middle one, which a linear cost keeps at 1 or, with a fixed part, below. Its note has
that fixed part, from a straight line through all sizes with errors in proportion to the seconds.

fit_softmax_sgd, fit_mlp, fit_cnn
    SoftmaxRegression(solver="sgd"), MLPClassifier of 200 units and the small CNN of bench_fit.py
    in the precision that "auto" chooses, one epoch of 5,000 to 500,000 images; the CNN to 125,000.
fit_softmax_lbfgs
    SoftmaxRegression(), stopped after four iterations, seconds of one of them; what comes before
    the first (curvature of a sample of 10,000 rows at most) is in the note.
predict_softmax, predict_mlp, predict_cnn
    Of the classifiers just fitted, on the images they were fitted on.
epochs_softmax, epochs_mlp, epochs_cnn
    1, 2, 4 and 8 epochs of 20,000 images; the CNN of 5,000.
candidates
    1, 4, 16 and 64 learning rates of an MLP of 32 units on 10,000 images of 28x28, five epochs,
    batches of 200, three folds: GridSearchCV in joblib.parallel_config(backend="skcifar").
memory_softmax_sgd, memory_softmax_lbfgs, memory_mlp, memory_cnn
    Growth of the highest anonymous memory of a fresh process that makes n images and fits one
    epoch, from 125,000 to 500,000 of them, in bytes an image over those of the image itself;
    read from /proc. The CNN's from 5,000 to 50,000.

    python benchmarks/bench_scaling.py [--only ROW,...] [--check] [--repeats N] [--output DIR]

takes 6 minutes on two cores, and 4 GB of memory.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from _contestants import COMMON, our_cnn, our_mlp, our_softmax
from _measure import (
    Images,
    Result,
    exit_status,
    interleave,
    machine,
    median_seconds,
    parse_options,
    peak_anonymous,
    record,
    say,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV

from skcifar import MLPClassifier, SoftmaxRegression

SIZES = [5_000, 20_000, 50_000, 125_000, 500_000]
MIDDLE = 50_000
MOST_FOR_CNN = 125_000
EPOCHS = [1, 2, 4, 8]
IMAGES_OF_EPOCHS = {"softmax": 20_000, "mlp": 20_000, "cnn": 5_000}
CANDIDATES = [1, 4, 16, 64]
ITERATIONS = 4
BOUND = 1.3  # times the cost of a unit

# epochs, or iterations, to estimator
ESTIMATORS: dict[str, Callable[[int], Any]] = {
    "softmax_sgd": lambda epochs: our_softmax("auto", epochs, 0),
    "mlp": lambda epochs: our_mlp("auto", epochs, 0),
    "cnn": lambda epochs: our_cnn("auto", epochs, 0),
    "softmax_lbfgs": lambda iterations: SoftmaxRegression(
        max_iter=iterations, random_state=0, **COMMON
    ),
}
# estimator: images of the two processes
MEMORY = {
    "softmax_sgd": (125_000, 500_000),
    "softmax_lbfgs": (125_000, 500_000),
    "mlp": (125_000, 500_000),
    "cnn": (5_000, 50_000),
}


def main() -> int:
    rows = [f"fit_{name}" for name in ESTIMATORS]
    rows += ["predict_softmax", "predict_mlp", "predict_cnn"]
    rows += ["epochs_softmax", "epochs_mlp", "epochs_cnn", "candidates"]
    rows += [f"memory_{name}" for name in MEMORY]
    options = parse_options(__doc__, rows, repeats=3)
    header = machine()
    warnings.simplefilter("ignore", ConvergenceWarning)  # a few epochs are what is asked for
    results: list[Result] = []

    def keep(measured: list[Result]) -> None:
        if not measured:
            return
        record(measured, options.output / "scaling.csv", header)
        results.extend(measured)

    if any(row.startswith(("fit", "predict", "epochs")) for row in options.only):
        images = synthetic(SIZES[-1])
        for name in ESTIMATORS:
            keep(rows_of(name, images, options))
        for name in IMAGES_OF_EPOCHS:
            if f"epochs_{name}" in options.only:
                keep(epochs_of(name, images, options.repeats))
        del images
    if "candidates" in options.only:
        keep(candidates(options.repeats))
    for name in MEMORY:
        if f"memory_{name}" in options.only:
            keep(memory_of(name))
    return exit_status(results, options.check)


def synthetic(n: int, n_features: int = 3072, seed: int = 0) -> Images:
    """Images that can be learned; a part at a time, so that no more memory is taken than theirs."""
    rng = np.random.default_rng(seed)
    means = rng.integers(0, 16, (10, n_features), dtype=np.uint8)
    y = rng.integers(0, 10, n)
    X = np.empty((n, n_features), dtype=np.uint8)
    for start in range(0, n, 10_000):
        part = slice(start, start + 10_000)
        X[part] = rng.integers(0, 240, X[part].shape, dtype=np.uint8)
        X[part] += means[y[part]]
    return Images(X, y, "synthetic")


# -- rows ----------------------------------------------------------------------------------------


def rows_of(name: str, images: Images, options: argparse.Namespace) -> list[Result]:
    """Fits of one estimator at all sizes, and what it then predicts."""
    rows = {"fit": f"fit_{name}", "predict": f"predict_{name.removesuffix('_sgd')}"}
    rows = {what: row for what, row in rows.items() if row in options.only}
    if not rows:
        return []
    sizes = [n for n in SIZES if name != "cnn" or n <= MOST_FOR_CNN]
    fits = {f"{name} {n}": partial(fitted, name, images.first(n), "predict" in rows) for n in sizes}
    fits[f"{name} {sizes[0]}"]()  # a warm-up
    runs = interleave(fits, options.repeats, warm_up=False)
    medians = {
        what: [float(np.median([run.outcome[what] for run in part])) for part in runs.values()]
        for what in ("fit", "predict", "before")
    }
    results = []
    for what, row in rows.items():
        results += linear(row, "image", sizes, medians[what], MIDDLE, options.repeats, sizes)
        if row == "fit_softmax_lbfgs":
            middle, largest = (medians["before"][sizes.index(n)] for n in (MIDDLE, sizes[-1]))
            results[-1].note += f"; before the iterations {middle:.2f} s and {largest:.2f} s"
    return results


def fitted(name: str, images: Images, predict: bool) -> dict[str, float]:
    """Seconds of a fit of one epoch, or of an iteration and of what is before the first."""
    lbfgs = name == "softmax_lbfgs"
    start = time.perf_counter()
    estimator = ESTIMATORS[name](ITERATIONS if lbfgs else 1).fit(images.X, images.y)
    seconds = {"fit": time.perf_counter() - start, "predict": 0.0, "before": 0.0}
    if lbfgs:
        _, *later = (row["seconds"] for row in estimator.history_)
        iteration = float(np.median(later))
        # the first iteration's seconds hold the curvature
        seconds["before"] = seconds["fit"] - sum(later) - iteration
        seconds["fit"] = iteration
    if predict:
        start = time.perf_counter()
        estimator.predict(images.X)
        seconds["predict"] = time.perf_counter() - start
    return seconds


def linear(
    row: str,
    unit: str,
    sizes: list[int],
    seconds: list[float],
    middle: int,
    repeats: int,
    n_images: list[int],
) -> list[Result]:
    """The cost of a unit at each size, and how it grows from the middle one to the largest."""
    costs = [s / size for s, size in zip(seconds, sizes, strict=True)]
    scale, prefix = (1e6, "µ") if unit == "image" else (1e3, "m")
    results = [
        Result(
            f"{row}_{size}", f"{prefix}s of each {unit}", scale * cost, ours_s=total, n=n,
            repeats=repeats, data="synthetic",
        )
        for size, total, cost, n in zip(sizes, seconds, costs, n_images, strict=True)
    ]  # fmt: skip
    slope, fixed = np.polyfit(sizes, seconds, 1, w=1 / np.array(seconds))
    growth = costs[-1] / costs[sizes.index(middle)]
    note = f"fixed {fixed:.3f} s, then {scale * slope:.4g} {prefix}s of each {unit}"
    return [
        *results,
        Result(
            row, f"times the cost of each {unit} at {middle:,}", growth, at_most=BOUND,
            n=n_images[-1], repeats=repeats, data="synthetic", note=note,
        ),
    ]  # fmt: skip


# -- epochs and candidates -----------------------------------------------------------------------


def epochs_of(name: str, images: Images, repeats: int) -> list[Result]:
    part = images.first(IMAGES_OF_EPOCHS[name])
    make = ESTIMATORS["softmax_sgd" if name == "softmax" else name]

    def fit(n: int) -> None:
        make(n).fit(part.X, part.y)

    fits = {f"{name} {n} epochs": partial(fit, n) for n in EPOCHS}
    runs = interleave(fits, repeats)
    seconds = [median_seconds(one) for one in runs.values()]
    n_images = [len(part.X)] * len(EPOCHS)
    return linear(f"epochs_{name}", "epoch", EPOCHS, seconds, 4, repeats, n_images)


def candidates(repeats: int) -> list[Result]:
    digits = synthetic(10_000, 784)
    estimator = MLPClassifier(
        (32,),
        solver="sgd",
        batch_size=200,
        max_iter=5,
        learning_rate="constant",
        random_state=0,
        device="cpu",
    )

    def study(n: int) -> None:
        grid = {"learning_rate_init": np.geomspace(1e-4, 1e-2, n)}
        with joblib.parallel_config(backend="skcifar"):
            GridSearchCV(estimator, grid, cv=3, refit=False).fit(digits.X, digits.y)

    runs = interleave({f"{n} candidates": partial(study, n) for n in CANDIDATES}, repeats)
    seconds = [median_seconds(one) for one in runs.values()]
    n_images = [len(digits.X)] * len(CANDIDATES)
    return linear("candidates", "candidate", CANDIDATES, seconds, 16, repeats, n_images)


# -- memory --------------------------------------------------------------------------------------

PROGRAM = """
import sys
sys.path.insert(0, {folder!r})
import bench_scaling
images = bench_scaling.synthetic({n})
bench_scaling.ESTIMATORS[{name!r}](1).fit(images.X, images.y)
"""


def memory_of(name: str) -> list[Result]:
    if not Path("/proc/self/status").exists():
        say("memory is skipped: it is read from /proc, which this system does not have")
        return []
    folder = str(Path(__file__).parent)
    sizes = MEMORY[name]
    peaks = [peak_anonymous(PROGRAM.format(folder=folder, n=n, name=name)) for n in sizes]
    growth = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0]) / 3072
    shown = " and ".join(
        f"{peak / 1e6:.0f} MB of {n:,}" for peak, n in zip(peaks, sizes, strict=True)
    )
    return [
        Result(
            f"memory_{name}", "times the uint8 bytes of an image", growth, at_most=1.5,
            n=sizes[1], repeats=1, data="synthetic", note=shown,
        )
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
