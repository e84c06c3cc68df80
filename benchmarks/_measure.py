"""What the benchmarks share: options, images, interleaved runs, results with their machine.

Every benchmark writes one CSV, a row per figure, to the results folder. A row carries the machine
and the versions it was measured with, and replaces the row of its name from an earlier run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from skcifar._provenance import machine as this_machine
from skcifar._provenance import now, versions
from skcifar.datasets import fetch_cifar10, fetch_mnist


def parse_options(
    doc: str,
    rows: Sequence[str],
    repeats: int,
    *,
    on_request: Sequence[str] = (),
    add_options: Callable[[argparse.ArgumentParser], None] | None = None,
) -> argparse.Namespace:
    """What the command line says; rows `on_request` are measured where --only names them."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--data-home", default=None, help="folder of cifar-10-batches-bin/")
    parser.add_argument("--n-train", type=int, default=50_000, help="images, 50000 by default")
    parser.add_argument("--repeats", type=int, default=repeats, help="runs of each contestant")
    parser.add_argument("--only", default=",".join(rows), help="rows to measure: %(default)s")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--check", action="store_true", help="exit 1 where a bound is missed")
    if add_options is not None:
        add_options(parser)
    options = parser.parse_args()
    options.only = options.only.split(",") if options.only else []
    unknown = sorted(set(options.only) - {*rows, *on_request})
    if unknown:
        there_are = ", ".join([*rows, *on_request])
        parser.error(f"--only names {', '.join(unknown)}; there are {there_are}")
    return options


# -- images --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """Rows of uint8 pixels (n, 3072), height, width, channel, or (n, 784); and classes (n,)."""

    X: np.ndarray
    y: np.ndarray
    name: str

    @property
    def real(self) -> bool:
        return self.name != "synthetic"

    def first(self, n: int) -> Images:
        return Images(self.X[:n], self.y[:n], self.name)


def load_images(
    data_home: str | None, subset: str, n: int | None = None, name: str = "CIFAR-10"
) -> Images:
    """CIFAR-10 or MNIST where it is laid out, else random pixels of the same shape."""
    fetch, n_features = {"CIFAR-10": (fetch_cifar10, 3072), "MNIST": (fetch_mnist, 784)}[name]
    try:
        X, y = fetch(data_home=data_home, subset=subset, download_if_missing=False, return_X_y=True)
    except OSError as error:
        say(f"random images in place of {name}: {error}")
        n = n or 10_000
        rng = np.random.default_rng(0)
        X = rng.integers(0, 256, (n, n_features), dtype=np.uint8)
        return Images(X, rng.integers(0, 10, n), "synthetic")
    return Images(X[:n], y[:n], name)


def per_channel(X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, one entry per feature of an HWC row."""
    counts = np.stack([np.bincount(X[:, c::3].ravel(), minlength=256) for c in range(3)])
    levels = np.arange(256)
    mean = counts @ levels / counts.sum(1)
    std = np.sqrt(counts @ levels**2 / counts.sum(1) - mean**2)
    return np.tile(mean, X.shape[1] // 3), np.tile(std, X.shape[1] // 3)


def standardised(X: np.ndarray, shift: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float32 rows, as the peers want them."""
    rows = np.subtract(X, shift.astype(np.float32), dtype=np.float32)
    rows /= scale.astype(np.float32)
    return rows


# -- runs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    seconds: float
    outcome: Any  # what the contestant returned


def interleave(
    contestants: Mapping[str, Callable[[], Any]], repeats: int, *, warm_up: bool = True
) -> dict[str, list[Run]]:
    """Run the contestants in turn, A B A B, so that a noisy neighbour disturbs all of them.

    A warm-up is one round more, whose times do not count.
    """
    runs: dict[str, list[Run]] = {name: [] for name in contestants}
    for i in range(-int(warm_up), repeats):
        for name, contestant in contestants.items():
            start = time.perf_counter()
            outcome = contestant()
            run = Run(time.perf_counter() - start, outcome)
            say(f"{name:32} {run.seconds:8.3f} s{'' if i >= 0 else ' (warm-up)'}")
            if i >= 0:
                runs[name].append(run)
    return runs


class InProcessOfItsOwn:
    """A contestant whose memory no fit of ours has arranged: ours leave malloc in a better state.

    Parameters
    ----------
    function : callable
        Of a module; what it gives stays in its process.
    *arguments : object
        Sent once.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, context, _hold, (function, arguments))

    def __call__(self) -> None:
        self.pool.submit(_call_what_is_held).result()


_held: list[Any] = []


def _hold(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    _held[:] = [function, arguments]


def _call_what_is_held() -> None:
    function, arguments = _held
    function(*arguments)


def median_seconds(runs: list[Run]) -> float:
    return float(np.median([run.seconds for run in runs]))


def peak_anonymous(program: str) -> int:
    """Most bytes of anonymous memory that a fresh process running `program` has at a time."""
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", program])
    peak = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        for line in status.splitlines():
            if line.startswith("RssAnon:"):
                peak = max(peak, 1024 * int(line.split()[1]))
        time.sleep(0.002)  # touching 10 MB takes about as long
    if process.returncode:
        raise RuntimeError(f"this program ended with status {process.returncode}:\n{program}")
    return peak


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# -- results -------------------------------------------------------------------------------------


@dataclass
class Result:
    """One figure.

    Attributes
    ----------
    name : str
        Of the row.
    quantity : str
        What `figure` is, with its unit.
    figure : float or None
        None where it could not be measured; the note says why.
    at_least, at_most : float or None
        The bound.
    n : int
        Training images.
    ours_s, peer_s : float or None
        Medians, in seconds.
    """

    name: str
    quantity: str
    figure: float | None
    n: int
    repeats: int
    data: str
    at_least: float | None = None
    at_most: float | None = None
    ours_s: float | None = None
    peer_s: float | None = None
    note: str = ""

    @property
    def bound(self) -> str:
        if self.at_least is not None:
            return f"at least {self.at_least:g}"
        return "" if self.at_most is None else f"at most {self.at_most:g}"

    @property
    def passed(self) -> bool | None:
        """None without a bound or a figure."""
        if self.figure is None or not self.bound:
            return None
        if self.at_least is not None:
            return self.figure >= self.at_least
        return self.figure <= self.at_most

    def row(self) -> dict[str, Any]:
        both = self.ours_s is not None and self.peer_s is not None
        return {
            "name": self.name,
            "ours_s": _six_digits(self.ours_s),
            "peer_s": _six_digits(self.peer_s),
            "ratio": _six_digits(self.peer_s / self.ours_s) if both else None,
            "quantity": self.quantity,
            "figure": _six_digits(self.figure),
            "bound": self.bound,
            "passed": "" if self.passed is None else str(self.passed),
            "n": self.n,
            "repeats": self.repeats,
            "data": self.data,
            "note": self.note,
        }

    def __str__(self) -> str:
        figure = "not measured" if self.figure is None else f"{self.figure:.3g}"
        verdict = {True: "ok", False: "MISSED", None: ""}[self.passed]
        bound = f" ({self.bound})" if self.bound else ""
        return f"{self.name:34} {figure} {self.quantity}{bound} {verdict} {self.note}".rstrip()


def _six_digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def times_faster(name: str, ours: list[Run], peer: list[Run], **fields: Any) -> Result:
    """Ratio of the medians."""
    ours_s, peer_s = median_seconds(ours), median_seconds(peer)
    return Result(
        name, "times faster", peer_s / ours_s, ours_s=ours_s, peer_s=peer_s, repeats=len(ours),
        **fields,
    )  # fmt: skip


def machine() -> dict[str, Any]:
    # the columns that the committed results have
    return {"date": now()} | {k: v for k, v in this_machine().items() if k != "gpu"} | versions()


def record(results: list[Result], path: Path, header: dict[str, Any]) -> None:
    """Print the results and put them into the CSV, in place of earlier rows of their names.

    What could not be measured here takes no place of what somebody has measured.
    """
    for result in results:
        print(result, flush=True)
    table = pd.DataFrame([result.row() | header for result in results])
    if path.exists():
        earlier = pd.read_csv(path, dtype=object, keep_default_na=False)
        measured = set(earlier["name"][earlier["figure"] != ""])
        table = table[table["figure"].notna() | ~table["name"].isin(measured)]
        kept = earlier[~earlier["name"].isin(table["name"])]
        table = pd.concat([kept, table.astype(object)])
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)


def exit_status(results: list[Result], check: bool) -> int:
    missed = [result for result in results if result.passed is False]
    for result in missed:
        say(f"missed: {result.name}: {result.figure:.4g} {result.quantity}, {result.bound}")
    return int(check and bool(missed))
