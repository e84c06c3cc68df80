"""What a search would train together, how much memory that takes, and about how long."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from skcifar import _stack
from skcifar._jobs import TrainingJob
from skcifar._meeting import PlannedFit
from skcifar._study import SearchStudy, last_step, trained_parts

_FOREIGN = "not an estimator of skcifar"
_CALIBRATION_SECONDS = 1.0  # of all groups of a plan together, roughly


def plan_of(study: SearchStudy, fits: list[PlannedFit]) -> pd.DataFrame:
    """One row a group, from what was parked (`fits`) in the first round of a search."""
    first = study.rounds[0]
    names = [_trained_names(first.place(fit.task)[0].estimator) for fit in fits]
    jobs = [fit.job for fit in fits if fit.job is not None]
    job_names = [name for name, fit in zip(names, fits, strict=True) if fit.job is not None]
    rows: dict[tuple, dict[str, Any]] = {}
    samples: list[tuple[dict[str, Any], list[TrainingJob]]] = []
    for positions in _stack.groups_of(jobs) if jobs else []:
        group = [jobs[i] for i in positions]
        row = _describe_group(group, sorted({job_names[i] for i in positions}))
        # Lone fits of one kind, for one reason, are one row.
        key = (len(samples),) if len(group) > 1 else tuple(row[name] for name in _LONE_ALIKE)
        if key in rows:
            rows[key]["models"] += 1
            rows[key]["bytes"] = max(rows[key]["bytes"], row["bytes"])
            continue
        rows[key] = row
        samples.append((row, group))
    # Groups of one shape take steps of one length: the first of them stands for all.
    shapes = [
        (row["batch_size"], *sorted(_widths(job.module) for job in group)) for row, group in samples
    ]
    step_seconds: dict[tuple, float] = {}
    for shape, (row, group) in zip(shapes, samples, strict=True):
        if shape not in step_seconds:
            step_seconds[shape] = _step_seconds(group, _CALIBRATION_SECONDS / len(set(shapes)))
        steps = max(_epochs_of(job) * _steps_of_an_epoch(job) for job in group)
        row["seconds"] = step_seconds[shape] * steps * row["models"] / len(group)
    unseen = [
        (name, bool(trained_parts(first.place(fit.task)[0].estimator)))
        for name, fit in zip(names, fits, strict=True)
        if fit.job is None
    ]
    for name, is_ours in dict.fromkeys(unseen):
        reason = "its fit trains nothing: it raises an error" if is_ours else _FOREIGN
        row = {"models": unseen.count((name, is_ours)), "estimator": name, "reason": reason}
        rows[(name,)] = dict.fromkeys(_PLAN_COLUMNS[3:-1], np.nan) | row
    table = list(rows.values())
    table += _later_rounds(study, table)
    frame = pd.DataFrame(table, columns=_PLAN_COLUMNS[1:])
    frame.insert(0, "group", range(len(frame)))
    frame["reason"] = frame["reason"].astype("str")
    frame.attrs = {
        "total_seconds": float(frame["seconds"].sum()),
        "total_bytes": float(frame["bytes"].max()) if frame["bytes"].notna().any() else 0.0,
    }
    return frame


_PLAN_COLUMNS = [
    "group",
    "models",
    "estimator",
    "widths",
    "batch_size",
    "epochs",
    "bytes",
    "seconds",
    "reason",
]
_LONE_ALIKE = ["estimator", "widths", "batch_size", "epochs", "reason"]


def _trained_names(estimator: Any) -> str:
    parts = trained_parts(estimator) or [last_step(estimator)]
    return ", ".join(type(part).__name__ for part in parts)


def _describe_group(group: list[TrainingJob], names: list[str]) -> dict[str, Any]:
    job = group[0]
    reason = None
    if len(group) == 1:
        reason = _stack.why_alone(job) or "no other fit is of its kind"
    epochs = [_epochs_of(each) for each in group]
    return {
        "models": len(group),
        "estimator": ", ".join(names),
        "widths": "; ".join(dict.fromkeys(_widths(each.module) for each in group)),
        "batch_size": max(each.recipe.batch_size for each in group),
        "epochs": max(epochs),
        "bytes": _estimated_bytes(group),
        "seconds": np.nan,
        "reason": reason,
    }


def _epochs_of(job: TrainingJob) -> int:
    n_epochs = job.recipe.max_iter
    return n_epochs if job.pause_after is None else min(job.pause_after, n_epochs)


def _layer_widths(module: nn.Module) -> list[int]:
    """Widths of its dense and convolutional layers, outputs included."""
    widths = []
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            widths.append(layer.out_features)
        elif isinstance(layer, nn.Conv2d):
            widths.append(layer.out_channels)
    return widths


def _widths(module: nn.Module) -> str:
    return "-".join(map(str, _layer_widths(module)))


def _estimated_bytes(group: list[TrainingJob]) -> int:
    """Rows, each array once; weights, gradients and two moments; activations and theirs."""
    samples = [s for job in group for s in (job.train, job.validation) if s is not None]
    tensors = [s.rows for s in samples if isinstance(s.rows, Tensor)]  # others stay in their files
    storages = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in tensors}
    total = sum(storages.values())
    for job in group:
        if _stack.why_alone(job) is None:
            total += _stack.stack_bytes(job)
            continue
        item = job.precision.weights.itemsize
        total += 4 * item * sum(weight.numel() for weight in job.module.parameters())
        total += 2 * item * job.recipe.batch_size * sum(_layer_widths(job.module))
    return total


def _step_seconds(group: list[TrainingJob], budget: float) -> float:
    """Of a step of all of a group, from a few batches of it; NaN where these fail.

    The jobs are a plan's own, so their modules may be trained.
    """
    try:
        _timed(group, 1)  # the first in a process may take a second
        first = _timed(group, 1)
        n_steps = min(int(budget / max(first, 1e-6)), 128)
        if n_steps <= 1:
            return first
        all_of_them = _timed(group, n_steps)
    except Exception:  # not every training can be cut short: the plan is told without
        return np.nan
    # without what a group costs however few its steps are
    return max(all_of_them - first, 0.0) / (n_steps - 1) or all_of_them / n_steps


def _steps_of_an_epoch(job: TrainingJob) -> float:
    """In units of the steps that are timed; a forward pass is a third of a step."""
    n_validated = 0 if job.validation is None else len(job.validation)
    size = _rows_of_a_step(job)
    return -(-len(job.train) // size) + n_validated / (3 * size)


def _rows_of_a_step(job: TrainingJob) -> int:
    full = 2000 if job.recipe.solver == "lbfgs" else job.recipe.batch_size
    return min(full, len(job.train))


def _timed(group: list[TrainingJob], n_steps: int) -> float:
    """Seconds of so many batches of each job, without validation or callbacks."""
    start = time.perf_counter()
    outcomes = _stack.train_group([_truncated(job, n_steps) for job in group])
    seconds = time.perf_counter() - start
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    return seconds


def _truncated(job: TrainingJob, n_steps: int) -> TrainingJob:
    samples = job.train
    n_rows = min(len(samples), n_steps * _rows_of_a_step(job))
    # from all over, since some samplers need several classes
    index = torch.linspace(0, len(samples) - 1, n_rows, device=samples.targets.device).long()
    if samples.index is not None:
        index = samples.index[index]
    return replace(
        job,
        train=replace(samples, index=index),
        recipe=replace(job.recipe, max_iter=1, early_stopping=False),
        validation=None,
        validation_score=None,
        on_epoch_begin=lambda: None,
        on_epoch_end=lambda row: False,
        skorch_callbacks=[],
        pause_after=None,
        verbose=False,
    )


def _later_rounds(study: SearchStudy, table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows for the rounds of a halving search after the first."""
    first = study.rounds[0]
    done = first.n_resources or 0
    rows = []
    fits = len(first.splits) * first.n_repeats
    seconds = sum(row["seconds"] for row in table)
    for n_candidates, n_resources in study.search._rounds_after(len(first.candidates)):
        goes_on = all(candidate.pauses for candidate in first.candidates)
        resource = n_resources - (done if goes_on else 0)
        share = n_candidates / len(first.candidates) * resource / (first.n_resources or 1)
        rows.append(
            dict.fromkeys(_PLAN_COLUMNS[3:], np.nan)
            | {
                "models": n_candidates * fits,
                "estimator": "survivors of the round before",
                "epochs": resource,
                "seconds": seconds * share,
                "reason": None,
            }
        )
        done = n_resources
    return rows
