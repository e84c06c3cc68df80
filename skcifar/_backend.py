"""The joblib backend of sweeps: what joblib sees of it, and whether that works."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import joblib
import numpy as np
from joblib.parallel import ParallelBackendBase

from skcifar._jobs import TrainingJob, TrainingResult
from skcifar._meeting import PLAN, Coordinator, Plan, Planned, PlannedFit
from skcifar._tasks import Call, Study, Task, Work, current_work


class Backend(ParallelBackendBase):
    """The backend "skcifar", whose tasks' fits are trained together.

    Parameters
    ----------
    study : Study, optional
        What is told of the tasks of calls made with this backend.
    **params
        joblib's own.

    Notes
    -----
    All that joblib is relied on for: `configure` may set `pre_dispatch` and ask for another
    instance, so that each `joblib.Parallel` has one of its own; `submit` is called with a batch
    and a callback; results are asked for within `retrieval_context`, on entry to which all tasks
    are run. Where `batch.items` exist, what they share is shared.
    """

    supports_retrieve_callback = True
    supports_sharedmem = False

    def __init__(self, study: Study | None = None, **params: Any) -> None:
        super().__init__(**params)
        self.study = study
        self.parallel: Any = None
        self._calls = itertools.count()
        self._works: list[Work] = []
        self._running: Call | None = None
        self._is_probe = False

    def effective_n_jobs(self, n_jobs: int) -> int:
        """Two: joblib would go past the backend with one, and helpers split by more."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        return 2 if self._is_probe or _works_with_joblib() else 1

    def configure(self, n_jobs: int = 1, parallel: Any = None, **_: Any) -> int:
        effective = self.effective_n_jobs(n_jobs)
        if effective == 1:  # joblib then runs the tasks itself, one after another
            return 1
        if self.parallel is not parallel:
            from joblib.parallel import FallbackToBackend

            own = copy.copy(self)
            own.parallel, own._works = parallel, []
            raise FallbackToBackend(own)
        parallel.pre_dispatch = "all"
        if self._is_probe:  # joblib would wait for ever for tasks that are never run
            parallel.timeout = 1.0
        return effective

    def submit(self, func: Callable[[], Any], callback: Any = None) -> Work:
        work = Work(func, callback)
        if self._running is not None:  # joblib did not dispatch all beforehand
            self._running.add([work])
        else:
            self._works.append(work)
        return work

    @contextlib.contextmanager
    def retrieval_context(self) -> Iterator[None]:
        works, self._works = self._works, []
        if not works:
            yield
            return
        parent = current_work()
        call = self._running = Call(parent, None if parent else next(self._calls))
        call.add(works)
        try:
            if parent is not None:
                parent.run_nested(call)
            else:
                Coordinator(self.study).run(call)
        finally:
            self._running = None
        yield

    def retrieve_result_callback(self, out: Work) -> Any:
        if out.error is not None:
            raise out.error
        return out.value

    def abort_everything(self, ensure_ready: bool = True) -> None:
        self._works = []  # those that ran have ended before

    def terminate(self) -> None:
        self.parallel = None
        self._works = []

    def get_nested_backend(self) -> tuple[Backend, None]:
        nested = Backend(nesting_level=(self.nesting_level or 0) + 1)
        nested._is_probe = self._is_probe
        return nested, None


def collect(run: Callable[[], Any], study: Study | None = None) -> list[PlannedFit]:
    """Give the fits that the first joblib call within `run` would train, and train none.

    A fit that depends on another (a classifier after an embedder in one Pipeline) is not seen, as
    the first one ends its task; nor is one of a task that waits for another's step. A task without
    any estimator of ours does not run.
    """
    plan = Plan(study)
    token = PLAN.set(plan)
    try:
        with joblib.parallel_config(backend=Backend(study)):
            run()
    except Planned as planned:
        if planned.plan is not plan:
            raise
    finally:
        PLAN.reset(token)
    return sorted(plan.fits, key=lambda fit: (fit.task.call, fit.task.position))


# -- a trial ---------------------------------------------------------------------------------------


_probe_lock = threading.RLock()
_probe_passed: bool | None = None


def _works_with_joblib() -> bool:
    """Whether fits meet, tried once in a process; if not, a warning says so."""
    global _probe_passed
    if _probe_passed is not None:
        return _probe_passed
    with _probe_lock:
        if _probe_passed is None:
            reason = _probe()
            _probe_passed = reason is None
            if reason is not None:
                warnings.warn(
                    f"The joblib backend 'skcifar' does not work with joblib {joblib.__version__} "
                    f"({reason}): calls run one task after another, with the same results. Install "
                    "a joblib that this release of skcifar was tested with to train fits together.",
                    RuntimeWarning,
                    stacklevel=2,
                )
    return _probe_passed


class _Probe(Study):
    def __init__(self) -> None:
        self.n_jobs = 0
        self.n_met: list[int] = []

    def job(self, task: Task, job: TrainingJob) -> TrainingJob:
        self.n_jobs += 1
        return job

    def trained(self, task: Task, job: TrainingJob, result: TrainingResult) -> None:
        self.n_met.append(self.n_jobs)


def _probe() -> str | None:
    """Cross-validate two tiny fits; why they did not meet, if so."""
    from sklearn.model_selection import cross_val_score

    from skcifar.softmax import SoftmaxRegression

    study = _Probe()
    backend = Backend(study)
    backend._is_probe = True
    X = np.array([[0.0], [1.0], [2.0], [3.0]])
    model = SoftmaxRegression(solver="sgd", max_iter=1, random_state=0, device="cpu")
    run = partial(
        cross_val_score, model, X, [0, 1, 0, 1], cv=2, n_jobs=2, pre_dispatch=1, error_score="raise"
    )
    # neither a plan nor a task of the caller takes part in this
    context = contextvars.Context()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with joblib.parallel_config(backend=backend):
                context.run(run)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None if study.n_met == [2, 2] else "fits of one call did not meet"
