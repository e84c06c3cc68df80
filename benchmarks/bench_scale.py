"""Studies on several processes: Dask's workers, joblib's own, and what 64 GPUs would do.

The study is a grid of 6 learning rates and 4 penalties with 3 folds, 72 fits, of an MLP of 32 units
on 10,000 images of MNIST (pixels / 255, float32), SGD with Nesterov momentum, batches of 200, 10
epochs, without the refit. Local runs use all cores; each worker of a LocalCluster is a process of
one thread, and the rows with more workers than cores say what those cost. Workers are started
before the clock is, and data travels within it.

batched_1, batched_2, batched_4
    BatchedGridSearchCV(backend="dask") on as many workers, against backend="skcifar", which trains
    on all cores of this process. The note has the seconds with one worker over those with k,
    divided by k: the efficiency, which is bounded by the cores that there are for each worker.
grid_2, grid_4
    scikit-learn's GridSearchCV in joblib.parallel_config(backend="dask"), a fit a task, against the
    same one without it, one fit after another on all cores. (With a single thread in the whole
    cluster joblib does not use it.)
loky_2
    GridSearchCV(n_jobs=2), whose two processes have a core each, against n_jobs=1.
task_seconds, group_seconds, moved_bytes
    What the plan below is made of: scheduling a task that does nothing; a group of fits on one
    thread by its size; bytes of the rows, and of what is written down of each fit.
plan_1, plan_10, plan_100
    SIMULATED, not run: a study of 10,000 fits (5,000 of 32 units, 5,000 of 100) on 64 workers. The
    seconds of groups are those measured here on one core of a CPU, divided by 1, 10 and 100 for
    faster workers; rows go to all workers in a binary tree at 10 Gbit/s, then the scheduler hands
    out one group after another, each to the worker that is free first; one process takes what comes
    back, writes the journal and refits. The figure is the busy share of the workers with the best
    size of groups, the note says where the rest goes: until rows are there; waiting for the
    scheduler; waiting for the last group (tail); for the journal after it; for the refit. All
    sizes, and 1 Gbit/s, are in scale_plan.csv.

What the plan says, from one run of these figures (a group 0.2 s and then 50 to 140 ms a fit, 1.7 ms
a task, 0.18 ms to write a fit down, 31 MB of rows), and what the design does about it:

- Workers as slow as this CPU's cores are nine tenths busy, in 17 s, with two groups each. With one
  group each, the widths' unequal seconds leave a tail of 7 of 24 s; with fits by threes, groups'
  fixed part makes it 26 s. So a search cuts a CPU's study into four groups a worker: no tail of
  more than a fourth of a worker's time, and as much is lost with a worker that dies.
- Rows take 0.2 s, 1.8 s at 1 Gbit/s. As an argument of each of 128 groups, from one machine, they
  would take 3 s and 32 s, of each of 10,000 fits 250 s and 42 minutes: they are sent to every
  worker, once, before the groups.
- Ten times faster workers are three quarters busy, in 2.2 s: what one process does for all, 10,000
  lines of the journal and the refit, is a tenth of it. A hundred times faster ones are a tenth
  busy: 1.8 s of journal and 1.4 s of scheduling, which run beside each other, bound the study at
  2 s, whatever the size of groups. More workers would not help then. Larger groups spare tasks,
  which is why a GPU is sent one; the journal is written a line at a time, each safely on disk,
  which one write for each group would end: not done, as a study of seconds needs no journal.
- With more epochs only the seconds of groups and of the refit grow: ten times the work on workers a
  hundred times faster is plan_10.

    python benchmarks/bench_scale.py [--only ROW,...] [--check] [--data-home DIR] [--repeats N]
        [--output DIR]

takes 11 minutes on two cores.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
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
    times_faster,
)
from distributed import Client, LocalCluster
from joblib import cpu_count
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV

from skcifar import MLPClassifier
from skcifar._journal import Journal
from skcifar.model_selection import BatchedGridSearchCV

N_IMAGES = 10_000
GRID = {
    "learning_rate_init": [0.3, 0.1, 0.03, 0.01, 0.003, 0.001],
    "alpha": [1e-5, 1e-4, 1e-3, 1e-2],
}
FOLDS = 3
WORKERS = {"batched": [1, 2, 4], "grid": [2, 4]}
LOKY_BOUND = 0.95
# candidates of the groups that are timed; each has a fit for every fold
GROUPS = [1, 4, 16, 32]
N_NOTHINGS = 500  # tasks that do nothing

# -- the plan: its study and machines
N_FITS = 10_000
N_GPUS = 64
WIDTHS = [32, 100]  # half of the fits each
MODELS = [3, 10, 20, 39, 79, 157, 625]  # of a group: 39 are four groups a worker, 157 one
FASTER = [1, 10, 100]
GBITS = [1, 10]


def main() -> int:
    rows = [f"{kind}_{n}" for kind, numbers in WORKERS.items() for n in numbers]
    rows += ["loky_2", "task_seconds", "group_seconds", "moved_bytes"]
    rows += [f"plan_{faster}" for faster in FASTER]
    options = parse_options(__doc__, rows, repeats=3)
    header = machine()
    warnings.simplefilter("ignore", ConvergenceWarning)  # ten epochs are what is asked for
    digits = load_images(options.data_home, "train", N_IMAGES, "MNIST")
    digits = Images((digits.X / 255).astype(np.float32), digits.y, digits.name)
    results: list[Result] = []

    def keep(measured: list[Result]) -> None:
        if measured:
            record(measured, options.output / "scale.csv", header)
            results.extend(measured)

    keep(on_dask(digits, options))
    if "loky_2" in options.only:
        keep([on_loky(digits, options)])
    if any(row.startswith(("task", "group", "moved", "plan")) for row in options.only):
        costs, measured = measure_costs(digits, options)
        keep([result for result in measured if result.name.split("-")[0] in options.only])
        keep(plans(costs, options, header))
    return exit_status(results, options.check)


# -- the study -----------------------------------------------------------------------------------


def perceptron(width: int = 32) -> MLPClassifier:
    return MLPClassifier(
        (width,),
        solver="sgd",
        momentum=0.9,
        learning_rate="constant",
        batch_size=200,
        max_iter=10,
        n_iter_no_change=100,  # all ten
        random_state=0,
        device="cpu",
    )


def batched(images: Images, backend: str = "skcifar") -> float:
    """Best mean score."""
    search = BatchedGridSearchCV(perceptron(), GRID, cv=FOLDS, refit=False, backend=backend)
    return best(search, images)


def one_by_one(images: Images, backend: str | None = None, n_jobs: int | None = None) -> float:
    search = GridSearchCV(perceptron(), GRID, cv=FOLDS, refit=False, n_jobs=n_jobs)
    if backend is None:
        return best(search, images)
    with joblib.parallel_config(backend=backend):
        return best(search, images)


def best(search: BaseEstimator, images: Images) -> float:
    return float(search.fit(images.X, images.y).cv_results_["mean_test_score"].max())


# -- workers -------------------------------------------------------------------------------------


@contextmanager
def workers(n: int) -> Iterator[Client]:
    """Processes of one thread each, and the scheduler in this one."""
    local = LocalCluster(n_workers=n, threads_per_worker=1, dashboard_address=":0")
    with local as cluster, Client(cluster) as client:
        client.wait_for_workers(n)
        yield client


def on_dask(images: Images, options: argparse.Namespace) -> list[Result]:
    kinds: dict[str, Callable[..., float]] = {"batched": batched, "grid": one_by_one}
    least: dict[str, tuple[int, float]] = {}  # workers, and seconds of all of them
    results = []
    for n in sorted(set().union(*WORKERS.values())):
        contestants: dict[str, Callable[[], float]] = {}
        for kind, study in kinds.items():
            if f"{kind}_{n}" in options.only:
                contestants[f"{kind} local"] = partial(study, images)
                contestants[f"{kind} on {n}"] = partial(study, images, "dask")
        if not contestants:
            continue
        with workers(n):
            runs = interleave(contestants, options.repeats)
        for kind in kinds:
            if f"{kind}_{n}" in options.only:
                found = runs[f"{kind} on {n}"]
                least.setdefault(kind, (n, n * median_seconds(found)))
                results.append(
                    times_faster(
                        f"{kind}_{n}", found, runs[f"{kind} local"], n=len(images.X),
                        data=images.name, note=_efficiency(*least[kind], found, n),
                    )
                )  # fmt: skip
    return results


def _efficiency(least: int, with_least: float, runs: list[Run], n: int) -> str:
    share = with_least / n / median_seconds(runs)
    cores = min(1.0, cpu_count() / n)
    efficiency = f"efficiency {share:.2f} relative to {least}, " if n > least else ""
    return f"{efficiency}{cores:.2f} cores for each worker"


def on_loky(images: Images, options: argparse.Namespace) -> Result:
    runs = interleave(
        {
            "n_jobs=1": partial(one_by_one, images),
            "n_jobs=2": partial(one_by_one, images, "loky", 2),
        },
        options.repeats,
    )
    return times_faster(
        "loky_2", runs["n_jobs=2"], runs["n_jobs=1"], at_least=LOKY_BOUND, n=len(images.X),
        data=images.name,
    )  # fmt: skip


# -- what a plan is made of ----------------------------------------------------------------------


@dataclass(frozen=True)
class Costs:
    """Seconds on one core, and bytes.

    Attributes
    ----------
    fixed, each : dict of int to float
        Of a group whatever its size, and of each of its fits; by width.
    task : float
        Of the scheduler, for a task.
    rows : int
        Bytes that every worker needs.
    row_of_fit : float
        Bytes that come back of a fit, as written to the journal.
    write : float
        To write them safely.
    refit : float
        One fit alone, on all rows.
    """

    fixed: dict[int, float]
    each: dict[int, float]
    task: float
    rows: int
    row_of_fit: float
    write: float
    refit: float


def measure_costs(images: Images, options: argparse.Namespace) -> tuple[Costs, list[Result]]:
    about: dict[str, Any] = {"n": len(images.X), "data": images.name}
    fixed, each, results = {}, {}, []
    sizes = np.array([FOLDS * n for n in GROUPS])
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for width in WIDTHS:
            seconds = np.array([seconds_of_group(width, n, images, options) for n in GROUPS])
            each[width], fixed[width] = np.polyfit(sizes, seconds, 1, w=1 / seconds)
            shown = ", ".join(f"{n}: {s:.2f} s" for n, s in zip(sizes, seconds, strict=True))
            note = f"fixed {fixed[width]:.3f} s, then {1e3 * each[width]:.1f} ms; {shown}"
            last = 1e3 * seconds[-1] / sizes[-1]
            quantity = f"ms of a fit in a group of {sizes[-1]}, one thread"
            name = f"group_seconds-{width}"
            results.append(
                Result(name, quantity, last, repeats=options.repeats, note=note, **about)
            )
        start = time.perf_counter()
        perceptron(WIDTHS[-1]).fit(images.X, images.y)
        refit = time.perf_counter() - start
    finally:
        torch.set_num_threads(n_threads)
    with workers(2) as client:
        task = seconds_of_task(client)
    rows = images.X.nbytes + images.y.nbytes
    row_of_fit, write = journal_of_fit(images)
    shown = f"rows {rows / 1e6:.1f} MB; written safely in {1e3 * write:.2f} ms"
    results += [
        Result("task_seconds", "ms of scheduling a task", 1e3 * task, repeats=N_NOTHINGS, **about),
        Result("moved_bytes", "bytes that come back of a fit", row_of_fit, repeats=1, note=shown,
               **about),
    ]  # fmt: skip
    return Costs(fixed, each, task, rows, row_of_fit, write, refit), results


def seconds_of_group(
    width: int, n_candidates: int, images: Images, options: argparse.Namespace
) -> float:
    grid = {"learning_rate_init": np.geomspace(1e-3, 0.3, n_candidates)}
    search = BatchedGridSearchCV(perceptron(width), grid, cv=FOLDS, refit=False)
    runs = interleave(
        {f"{n_candidates} of {width}": partial(best, search, images)}, options.repeats
    )
    return median_seconds(*runs.values())


def seconds_of_task(client: Client) -> float:
    """Of tasks that do nothing and are all asked for at once."""
    client.gather(client.map(nothing, range(10), pure=False))
    start = time.perf_counter()
    client.gather(client.map(nothing, range(N_NOTHINGS), pure=False))
    return (time.perf_counter() - start) / N_NOTHINGS


def nothing(_: int) -> None:
    pass


def journal_of_fit(images: Images) -> tuple[float, float]:
    """Bytes of a fit in a journal, and seconds to write them."""
    some = images.first(1000)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "study.jsonl"
        search = BatchedGridSearchCV(perceptron(), GRID, cv=FOLDS, refit=False, journal=path)
        search.fit(some.X, some.y)
        lines = path.read_bytes().splitlines()[1:]
        size = sum(map(len, lines)) / len(lines)
        with Journal(Path(folder) / "again.jsonl", {}) as journal:
            start = time.perf_counter()
            for _ in range(100):
                journal.append({"text": "x" * int(size)})
            return size, (time.perf_counter() - start) / 100


# -- the plan ------------------------------------------------------------------------------------


def plans(costs: Costs, options: argparse.Namespace, header: dict[str, Any]) -> list[Result]:
    settings = itertools.product(FASTER, GBITS, MODELS)
    table = pd.DataFrame([simulated(costs, *setting) for setting in settings])
    for name, value in header.items():
        table[name] = value
    table.to_csv(options.output / "scale_plan.csv", index=False)
    results = []
    for faster in FASTER:
        if f"plan_{faster}" not in options.only:
            continue
        fast = table[(table["faster"] == faster) & (table["gbit"] == max(GBITS))]
        chosen = fast.loc[fast["seconds"].idxmin()]
        parts = ", ".join(
            f"{part} {chosen[part]:.2f} s"
            for part in ("rows", "scheduler", "tail", "journal", "refit")
        )
        note = (
            f"simulated: {chosen['seconds']:.1f} s with groups of {int(chosen['models'])}; {parts}"
        )
        quantity = f"of {N_GPUS} workers busy"
        results.append(
            Result(
                f"plan_{faster}", quantity, float(chosen["busy"]), n=N_IMAGES, repeats=0,
                data="simulated", note=note,
            )
        )  # fmt: skip
    return results


def simulated(costs: Costs, faster: float, gbit: float, models: int) -> dict[str, float]:
    """Where the time of a study goes, by following its tasks from event to event."""
    rate = gbit * 1e9 / 8
    groups = groups_of_plan(costs, faster, models)
    # in each round every worker that has the rows hands them to another one
    rows = int(np.ceil(np.log2(N_GPUS + 1))) * costs.rows / rate
    free = [rows] * N_GPUS  # when each worker is; a heap
    ends, waited = [], 0.0
    for position, (seconds, n_fits) in enumerate(groups, start=1):
        idle_since = heapq.heappop(free)
        start = max(idle_since, rows + position * costs.task)
        waited += start - idle_since
        ends.append((start + seconds, n_fits))
        heapq.heappush(free, start + seconds)
    taken = 0.0
    for end, n_fits in sorted(ends):
        taken = max(taken, end) + n_fits * (costs.row_of_fit / rate + costs.write)
    refit = costs.refit / faster
    total = taken + refit
    work = sum(seconds for seconds, _ in groups)
    return {
        "fits": N_FITS,
        "workers": N_GPUS,
        "faster": faster,
        "gbit": gbit,
        "models": models,
        "groups": len(groups),
        "seconds": total,
        "busy": work / N_GPUS / total,
        "rows": rows,
        "scheduler": waited / N_GPUS,
        "tail": max(free) - float(np.mean(free)),
        "journal": taken - max(free),
        "refit": refit,
    }


def groups_of_plan(costs: Costs, faster: float, models: int) -> list[tuple[float, int]]:
    """Seconds and fits of each group, in the order of the grid: narrow networks first."""
    groups = []
    for width in WIDTHS:
        n_fits = N_FITS // len(WIDTHS)
        while n_fits:
            n = min(models, n_fits)
            groups.append(((costs.fixed[width] + n * costs.each[width]) / faster, n))
            n_fits -= n
    return groups


if __name__ == "__main__":
    sys.exit(main())
