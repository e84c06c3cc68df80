"""A round of a search: its candidates, and what is asked of their fits wherever these are trained.

What the search learns of its tasks, keeps and tells is `skcifar._study`'s.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.utils import _safe_indexing, column_or_1d

from skcifar._batches import Samples
from skcifar._jobs import TrainingJob, TrainingResult
from skcifar._journal import as_plain
from skcifar._optimization import ClassificationLoss
from skcifar._supervised import SupervisedEstimator, samples_of
from skcifar._tasks import Study, Task

Split = tuple[NDArray[Any], NDArray[Any]]  # rows to train on, rows to score


@dataclass
class Candidate:
    """One setting of the parameters in one round.

    Attributes
    ----------
    parameters : dict
        As in `cv_results_["params"]`.
    name : str
        Tells it from others in every process, whatever the round.
    estimator : estimator
        With these parameters; not to be fitted.
    pauses : bool
        Whether it trains along the horizon of the search, with pauses.
    unseeded : bool
        Whether no seed is given.
    epochs : int
        That a fit of it has still to take, at most.
    number : int
        Of equal candidates in its round, from 0.
    """

    parameters: dict
    name: str
    estimator: Any
    pauses: bool
    unseeded: bool
    epochs: int
    number: int = 0


@dataclass
class Round:
    """One call of scikit-learn's evaluate_candidates: all of a grid, or a round of halving."""

    number: int
    first: int  # row of cv_results_ of its first candidate
    candidates: list[Candidate]
    n_resources: int | None
    horizon: int | None  # epochs that fits are planned for which pause
    n_repeats: int
    splits: list[Split] = field(default_factory=list)  # of one repeat
    split_digests: list[str] = field(default_factory=list)

    @property
    def n_tasks(self) -> int:
        return len(self.candidates) * len(self.splits) * self.n_repeats

    def place(self, task: Task) -> tuple[Candidate, Place]:
        candidate, split = divmod(task.position, len(self.splits) * self.n_repeats)
        repeat, fold = divmod(split, len(self.splits))
        return self.candidates[candidate], Place(self.first + candidate, fold, repeat)

    def key(self, task: Task) -> str:
        """Tells a task from all others of the search, in every process."""
        candidate, place = self.place(task)
        return json.dumps(
            {
                "round": self.number,
                "n_resources": self.n_resources,
                "params": json.loads(candidate.name),
                "fold": place.fold,
                "repeat": place.repeat,
                "split": self.split_digests[place.fold],
            }
        )


@dataclass(frozen=True)
class Place:
    """Where the results of a task belong."""

    candidate: int  # row of cv_results_
    fold: int
    repeat: int


class RoundStudy(Study):
    """Follows the tasks of a round: their seeds, rows to watch and pauses, and their histories.

    Attributes
    ----------
    X, y : data
        That the round is on; read for `validate_epochs`.
    validate_epochs : bool
    current : Round or None
    shared_seed : int or None
        Of all fits without one.
    histories : dict
        Of each place, the epochs of each network that was trained there.
    """

    def __init__(self, X: Any, y: Any, validate_epochs: bool) -> None:
        self.X, self.y = X, y
        self.validate_epochs = validate_epochs
        self.current: Round | None = None
        self.shared_seed: int | None = None
        self.histories: dict[Place, list[list[dict]]] = {}
        self.paused: dict[tuple[str, int, int, int], Any] = {}
        self.left_out: dict[tuple, Samples | None] = {}

    def place(self, task: Task) -> tuple[Candidate, Place]:
        assert self.current is not None
        return self.current.place(task)

    def seed(self, task: Task, seed: int) -> int:
        if self.current is None:
            return seed
        candidate, place = self.place(task)
        if candidate.unseeded:
            assert self.shared_seed is not None
            seed = self.shared_seed
        if place.repeat == 0:
            return seed
        return int(np.random.SeedSequence([seed, place.repeat]).generate_state(1)[0])

    def job(self, task: Task, job: TrainingJob) -> TrainingJob:
        if self.current is None:
            return job
        candidate, place = self.place(task)
        if self.validate_epochs and job.validation is None:
            samples = self._left_out_rows(candidate.estimator, place.fold, job)
            # without labels to be right about, a loss is all there is
            by_loss = job.monitor_loss or not isinstance(job.criterion, ClassificationLoss)
            job = replace(
                job, validation=samples, monitor_loss=by_loss, only_watched=samples is not None
            )
        if candidate.pauses:
            assert self.current.horizon is not None
            key = candidate.name, candidate.number, place.fold, place.repeat
            job = replace(
                job,
                recipe=replace(job.recipe, max_iter=self.current.horizon),
                pause_after=self.current.n_resources,
                paused=self.paused.get(key),
            )
        return job

    def trained(self, task: Task, job: TrainingJob, result: TrainingResult) -> None:
        if self.current is None:
            return
        candidate, place = self.place(task)
        rows = [_plain_row(row) for row in result.history]
        self.histories.setdefault(place, []).append(rows)
        if candidate.pauses:
            key = candidate.name, candidate.number, place.fold, place.repeat
            self.paused[key] = result.paused

    def _left_out_rows(self, estimator: Any, fold: int, job: TrainingJob) -> Samples | None:
        """The rows that a fold leaves out, as the job reads rows; None where it reads others."""
        if not isinstance(estimator, SupervisedEstimator):
            return None
        key = (fold, type(estimator), estimator.layout)
        if key not in self.left_out:
            self.left_out[key] = self._make_left_out_rows(clone(estimator), fold, job)
        return self.left_out[key]

    def _make_left_out_rows(self, estimator: Any, fold: int, job: TrainingJob) -> Samples | None:
        assert self.current is not None
        train, test = self.current.splits[fold]
        # The first row that is trained on comes along, to see that the job reads it alike.
        train, test = (np.arange(len(self.y))[part] for part in (train, test))
        picked = np.concatenate([train[:1], test])
        classes = np.unique(column_or_1d(_safe_indexing(self.y, train)))
        try:
            rows, labels, _ = estimator._validate_rows(
                _safe_indexing(self.X, picked), _safe_indexing(self.y, picked), reset=True
            )
            codes = estimator._encode_validation(column_or_1d(labels)[1:], classes)
        except ValueError:  # rows with NaN, or a label that is not among those trained on
            return None
        trained = job.train.rows[:1]
        if trained.shape != rows[:1].shape or not torch.equal(trained.cpu(), rows[:1].cpu()):
            return None
        return samples_of(rows[1:], codes, None, None, job.reader.device, job.precision.name)


def _plain_row(row: dict) -> dict:
    """Of an epoch's row what a table and a journal can hold."""
    kept = {}
    for name, value in row.items():
        try:
            kept[str(name)] = as_plain(value, str(name))
        except TypeError:
            continue
    return {name: value for name, value in kept.items() if not isinstance(value, dict | list)}
