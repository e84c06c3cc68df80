"""The tasks of a `joblib.Parallel` call, each in a thread of its own, and what is told of them.

`skcifar._meeting` gives them their turns: of all these threads and the one that called, one runs at
any time.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Protocol

import sklearn
import torch
from sklearn.pipeline import Pipeline

from skcifar._jobs import MEETING, TrainingJob, TrainingResult
from skcifar._stack import Outcome
from skcifar._training import train_alone

# -- what a search sees ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One task of a `joblib.Parallel` call: in a search, one candidate on one fold.

    Attributes
    ----------
    call : int
        Position of the call among those of the backend, from 0: 0 but for halving searches.
    position : int
        Of the task in its call.
    """

    call: int
    position: int


class Study:
    """What a search wants of the tasks that the backend runs for it; this one wants nothing.

    Only tasks of the backend's own calls are told of; the fits of tasks nested in these count as
    theirs. All methods are called by one thread at a time.
    """

    def known(self, task: Task) -> Any | None:
        """The task's return value from an earlier run: then it does not run again."""
        return None

    def seed(self, task: Task, seed: int) -> int:
        """Seed of a fit, where the estimator's own is `seed`."""
        return seed

    def job(self, task: Task, job: TrainingJob) -> TrainingJob:
        """The training to do in place of `job`."""
        return job

    def epoch(self, task: Task, row: dict) -> None:
        """An epoch of a fit is over; `row` is that of its history."""

    def trained(self, task: Task, job: TrainingJob, result: TrainingResult) -> None:
        """A fit has been trained."""

    def finished(self, task: Task, value: Any) -> None:
        """The task has returned `value`, its list of return values; not of `known` ones."""


# -- tasks as threads ------------------------------------------------------------------------------


class Ended(SystemExit):
    """Ends a task whose value nobody wants any more; a thread that it ends does not report it."""


class Call:
    """The tasks of one call of a `joblib.Parallel`."""

    def __init__(self, parent: Work | None, index: int | None) -> None:
        self.parent = parent
        self.index = index
        self.depth: int = 0 if parent is None else parent.call.depth + 1
        self.works: list[Work] = []
        self.waiting: deque[Work] = deque()  # for their first turn
        self.n_left = 0
        self.failed: Work | None = None
        self.surroundings = _Surroundings()

    def add(self, works: Iterable[Work]) -> None:
        for work in works:
            work.call = self
            if self.parent is not None:
                work.task = self.parent.task
            else:
                assert self.index is not None
                work.task = Task(self.index, len(self.works))
            self.works.append(work)
            self.waiting.append(work)
            self.n_left += 1

    @property
    def is_over(self) -> bool:
        return self.n_left == 0 or self.failed is not None


class _Surroundings:
    """What belongs to a thread, of the one that makes a call; its tasks run with the same."""

    def __init__(self) -> None:
        self.context = contextvars.copy_context()
        self.config = sklearn.get_config()
        self.has_gradients = torch.is_grad_enabled()
        self.warnings = WarningState()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with torch.set_grad_enabled(self.has_gradients), sklearn.config_context(**self.config):
            yield


class WarningState:
    """What `warnings.catch_warnings` changes, for the whole process.

    Tasks take turns in the middle of such blocks, so each has its own.
    """

    # the last one is where catch_warnings(record=True) has warnings go
    _names = ("filters", "showwarning", "_showwarnmsg_impl")

    def __init__(self) -> None:
        self.values = {n: getattr(warnings, n) for n in self._names if hasattr(warnings, n)}

    def restore(self) -> None:
        for name, value in self.values.items():
            if getattr(warnings, name) is not value:
                setattr(warnings, name, value)
        # entering such a block also says that the filters are others now, or warnings that were
        # given once would go by those before
        with warnings.catch_warnings():
            pass


@dataclass
class _Absence:
    """A task's wait within its own time, and the seconds that others worked for it meanwhile."""

    left: float
    back: float
    charged: float


@dataclass
class Errand:
    """Something that the coordinator does for a task, which waits."""

    function: Callable[[], Any]
    value: Any = None
    error: Exception | None = None
    seconds: float = 0.0

    def run(self) -> None:
        start = now()
        try:
            self.value = self.function()
        except Exception as error:
            self.error = error
        self.seconds = now() - start


class Turns(Protocol):
    """What tasks see of the one that gives them their turns, `skcifar._meeting.Coordinator`."""

    study: Study | None
    back: threading.Lock
    calls: list[Call]
    ready: deque[Work]

    @property
    def plan(self) -> object | None: ...

    def seed(self) -> int: ...

    def share(self, work: Work) -> None: ...

    def known(self, what: tuple) -> dict[tuple, Any] | None: ...

    def release(self, work: Work, value: Any) -> None: ...


class Work:
    """A task, and its thread; the `Meeting` of the fits in it.

    Of the two threads that hand each other the turn here, the coordinator's and the task's, only
    the one that has it touches anything.
    """

    def __init__(self, func: Callable[[], Any], callback: Any) -> None:
        self.func: Callable[[], Any] | None = func
        self.callback = callback
        self.call: Call
        self.task: Task
        self.coordinator: Turns
        self.thread: threading.Thread | None = None
        self.turn = threading.Lock()
        self.turn.acquire()
        self.is_done = self.is_ended = False
        self.value: Any = None
        self.error: BaseException | None = None
        self.traceback: TracebackType | None = None  # joblib takes it off the error
        # a fit that waits to be trained, and what came of it
        self.job: TrainingJob | None = None
        self.context: contextvars.Context | None = None
        self.outcome: Outcome | None = None
        self.errand: Errand | None = None
        self.n_jobs = self.n_replaced = 0
        self.warnings: WarningState
        self.began = self.held = self.charged = 0.0
        self.absences: list[_Absence] = []
        self.pipelines: list[Pipeline] = []

    # -- by the coordinator

    def start(self, coordinator: Turns) -> None:
        self.coordinator = coordinator
        self.warnings = self.call.surroundings.warnings
        context = self.call.surroundings.context.copy()
        context.run(MEETING.set, self)
        self.thread = threading.Thread(
            target=context.run, args=(self._run,), name=f"skcifar-{self.task}", daemon=True
        )
        self.thread.start()

    def finish(self) -> None:
        """Let go of what the task held."""
        self.func = self.job = self.context = self.outcome = None

    # -- by the task's thread

    def _run(self) -> None:
        try:
            self.turn.acquire()
            if not self.is_ended:
                assert self.func is not None
                self.began = now()
                self.coordinator.share(self)
                with self.call.surroundings():
                    value = self.func()
                self.coordinator.release(self, value)
                self.value = with_own_times(value, self.began, self.absences)
        except Ended:
            pass
        except BaseException as error:
            self.error, self.traceback = error, error.__traceback__
        finally:
            self.is_done = True
            self.coordinator.back.release()

    def hand_on(self, charged: Callable[[], float] = lambda: 0.0) -> None:
        """Let others run until it is this task's turn again."""
        if self.is_ended:
            raise Ended
        left = now()
        self.coordinator.back.release()
        self.turn.acquire()
        if self.is_ended:
            raise Ended
        seconds = charged()
        self.charged += seconds
        self.absences.append(_Absence(left, now(), seconds))

    def run_nested(self, call: Call) -> None:
        self.coordinator.calls.append(call)
        self.hand_on(lambda: sum(work.held + work.charged for work in call.works))
        if call.failed is not None:
            reraise(call.failed)

    def train(self, job: TrainingJob) -> TrainingResult:
        if threading.current_thread() is not self.thread:  # one that the task itself has started
            return train_alone(job)
        study = self.coordinator.study
        if study is not None:
            own, job = job, study.job(self.task, job)
            self.n_replaced += job is not own
            job.on_epoch_end = partial(_tell_of_epoch, study, self.task, job.on_epoch_end)
        self.job, self.outcome = job, None
        self.context = contextvars.copy_context()
        self.hand_on(lambda: self.outcome.seconds if self.outcome else 0.0)
        outcome = self._own_outcome()
        if outcome.error is not None:
            raise outcome.error
        assert outcome.result is not None
        return outcome.result

    def _own_outcome(self) -> Outcome:
        outcome = self.outcome
        assert outcome is not None
        self.job = self.context = self.outcome = None
        self.n_jobs += 1
        return outcome

    def compute(self, function: Callable[[], Any], what: tuple | None = None) -> Any:
        if threading.current_thread() is not self.thread:
            return function()
        known = None if what is None else self.coordinator.known(what)
        if known is None or what not in known:
            # In a thread that is new, torch begins with new threads of its own and new memory:
            # a prediction of 3 ms takes from 6 to 50 there.
            value = self._have_done(function)
            if known is None:
                return value
            known[what] = value  # type: ignore[index]
        return known[what]  # type: ignore[index]

    def _have_done(self, function: Callable[[], Any]) -> Any:
        """What `function` gives in the coordinator's thread, as part of this task's time."""
        errand = self.errand = Errand(function)
        self.context = contextvars.copy_context()
        self.hand_on(lambda: errand.seconds)
        self.errand = self.context = None
        if errand.error is not None:
            raise errand.error
        return errand.value

    def seed(self, seed: int | None) -> int:
        return self.seed_of(self.coordinator.seed() if seed is None else seed)

    def seed_of(self, seed: int) -> int:
        study = self.coordinator.study
        return seed if study is None else study.seed(self.task, seed)


def current_work() -> Work | None:
    """The task that this thread runs, if it is one of ours."""
    work = MEETING.get()
    if isinstance(work, Work) and work.thread is threading.current_thread():
        return work
    return None


def _tell_of_epoch(
    study: Study, task: Task, on_epoch_end: Callable[[dict], bool], row: dict
) -> bool:
    stop = on_epoch_end(row)
    study.epoch(task, row)
    return stop


def reraise(work: Work) -> None:
    error, traceback = work.error, work.traceback
    assert error is not None
    try:
        raise error.with_traceback(traceback)
    finally:
        del error, traceback, work


now = time.time  # scikit-learn's clock


# -- times -----------------------------------------------------------------------------------------


def with_own_times(value: Any, began: float, absences: list[_Absence]) -> Any:
    """A task's value whose "fit_time" and "score_time" tell of its own work only.

    Waits go, and the seconds that others worked for the task meanwhile come in their place.
    `value` is a list with scikit-learn's result dicts, in the order they were computed.
    """
    if not isinstance(value, list) or not absences:
        return value
    for result in value:
        if not isinstance(result, dict) or "fit_time" not in result:
            continue
        fitted = began + result["fit_time"]
        scored = fitted + result.get("score_time", 0.0)
        for name, start, stop in (("fit_time", began, fitted), ("score_time", fitted, scored)):
            if name in result:
                # `began` is a little early: the middle of a wait tells for sure where it belongs
                inside = [a for a in absences if start <= (a.left + a.back) / 2 < stop]
                result[name] += sum(a.charged - (a.back - a.left) for a in inside)
                result[name] = max(result[name], 0.0)
        began = scored
    return value
