"""Which fits are trained together, and their training: the fits of a sweep as a few programs."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from skcifar._jobs import TrainingJob, TrainingResult
from skcifar._memory import free_memory, is_out_of_memory
from skcifar._networks import MultilayerPerceptron
from skcifar._optimization import ClassificationLoss
from skcifar._stacked_loss import same
from skcifar._stacked_networks import Model, Stack, dense_layers
from skcifar._training import PIECE_ROWS, train_alone

# Bytes of weights, gradients and moments of one stack on a CPU: what stays in its cache. 100 units
# on MNIST in batches of 32 take 12 ms an epoch in stacks of 12 (11 MB), 19 in stacks of 96.
_CACHE_BYTES = 20 * 2**20

# Share of the device's free memory that one stack may take.
_MEMORY_SHARE = 0.25


@dataclass
class Outcome:
    """What came of one job of a group.

    Attributes
    ----------
    result : TrainingResult or None
    error : Exception or None
        Why there is no result: the job's own failure, such as a loss that is no longer finite.
    seconds : float
        The job's share of the group's time, by its floating-point operations.
    """

    result: TrainingResult | None
    error: Exception | None
    seconds: float


# -- which jobs belong together --------------------------------------------------------------------


def why_alone(job: TrainingJob) -> str | None:
    """Why a job is trained by itself; None where it can be trained with others."""
    if job.recipe.solver == "lbfgs":
        return "solver='lbfgs' takes steps of its own length over all rows"
    if type(job.module) is not MultilayerPerceptron:
        return f"{type(job.module).__name__} is no stack of dense layers: it fills the machine"
    if not isinstance(job.criterion, ClassificationLoss) or job.sampler or job.augment:
        return "its loss or its batches are of its own kind"
    if job.train.is_stored or (job.validation is not None and job.validation.is_stored):
        return "its rows are read from where they are stored"
    if job.skorch_callbacks:
        return "skorch_callbacks want a net of their own"
    if callable(job.recipe.learning_rate):
        return "a learning_rate that is a callable wants an optimizer of its own"
    if job.state is not None or not isinstance(job.paused, Model | None):
        return "it goes on from an earlier fit"
    return None


def groups_of(jobs: Sequence[TrainingJob]) -> list[list[int]]:
    """Positions of the jobs that train as one program, in groups of at least one.

    A group is one stack, or several that are trained at the same time.
    """
    stackable = [i for i, job in enumerate(jobs) if why_alone(job) is None]
    groups = [[i] for i, job in enumerate(jobs) if why_alone(job) is not None]
    stacks = [[stackable[i] for i in stack] for stack in _stacks_of([jobs[i] for i in stackable])]
    while stacks:
        n = _n_workers(jobs[stacks[0][0]].reader.device)
        # the last ones are not left with fewer than there are threads
        n = len(stacks) if len(stacks) < 2 * n else n
        groups.append([i for stack in stacks[:n] for i in stack])
        del stacks[:n]
    return sorted(groups)


def _stacks_of(jobs: Sequence[TrainingJob]) -> list[list[int]]:
    """Positions of the jobs that see the same batches, as many as memory holds."""
    lanes: list[list[int]] = []
    of_key: dict[tuple, list[list[int]]] = {}
    for i, job in enumerate(jobs):
        alike = of_key.setdefault(_stack_key(job), [])
        lane = next((lane for lane in alike if _sees_the_same(job, jobs[lane[0]])), None)
        if lane is None:
            lane = []
            alike.append(lane)
            lanes.append(lane)
        lane.append(i)
    return [stack for lane in lanes for stack in _cut(lane, jobs, len(lanes))]


def _n_workers(device: torch.device) -> int:
    """Stacks that are trained at the same time.

    On a CPU each has a thread: a batch is too little work to be divided. 27 perceptrons of 32
    units take 1.9 s for ten epochs of MNIST-10k in batches of 32, and 2.1 one stack after the
    other; beside a busy process, which holds up one thread rather than both, 3.1 s and 7.9.
    """
    return torch.get_num_threads() if device.type == "cpu" else 1


def _stack_key(job: TrainingJob) -> tuple:
    """What jobs of one stack have in common, as far as it is quickly compared."""
    recipe, criterion = job.recipe, job.criterion
    n_features = job.train.rows.shape[1]
    validation = job.validation
    return (
        (n_features, dense_layers(job.module)[-1].out_features, criterion.loss),
        (recipe.solver, recipe.nesterovs_momentum, recipe.batch_size, recipe.shuffle),
        (recipe.clip_grad_norm is None, recipe.clip_grad_value is None),
        (job.precision, job.reader.device, job.reader.image_shape, job.reader.layout),
        (len(job.train.rows), len(job.train), job.train.rows.dtype),
        None if validation is None else (len(validation), job.evaluation_rows),
        0 if job.paused is None else len(job.paused.conductor.history),
    )


def _sees_the_same(job: TrainingJob, other: TrainingJob) -> bool:
    """Whether two jobs of one key are given the same batches, and the same validation rows."""
    if job.recipe.shuffle and job.recipe.batch_size < len(job.train):
        orders = [
            j.generators if j.paused is None else j.paused.job.generators for j in (job, other)
        ]
        if not torch.equal(orders[0].order.get_state(), orders[1].order.get_state()):
            return False
    for own, its in zip(_statistics(job), _statistics(other), strict=True):
        if not same(own, its):
            return False
    pairs = [(job.train, other.train)]
    if job.validation is not None and other.validation is not None:
        if not same(job.validation.targets, other.validation.targets):
            return False
        if not same(job.validation.weight, other.validation.weight):
            return False
        pairs.append((job.validation, other.validation))
    # none of them are stored rows, which have no place in a stack
    return all(same(a.index, b.index) and same(a.rows, b.rows) for a, b in pairs)  # type: ignore[arg-type]


def _statistics(job: TrainingJob) -> tuple[Tensor | None, Tensor | None]:
    reader = job.reader
    if reader.mean is None or reader.scale is None:
        return None, None
    return torch.as_tensor(reader.mean), torch.as_tensor(reader.scale)


def _cut(lane: list[int], jobs: Sequence[TrainingJob], n_lanes: int) -> list[list[int]]:
    """Jobs that see the same batches, in stacks that the memory holds, of nearly equal size."""
    device = jobs[lane[0]].reader.device
    n_at_once = min(n_lanes, _n_workers(device))
    cache = _CACHE_BYTES / n_at_once if device.type == "cpu" else math.inf
    memory = free_memory(device) * _MEMORY_SHARE / n_at_once
    cached = sum(_bytes_of_weights(jobs[i]) for i in lane)
    whole = sum(stack_bytes(jobs[i]) for i in lane)
    n_parts = max(1, math.ceil(cached / cache), math.ceil(whole / memory))
    n_parts = min(n_parts, len(lane))
    bounds = [len(lane) * i // n_parts for i in range(n_parts + 1)]
    return [lane[start:stop] for start, stop in pairwise(bounds)]


def _bytes_of_weights(job: TrainingJob) -> int:
    n_moments = 1 if job.recipe.solver == "sgd" else 2
    parameters = sum(p.numel() for p in job.module.parameters())
    return parameters * job.precision.weights.itemsize * (2 + n_moments)


def stack_bytes(job: TrainingJob) -> int:
    """Bytes that a job adds to the memory of its stack."""
    n_rows = len(job.train)
    n_validation = 0 if job.validation is None else len(job.validation)
    layers = dense_layers(job.module)
    n_units = sum(layer.out_features for layer in layers)
    numbers = 3 * n_units * min(job.recipe.batch_size, PIECE_ROWS)
    numbers += 3 * layers[-1].out_features * (n_rows + n_validation)
    # the estimator's own weights stay until the stack's are whole
    return _bytes_of_weights(job) * 3 // 2 + numbers * job.precision.weights.itemsize


# -- a group, from jobs to outcomes ----------------------------------------------------------------


def train_group(jobs: Sequence[TrainingJob]) -> list[Outcome]:
    """Train the jobs of one group; the outcomes in their order.

    A job that fails costs nothing but itself. Where memory does not suffice, the group is halved.

    Raises
    ------
    Exception
        What stopped the group as a whole.
    """
    start = time.perf_counter()
    if len(jobs) == 1 and why_alone(jobs[0]) is not None:
        try:
            result = train_alone(jobs[0])
        except Exception as error:
            return [Outcome(None, error, time.perf_counter() - start)]
        return [Outcome(result, None, time.perf_counter() - start)]
    models = [Model(job) if job.paused is None else job.paused.taken_up(job) for job in jobs]
    courses = [_Course([models[i] for i in stack]) for stack in _stacks_of(jobs)]
    before = [model.state() for model in models]
    try:
        _run(courses, _n_workers(jobs[0].reader.device))
    except (RuntimeError, MemoryError) as error:
        # memory that suffices for one epoch suffices for all
        begun = any(model.conductor.history for model in models)
        if begun or len(jobs) == 1 or not is_out_of_memory(error):
            raise
    else:
        seconds = time.perf_counter() - start
        total = sum(model.operations for model in models)
        shares = [m.operations / total if total else 1 / len(models) for m in models]
        return [
            Outcome(None if model.error else model.result(job), model.error, share * seconds)
            for model, job, share in zip(models, jobs, shares, strict=True)
        ]
    for model, state in zip(models, before, strict=True):
        model.restore(*state)
    middle = len(jobs) // 2
    return train_group(jobs[:middle]) + train_group(jobs[middle:])


def _run(courses: list[_Course], n_workers: int) -> None:
    """Run courses to their ends: one with all of torch's threads, several with a share each."""
    if len(courses) == 1 or n_workers == 1:
        for course in courses:
            try:
                while not course.is_over:
                    course.begin_epoch()
                    course.end_epoch(course.run_epoch())
            finally:
                course.dissolve()
        return
    n_threads = torch.get_num_threads()
    share = max(1, n_threads // len(courses))
    running: dict[Future, _Course] = {}
    pool = ThreadPoolExecutor(n_workers, "skcifar-stack")

    def run_epoch(course: _Course) -> list[dict[str, Any]]:
        if course.is_cancelled:
            return []
        if torch.get_num_threads() != share:  # once in each of the pool's threads
            torch.set_num_threads(share)
        return course.run_epoch()

    try:
        _switching.enter()
        while left := [course for course in courses if not course.is_over]:
            # what has most to do goes first, so that none is left over at the end
            idle = [course for course in left if course not in running.values()]
            idle.sort(key=lambda course: -course.operations_left)
            for course in idle[: n_workers - len(running)]:
                course.begin_epoch()
                running[pool.submit(run_epoch, course)] = course
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            torch.set_num_threads(n_threads)  # new threads begin with what was set last
            for future in done:
                running.pop(future).end_epoch(future.result())
    finally:
        for course in courses:
            course.is_cancelled = True
        try:
            pool.shutdown()
        finally:
            torch.set_num_threads(n_threads)
            _switching.leave()
        for course in courses:
            course.dissolve()


class _Switching:
    """Lets threads take the interpreter from each other sooner, while several train.

    A thread that finds it taken sleeps for so long or until it is told, which takes the system as
    long as ten small operations. With Python's 5 ms instead of this, two stacks of 9 perceptrons of
    32 units take 630 us a step in batches of 32 rather than 560.
    """

    seconds = 1e-4

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.n_inside = 0
        self.before = 0.0

    def enter(self) -> None:
        with self.lock:
            self.n_inside += 1
            if self.n_inside == 1:
                self.before = sys.getswitchinterval()
                sys.setswitchinterval(self.seconds)

    def leave(self) -> None:
        with self.lock:
            self.n_inside -= 1
            if self.n_inside == 0:
                sys.setswitchinterval(self.before)


_switching = _Switching()


class _Course:
    """The training of a stack from its first epoch to the last; networks that are over leave it.

    `run_epoch` may be called in any thread, the others tell callbacks of the epoch.
    """

    def __init__(self, models: list[Model]) -> None:
        self.models = [model for model in models if not model.is_done]
        self.stack: Stack | None = None
        self.is_cancelled = False

    @property
    def is_over(self) -> bool:
        return not self.models

    @property
    def operations_left(self) -> float:
        epochs = [model.until - len(model.conductor.history) for model in self.models]
        return sum(n * model.cost for n, model in zip(epochs, self.models, strict=True))

    def begin_epoch(self) -> None:
        for model in self.models:
            model.job.on_epoch_begin()

    def run_epoch(self) -> list[dict[str, Any]]:
        """Train for an epoch; a row of the history for each network."""
        if self.stack is None:
            self.stack = Stack(self.models)
        return self.stack.run_epoch(lambda: self.is_cancelled)

    def end_epoch(self, rows: list[dict[str, Any]]) -> None:
        assert self.stack is not None
        for model, row in zip(self.stack.models, rows, strict=True):
            model.epoch_over(row)
        if any(model.is_done for model in self.models):
            self.dissolve()
            self.models = [model for model in self.models if not model.is_done]

    def dissolve(self) -> None:
        if self.stack is not None:
            self.stack.dissolve()
        self.stack = None
