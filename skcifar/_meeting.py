"""Where the fits that can run now meet, and are trained together.

Every task of a `joblib.Parallel` call runs in a thread of its own, but only one of them, or the
thread that called, runs at any time. A fit of ours hands on at `skcifar._training.train`; when no
task can go on, the calling thread trains those that wait there as one program.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.pipeline import Pipeline
from sklearn.utils import check_random_state

from skcifar import _stack
from skcifar._base import TorchEstimator
from skcifar._jobs import TrainingJob
from skcifar._memory import free_memory, memory_kept
from skcifar._sharing import SharedRows, Steps, arguments_of, may_train
from skcifar._stack import Outcome
from skcifar._tasks import Call, Ended, Study, Task, WarningState, Work, now, reraise
from skcifar._training import train_alone

# Fits that wait to be trained at a time, and the memory their rows may take together; None is a
# quarter of what is free. Beyond, those that wait are trained before others start.
MOST_WAITING = 256
MEMORY_BUDGET: int | None = None


# -- plans -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedFit:
    """A fit that would be trained; `job` is None for a task that trains nothing of ours."""

    task: Task
    job: TrainingJob | None


class Plan:
    def __init__(self, study: Study | None) -> None:
        self.study = study
        self.fits: list[PlannedFit] = []


class Planned(BaseException):
    def __init__(self, plan: Plan) -> None:
        self.plan = plan


PLAN: contextvars.ContextVar[Plan | None] = contextvars.ContextVar("PLAN", default=None)


# -- the coordinator -------------------------------------------------------------------------------


class Coordinator:
    """Gives the tasks of one outermost call, and of those nested in it, their turns; trains.

    It works in the thread that called: Ctrl-C then ends a training as it ends any other.
    """

    def __init__(self, study: Study | None) -> None:
        self.plan = PLAN.get()
        if study is None and self.plan is not None:
            study = self.plan.study
        self.study = study
        self.back = threading.Lock()
        self.back.acquire()
        self.calls: list[Call] = []
        self.ready: deque[Work] = deque()  # to go on
        self.parked: list[Work] = []  # until their jobs are trained
        self.row_bytes: dict[int, int] = {}  # of theirs, by address
        self.groups: deque[list[Work]] = deque()  # of parked ones, next to be trained
        self.rows = SharedRows()
        self.steps = Steps(self.rows.facts)
        self._seed: int | None = None
        self._budget = (
            MEMORY_BUDGET if MEMORY_BUDGET is not None else free_memory(torch.device("cpu")) // 4
        )

    def run(self, call: Call) -> None:
        # rows that are picked, 94 MB for 3 folds of MNIST-10k, lie where those of the last call lay
        with memory_kept(torch.device("cpu")):
            self._run(call)

    def _run(self, call: Call) -> None:
        warning_state = WarningState()
        self.calls.append(call)
        try:
            while not call.is_over:
                self._step()
        except BaseException:
            self._end(call)
            raise
        finally:
            warning_state.restore()
        if call.failed is not None:
            reraise(call.failed)
        if self.plan is not None:
            raise Planned(self.plan)

    def seed(self) -> int:
        """The one seed of all fits whose random_state is None."""
        if self._seed is None:
            self._seed = int(check_random_state(None).randint(np.iinfo(np.int32).max))
        return self._seed

    def share(self, work: Work) -> None:
        """Have the task's arguments be shared with other tasks, as far as nobody can tell."""
        items = getattr(work.func, "items", None)
        if not isinstance(items, list):
            return
        for i, item in enumerate(items):
            arguments = arguments_of(item)
            estimator = arguments.get("estimator")
            if isinstance(estimator, TorchEstimator):
                items[i] = self.rows.share(item, arguments)
            elif isinstance(estimator, Pipeline):
                self.steps.attach(work, estimator)

    def release(self, work: Work, value: Any) -> None:
        """Have what is in the task's value be its own, before it is handed out."""
        self.steps.release(work, value)

    def known(self, what: tuple) -> dict[tuple, Any] | None:
        """What is known of the rows that `what` is of; None for rows that are not shared."""
        return self.rows.facts.of(what[0])

    # -- turns

    def _step(self) -> None:
        if self.ready:
            work = self.ready.popleft()
            if not work.is_ended:
                self._take_turn(work)
        elif (new := self._next_to_start()) is not None:
            if not self._is_settled(new):
                new.start(self)
                self._take_turn(new)
        elif self.groups or self.parked:
            if not self.groups:
                self._form_groups()
            if works := self.groups.popleft():
                self._train(works)
        elif self.plan is not None:
            raise Planned(self.plan)
        else:
            raise RuntimeError("Tasks of the backend 'skcifar' wait for each other; please report.")

    def _next_to_start(self) -> Work | None:
        """The next new task, of the innermost call, unless those that wait are to be trained."""
        if self.groups or (self.parked and not self._has_room()):
            return None
        for call in reversed(self.calls):
            if call.waiting:
                return call.waiting.popleft()
        return None

    def _has_room(self) -> bool:
        return len(self.parked) < MOST_WAITING and sum(self.row_bytes.values()) < self._budget

    def _is_settled(self, work: Work) -> bool:
        """Whether a task need not run; then its value is handed out."""
        if work.call.depth > 0:
            return False
        if self.study is not None and (value := self.study.known(work.task)) is not None:
            work.value = value
        elif self.plan is not None and not may_train(work.func):
            self.plan.fits.append(PlannedFit(work.task, None))
        else:
            return False
        if self.plan is None:
            self._finished(work, known=True)
        else:
            work.call.n_left -= 1
        return True

    def _take_turn(self, work: Work) -> None:
        self._switch_to(work)
        if work.is_done:
            assert work.thread is not None
            work.thread.join()
            self._finished(work)
        elif work.errand is not None:
            self._as(work, work.errand.run)
            self.ready.appendleft(work)
        elif work.job is None:  # it waits for other tasks
            pass
        elif self.plan is not None:
            self.plan.fits.append(PlannedFit(work.task, work.job))
            self._end_work(work)
        elif _stack.why_alone(work.job) is not None:
            self._train([work])
        else:
            self.parked.append(work)
            self.row_bytes |= _row_bytes(work.job)

    def _switch_to(self, work: Work) -> None:
        """Let a task run until it hands on or is over."""
        mine = WarningState()
        began = now()
        work.warnings.restore()
        try:
            work.turn.release()
            # in pieces, as Windows does not interrupt such a wait for Ctrl-C
            while not self.back.acquire(timeout=0.1):
                if work.thread is not None and not work.thread.is_alive() and not work.is_done:
                    work.is_done, work.error = True, RuntimeError("A task's thread is gone.")
                    break
        except BaseException:
            self._interrupt(work)
            raise
        finally:
            work.held += now() - began
            work.warnings = WarningState()
            mine.restore()

    def _interrupt(self, work: Work) -> None:
        """End a task while it runs."""
        work.is_ended = True
        assert work.thread is not None and work.thread.ident is not None
        thread = ctypes.c_ulong(work.thread.ident)
        self.back.acquire(blocking=False)  # if it has handed on in the meantime
        while work.thread.is_alive():
            if not work.is_done:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(Ended))
            with contextlib.suppress(RuntimeError):  # in case that it waits for its turn
                work.turn.release()
            work.thread.join(0.5)
        self.back.acquire(blocking=False)

    # -- what comes of a task

    def _finished(self, work: Work, known: bool = False) -> None:
        call = work.call
        call.n_left -= 1
        if self.plan is not None and call.depth == 0 and work.error is None and not work.n_jobs:
            self.plan.fits.append(PlannedFit(work.task, None))
        if work.error is None and self.study is not None and call.depth == 0 and not known:
            self.study.finished(work.task, work.value)
        if work.error is not None:
            call.failed = work
        work.finish()
        # joblib is to know of a failure before other tasks end because of it
        if work.callback is not None:
            work.callback(work)
        if call.is_over:
            if work.error is not None:
                self._end(call)
            if call in self.calls:
                self.calls.remove(call)
            if call.parent is not None:
                self.ready.appendleft(call.parent)

    def _end(self, call: Call) -> None:
        """End all tasks of a call that still run."""
        for work in reversed(call.works):
            self._end_work(work)
        call.waiting.clear()
        if call in self.calls:
            self.calls.remove(call)

    def _end_work(self, work: Work) -> None:
        for call in [call for call in self.calls if call.parent is work]:
            self._end(call)
        if work.thread is None or work.is_done:
            return
        work.is_ended = True
        for queue in (self.ready, self.parked, *self.groups):
            if work in queue:
                queue.remove(work)
        if work.thread.is_alive():
            self._switch_to(work)
            work.thread.join()
        else:  # interrupted while it was started: it may come to life yet, and ends at once
            with contextlib.suppress(RuntimeError):
                work.turn.release()
        work.finish()

    # -- training

    def _form_groups(self) -> None:
        jobs = [work.job for work in self.parked if work.job is not None]
        groups = [[self.parked[i] for i in group] for group in _stack.groups_of(jobs)]
        # fits that others wait for come first: those nested deepest, those with more to follow
        groups.sort(key=lambda group: (-max(w.call.depth for w in group), group[0].n_jobs))
        self.groups = deque(groups)
        self.parked, self.row_bytes = [], {}

    def _train(self, works: list[Work]) -> None:
        outcomes = self._outcomes(works)
        for work, outcome in zip(works, outcomes, strict=True):
            work.outcome = outcome
            if self.study is not None and outcome.result is not None:
                assert work.job is not None
                self.study.trained(work.task, work.job, outcome.result)
        self.ready.extend(works)

    def _outcomes(self, works: list[Work]) -> list[Outcome]:
        jobs = [work.job for work in works if work.job is not None]
        # paused ones go on from what a training uses up
        before = [_State(job) for job in jobs if job.paused is None and len(jobs) > 1]
        try:
            outcomes = self._as(works[0], lambda: _stack.train_group(jobs))
            if len(outcomes) != len(jobs):
                raise RuntimeError(f"{len(outcomes)} outcomes of {len(jobs)} fits")
            return outcomes
        except Exception as error:
            if len(before) < len(jobs):
                return [Outcome(None, error, 0.0) for _ in jobs]
            for state in before:
                state.restore()
            warnings.warn(
                f"{len(jobs)} fits could not be trained together ({type(error).__name__}: {error}) "
                "and are trained one by one.",
                RuntimeWarning,
                stacklevel=2,
            )
            return [self._train_one(work) for work in works]
        finally:
            for state in before:
                state.leave()

    def _train_one(self, work: Work) -> Outcome:
        job = work.job
        assert job is not None
        start = time.perf_counter()
        try:
            result = self._as(work, lambda: train_alone(job))
        except Exception as error:
            return Outcome(None, error, time.perf_counter() - start)
        return Outcome(result, None, time.perf_counter() - start)

    def _as(self, work: Work, train: Callable[[], Any]) -> Any:
        """Train with the warning filters and the context that the fit has."""
        mine = WarningState()
        assert work.context is not None
        work.warnings.restore()
        try:
            return work.context.run(train)
        finally:
            work.warnings = WarningState()
            mine.restore()


class _State:
    """What a training changes of a job, and whom it tells of which epochs, to begin anew."""

    def __init__(self, job: TrainingJob) -> None:
        self.job = job
        self.weights = {k: v.clone() for k, v in job.module.state_dict().items()}
        self.generators = job.generators.get_state()
        self.tell_of_begin, self.tell_of_end = job.on_epoch_begin, job.on_epoch_end
        job.on_epoch_begin, job.on_epoch_end = self._begin, self._end
        self.n_begun = self.n_ended = self.n_told = 0
        self.stops: list[bool] = []

    def restore(self) -> None:
        self.job.module.load_state_dict(self.weights)
        self.job.generators.set_state(self.generators)
        self.n_begun = self.n_ended = 0

    def leave(self) -> None:
        """Let the job be freed, and its rows with it, as soon as nobody needs it."""
        self.job.on_epoch_begin, self.job.on_epoch_end = self.tell_of_begin, self.tell_of_end
        del self.job, self.weights, self.generators

    def _begin(self) -> None:
        self.n_begun += 1
        if self.n_begun > self.n_told:
            self.n_told += 1
            self.tell_of_begin()

    def _end(self, row: dict) -> bool:
        self.n_ended += 1
        if self.n_ended > len(self.stops):
            self.stops.append(self.tell_of_end(row))
        return self.stops[self.n_ended - 1]


def _row_bytes(job: TrainingJob) -> dict[int, int]:
    """Memory of a job's rows, by where it begins: jobs may share it."""
    samples = [job.train] if job.validation is None else [job.train, job.validation]
    storages = [s.rows.untyped_storage() for s in samples if isinstance(s.rows, torch.Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
