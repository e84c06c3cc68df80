"""What the recipe of CNNClassifier(architecture="airbench94") reaches on a CPU.

airbench94_cpu
    Test accuracy of `CNNClassifier(architecture="airbench94", tta=True, random_state=0)` on the
    official test images after `fit` on the 50,000 training images; `ours_s` are the seconds of
    `fit`. Averaging runs the network six times for an image: both sides of it, in place and moved
    by a pixel to either corner.
airbench94_cpu_plain
    The same fit without averaging.

    python benchmarks/bench_airbench.py --only airbench94_cpu,airbench94_cpu_plain [--check]
        [--data-home DIR] [--n-train N] [--output DIR]

takes 8 minutes on two cores, and so measures nothing without `--only`. What a GPU makes of the
recipe is measured by bench_gpu.py.
"""

from __future__ import annotations

import sys
import time
from typing import Any

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

from skcifar import CNNClassifier

# name: (averaging, bound)
ROWS: dict[str, tuple[bool, float | None]] = {
    "airbench94_cpu": (True, 0.905),
    "airbench94_cpu_plain": (False, None),
}


def main() -> int:
    options = parse_options(__doc__, [], repeats=1, on_request=list(ROWS))
    if not options.only:
        say(f"nothing measured: --only {','.join(ROWS)} takes 8 minutes on two cores")
        return 0
    train = load_images(options.data_home, "train", options.n_train)
    test = load_images(options.data_home, "test")
    results = accuracies(options.only, train, test)
    record(results, options.output / "airbench.csv", machine())
    return exit_status(results, options.check)


def accuracies(names: list[str], train: Images, test: Images) -> list[Result]:
    classifier = CNNClassifier(architecture="airbench94", random_state=0, device="cpu")
    start = time.perf_counter()
    classifier.fit(train.X, train.y)
    about: dict[str, Any] = {
        "n": len(train.X),
        "repeats": 1,
        "data": train.name,
        "ours_s": time.perf_counter() - start,
        "note": f"{len(classifier.history_)} epochs, {classifier.dtype_}",
    }
    if not train.real:
        about["note"] = "random images, which have no accuracy to speak of"
    results = []
    for name in names:
        averaging, bound = ROWS[name]
        accuracy = float(classifier.set_params(tta=averaging).score(test.X, test.y))
        results.append(Result(name, "test accuracy", accuracy, at_least=bound, **about))
    return results


if __name__ == "__main__":
    sys.exit(main())
