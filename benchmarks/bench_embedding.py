"""An embedding's step against a naive loop and pytorch-metric-learning, and what embeddings reach.

Rows of time: one training step at batch 2,048, and of all triplets at 256 too (LeNet-5 to 64
dimensions, 32 x 32 colour images, Adam), the same network, images and arithmetic for all
contestants. The naive loop draws each anchor's positive and negative with np.where and a choice;
pytorch-metric-learning mines and averages as its TripletMarginLoss and miners do by default.
`sampling-share` is the part of our step in which triplets are drawn.

Rows of accuracy: nearest neighbours on the embedding of `TripletEmbedder(random_state=0)`, nothing
else set unless the row says so, against nearest neighbours on raw pixels. The defaults were chosen
looking at these figures.

    python benchmarks/bench_embedding.py [--data-home DIR] [--only ROW,...] [--check]

takes 15 minutes on two cores. pytorch-metric-learning is not among the dependencies: without it its
rows are not measured.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _measure import (
    Result,
    exit_status,
    interleave,
    load_images,
    machine,
    median_seconds,
    parse_options,
    record,
    say,
    times_faster,
)
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from torch import Tensor, nn

from skcifar import TripletEmbedder
from skcifar._architectures import LeNet5
from skcifar._metric_learning import MetricLoss
from skcifar.datasets import fetch_cifar10, fetch_mnist

BATCH = 2048
STEPS = 5  # of one run
MINERS = ("random", "semihard", "hard", "all")


def main() -> int:
    steps = {f"step-{mining}": (mining, BATCH) for mining in MINERS}
    steps["step-all-256"] = ("all", 256)
    rows = [*steps, "digits", "mnist", "cifar10-10k"]
    options = parse_options(__doc__, rows, repeats=5)
    header = machine()
    images = load_images(options.data_home, "train", BATCH)
    results: list[Result] = []
    for name in options.only:
        if name in steps:
            found = time_step(name, *steps[name], images, options.repeats)
        else:
            found = ACCURACIES[name](options.data_home)
        record(found, options.output / "embedding.csv", header)
        results += found
    return exit_status(results, options.check)


# -- steps ---------------------------------------------------------------------------------------


def time_step(name: str, mining: str, size: int, images: Any, repeats: int) -> list[Result]:
    images = images.first(size)
    batch = torch.from_numpy(images.X).reshape(-1, 32, 32, 3).permute(0, 3, 1, 2).float() / 255
    batch = batch.contiguous(memory_format=torch.channels_last)
    targets = torch.from_numpy(np.asarray(images.y, dtype=np.int64))
    ours_loss = MetricLoss("triplet", mining, generator=torch.Generator().manual_seed(0))
    contestants = {f"ours-{mining}": stepper(batch, targets, ours_loss)}
    library, library_note = library_loss(mining, size)
    if library is not None:
        contestants[f"pytorch-metric-learning-{mining}"] = stepper(batch, targets, library)
    if mining == "random":
        contestants["naive loop"] = stepper(batch, targets, naive_loss)
    runs = interleave(contestants, repeats)
    ours = runs.pop(f"ours-{mining}")
    about = {"n": size, "data": images.name}
    seconds = median_seconds(ours) / STEPS
    results = [Result(name, "s", seconds, repeats=repeats, **about)]
    if library is None:
        results.append(
            Result(f"{name}-library", "times faster", None, repeats=0, note=library_note, **about)
        )
    for peer_name, peer in runs.items():
        short = "naive" if peer_name == "naive loop" else "library"
        note = library_note if short == "library" else ""
        results.append(
            times_faster(f"{name}-{short}", ours, peer, at_least=1.0, note=note, **about)
        )
    if mining == "random":
        share = sampling_seconds(targets) * STEPS / median_seconds(ours)
        results.append(
            Result(
                "step-random-sampling-share",
                "share of the step",
                share,
                at_most=0.05,
                repeats=repeats,
                **about,
            )
        )
    return results


def stepper(batch: Tensor, targets: Tensor, loss_of: Callable) -> Callable[[], float]:
    """A run of some steps of a network that starts the same for all contestants."""
    torch.manual_seed(0)
    network = LeNet5((32, 32, 3), 64).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)

    def run() -> float:
        for _ in range(STEPS):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(network(batch), targets)
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    return run


def naive_loss(embeddings: Tensor, targets: Tensor) -> Tensor:
    """Positives and negatives drawn one anchor after another, as one writes it at first."""
    labels, draw = targets.numpy(), np.random.RandomState(0).choice
    positives, negatives = [], []
    for anchor, label in enumerate(labels):
        same = np.where(labels == label)[0]
        positives.append(draw(same[same != anchor]))
        negatives.append(draw(np.where(labels != label)[0]))
    return nn.functional.triplet_margin_loss(
        embeddings, embeddings[positives], embeddings[negatives], margin=1.0
    )


def library_loss(mining: str, size: int) -> tuple[Callable[[Tensor, Tensor], Tensor] | None, str]:
    """pytorch-metric-learning's loss with its miner, and its version; or None, and why."""
    if mining == "all" and size > 256:
        return None, f"its triplets of a batch of {size} are a tensor of {size}^3 entries"
    try:
        import pytorch_metric_learning
        from pytorch_metric_learning import distances, losses, miners
    except Exception:  # an installation that is not whole may raise anything
        return None, "pytorch-metric-learning is not installed"
    note = f"pytorch-metric-learning {pytorch_metric_learning.__version__}"
    distance = distances.LpDistance(normalize_embeddings=False, p=2)
    if mining == "random":  # a triplet for each anchor, drawn by the loss itself
        loss = losses.TripletMarginLoss(margin=1.0, distance=distance, triplets_per_anchor=1)
        return loss, note
    loss = losses.TripletMarginLoss(margin=1.0, distance=distance)
    if mining == "all":
        return loss, note
    if mining == "hard":
        miner = miners.BatchHardMiner(distance=distance)
    else:  # its closest in cost: one positive of each anchor, and a semi-hard negative
        miner = miners.BatchEasyHardMiner(
            pos_strategy="easy", neg_strategy="semihard", distance=distance
        )
    return lambda embeddings, targets: loss(embeddings, targets, miner(embeddings, targets)), note


def sampling_seconds(targets: Tensor) -> float:
    """Median seconds to draw the triplets of one batch."""
    loss = MetricLoss("triplet", "random", generator=torch.Generator().manual_seed(0))
    rows = torch.zeros(len(targets), 64)  # random triplets do not look at them
    seconds = []
    for _ in range(50):
        start = time.perf_counter()
        loss._mine(rows, targets)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


# -- accuracies ----------------------------------------------------------------------------------


def digits(data_home: str | None) -> list[Result]:
    X, y = load_digits(return_X_y=True)
    X = X.astype(np.uint8)
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    raw = cross_val_score(KNeighborsClassifier(), X, y, cv=folds).mean()
    model = make_pipeline(TripletEmbedder(random_state=0), KNeighborsClassifier())
    start = time.perf_counter()
    ours = cross_val_score(model, X, y, cv=folds, error_score="raise").mean()
    seconds = (time.perf_counter() - start) / 5
    about = {"n": len(X), "repeats": 5, "data": "digits"}
    return [
        Result("digits-raw", "5-fold accuracy", raw, **about),
        Result("digits", "5-fold accuracy", ours, at_least=raw, ours_s=seconds, **about),
    ]


def mnist(data_home: str | None) -> list[Result]:
    train = fetch_mnist(data_home=data_home, return_X_y=True)
    test = fetch_mnist(data_home=data_home, subset="test", return_X_y=True)
    accuracy, seconds = embedded_accuracy(train, test)
    raw = KNeighborsClassifier().fit(*train).score(*test)
    about = {"n": len(train[0]), "repeats": 1, "data": "mnist"}
    return [
        Result("mnist-raw", "test accuracy", raw, **about),
        Result("mnist", "test accuracy", accuracy, at_least=0.985, ours_s=seconds, **about),
    ]


def cifar10(data_home: str | None) -> list[Result]:
    X, y = fetch_cifar10(data_home=data_home, return_X_y=True)
    test = fetch_cifar10(data_home=data_home, subset="test", return_X_y=True)
    train = X[:10_000], y[:10_000]
    accuracy, seconds = embedded_accuracy(train, test)
    raw = KNeighborsClassifier().fit(train[0].astype(np.float32), train[1])
    raw_accuracy = raw.score(test[0].astype(np.float32), test[1])
    about = {"n": len(train[0]), "repeats": 1, "data": "cifar10"}
    return [
        Result("cifar10-10k-raw", "test accuracy", raw_accuracy, **about),
        Result(
            "cifar10-10k",
            "test accuracy",
            accuracy,
            at_least=1.5 * raw_accuracy,
            ours_s=seconds,
            **about,
        ),
    ]


def embedded_accuracy(train: tuple, test: tuple) -> tuple[float, float]:
    embedder = TripletEmbedder(random_state=0)
    start = time.perf_counter()
    embedding = embedder.fit(*train).transform(train[0])
    seconds = time.perf_counter() - start
    say(f"embedded in {seconds:.0f} s, losses {np.round(embedder.loss_curve_, 3)}")
    neighbours = KNeighborsClassifier().fit(embedding, train[1])
    return neighbours.score(embedder.transform(test[0]), test[1]), seconds


ACCURACIES: dict[str, Callable[[str | None], list[Result]]] = {
    "digits": digits,
    "mnist": mnist,
    "cifar10-10k": cifar10,
}

if __name__ == "__main__":
    sys.exit(main())
