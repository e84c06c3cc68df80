"""Triplet embedding, linear classifier on it, fine-tuning: a course report's chain on CIFAR-10.

An encoder is trained on random triplets (margin 1, p = 2, 64 dimensions, Adam 1e-3, batch 2,048),
then a linear classifier on the frozen embedding, then two dense layers together with the encoder.
The report's figures, with VGG-16, 3,000 iterations, 3,000, and 5,000 or 10,000: 52% of its
validation images on the frozen embedding, 82% or 86% and 85.88% of held-out images fine-tuned; with
LeNet-5 57%.

    python benchmarks/bench_finetuning.py            # LeNet-5, 10,000 images, a tenth of the steps
    python benchmarks/bench_finetuning.py --full     # VGG-16, 50,000 images, all steps: for a GPU

The first takes 3 minutes on two cores. Test accuracies are on the official test split.
"""

from __future__ import annotations

import sys
import time
import warnings
from dataclasses import dataclass
from typing import Any

from _measure import Result, exit_status, load_images, machine, parse_options, record, say
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.frozen import FrozenEstimator
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline

from skcifar import FineTunedClassifier, SoftmaxRegression, TripletEmbedder

BATCH = 2048


@dataclass(frozen=True)
class Study:
    architecture: str
    n_images: int
    iterations: dict[str, int]  # of each stage


SMALL = Study("lenet5", 10_000, {"embedding": 300, "frozen": 300, "finetuned": 1_000})
FULL = Study("vgg16", 50_000, {"embedding": 3_000, "frozen": 3_000, "finetuned": 10_000})


def main() -> int:
    full = "--full" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--full"]
    options = parse_options(__doc__, ["embedding", "frozen", "finetuned"], repeats=1)
    study = FULL if full else SMALL
    header = machine()
    train = load_images(options.data_home, "train", study.n_images)
    test = load_images(options.data_home, "test")
    about = {"n": len(train.X), "repeats": 1, "data": train.name}
    results: list[Result] = []

    def measure(stage: str, model: BaseEstimator) -> BaseEstimator:
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the number of steps is given
            model.fit(train.X, train.y)
        seconds = time.perf_counter() - start
        say(f"{stage}: {seconds:.0f} s")
        for name, images in (("train", train), ("test", test)):
            found = Result(
                f"{study.architecture}-{stage}-{name}",
                f"{name} accuracy",
                model.score(images.X, images.y),
                ours_s=seconds,
                note=f"{study.iterations[stage]} iterations of {BATCH} images",
                **about,
            )
            record([found], options.output / "finetuning.csv", header)
            results.append(found)
        return model

    embedder = TripletEmbedder(
        64,
        architecture=study.architecture,
        mining="random",
        margin=1.0,
        p=2.0,
        normalize_embedding=False,
        translate=0,
        weight_decay=0.0,
        random_state=0,
        **adam(study, "embedding"),
    )
    neighbours = measure("embedding", make_pipeline(embedder, KNeighborsClassifier()))
    frozen = FrozenEstimator(neighbours[0])
    linear = SoftmaxRegression(alpha=0.0, random_state=0, **adam(study, "frozen"))
    measure("frozen", make_pipeline(frozen, linear))
    classifier = FineTunedClassifier(
        frozen,
        (64,),
        encoder_learning_rate=1e-3,
        weight_decay=0.0,
        random_state=0,
        **adam(study, "finetuned"),
    )
    measure("finetuned", classifier)
    return exit_status(results, options.check)


def adam(study: Study, stage: str) -> dict[str, Any]:
    """Adam at 1e-3 throughout, for so many epochs as make the iterations."""
    batches = -(-study.n_images // BATCH)
    n_epochs = study.iterations[stage] // batches
    return {
        "solver": "adam",
        "learning_rate": "constant",
        "learning_rate_init": 1e-3,
        "batch_size": BATCH,
        "max_iter": n_epochs,
        "n_iter_no_change": n_epochs,
    }


if __name__ == "__main__":
    sys.exit(main())
