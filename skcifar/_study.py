"""What a search wants of its tasks, seeds, pauses, a journal, and what it learns from them."""

from __future__ import annotations

import copy
import json
import platform
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import joblib
import numpy as np
import pandas as pd
import sklearn
import torch
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.pipeline import Pipeline
from sklearn.utils import _safe_indexing, check_random_state, column_or_1d, indexable

from skcifar._batches import Samples
from skcifar._jobs import TrainingJob, TrainingResult
from skcifar._journal import Journal, as_plain, describe, digest
from skcifar._optimization import ClassificationLoss
from skcifar._supervised import SupervisedEstimator, samples_of
from skcifar._tasks import Study, Task

Split = tuple[NDArray[Any], NDArray[Any]]  # rows to train on, rows to score


@dataclass
class _Candidate:
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
class _Round:
    """One call of scikit-learn's evaluate_candidates: all of a grid, or a round of halving."""

    number: int
    first: int  # row of cv_results_ of its first candidate
    candidates: list[_Candidate]
    n_resources: int | None
    n_repeats: int
    splits: list[Split] = field(default_factory=list)  # of one repeat
    split_digests: list[str] = field(default_factory=list)

    @property
    def n_tasks(self) -> int:
        return len(self.candidates) * len(self.splits) * self.n_repeats

    def place(self, task: Task) -> tuple[_Candidate, _Place]:
        candidate, split = divmod(task.position, len(self.splits) * self.n_repeats)
        repeat, fold = divmod(split, len(self.splits))
        return self.candidates[candidate], _Place(self.first + candidate, fold, repeat)

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
class _Place:
    """Where the results of a task belong."""

    candidate: int  # row of cv_results_
    fold: int
    repeat: int


class SearchStudy(Study):
    """Follows the tasks of one `fit` of a search."""

    def __init__(self, search: Any, X: Any, y: Any, params: Mapping[str, Any]) -> None:
        self.search = search
        self.X, self.y = indexable(X, y)
        self.params = params
        self.rounds: list[_Round] = []
        self.current: _Round | None = None
        self.journal: Journal | None = None
        self.journalled: dict[str, dict] = {}
        self.values: dict[_Place, dict] = {}  # of finished tasks, in the order they finished
        self.histories: dict[_Place, list[list[dict]]] = {}
        self.paused: dict[tuple[str, int, int, int], Any] = {}
        self.shared_seed: int | None = None
        self.left_out: dict[tuple, Samples | None] = {}
        self.epochs_done: dict[_Place, int] = {}
        self.done_epochs = self.expected_epochs = self.total_fits = 0
        self.scores: dict[int, list[float]] = {}  # of each candidate
        self.best_score: float | None = None  # of the round
        self.began = time.perf_counter()
        self.progress_error: Exception | None = None

    def __enter__(self) -> SearchStudy:
        return self

    def __exit__(self, *_: object) -> None:
        self.paused.clear()
        if self.journal is not None:
            self.journal.close()

    def needs_to_be_told(self) -> None:
        """Raise an error if results depend on this study, of whose tasks the backend does not tell.

        joblib runs the tasks by itself where the backend does not work with it.
        """
        search = self.search
        asked = {
            "journal": search.journal is not None,
            "n_repeats": search.n_repeats > 1,
            "validate_epochs": search.validate_epochs,
            "resource": getattr(search, "resource", "n_samples") != "n_samples",
        }
        needing = [name for name, is_asked in asked.items() if is_asked]
        if needing:
            raise RuntimeError(
                f"{', '.join(needing)} of {type(search).__name__} need the joblib backend "
                f"'skcifar', which does not work with joblib {joblib.__version__}. Install a "
                "joblib that skcifar was tested with, or use scikit-learn's own search."
            )

    def was_told_of(self, closed: _Round) -> bool:
        return sum(place.candidate >= closed.first for place in self.values) == closed.n_tasks

    # -- rounds ------------------------------------------------------------------------------------

    def open_round(self, candidates: list[dict], more_results: dict | None) -> list[dict]:
        """Begin a round; gives the candidates as scikit-learn is to have them."""
        n_resources = more_results["n_resources"][0] if more_results else None
        first = sum(len(earlier.candidates) for earlier in self.rounds)
        self.current = _Round(
            len(self.rounds),
            first,
            [self._candidate(parameters, n_resources) for parameters in candidates],
            n_resources,
            self.search.n_repeats,
        )
        self.rounds.append(self.current)
        seen: Counter[str] = Counter()
        for candidate in self.current.candidates:
            candidate.number = seen[candidate.name]
            seen[candidate.name] += 1
        self.paused = {key: net for key, net in self.paused.items() if key[1] < seen[key[0]]}
        return [candidate.parameters for candidate in self.current.candidates]

    def start(self, splits: list[Split]) -> None:
        """The splits of the round, the last thing known before its tasks."""
        assert self.current is not None
        self.current.splits = splits
        self.left_out.clear()
        self.best_score = None
        self.total_fits += self.current.n_tasks
        fits = len(splits) * self.search.n_repeats
        self.expected_epochs += fits * sum(c.epochs for c in self.current.candidates)
        if self.shared_seed is None and any(c.unseeded for c in self.current.candidates):
            # one for all rounds, as the backend has one for each call
            self.shared_seed = int(check_random_state(None).randint(np.iinfo(np.int32).max))
        if self.search.journal is None:
            return
        self.current.split_digests = [
            digest(np.concatenate([train, [-1], test]))[:16] for train, test in splits
        ]
        if self.journal is None:
            self._open_journal()

    def close_round(self) -> _Round:
        assert self.current is not None
        closed, self.current = self.current, None
        return closed

    def _candidate(self, parameters: dict, n_resources: int | None) -> _Candidate:
        search = self.search
        resource = getattr(search, "resource", None)
        named = {name: value for name, value in parameters.items() if name != resource}
        estimator = clone(search.estimator).set_params(**clone(named, safe=False))
        pauses = resource in parameters and _trains_once_up_to(estimator, str(resource))
        if pauses:
            parameters = parameters | {resource: search._horizon()}
        estimator.set_params(**clone(parameters, safe=False))
        name = self._name(named)
        n_epochs = int(n_resources or 0)
        if any(key[0] == name for key in self.paused):
            n_epochs -= int(self.rounds[-1].n_resources or 0)
        trained = trained_parts(estimator)
        return _Candidate(
            parameters,
            name,
            estimator,
            pauses,
            # a meta-estimator may give seeds to its parts
            unseeded=trained == [last_step(estimator)] and trained[0].random_state is None,
            epochs=n_epochs if pauses else sum(map(_most_epochs, trained)),
        )

    def _name(self, parameters: dict) -> str:
        if self.search.journal is None:  # for one process, anything will do that tells them apart
            return joblib.hash([(k, _identity(parameters[k])) for k in sorted(parameters)])
        return json.dumps({k: describe(v, f"parameter {k}") for k, v in parameters.items()})

    # -- the journal -------------------------------------------------------------------------------

    def _open_journal(self) -> None:
        assert self.current is not None
        notes = {"seed": self.shared_seed}
        self.journal = Journal(self.search.journal, self._identity_of_search(), notes)
        # A search without a seed goes on with that of its beginning.
        self.shared_seed = self.journal.notes["seed"]
        self.journalled = {json.dumps(record["task"]): record for record in self.journal.records}

    def _identity_of_search(self) -> dict[str, Any]:
        assert self.current is not None
        search = self.search
        return {
            "data": {"X": digest(self.X), "y": digest(self.y)},
            "fit parameters": {name: digest(value) for name, value in self.params.items()},
            "estimator": describe(search.estimator, "estimator"),
            "grid": [json.loads(candidate.name) for candidate in self.current.candidates],
            "cv splits": self.current.split_digests,
            "scoring": describe(search.scoring, "scoring"),
            "search": {
                "class": type(search).__name__,
                "n_repeats": search.n_repeats,
                "validate_epochs": search.validate_epochs,
                "return_train_score": search.return_train_score,
                "error_score": search.error_score,
                "resource": getattr(search, "resource", None),
                "n_resources": self.current.n_resources,
                "max_resources": search._horizon(),
            },
            "versions": {
                # of the package as a whole, which is above this file
                "skcifar": sys.modules["skcifar"].__version__,
                "scikit-learn": sklearn.__version__,
                "torch": torch.__version__,
                "python": ".".join(platform.python_version_tuple()[:2]),
            },
        }

    # -- hooks of the backend ----------------------------------------------------------------------

    def known(self, task: Task) -> Any | None:
        if self.current is None or not self.journalled:
            return None
        record = self.journalled.get(self.current.key(task))
        if record is None:
            return None
        candidate, place = self.current.place(task)
        self.histories[place] = record["fits"]
        n_epochs = candidate.epochs if candidate.pauses else sum(map(len, record["fits"]))
        self.epochs_done[place] = n_epochs
        self.done_epochs += n_epochs
        self._count(candidate, place, record["value"])
        return copy.deepcopy(record["value"])

    def seed(self, task: Task, seed: int) -> int:
        if self.current is None:
            return seed
        candidate, place = self.current.place(task)
        if candidate.unseeded:
            assert self.shared_seed is not None
            seed = self.shared_seed
        if place.repeat == 0:
            return seed
        return int(np.random.SeedSequence([seed, place.repeat]).generate_state(1)[0])

    def job(self, task: Task, job: TrainingJob) -> TrainingJob:
        if self.current is None:
            return job
        candidate, place = self.current.place(task)
        if self.search.validate_epochs and job.validation is None:
            samples = self._left_out_rows(candidate.estimator, place.fold, job)
            # without labels to be right about, a loss is all there is
            by_loss = job.monitor_loss or not isinstance(job.criterion, ClassificationLoss)
            job = replace(
                job, validation=samples, monitor_loss=by_loss, only_watched=samples is not None
            )
        if candidate.pauses:
            key = candidate.name, candidate.number, place.fold, place.repeat
            job = replace(
                job,
                recipe=replace(job.recipe, max_iter=self.search._horizon()),
                pause_after=self.current.n_resources,
                paused=self.paused.get(key),
            )
        return job

    def epoch(self, task: Task, row: dict) -> None:
        if self.current is not None:
            _, place = self.current.place(task)
            self.epochs_done[place] = self.epochs_done.get(place, 0) + 1
            self.done_epochs += 1
            self._report()

    def trained(self, task: Task, job: TrainingJob, result: TrainingResult) -> None:
        if self.current is None:
            return
        candidate, place = self.current.place(task)
        rows = [_plain_row(row) for row in result.history]
        self.histories.setdefault(place, []).append(rows)
        if candidate.pauses:
            key = candidate.name, candidate.number, place.fold, place.repeat
            self.paused[key] = result.paused

    def finished(self, task: Task, value: Any) -> None:
        if self.progress_error is not None:
            raise self.progress_error
        if self.current is None:
            return
        candidate, place = self.current.place(task)
        if self.journal is not None:
            record = {
                "task": json.loads(self.current.key(task)),
                "value": value,
                "fits": self.histories.get(place, []),
            }
            self.journal.append(record)
        self._count(candidate, place, value)

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

    # -- progress and results ----------------------------------------------------------------------

    def _count(self, candidate: _Candidate, place: _Place, value: Any) -> None:
        """A task is over, whether it ran now or earlier."""
        self.values[place] = copy.deepcopy(value[0])
        self.expected_epochs += self.epochs_done.get(place, 0) - candidate.epochs
        self._note_score(place.candidate, value[0]["test_scores"])
        self._report()

    def _note_score(self, candidate: int, score: Any) -> None:
        """Of a split; the best counts candidates whose splits are all done."""
        assert self.current is not None
        if isinstance(score, dict):
            score = score.get(self.search.refit) if isinstance(self.search.refit, str) else None
        if score is None:
            return
        scores = self.scores.setdefault(candidate, [])
        scores.append(score)
        if len(scores) == len(self.current.splits) * self.current.n_repeats:
            mean = float(np.mean(scores))
            if not np.isnan(mean) and (self.best_score is None or mean > self.best_score):
                self.best_score = mean

    def _report(self) -> None:
        if self.search.progress is None or self.progress_error is not None:
            return
        event = {
            "done_fits": len(self.values),
            "total_fits": self.total_fits,
            "done_epochs": self.done_epochs,
            "expected_epochs": self.expected_epochs,
            "best_score": self.best_score,
            "seconds": time.perf_counter() - self.began,
        }
        try:
            self.search.progress(event)
        except Exception as error:
            # Raised here it would be taken for a failure of the fits in training.
            self.progress_error = error

    def epoch_results(self) -> pd.DataFrame:
        rows = [
            {**vars(place), "fit": fit, "valid_score": np.nan, **row}
            for place in sorted(self.histories, key=lambda p: (p.candidate, p.fold, p.repeat))
            for fit, history in enumerate(self.histories[place])
            for row in history
        ]
        columns = ["candidate", "fold", "repeat", "fit", "epoch", "train_loss", "valid_score"]
        others = dict.fromkeys(name for row in rows for name in row)
        return pd.DataFrame(rows, columns=[*columns, *(n for n in others if n not in columns)])

    def partial_results(self) -> pd.DataFrame:
        parameters = [c.parameters for each in self.rounds for c in each.candidates]
        rows = []
        for place, value in self.values.items():
            row = {"candidate": place.candidate, "params": parameters[place.candidate]}
            row |= {"fold": place.fold, "repeat": place.repeat}
            for part in ("test", "train"):
                scores = value.get(f"{part}_scores", {})
                named = scores if isinstance(scores, dict) else {"score": scores}
                row |= {f"{part}_{name}": score for name, score in named.items()}
            rows.append(row | {name: value[name] for name in ("fit_time", "score_time")})
        columns = ["candidate", "params", "fold", "repeat"]
        frame = pd.DataFrame(rows, columns=None if rows else columns)
        return frame.sort_values(["candidate", "repeat", "fold"], ignore_index=True)


def _identity(value: Any) -> Any:
    """A value as joblib can hash it in this process."""
    try:
        joblib.hash(value)
    except Exception:
        return id(value)
    return value


def trained_parts(estimator: Any) -> list[SupervisedEstimator]:
    """Those estimators that it is, or is made of, whose trainings can meet."""
    parts = [estimator, *estimator.get_params(deep=True).values()]
    found = {id(part): part for part in parts if isinstance(part, SupervisedEstimator)}
    return list(found.values())


def _most_epochs(estimator: SupervisedEstimator) -> int:
    n_epochs: Any = estimator._resolve_max_iter()
    return int(n_epochs) if isinstance(n_epochs, int | np.integer) else 0  # not yet validated


def _trains_once_up_to(estimator: Any, resource: str) -> bool:
    """Whether `resource` is the epochs of the one network that a fit trains, and trains once."""
    owner, name = owner_of(estimator, resource)
    return name == "max_iter" and trained_parts(estimator) == [owner] == [last_step(estimator)]


def owner_of(estimator: Any, parameter: str) -> tuple[Any, str]:
    """The estimator that has a nested parameter, and the parameter's name there."""
    path, _, name = parameter.rpartition("__")
    return (estimator.get_params().get(path) if path else estimator), name


def last_step(estimator: Any) -> Any:
    while isinstance(estimator, Pipeline):
        estimator = estimator.steps[-1][1]
    return estimator


def _plain_row(row: dict) -> dict:
    """Of an epoch's row what a table and a journal can hold."""
    kept = {}
    for name, value in row.items():
        try:
            kept[str(name)] = as_plain(value, str(name))
        except TypeError:
            continue
    return {name: value for name, value in kept.items() if not isinstance(value, dict | list)}
