"""What a search wants of its tasks, seeds, pauses, a journal, and what it learns from them."""

from __future__ import annotations

import copy
import json
import platform
import sys
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import joblib
import numpy as np
import pandas as pd
import sklearn
import torch
from sklearn.base import clone
from sklearn.pipeline import Pipeline
from sklearn.utils import check_random_state, indexable

from skcifar._journal import Journal, describe, digest
from skcifar._rounds import Candidate, Place, Round, RoundStudy, Split
from skcifar._supervised import SupervisedEstimator
from skcifar._tasks import Task


class SearchStudy(RoundStudy):
    """Follows the tasks of one `fit` of a search."""

    def __init__(self, search: Any, X: Any, y: Any, params: Mapping[str, Any]) -> None:
        X, y = indexable(X, y)
        super().__init__(X, y, search.validate_epochs)
        self.search = search
        self.params = params
        self.rounds: list[Round] = []
        self.journal: Journal | None = None
        self.journalled: dict[str, dict] = {}
        self.values: dict[Place, dict] = {}  # of finished tasks, in the order they finished
        self.epochs_done: dict[Place, int] = {}
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
            "backend": search.backend != "skcifar",
        }
        needing = [name for name, is_asked in asked.items() if is_asked]
        if needing:
            raise RuntimeError(
                f"{', '.join(needing)} of {type(search).__name__} need the joblib backend "
                f"'skcifar', which does not work with joblib {joblib.__version__}. Install a "
                "joblib that skcifar was tested with, or use scikit-learn's own search."
            )

    def was_told_of(self, closed: Round) -> bool:
        return sum(place.candidate >= closed.first for place in self.values) == closed.n_tasks

    # -- rounds ------------------------------------------------------------------------------------

    def open_round(self, candidates: list[dict], more_results: dict | None) -> list[dict]:
        """Begin a round; gives the candidates as scikit-learn is to have them."""
        n_resources = more_results["n_resources"][0] if more_results else None
        first = sum(len(earlier.candidates) for earlier in self.rounds)
        self.current = Round(
            len(self.rounds),
            first,
            [self._candidate(parameters, n_resources) for parameters in candidates],
            n_resources,
            self.search._horizon(),
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

    def close_round(self) -> Round:
        assert self.current is not None
        closed, self.current = self.current, None
        return closed

    def _candidate(self, parameters: dict, n_resources: int | None) -> Candidate:
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
        return Candidate(
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
        candidate, place = self.place(task)
        self._take_over(candidate, place, record["fits"])
        self._count(candidate, place, record["value"])
        return copy.deepcopy(record["value"])

    def came_back(self, task: Task, value: Any, fits: list[list[dict]]) -> None:
        """The task ran in another process, where it returned `value`; `fits` are its histories."""
        self._take_over(*self.place(task), fits)
        self.finished(task, value)

    def _take_over(self, candidate: Candidate, place: Place, fits: list[list[dict]]) -> None:
        self.histories[place] = fits
        n_epochs = candidate.epochs if candidate.pauses else sum(map(len, fits))
        self.epochs_done[place] = n_epochs
        self.done_epochs += n_epochs

    def epoch(self, task: Task, row: dict) -> None:
        if self.current is not None:
            _, place = self.place(task)
            self.epochs_done[place] = self.epochs_done.get(place, 0) + 1
            self.done_epochs += 1
            self._report()

    def finished(self, task: Task, value: Any) -> None:
        if self.progress_error is not None:
            raise self.progress_error
        if self.current is None:
            return
        candidate, place = self.place(task)
        if self.journal is not None:
            record = {
                "task": json.loads(self.current.key(task)),
                "value": value,
                "fits": self.histories.get(place, []),
            }
            self.journal.append(record)
        self._count(candidate, place, value)

    # -- progress and results ----------------------------------------------------------------------

    def _count(self, candidate: Candidate, place: Place, value: Any) -> None:
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
