"""On a GPU: the fits, steps and passes of skcifar against loops written by hand, on the same GPU.

    python benchmarks/bench_gpu.py [--check] [--data-home DIR] [--script airbench94_muon.py]
        [--only ROW,...] [--repeats N] [--output DIR]

is the one command for a machine with a GPU; where there is none it writes its rows without a
figure, in place of no measured ones. Peers have their data on the device. Contestants take turns,
five times after a round that does not count, and medians are compared; the device is waited for
at both ends. An epoch is the median epoch of a fit, by its own `history_`, for the first of them
records the steps; what a fit costs beside its epochs is in the note.

airbench94_accuracy, airbench94_seconds
    `CNNClassifier(architecture="airbench94", tta=True, random_state=seed).fit(X, y)` on uint8 rows
    in NumPy's memory, and its score on the test images, against a bare loop of the same recipe
    (float16 weights, an epoch's images moved at once, no records), with ten seeds in turn.
    Accuracy is in points below the loop's, which are to be at most 0.1; seconds are those of fit
    and score after a first fit, whose cost is in the note, as is that of the fit alone. A fit is
    0.28 PFLOP: 0.7 s at the 400 TFLOP/s that bfloat16 reaches in convolutions at best.
airbench94_script, airbench94_script_seconds
    With --script: the mean accuracy and the median seconds that a copy of the published script
    prints, on the same images, against ours. Its 200 runs take ten minutes and more. Its images
    are on the device before its clock starts; its first run, which compiles, is left out.
softmax_epoch_..., mlp_epoch_..., mlp_128_epoch_...
    SoftmaxRegression(solver="sgd", batch_size=256) and 200 hidden units in batches of 500 and 128
    in float32, against skorch's NeuralNetClassifier as it comes (_skorch; here the whole fit
    counts, divided by its epochs, on both sides), a plain torch loop (_eager), and ours with
    SKCIFAR_CUDA_GRAPHS=0 (_graphs: what it is worth to record steps). An epoch of the MLP is 0.19
    TFLOP and 0.8 GB of pixels, under 5 ms of any GPU; one launched operation by operation takes
    100 steps times 40 to 100 launches of 5 us, 20 to 50 ms.
vgg16_epoch, resnet18_epoch
    CNNClassifier in bfloat16, batches of 512, flipped and moved by 2 pixels, against a loop with
    autocast, channels_last, cuDNN's search for algorithms, fused SGD and the same augmentation of
    an epoch at once. 94 and 167 TFLOP an epoch; BatchNorm and ReLU are bound by memory.
features_resnet18
    Images a second of `PretrainedFeatures` at 224 pixels from uint8 rows of 32x32, against a loop
    in bfloat16 and channels_last that resizes on the device as well. 3.6 GFLOP an image. Random
    weights take as long as ImageNet's.
memory_growth_mlp, memory_growth_cnn
    Bytes allocated on the device after each of 50 fits of 1,000 images in a process of their own:
    the highest less that after the second.
memory_peak_mlp, memory_peak_airbench94
    Most bytes allocated at a time in a fit of 50,000 images, of which 154 MB are the pixels.
sweeps
    Runs `bench_sweep.py --only gpu_27,gpu_135,gpu_cnn_27`, which writes to its own sweep.csv.

--device cpu --output DIR, with --quick and --n-train 512, lets every contestant run once on a CPU,
to see that the script works: its figures say nothing of a GPU.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from _contestants import TASKS, Task, our_mlp, our_softmax
from _gpu_peers import (
    bare_accuracy,
    bare_features,
    bare_fit,
    by_hand,
    eager,
    on_device,
    run_script,
    skorch,
    wait_for,
)
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
    per_channel,
    record,
    say,
    standardised,
)
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning

from skcifar import CNNClassifier, MLPClassifier, PretrainedFeatures

UNMEASURED = "not measured on a GPU"
DEFAULT_OUTPUT = Path(__file__).parent / "results"
SWEEPS = "gpu_27,gpu_135,gpu_cnn_27"


@dataclass(frozen=True)
class Row:
    quantity: str
    at_least: float | None = None
    at_most: float | None = None


STEPS = ("softmax", "mlp", "mlp_128")
FASTER = "times faster"
BELOW = "points of accuracy below"
ROWS = {
    "airbench94_accuracy": Row(BELOW + " the bare loop", at_most=0.1),
    "airbench94_seconds": Row(FASTER, at_least=1.0),
    "airbench94_script": Row(BELOW + " the script", at_most=0.1),
    "airbench94_script_seconds": Row(FASTER, at_least=1.0),
    **{
        f"{name}_epoch_{peer}": Row(FASTER, at_least=bound)
        for name in STEPS
        for peer, bound in (("skorch", 5.0), ("eager", 3.0), ("graphs", None))
    },
    "vgg16_epoch": Row(FASTER, at_least=0.9),
    "resnet18_epoch": Row(FASTER, at_least=0.9),
    "features_resnet18": Row(FASTER, at_least=0.9),
    "memory_growth_mlp": Row("MB more after 50 fits than after two", at_most=1.0),
    "memory_growth_cnn": Row("MB more after 50 fits than after two", at_most=1.0),
    "memory_peak_mlp": Row("MB"),
    "memory_peak_airbench94": Row("MB"),
}


@dataclass(frozen=True)
class Setting:
    """What is run, and where; the second values are those of --quick.

    Attributes
    ----------
    images : int
        Of which features are computed, 20 batches of 256.
    epochs : int or None
        Of the recipe; None are all of them.
    """

    train: Images
    test: Images
    device: torch.device
    repeats: int
    seeds: int = 10
    epochs: int | None = None
    step_epochs: int = 20
    skorch_epochs: int = 3
    convolution_epochs: int = 5
    images: int = 5120
    fits: int = 50
    script: Path | None = None
    only: tuple[str, ...] = ()

    def result(self, name: str, figure: float | None, **fields: Any) -> Result:
        row = ROWS[name]
        about: dict[str, Any] = {
            "n": len(self.train.X),
            "data": self.train.name,
            "repeats": self.repeats,
        }
        about |= {"at_least": row.at_least, "at_most": row.at_most} | fields
        if self.device.type != "cuda":  # a trial, which no bound is for
            note = f"a trial on the {self.device}; {fields.get('note', '')}"
            about |= {"at_least": None, "at_most": None, "note": note}
        return Result(name, row.quantity, figure, **about)

    def unmeasured(self, name: str, note: str) -> Result:
        return self.result(name, None, repeats=0, note=note)


QUICK: dict[str, Any] = {
    "repeats": 1,
    "seeds": 2,
    "epochs": 2,
    "step_epochs": 2,
    "skorch_epochs": 1,
    "convolution_epochs": 1,
    "images": 8,
    "fits": 4,
}


def main() -> int:
    options = parse_options(__doc__, [*ROWS, "sweeps"], repeats=5, add_options=add_options)
    if (options.device == "cpu" or options.quick) and options.output == DEFAULT_OUTPUT:
        say("figures of a trial are no results: give --output another folder")
        return 2
    header = machine() | gpu()
    path = options.output / "gpu.csv"
    train = load_images(options.data_home, "train", options.n_train)
    test = load_images(
        options.data_home, "test", min(200, options.n_train) if options.quick else None
    )
    setting = Setting(
        train,
        test,
        torch.device(options.device),
        options.repeats,
        script=options.script,
        only=tuple(options.only),
    )
    if options.quick:
        setting = replace(setting, **QUICK)
    if options.device == "cuda" and not torch.cuda.is_available():
        missing = {name: UNMEASURED for name in ROWS if name in options.only}
        record([setting.unmeasured(name, note) for name, note in missing.items()], path, header)
        return 0
    warnings.simplefilter("ignore", ConvergenceWarning)  # a few epochs are what is asked for
    results: list[Result] = []
    failed = False
    for names, group in GROUPS:
        if not set(names) & set(options.only):
            continue
        try:
            found = group(setting)
        except Exception as error:  # one that fails does not cost the others the time on a GPU
            traceback.print_exc()
            failed = True
            note = f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            found = [setting.unmeasured(name, note) for name in names]
        found = [result for result in found if result.name in options.only]
        record(found, path, header)
        results += found
    missed = exit_status(results, options.check) | int(failed)
    if "sweeps" in options.only and options.device == "cuda":
        missed |= sweeps(options)
    return missed


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--script", type=Path, help="a copy of airbench94_muon.py, to be run too")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: a trial")
    parser.add_argument("--quick", action="store_true", help="few fits of few epochs: a trial")


def gpu() -> dict[str, Any]:
    """Columns beside those of the machine; empty without a GPU."""
    if not torch.cuda.is_available():
        return dict.fromkeys(("gpu", "driver", "cuda", "cudnn"))
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    except OSError:
        listed = ""
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": next(iter(listed.split()), None),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def sweeps(options: argparse.Namespace) -> int:
    command = [sys.executable, str(Path(__file__).with_name("bench_sweep.py")), "--only", SWEEPS]
    command += ["--output", str(options.output)]
    if options.data_home is not None:
        command += ["--data-home", options.data_home]
    return subprocess.run([*command, *(["--check"] if options.check else [])]).returncode


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def faster(setting: Setting, name: str, ours_s: float, peer_s: float, **fields: Any) -> Result:
    return setting.result(name, peer_s / ours_s, ours_s=ours_s, peer_s=peer_s, **fields)


# -- airbench94 ----------------------------------------------------------------------------------


def airbench94(setting: Setting) -> list[Result]:
    train, test, device = setting.train, setting.test, setting.device
    contestants = {
        "skcifar": fit_and_score(
            setting,
            lambda seed: airbench_classifier(seed, setting).fit(train.X, train.y),
            lambda classifier: classifier.score(test.X, test.y),
        ),
        "bare loop": fit_and_score(
            setting,
            lambda seed: bare_fit(train, seed, device, setting.epochs),
            lambda model: bare_accuracy(model, test, device),
        ),
    }
    first = interleave(contestants, 1, warm_up=False)
    runs = interleave(contestants, setting.seeds, warm_up=False)
    scores = {name: np.array([run.outcome[0] for run in part]) for name, part in runs.items()}
    results = [airbench94_accuracy(setting, scores["skcifar"], scores["bare loop"])]
    fits = {name: np.median([run.outcome[1] for run in part]) for name, part in runs.items()}
    costs = {name: part[0].outcome[1] for name, part in first.items()}
    ours_s, bare_s = (median_seconds(part) for part in runs.values())
    note = (
        f"fit and score; fit alone {fits['skcifar']:.2f} and {fits['bare loop']:.2f} s, "
        f"the first one {costs['skcifar']:.2f} s, in which CUDA starts, and "
        f"{costs['bare loop']:.2f} s"
    )
    seconds = faster(setting, "airbench94_seconds", ours_s, bare_s, note=note)
    results.append(replace(seconds, repeats=setting.seeds))
    if {"airbench94_script", "airbench94_script_seconds"} & set(setting.only):
        results += airbench94_script(setting, scores["skcifar"], ours_s)
    return results


def airbench_classifier(seed: int, setting: Setting) -> CNNClassifier:
    classifier = CNNClassifier(architecture="airbench94", tta=True, random_state=seed)
    classifier.set_params(device=str(setting.device))
    return classifier if setting.epochs is None else classifier.set_params(max_iter=setting.epochs)


def fit_and_score(
    setting: Setting, fit: Callable[[int], Any], score: Callable[[Any], float]
) -> Callable[[], tuple[float, float]]:
    """A contestant, with another seed in each call; gives per cent and the seconds of the fit."""
    seeds = count()

    def run() -> tuple[float, float]:
        start = time.perf_counter()
        fitted = fit(next(seeds))
        wait_for(setting.device)
        seconds = time.perf_counter() - start
        return 100 * float(score(fitted)), seconds

    return run


def airbench94_accuracy(setting: Setting, found: np.ndarray, bare: np.ndarray) -> Result:
    lost: float | None = float(bare.mean() - found.mean())
    note = f"{mean_and_error(found)} against {mean_and_error(bare)}"
    if not setting.train.real:
        lost, note = None, "not measured: random images have no accuracy to speak of"
    return setting.result("airbench94_accuracy", lost, note=note, repeats=setting.seeds)


def mean_and_error(scores: np.ndarray) -> str:
    error = np.std(scores, ddof=1) / len(scores) ** 0.5
    return f"{scores.mean():.3f} ± {error:.3f}%"


def airbench94_script(setting: Setting, found: np.ndarray, ours_s: float) -> list[Result]:
    names = "airbench94_script", "airbench94_script_seconds"
    if setting.script is None:
        note = "not measured: --script PATH names a copy of airbench94_muon.py"
        return [setting.unmeasured(name, note) for name in names]
    printed = run_script(setting.script, setting.train, setting.test)
    note = f"ours {mean_and_error(found)}; it said: {printed.end}"
    lost = None if printed.accuracy is None else printed.accuracy - float(found.mean())
    accuracy = setting.result(names[0], lost, note=note, repeats=setting.seeds)
    if printed.seconds is None:
        return [accuracy, setting.unmeasured(names[1], printed.end)]
    seconds = faster(setting, names[1], ours_s, printed.seconds, note="as it prints them")
    return [accuracy, seconds]


# -- steps of small networks ---------------------------------------------------------------------


def task_of(name: str) -> Task:
    if name == "mlp_128":
        return replace(TASKS["mlp"], batch_size=128, penalty=1e-4 / 128)
    return TASKS[name]


def estimator_of(name: str, setting: Setting) -> BaseEstimator:
    make = our_softmax if name == "softmax" else our_mlp
    estimator = make("float32", setting.step_epochs, 0)
    device = str(setting.device)
    return estimator.set_params(device=device, batch_size=task_of(name).batch_size)


def steps(name: str, setting: Setting) -> list[Result]:
    train, device, epochs = setting.train, setting.device, setting.step_epochs
    task, estimator = task_of(name), estimator_of(name, setting)
    rows = standardised(train.X, *per_channel(train.X))
    inputs, labels = torch.from_numpy(rows).to(device), torch.from_numpy(train.y).to(device)

    def recorded() -> list[float]:
        return epoch_seconds(estimator, train)

    def unrecorded() -> list[float]:
        with mock.patch.dict(os.environ, SKCIFAR_CUDA_GRAPHS="0"):
            return epoch_seconds(estimator, train)

    peers: dict[str, Callable[[], Any]] = {
        "graphs": unrecorded,
        "eager": lambda: eager(task, inputs, labels, epochs),
        "skorch": lambda: skorch(task, rows, train.y, setting.skorch_epochs, device),
    }
    asked = [peer for peer in peers if f"{name}_epoch_{peer}" in setting.only]
    runs = interleave(
        {"skcifar": recorded, **{peer: peers[peer] for peer in asked}}, setting.repeats
    )
    note = beside_epochs(runs["skcifar"])
    results = []
    for peer in asked:
        if peer == "skorch":  # its epochs are not timed one by one
            ours_s = median_seconds(runs["skcifar"]) / epochs
            peer_s = median_seconds(runs["skorch"]) / setting.skorch_epochs
        else:
            ours_s, peer_s = median_epoch(runs["skcifar"]), median_epoch(runs[peer])
        results.append(faster(setting, f"{name}_epoch_{peer}", ours_s, peer_s, note=note))
    return results


def epoch_seconds(estimator: BaseEstimator, train: Images) -> list[float]:
    """Fit; gives the seconds of each epoch, at whose end the host reads its loss."""
    estimator.fit(train.X, train.y)
    return [row["seconds"] for row in estimator.history_]


def median_epoch(runs: list[Run]) -> float:
    return float(np.median([np.median(run.outcome) for run in runs]))


def beside_epochs(runs: list[Run]) -> str:
    rest = np.median([run.seconds - sum(run.outcome) for run in runs])
    first = np.median([run.outcome[0] for run in runs])
    return (
        f"a fit of {len(runs[0].outcome)} epochs takes {median_seconds(runs):.3f} s, {rest:.3f} s "
        f"of them beside its epochs; the first epoch {first:.3f} s"
    )


# -- convolutional networks ----------------------------------------------------------------------

BATCH_SIZE = 512
RATE = 0.1


def convolutions(name: str, setting: Setting) -> list[Result]:
    estimator = CNNClassifier(
        architecture=name,
        horizontal_flip=True,
        translate=2,
        batch_size=BATCH_SIZE,
        learning_rate_init=RATE,
        max_iter=setting.convolution_epochs,
        precision="bfloat16",
        device=str(setting.device),
        random_state=0,
    )
    images, labels = on_device(setting.train, setting.device, torch.bfloat16)
    runs = interleave(
        {
            name: lambda: epoch_seconds(estimator, setting.train),
            "by hand": lambda: by_hand(
                name, images, labels, BATCH_SIZE, RATE, setting.convolution_epochs
            ),
        },
        setting.repeats,
    )
    ours_s, peer_s = median_epoch(runs[name]), median_epoch(runs["by hand"])
    rate = f"{len(images) / ours_s:,.0f} images/s; "
    note = rate + beside_epochs(runs[name])
    return [faster(setting, f"{name}_epoch", ours_s, peer_s, note=note)]


# -- features ------------------------------------------------------------------------------------


def features_resnet18(setting: Setting) -> list[Result]:
    device, X = setting.device, setting.train.X[: setting.images]
    estimator = PretrainedFeatures(
        "resnet18", weights=None, precision="bfloat16", device=str(device), random_state=0
    )
    estimator.fit(X[:1])
    # nothing is cast, as nothing is trained
    network = copy.deepcopy(estimator.module_.network).bfloat16()
    network = network.to(memory_format=torch.channels_last).eval()
    runs = interleave(
        {
            "skcifar": lambda: estimator.transform(X),
            "bare loop": lambda: bare_features(network, X, device),
        },
        setting.repeats,
    )
    ours_s, peer_s = (median_seconds(part) for part in runs.values())
    found, expected = (part[-1].outcome for part in runs.values())
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    note = (
        f"{len(X) / ours_s:,.0f} and {len(X) / peer_s:,.0f} images/s; "
        f"differs by {difference:.1g} of the largest"
    )
    return [faster(setting, "features_resnet18", ours_s, peer_s, n=len(X), note=note)]


# -- memory --------------------------------------------------------------------------------------


def memory(setting: Setting) -> list[Result]:
    device = str(setting.device)
    perceptron = MLPClassifier((200,), max_iter=2, device=device, random_state=0)
    small = {
        "memory_growth_mlp": perceptron,
        "memory_growth_cnn": CNNClassifier((16, 32), max_iter=2, device=device, random_state=0),
    }
    large = {
        "memory_peak_mlp": perceptron,
        "memory_peak_airbench94": airbench_classifier(0, setting),
    }
    results = [growth(name, one, setting) for name, one in small.items() if name in setting.only]
    return results + [peak(name, e, setting) for name, e in large.items() if name in setting.only]


def growth(name: str, estimator: BaseEstimator, setting: Setting) -> Result:
    part = setting.train.first(1000)
    # in a process that has not fitted before: what is kept once for all fits would be there
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        held = pool.submit(allocations, estimator, part, setting.fits, setting.device).result()
    more = max(held[2:]) - held[1]
    note = f"{held[1] / 1e6:.1f} MB after the second, {held[-1] / 1e6:.1f} MB after the last"
    return setting.result(name, more / 1e6, n=len(part.X), repeats=setting.fits, note=note)


def allocations(
    estimator: BaseEstimator, part: Images, n_fits: int, device: torch.device
) -> list[int]:
    """Bytes that are allocated after each fit."""
    warnings.simplefilter("ignore", ConvergenceWarning)
    held = []
    for _ in range(n_fits):
        estimator.fit(part.X, part.y)
        held.append(allocated(device))
    return held


def peak(name: str, estimator: BaseEstimator, setting: Setting) -> Result:
    before = allocated(setting.device)
    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(setting.device)
    estimator.fit(setting.train.X, setting.train.y)
    highest = before
    if setting.device.type == "cuda":
        highest = torch.cuda.max_memory_allocated(setting.device)
    note = f"beside {before / 1e6:.0f} MB that were allocated before"
    return setting.result(name, (highest - before) / 1e6, repeats=1, note=note)


def rows_of(beginning: str) -> tuple[str, ...]:
    return tuple(name for name in ROWS if name.startswith(beginning))


GROUPS: list[tuple[tuple[str, ...], Callable[[Setting], list[Result]]]] = [
    (rows_of("airbench94"), airbench94),
    *((rows_of(f"{name}_epoch"), partial(steps, name)) for name in STEPS),
    *((rows_of(f"{name}_epoch"), partial(convolutions, name)) for name in ("vgg16", "resnet18")),
    (rows_of("features_resnet18"), features_resnet18),
    (rows_of("memory"), memory),
]


if __name__ == "__main__":
    sys.exit(main())
