"""Groups of a search's tasks that run in another process: packed here, run there, reported back.

A group runs there as it would here, its fits trained together; what tasks have in common, rows
above all, travels beside the groups and once.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import io
import pickle
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import joblib
import numpy as np
import pandas as pd
import torch
from scipy.sparse import issparse

from skcifar import _stack
from skcifar._backend import Backend
from skcifar._jobs import TrainingJob, TrainingResult
from skcifar._meeting import PLAN, Coordinator, Plan, Planned
from skcifar._rounds import Candidate, Place, RoundStudy
from skcifar._sharing import arguments_of
from skcifar._study import SearchStudy
from skcifar._tasks import Call, Task, Work

# Bytes from which on an array or table travels by itself.
_LARGE = 10_000

# -- which tasks make a group ----------------------------------------------------------------------


@dataclass(frozen=True)
class Needs:
    """Bytes that fits take where they are trained.

    Attributes
    ----------
    fit : int
        Weights, gradients and moments of one that is trained together with others.
    rows : int
        Those that the fits of a lane have in common.
    """

    fit: int = 0
    rows: int = 0


def cut(lanes: Sequence[Any], n_groups: int, needs: Needs, room: float) -> list[list[int]]:
    """Positions of tasks in groups of neighbours, for which `room` bytes suffice, down to one task.

    Groups are of nearly equal size, and at least `n_groups` where there are as many tasks.

    Parameters
    ----------
    lanes : sequence
        Of each task, what its fit's batches are those of; tasks of one lane lie together.
    """
    n_lanes = len(set(lanes))
    if n_groups > n_lanes:  # whole parts of lanes, so that no group picks rows of two
        n_groups = -(-n_groups // n_lanes) * n_lanes
    n_groups = min(n_groups, len(lanes))
    bounds = [len(lanes) * i // n_groups for i in range(n_groups + 1)]

    def fitting(group: list[int]) -> list[list[int]]:
        n_bytes = len(group) * needs.fit + len({lanes[i] for i in group}) * needs.rows
        if n_bytes <= room or len(group) == 1:
            return [group]
        middle = len(group) // 2
        return fitting(group[:middle]) + fitting(group[middle:])

    return [part for start, stop in pairwise(bounds) for part in fitting([*range(start, stop)])]


# -- packing ---------------------------------------------------------------------------------------


@dataclass
class Packed:
    """Some tasks as bytes, and what these leave out, to be passed along beside them."""

    tasks: list[Task]
    payload: bytes
    data: list[Any]


def pack(study: SearchStudy, works: Sequence[Work], seed: int) -> Packed:
    """The tasks with all that `run_group` and `measure` want to know; `seed` as a `Coordinator`'s.

    Raises
    ------
    TypeError
        If something cannot be pickled.
    """
    import cloudpickle

    shown = _shown(study.search)
    items = [_own_items(work, shown) for work in works]
    tasks = [work.task for work in works]
    apart = {id(value) for part in items for item in part for value in _data_of(item)}
    data: dict[int, Any] = {}  # by address, in the order of their numbers

    def persistent_id(value: Any) -> int | None:
        if id(value) not in apart:
            return None
        data.setdefault(id(value), value)
        return list(data).index(id(value))

    buffer = io.BytesIO()
    pickler = cloudpickle.Pickler(buffer)
    pickler.persistent_id = persistent_id
    try:
        pickler.dump(Group(tasks, items, Deputy(study, tasks), seed))
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        raise TypeError(
            f"The tasks of {type(study.search).__name__} cannot be sent to other processes: "
            f"{error}. Give an estimator, scorers and fit parameters that can be pickled, or "
            "backend='skcifar'."
        ) from error
    return Packed(tasks, buffer.getvalue(), list(data.values()))


def _shown(search: Any) -> dict[str, Any]:
    """Arguments of tasks that only scikit-learn's callbacks are for, as far as there are any."""
    parts = [search, search.estimator, *search.estimator.get_params().values()]
    if not any(getattr(part, "_skl_callbacks", None) for part in parts):
        return {"caller": None, "callback_ctx": None}  # all of the search, and of all its tasks
    caller = copy.copy(search)
    del caller._study
    caller.progress = caller.journal = None
    return {"caller": caller}


def _own_items(work: Work, shown: Mapping[str, Any]) -> list[Any]:
    batch: Any = work.func  # of joblib's
    return [
        (func, args, {name: shown.get(name, value) for name, value in kwargs.items()})
        for func, args, kwargs in batch.items
    ]


def _data_of(item: tuple) -> Iterator[Any]:
    """What a call is on: X and y, whatever they are, and large arrays among its arguments.

    Those that an estimator holds are copies of its own.
    """
    given = arguments_of(item)
    yield from (given[name] for name in ("X", "y") if given.get(name) is not None)
    values = [*item[1], *item[2].values()]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            values.extend(value.values())
        elif _is_large(value):
            yield value


def _is_large(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.nbytes >= _LARGE
    if isinstance(value, pd.DataFrame | pd.Series):
        return int(np.sum(value.memory_usage())) >= _LARGE
    return issparse(value) and value.data.nbytes >= _LARGE


class Deputy(RoundStudy):
    """Stands in for a search's study where some of its tasks run; knows of no others."""

    def __init__(self, study: SearchStudy, tasks: Iterable[Task]) -> None:
        super().__init__(None, None, study.validate_epochs)
        self.places = {task: study.place(task) for task in tasks}
        self.values: dict[Task, Any] = {}
        self.shared_seed = study.shared_seed
        self.is_wanted: Callable[[], bool] | None = None  # is known where the tasks run
        assert study.current is not None
        splits: list[Any] = [()] * len(study.current.splits)
        if self.validate_epochs:
            self.X, self.y = study.X, study.y
            for _, place in self.places.values():
                splits[place.fold] = study.current.splits[place.fold]
        self.current = replace(study.current, candidates=[], splits=splits, split_digests=[])

    def place(self, task: Task) -> tuple[Candidate, Place]:
        return self.places[task]

    def epoch(self, task: Task, row: dict) -> None:
        if self.is_wanted is not None and not self.is_wanted():
            raise Unwanted

    def trained(self, task: Task, job: TrainingJob, result: TrainingResult) -> None:
        super().trained(task, job, result)
        self.paused.clear()  # networks stay where they are: others may go on anywhere

    def finished(self, task: Task, value: Any) -> None:
        self.values[task] = value


class Unwanted(BaseException):
    """Ends a group that nobody waits for any more."""


# -- running ---------------------------------------------------------------------------------------


@dataclass
class Report:
    """What came of a group.

    Attributes
    ----------
    values : dict
        What the tasks returned.
    fits : dict
        The histories of their fits, by task.
    warnings : list of (text, category, file, line)
    failed : (task, exception) or None
        The task that ended the group with an error.
    gave_seed : bool
        Whether a fit asked for the common seed.
    """

    values: dict[Task, Any] = field(default_factory=dict)
    fits: dict[Task, list[list[dict]]] = field(default_factory=dict)
    warnings: list[tuple[str, type[Warning], str, int]] = field(default_factory=list)
    failed: tuple[Task, BaseException] | None = None
    gave_seed: bool = False


@dataclass
class Group:
    """Tasks with what their fits are told, as they travel."""

    tasks: list[Task]
    items: list[list[Any]]  # of each task, its (function, args, kwargs)
    study: Deputy
    seed: int

    def call(self) -> Call:
        call = Call(None, 0)
        call.add(Work(_Calls(items), None) for items in self.items)
        for work, task in zip(call.works, self.tasks, strict=True):
            work.task = task
        return call


class _Calls:
    """The calls of a task, which meet others in those that they make themselves."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __call__(self) -> list[Any]:
        with joblib.parallel_config(backend=Backend(nesting_level=1)):
            return [func(*args, **kwargs) for func, args, kwargs in self.items]


class _Coordinator(Coordinator):
    """With the seed that fits without one have in all groups."""

    def __init__(self, study: Deputy, seed: int) -> None:
        super().__init__(study)
        self.given_seed = seed
        self.gave_seed = False

    def seed(self) -> int:
        self.gave_seed = True
        return self.given_seed


# Set within a group: searches among its tasks have their own tasks run in this process, as the
# cluster's workers may all be busy with groups that wait for them.
IN_GROUP: contextvars.ContextVar[bool] = contextvars.ContextVar("IN_GROUP", default=False)

_one_at_a_time = threading.Lock()


def run_group(
    payload: bytes, data: list[Any], is_wanted: Callable[[], bool], n_threads: int
) -> Report:
    """Run a group; groups of one process run one after the other, with `n_threads` of torch's.

    Raises
    ------
    Unwanted
        In place of a report, once `is_wanted` says no; it is asked after each epoch.
    """
    with _one_at_a_time, _threads(n_threads), warnings.catch_warnings(record=True) as caught:
        if not is_wanted():
            raise Unwanted
        group: Group = _Unpickler(payload, data).load()
        study = group.study
        study.is_wanted = is_wanted
        context = contextvars.copy_context()
        context.run(IN_GROUP.set, True)
        report = context.run(_run, group)
    report.values = study.values
    report.fits = {task: study.histories.get(study.place(task)[1], []) for task in study.values}
    report.warnings = [(str(w.message), w.category, w.filename, w.lineno) for w in caught]
    return report


def _run(group: Group) -> Report:
    warnings.simplefilter("always")
    call, coordinator = group.call(), _Coordinator(group.study, group.seed)
    failed = None
    try:
        coordinator.run(call)
    except BaseException as error:
        if call.failed is None:  # not one of the tasks'
            raise
        failed = call.failed.task, _as_sent(error)
    return Report(failed=failed, gave_seed=coordinator.gave_seed)


def _as_sent(error: BaseException) -> BaseException:
    """An error with its traceback as text, or the like of one that cannot be pickled."""
    import cloudpickle

    trace = "".join(traceback.format_exception(error))
    try:
        sent = pickle.loads(cloudpickle.dumps(error))
    except Exception:
        sent = RuntimeError(f"{type(error).__name__}: {error}")
    sent.add_note(f"Raised in a worker:\n{trace}")
    return sent


def measure(payload: bytes, data: list[Any]) -> Needs:
    """What the fits of a group's tasks would take, the most of any; nothing is trained."""
    with warnings.catch_warnings(record=True):
        group: Group = _Unpickler(payload, data).load()
        plan = Plan(group.study)
        contextvars.copy_context().run(_plan, group, plan)
    jobs = [fit.job for fit in plan.fits if fit.job is not None]
    # those that are trained by themselves take their memory one after another
    stacked = [_stack.stack_bytes(job) for job in jobs if _stack.why_alone(job) is None]
    return Needs(max(stacked, default=0), max(map(_bytes_of_rows, jobs), default=0))


def _plan(group: Group, plan: Plan) -> None:
    PLAN.set(plan)
    with contextlib.suppress(Planned, Exception):  # what is wrong with a task, its run says
        _Coordinator(group.study, group.seed).run(group.call())


def _bytes_of_rows(job: TrainingJob) -> int:
    samples = [job.train] if job.validation is None else [job.train, job.validation]
    return sum(s.rows.nbytes for s in samples if isinstance(s.rows, torch.Tensor))


class _Unpickler(pickle.Unpickler):
    def __init__(self, payload: bytes, data: list[Any]) -> None:
        super().__init__(io.BytesIO(payload))
        self.data = data

    def persistent_load(self, number: int) -> Any:
        return self.data[number]


@contextlib.contextmanager
def _threads(n_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
