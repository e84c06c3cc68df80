"""Training many small networks as one program: the fits of a sweep.

Networks that see the same batches make a stack. Their first layers lie below each other in one
matrix, so that a batch goes through all of them in one product; the layers behind are batched
products, and the learning rates, penalties and momenta of the networks are vectors. Activations
have the units of all networks as rows and the samples as columns: then nothing is transposed or
copied on the way forward and back.

For 9 perceptrons of 32 units on MNIST in batches of 200, the two large products run at 450 GF/s on
two threads of an AMD Zen 5, where nine separate trainings come to 100.

HFTA (Wang et al., "Horizontally Fused Training Array", MLSys 2021) trains sweeps in this way.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skcifar._device import free_memory, is_out_of_memory
from skcifar._networks import MultilayerPerceptron, matrix_product
from skcifar._optimization import ClassificationLoss, LearningRates
from skcifar._training import (
    PIECE_ROWS,
    Batches,
    Conductor,
    Samples,
    TrainingJob,
    TrainingResult,
    detached,
    train_alone,
)

# Bytes of weights, gradients and moments of one stack on a CPU: what stays in its cache. 100 units
# on MNIST in batches of 32 take 12 ms an epoch in stacks of 12 (11 MB), 19 in stacks of 96.
_CACHE_BYTES = 20 * 2**20

# Parameters with fewer numbers are updated as one: a call takes as long as some thousand of them.
_SMALL = 2**15

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
    if job.skorch_callbacks:
        return "skorch_callbacks want a net of their own"
    if callable(job.recipe.learning_rate):
        return "a learning_rate that is a callable wants an optimizer of its own"
    if job.state is not None:
        return "it goes on from an earlier fit"
    return None


def groups_of(jobs: Sequence[TrainingJob]) -> list[list[int]]:
    """Positions of the jobs that train as one program, in groups of at least one.

    A group is one stack, or several that are trained at the same time.
    """
    stackable = [i for i, job in enumerate(jobs) if why_alone(job) is None]
    groups = [[i] for i in range(len(jobs)) if i not in set(stackable)]
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
    units take WORKERS_FIGURE in batches of 32, and a busy neighbour holds up one of them only.
    """
    return torch.get_num_threads() if device.type == "cpu" else 1


def _stack_key(job: TrainingJob) -> tuple:
    """What jobs of one stack have in common, as far as it is quickly compared."""
    recipe, criterion = job.recipe, job.criterion
    n_features = job.train.rows.shape[1]
    validation = job.validation
    return (
        (n_features, _dense_layers(job.module)[-1].out_features, criterion.loss),
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
        if not _equal(own, its):
            return False
    pairs = [(job.train, other.train)]
    if job.validation is not None and other.validation is not None:
        if not _equal(job.validation.targets, other.validation.targets):
            return False
        if not _equal(job.validation.weight, other.validation.weight):
            return False
        pairs.append((job.validation, other.validation))
    return all(_equal(a.index, b.index) and _equal(a.rows, b.rows) for a, b in pairs)


def _statistics(job: TrainingJob) -> tuple[Tensor | None, Tensor | None]:
    reader = job.reader
    if reader.mean is None or reader.scale is None:
        return None, None
    return torch.as_tensor(reader.mean), torch.as_tensor(reader.scale)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    same_memory = a.data_ptr() == b.data_ptr() and a.stride() == b.stride()
    return (same_memory and a.shape == b.shape) or torch.equal(a, b)


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
    layers = _dense_layers(job.module)
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
    models = [_Model(job) if job.paused is None else job.paused.taken_up(job) for job in jobs]
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
            model.outcome(job, share * seconds)
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
            while not course.is_over:
                course.begin_epoch()
                course.end_epoch(course.run_epoch())
        return
    n_threads = torch.get_num_threads()
    share = max(1, n_threads // len(courses))
    running: dict[Future, _Course] = {}
    pool = ThreadPoolExecutor(n_workers, "skcifar-stack", torch.set_num_threads, (share,))
    try:
        while left := [course for course in courses if not course.is_over]:
            # what has most to do goes first, so that none is left over at the end
            idle = [course for course in left if course not in running.values()]
            idle.sort(key=lambda course: -course.operations_left)
            for course in idle[: n_workers - len(running)]:
                course.begin_epoch()
                running[pool.submit(course.run_epoch)] = course
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                running.pop(future).end_epoch(future.result())
    finally:
        for course in courses:
            course.is_cancelled = True
        pool.shutdown()
        torch.set_num_threads(n_threads)  # new threads begin with what was set last
        for course in courses:
            course.dissolve()


class _Course:
    """The training of a stack from its first epoch to the last; networks that are over leave it.

    `run_epoch` may be called in any thread, the others tell callbacks of the epoch.
    """

    def __init__(self, models: list[_Model]) -> None:
        self.models = [model for model in models if not model.is_done]
        self.stack: _Stack | None = None
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
            self.stack = _Stack(self.models)
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


class _Model:
    """One network of a stack: what it carries from one epoch to the next.

    Attributes
    ----------
    job : TrainingJob
    parameters : list of torch.nn.Parameter
        Weights and biases of each layer in turn. While a stack trains them they are views of its
        tensors.
    moments : list of list of tensors
        The optimizer's, for each parameter; empty at the beginning.
    cost : float
        Multiplications of an epoch, up to a common factor.
    operations : float
        The same of its training so far.
    """

    def __init__(self, job: TrainingJob) -> None:
        self.job = detached(job)
        recipe = job.recipe
        n_batches = len(Batches(job.train, recipe.batch_size))
        rate = SimpleNamespace(param_groups=[{"lr": recipe.learning_rate_init, "rate_factor": 1.0}])
        self.rates = LearningRates(recipe, rate, len(job.train), recipe.max_iter * n_batches)  # type: ignore[arg-type]
        self.conductor = Conductor(self.job, self.rates)
        layers = _dense_layers(self.job.module)
        self.parameters = [p for layer in layers for p in layer.parameters()]
        self.moments: list[list[Tensor]] = []
        self.n_rows = len(job.train)
        self.cost = float(sum(layer.weight.numel() for layer in layers) * self.n_rows)
        self.n_rows_seen = 0
        self.operations = 0.0
        self.is_over = False
        self.error: Exception | None = None
        self._go_on_until(job)

    def _go_on_until(self, job: TrainingJob) -> None:
        n_epochs = job.recipe.max_iter
        self.until = n_epochs if job.pause_after is None else min(job.pause_after, n_epochs)

    def taken_up(self, job: TrainingJob) -> _Model:
        """This model, to be trained further on behalf of `job`."""
        self.job.on_epoch_begin, self.job.on_epoch_end = job.on_epoch_begin, job.on_epoch_end
        self.operations = 0.0
        self._go_on_until(job)
        return self

    def state(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Weights, which no stack writes to, and generators."""
        return [p.data for p in self.parameters], self.job.generators.get_state()

    def restore(self, weights: list[Tensor], generators: dict[str, Tensor]) -> None:
        for parameter, weight in zip(self.parameters, weights, strict=True):
            parameter.data = weight
        self.job.generators.set_state(generators)

    @property
    def is_done(self) -> bool:
        if self.is_over or self.error is not None:
            return True
        return len(self.conductor.history) >= self.until

    def epoch_over(self, row: dict) -> None:
        self.n_rows_seen += self.n_rows
        self.operations += self.cost
        try:
            self.is_over = self.conductor.epoch_over(row)
        except Exception as error:
            self.error = error

    def outcome(self, job: TrainingJob, seconds: float) -> Outcome:
        if self.error is not None:
            return Outcome(None, self.error, seconds)
        paused = None if job.pause_after is None else self
        result = self.conductor.result(
            job, self._optimizer_state(), self.n_rows_seen, paused=paused
        )
        return Outcome(result, None, seconds)

    def _optimizer_state(self) -> dict[int, dict[str, Any]]:
        """As the optimizer of a lone fit counts it: the weights, then the biases."""
        state: dict[int, dict[str, Any]] = {}
        recipe = self.job.recipe
        if recipe.solver == "sgd" and not recipe.momentum:
            return state
        for i, moments in enumerate(self.moments[::2] + self.moments[1::2]):
            if recipe.solver == "sgd":
                state[i] = {"momentum_buffer": moments[0]}
            else:
                step = torch.tensor(float(self.rates.step))
                state[i] = {"step": step, "exp_avg": moments[0], "exp_avg_sq": moments[1]}
        return state


def _dense_layers(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


# -- the stack -------------------------------------------------------------------------------------


class _Parameters:
    """One parameter of all networks in one tensor, and their moments.

    Attributes
    ----------
    value : tensor of shape (n_rows, ...)
        The rows of the first network, of the second, and so on. Tails of one architecture have a
        row for each network, (n, n_out, n_in), and biases a dimension for the samples: (n_rows, 1)
        or (n, n_out, 1).
    moments : list of tensors
        The optimizer's, laid out alike.
    owner : int64 tensor of shape (n_rows,)
        Position of the network that a row belongs to.
    """

    def __init__(
        self, owners: list[int], own: list[nn.Parameter], moments: list[list[Tensor]], tail: bool
    ) -> None:
        self.owners, self.own, self.tail = owners, own, tail
        self.is_weight = own[0].ndim > 1  # penalised, unlike biases
        self.sizes = [1 if tail else len(p) for p in own]
        self.value = self._joined([p.data for p in own])
        self.moments = [self._joined(list(m)) for m in zip(*moments, strict=True)]
        rows = [owner for owner, size in zip(owners, self.sizes, strict=True) for _ in range(size)]
        self.owner = torch.tensor(rows, device=self.value.device)

    def _joined(self, parts: list[Tensor]) -> Tensor:
        parts = [part if part.ndim > 1 else part[:, None] for part in parts]
        return torch.stack(parts) if self.tail else torch.cat(parts)

    def _views(self, joined: Tensor) -> list[Tensor]:
        views = list(joined) if self.tail else list(joined.split(self.sizes))
        return [v if self.is_weight else v[:, 0] for v in views]

    def lend(self) -> None:
        """Let the networks' own parameters be views of `value`."""
        for parameter, view in zip(self.own, self._views(self.value), strict=True):
            parameter.data = view

    def dissolve(self) -> list[list[Tensor]]:
        """Give the networks memory of their own again; the moments of each."""
        for parameter, view in zip(self.own, self._views(self.value), strict=True):
            parameter.data = view.clone()
        moments = [[view.clone() for view in self._views(m)] for m in self.moments]
        return [list(of_one) for of_one in zip(*moments, strict=True)] or [[] for _ in self.own]


class _Block:
    """Parameters that lie in one piece, so that an update is one call: a large one, or all others.

    Attributes
    ----------
    value : tensor of shape (n_rows, ...)
        Of a large parameter its rows, of others all their numbers as rows.
    owner : int64 tensor of shape (n_rows,)
    is_weight : tensor of shape (n_rows,) or None
        1 for what is penalised, 0 for biases; None where all is.
    """

    def __init__(self, parameters: list[_Parameters], n_moments: int) -> None:
        self.parameters = parameters
        for p in parameters:
            if not p.moments:
                p.moments = [torch.zeros_like(p.value) for _ in range(n_moments)]
        self.is_weight: Tensor | None = None
        if len(parameters) == 1:
            self.value, self.moments = parameters[0].value, parameters[0].moments
            self.owner = parameters[0].owner
            if not parameters[0].is_weight:
                self.is_weight = torch.zeros_like(self.owner, dtype=self.value.dtype)
            return
        sizes = [p.value.numel() for p in parameters]
        self.value = self.joined([p.value for p in parameters])
        self.moments = [self.joined([p.moments[i] for p in parameters]) for i in range(n_moments)]
        self.owner = torch.cat(
            [
                p.owner.repeat_interleave(size // len(p.owner))
                for p, size in zip(parameters, sizes, strict=True)
            ]
        )
        self.is_weight = torch.cat(
            [
                self.value.new_full((size,), p.is_weight)
                for p, size in zip(parameters, sizes, strict=True)
            ]
        )
        for i, p in enumerate(parameters):
            shape = p.value.shape
            p.value = self.value.split(sizes)[i].view(shape)
            p.moments = [m.split(sizes)[i].view(shape) for m in self.moments]

    def joined(self, values: list[Tensor]) -> Tensor:
        if len(values) == 1:
            return values[0]
        return torch.cat([value.flatten() for value in values])

    def spread(self, vector: Tensor | float) -> Tensor | float:
        """Values of the networks as values of the rows, to multiply `value` with."""
        if isinstance(vector, float):
            return vector
        return self._upright(vector.index_select(0, self.owner))

    def spread_to_weights(self, vector: Tensor | float) -> Tensor | float:
        """The same, and 0 for biases."""
        factor = self.spread(vector)
        return factor if self.is_weight is None else self._upright(self.is_weight) * factor

    def _upright(self, rows: Tensor) -> Tensor:
        return rows.view(-1, *[1] * (self.value.ndim - 1))


@dataclass
class _Tower:
    """The networks of one architecture in a stack, behind the first layer's product.

    Attributes
    ----------
    models : list of _Model
    rows : slice
        Of the first layer's outputs, (n_units of all networks, n_rows).
    activation : str
        Name of a class of `_ACTIVATIONS`; "" without hidden layers.
    dropout : tensor of shape (n_models, 1, 1) or None
        Share of units left out in training.
    tails : list of pairs of _Parameters
        Weights (n_models, n_out, n_in) and biases (n_models, n_out, 1) behind the first layer.
    """

    models: list[_Model]
    rows: slice
    activation: str
    dropout: list[float] | None
    tails: list[tuple[_Parameters, _Parameters]] = field(default_factory=list)

    def forward(
        self, block: Tensor, training: bool
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor | None]]]:
        """Logits (n_models, n_outputs, n_rows), and of each hidden layer what the way back needs.

        That is what its activation was of or gave, what it passed on, and the mask between.
        """
        z = block.view(len(self.models), -1, block.shape[1])
        trail = []
        for weights, biases in self.tails:
            kept, h = _ACTIVATIONS[self.activation].forward(z)
            mask = self._mask(h) if training and self.dropout is not None else None
            if mask is not None:
                h = h * mask
            trail.append((kept, h, mask))
            z = torch.baddbmm(_as(biases.value, h.dtype), _as(weights.value, h.dtype), h)
        return z, trail

    def backward(
        self, d: Tensor, trail: list[tuple[Tensor, Tensor, Tensor | None]]
    ) -> tuple[Tensor, list[Tensor]]:
        """Gradient of the first layer's outputs, and those of the tails, from the logits' `d`."""
        gradients: list[Tensor] = []
        for (weights, _), (kept, h, mask) in zip(
            reversed(self.tails), reversed(trail), strict=True
        ):
            dtype = weights.value.dtype
            of_bias = _as(d.sum(2, keepdim=True), dtype)
            of_weight = _as(torch.bmm(d, h.transpose(1, 2)), dtype)
            gradients[:0] = [of_weight, of_bias]
            d = torch.bmm(_as(weights.value, d.dtype).transpose(1, 2), d)
            if mask is not None:
                d = d * mask
            d = _ACTIVATIONS[self.activation].backward(d, kept)
        return d.flatten(0, 1), gradients

    def _mask(self, h: Tensor) -> Tensor:
        """From each network's own generator, drawn as its `Dropout` would: (n_rows, n_units)."""
        assert self.dropout is not None
        mask = torch.empty_like(h)
        for model, share, part in zip(self.models, self.dropout, mask, strict=True):
            keep = h.new_empty(h.shape[2], h.shape[1])
            keep.bernoulli_(1 - share, generator=model.job.generators.dropout).div_(1 - share)
            part.copy_(keep.t())
        return mask


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, which takes ten times as long to find out that there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


class _Activation:
    """An activation and its derivative.

    `forward` gives what `backward` needs beside the activations themselves.
    """

    def __init__(self, forward: Any, backward: Any, *, of_output: bool) -> None:
        self._forward, self.backward, self._of_output = forward, backward, of_output

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        h = self._forward(z)
        return (h if self._of_output else z), h


# By torch's own derivatives, so that networks come out as if autograd had trained them.
_aten = torch.ops.aten
_ACTIVATIONS = {
    "Identity": _Activation(lambda z: z, lambda d, h: d, of_output=True),
    "Sigmoid": _Activation(torch.sigmoid_, _aten.sigmoid_backward, of_output=True),
    "Tanh": _Activation(torch.tanh_, _aten.tanh_backward, of_output=True),
    "ReLU": _Activation(
        torch.relu_, lambda d, h: _aten.threshold_backward(d, h, 0), of_output=True
    ),
    "GELU": _Activation(F.gelu, _aten.gelu_backward, of_output=False),
    "SiLU": _Activation(F.silu, _aten.silu_backward, of_output=False),
}


class _Stack:
    """Networks that see the same batches, with their parameters in common tensors."""

    def __init__(self, models: list[_Model]) -> None:
        towers: dict[tuple, list[_Model]] = {}
        for model in models:
            towers.setdefault(_architecture(model.job.module), []).append(model)
        self.models = [model for alike in towers.values() for model in alike]
        job = self.models[0].job
        self.reader, self.train, self.validation = job.reader, job.train, job.validation
        self.evaluation_rows = job.evaluation_rows
        self.recipe = job.recipe  # what all have in common is read from it
        bounds = [0, *accumulate(len(alike) for alike in towers.values())]
        jobs = [model.job for model in self.models]
        self.loss = _Loss(jobs, self.train, [slice(*pair) for pair in pairwise(bounds)])
        # a generator of its own: the jobs' are set where this one is once they are over
        self.order = torch.Generator()
        self.order.set_state(job.generators.order.get_state())
        self.batches = Batches(
            self.train, job.recipe.batch_size, self.order if job.recipe.shuffle else None
        )
        autocast = job.precision.name == "bfloat16"
        self.dtype = torch.bfloat16 if autocast else job.precision.weights
        self._join(towers)

    def _join(self, towers: dict[tuple, list[_Model]]) -> None:
        owners = list(range(len(self.models)))

        def joined(layer: int, of: list[int], tail: bool) -> tuple[_Parameters, _Parameters]:
            weights, biases = (
                _Parameters(
                    of,
                    [self.models[i].parameters[place] for i in of],
                    [self.models[i].moments[place] for i in of if self.models[i].moments],
                    tail,
                )
                for place in (2 * layer, 2 * layer + 1)
            )
            return weights, biases

        self.first = joined(0, owners, tail=False)
        self.towers = []
        start = row = 0
        for (widths, activation, has_dropout), alike in towers.items():
            of = owners[start : start + len(alike)]
            n_rows = len(alike) * widths[0]
            shares = [_dropout(model.job.module) for model in alike] if has_dropout else None
            tower = _Tower(alike, slice(row, row + n_rows), activation, shares)
            tower.tails = [joined(layer, of, tail=True) for layer in range(1, len(widths))]
            self.towers.append(tower)
            start, row = start + len(alike), row + n_rows
        pairs = [self.first, *(pair for tower in self.towers for pair in tower.tails)]
        self.parameters = [parameters for pair in pairs for parameters in pair]
        self.optimizer = _Optimizer(self.models, self.parameters)
        for parameters in self.parameters:
            parameters.lend()

    def dissolve(self) -> None:
        """Give every network its own weights, moments and place in the order of the rows."""
        moments: list[list[list[Tensor]]] = [[] for _ in self.models]
        for parameters in self.parameters:
            for owner, of_one in zip(parameters.owners, parameters.dissolve(), strict=True):
                moments[owner].append(of_one)
        for model, of_all in zip(self.models, moments, strict=True):
            model.moments = of_all if any(of_all) else []
            model.job.generators.order.set_state(self.order.get_state())

    # -- an epoch ----------------------------------------------------------------------------------

    def run_epoch(self, is_cancelled: Callable[[], bool]) -> list[dict[str, Any]]:
        """Train for an epoch; a row of the history for each network, or none if cancelled."""
        start = time.perf_counter()
        with torch.no_grad():
            index, sizes = self.batches.epoch()
            targets = self.loss.targets(index)
            logits = self._space_for_logits(len(self.train))
            self.optimizer.begin_epoch(sizes, targets)
            pieces = self._pieces(index, sizes, targets, logits)
            for k, size in enumerate(sizes):
                if is_cancelled():
                    return []
                gradients = self._gradients(next(pieces))
                for _ in range(PIECE_ROWS, size, PIECE_ROWS):
                    more = self._gradients(next(pieces))
                    for gradient, addition in zip(gradients, more, strict=True):
                        gradient.add_(addition)
                self.optimizer.step(k, gradients)
            losses, accuracies = self.loss.figures(logits, targets)
            if self.optimizer.penalises:
                losses = losses + self.optimizer.mean_penalties()
            figures = {"train_loss": losses, "train_accuracy": accuracies}
            if self.validation is not None:
                figures["valid_loss"], figures["valid_accuracy"] = self._validate(self.validation)
        return self._rows({name: v.tolist() for name, v in figures.items()}, start)

    def _pieces(
        self, index: Tensor | None, sizes: list[int], targets: _Targets, logits: list[Tensor]
    ) -> Iterator[_Piece]:
        """The batches of an epoch, large ones in pieces; cut all at once, which is quicker."""
        parts = [
            (min(PIECE_ROWS, size - at), 1.0 / size)
            for size in sizes
            for at in range(0, size, PIECE_ROWS)
        ]
        lengths = [length for length, _ in parts]
        order = None if index is None else index.split(lengths)
        rows = self.train.rows[: sum(lengths)].split(lengths) if order is None else None
        wanted = [w.split(lengths, 2) for w in self.loss.of_towers(targets.wanted)]
        spaces = [space.split(lengths, 2) for space in logits]
        weights = targets.shares(sizes)
        shares = [w[:, None].split(lengths, 2) for w in self.loss.of_towers(weights)]
        for i, (_, share) in enumerate(parts):
            yield _Piece(
                rows[i] if rows is not None else self.train.rows.index_select(0, order[i]),  # type: ignore[index]
                [w[i] for w in wanted],
                [w[i] for w in shares] if shares else [share] * len(wanted),
                [space[i] for space in spaces],
            )

    def _space_for_logits(self, n_rows: int) -> list[Tensor]:
        """Of each tower's networks, (n_models, n_outputs, n_rows): they are read once an epoch."""
        like = self.first[0].value
        sizes = [len(tower.models) for tower in self.towers]
        return [like.new_empty(size, self.loss.n_outputs, n_rows) for size in sizes]

    def _rows(self, figures: dict[str, list[float]], start: float) -> list[dict[str, Any]]:
        """Of the history, in the order of a lone fit's."""
        seconds = time.perf_counter() - start
        total = sum(model.cost for model in self.models)
        rows = []
        for i, model in enumerate(self.models):
            row = {
                "epoch": len(model.conductor.history) + 1,
                "train_loss": figures["train_loss"][i],
                "train_accuracy": figures["train_accuracy"][i],
                "learning_rate": model.rates.optimizer.param_groups[0]["lr"],
                "seconds": seconds * model.cost / total,
            }
            valid = ("valid_loss", "valid_accuracy")
            rows.append(row | {name: figures[name][i] for name in valid if name in figures})
        return rows

    def _gradients(self, piece: _Piece) -> list[Tensor]:
        """Of the mean losses, for all parameters in order."""
        x, z = self._first_layer(piece.rows)  # (n_rows, n_features), (n_units of all, n_rows)
        of_first, tails = [], []
        for tower, wanted, shares, space in zip(
            self.towers, piece.wanted, piece.shares, piece.logits, strict=True
        ):
            logits, trail = tower.forward(z[tower.rows], training=True)
            space.copy_(logits)
            d = self.loss.gradient(logits, wanted, shares)
            back, gradients = tower.backward(_as(d, self.dtype), trail)
            of_first.append(back)
            tails += gradients
        d = of_first[0] if len(of_first) == 1 else torch.cat(of_first)
        dtype = self.first[0].value.dtype
        of_weights = _as(matrix_product(d, x.t()), dtype)
        return [of_weights, _as(d.sum(1, keepdim=True), dtype), *tails]

    def _first_layer(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        weights, biases = self.first
        x = _as(self.reader(rows), self.dtype)
        z = matrix_product(_as(weights.value, self.dtype), x)
        return x, z.add_(_as(biases.value, self.dtype))

    def _validate(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of each network on the validation rows, (n_models,)."""
        logits = self._space_for_logits(len(samples))
        at = 0
        for rows, *_ in Batches(samples, self.evaluation_rows):
            _, z = self._first_layer(rows)
            part = slice(at, at + len(rows))
            for tower, space in zip(self.towers, logits, strict=True):
                space[:, :, part], _ = tower.forward(z[tower.rows], training=False)
            at = part.stop
        return self.loss.figures(logits, self.loss.validation_targets(samples))


@dataclass(slots=True)
class _Piece:
    """What a forward pass and the way back take; lists have an entry for each tower."""

    rows: Tensor
    wanted: list[Tensor]  # (n_models or 1, n_outputs, n_rows)
    shares: Sequence[Tensor | float]  # of the rows in the loss, (n_models or 1, 1, n_rows)
    logits: list[Tensor]  # where they go


def _architecture(module: nn.Module) -> tuple[tuple[int, ...], str, bool]:
    """Widths of all layers, the activation's class and whether there is dropout."""
    widths = tuple(layer.out_features for layer in _dense_layers(module))
    names = [type(layer).__name__ for layer in module.features]  # type: ignore[union-attr]
    activation = next((name for name in names if name in _ACTIVATIONS), "")
    return widths, activation, "Dropout" in names


def _dropout(module: nn.Module) -> float:
    return next(layer.p for layer in module.modules() if isinstance(layer, nn.Dropout))


# -- losses, figures, updates ----------------------------------------------------------------------


@dataclass
class _Targets:
    """What the networks are to say of the rows of one pass, in its order.

    The first dimension is 1 where all networks are told the same.

    Attributes
    ----------
    codes : int64 tensor of shape (n_models or 1, n_rows)
    wanted : tensor of shape (n_models or 1, n_outputs, n_rows)
        What the outputs are drawn to.
    weights : tensor of shape (n_models or 1, n_rows) or None
    """

    codes: Tensor
    wanted: Tensor
    weights: Tensor | None

    def in_order(self, index: Tensor | None) -> _Targets:
        if index is None:
            return self
        weights = None if self.weights is None else self.weights.index_select(1, index)
        return _Targets(
            self.codes.index_select(1, index), self.wanted.index_select(2, index), weights
        )

    def shares(self, sizes: list[int]) -> Tensor | None:
        """Weights over the sum of their batch, (n_models or 1, n_rows)."""
        if self.weights is None:
            return None
        sums = self.weight_sums(sizes).repeat_interleave(torch.tensor(sizes), 0)
        return self.weights / sums.T.to(self.weights)

    def weight_sums(self, sizes: list[int]) -> Tensor:
        """Of each batch and network, (n_batches, n_models or 1), float64 on the CPU."""
        if self.weights is None:
            return torch.tensor(sizes, dtype=torch.float64)[:, None]
        sums = [part.sum(1) for part in self.weights.split(sizes, 1)]
        return torch.stack(sums).double().cpu()


class _Loss:
    """`ClassificationLoss` of every network at once, and its gradient."""

    def __init__(self, jobs: list[TrainingJob], train: Samples, bounds: list[slice]) -> None:
        criteria = [job.criterion for job in jobs]
        self.kind = criteria[0].loss
        self.n_outputs = _dense_layers(jobs[0].module)[-1].out_features
        self.bounds = bounds  # of the towers' networks
        self.dtype = jobs[0].precision.weights
        smoothing = [float(criterion.label_smoothing) for criterion in criteria]  # type: ignore[arg-type]
        alike = all(_equal(job.train.targets, train.targets) for job in jobs)
        codes = torch.stack([job.train.targets for job in (jobs[:1] if alike else jobs)])
        if len(set(smoothing)) > 1 and alike:
            codes = codes.expand(len(jobs), -1)
        same_weights = all(_equal(job.train.weight, train.weight) for job in jobs)
        weights = None
        if not same_weights:
            ones = torch.ones(len(train.rows), dtype=self.dtype, device=train.rows.device)
            own = [ones if job.train.weight is None else job.train.weight for job in jobs]
            weights = torch.stack(own)
        elif train.weight is not None:
            weights = train.weight[None]
        self.all_targets = _Targets(codes, self._wanted(codes, smoothing[: len(codes)]), weights)

    def _wanted(self, codes: Tensor, smoothing: list[float]) -> Tensor:
        binary = self.n_outputs == 1
        shares = torch.tensor(smoothing, dtype=self.dtype, device=codes.device)[:, None, None]
        if binary and self.kind == "squared_error":
            return (1 - shares) * (2 * codes[:, None].to(self.dtype) - 1)
        if binary:
            return codes[:, None].to(self.dtype) * (1 - shares) + shares / 2
        classes = torch.arange(self.n_outputs, device=codes.device)[:, None]
        one_hot = (codes[:, None] == classes).to(self.dtype)
        return (1 - shares) * one_hot + shares / self.n_outputs

    def targets(self, index: Tensor | None) -> _Targets:
        return self.all_targets.in_order(index)

    def validation_targets(self, samples: Samples) -> _Targets:
        codes = samples.y[None]
        weight = samples.used_weight()
        wanted = self._wanted(codes, [0.0])
        return _Targets(codes, wanted, None if weight is None else weight[None])

    def of_towers(self, values: Tensor | None) -> list[Tensor]:
        """Each tower's part of what all networks or each have."""
        if values is None:
            return []
        if len(values) == 1:
            return [values] * len(self.bounds)
        return [values[bounds] for bounds in self.bounds]

    def gradient(self, logits: Tensor, wanted: Tensor, shares: Tensor | float) -> Tensor:
        """Of the mean loss of a batch; `shares` are its rows' weights over their sum."""
        logits = _as(logits, self.dtype)
        if self.kind == "squared_error":
            d = (logits - wanted).div_(self.n_outputs)
        elif self.n_outputs == 1:
            d = torch.sigmoid(logits).sub_(wanted)
        else:
            d = torch.softmax(logits, 1).sub_(wanted)
        return d.mul_(shares)

    def losses(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """Of every network and row, (n_models, n_rows)."""
        if self.kind == "squared_error":
            return (logits - wanted).square_().mean(1).div_(2)
        if self.n_outputs == 1:
            return F.binary_cross_entropy_with_logits(
                logits, wanted.expand_as(logits), reduction="none"
            )[:, 0]
        return torch.log_softmax(logits, 1).mul_(wanted).sum(1).neg_()

    def figures(self, logits: list[Tensor], targets: _Targets) -> tuple[Tensor, Tensor]:
        """Weighted mean loss and accuracy of each network, (n_models,), on the CPU."""
        means = []
        own = (self.of_towers(values) for values in (targets.wanted, targets.codes))
        all_weights = self.of_towers(targets.weights)
        for i, (outputs, wanted, codes) in enumerate(zip(logits, *own, strict=True)):
            losses, right = self.losses(outputs, wanted), self._right(outputs, codes)
            both = torch.stack([losses.double(), right.double()])  # (2, n_models, n_rows)
            if not all_weights:
                means.append(both.mean(2))
            else:
                weights = all_weights[i].double()
                means.append((both * weights).sum(2) / weights.sum(1))
        loss, accuracy = torch.cat(means, 1).cpu()
        return loss, accuracy

    def _right(self, outputs: Tensor, codes: Tensor) -> Tensor:
        """Whether the predicted class is that of the code, (n_models, n_rows).

        As argmax(1), which takes ten times as long where the classes are not the last dimension.
        """
        if self.n_outputs == 1:
            return (outputs[:, 0] > 0).long() == codes
        codes = codes[:, None]
        is_highest = outputs == outputs.amax(1, keepdim=True)
        classes = torch.arange(self.n_outputs, device=codes.device)[:, None]
        # of equal outputs the first counts
        preceded = (is_highest & (classes < codes)).any(1)
        return is_highest.gather(1, codes.expand(len(outputs), -1, -1))[:, 0] & ~preceded


class _Optimizer:
    """torch.optim's updates with the hyperparameters of each network."""

    def __init__(self, models: list[_Model], parameters: list[_Parameters]) -> None:
        self.recipes = [model.job.recipe for model in models]
        self.models, self.parameters = models, parameters
        first = self.recipes[0]
        self.solver, self.nesterov = first.solver, first.nesterovs_momentum
        self.clips_norm = first.clip_grad_norm is not None
        self.clips_value = first.clip_grad_value is not None
        # as in a lone fit: clipping comes between the penalty and the decay, and AdamW's decay is
        # no part of the gradient
        self.adds_penalty = self.solver == "adamw" or self.clips_norm or self.clips_value
        self.n_steps = models[0].rates.step
        n_moments = 2
        if self.solver == "sgd":
            n_moments = 1 if any(recipe.momentum for recipe in self.recipes) else 0
        is_large = [p.value.numel() >= _SMALL for p in parameters]
        small = [i for i, large in enumerate(is_large) if not large]
        self.places = [[i] for i, large in enumerate(is_large) if large]
        self.places += [small] if small else []
        self.blocks = [_Block([parameters[i] for i in of], n_moments) for of in self.places]
        # of each network's weights or, in the first layer, each unit's
        self.weights = [(p.value.flatten(1), p.owner) for p in parameters if p.is_weight]
        self.like = parameters[0].value
        self.data_weights = [model.job.train.total_weight() for model in models]
        names = ("momentum", "beta_1", "beta_2", "epsilon")
        self.constants = {name: self._spread(self._of_recipes(name)) for name in names}
        self.decays = self._spread_to_weights(self._of_recipes("weight_decay"))
        if self.clips_norm:
            self.norm_limit = torch.as_tensor(self._of_recipes("clip_grad_norm")).to(self.like)
        if self.clips_value:
            self.value_limit = self._spread(self._of_recipes("clip_grad_value"))

    def _of_recipes(self, name: str) -> Tensor | float:
        return self._vector([float(getattr(recipe, name)) for recipe in self.recipes])

    def _vector(self, values: list[float]) -> Tensor | float:
        """A value for each network, or the one that they share."""
        if len(set(values)) == 1:
            return values[0]
        return torch.tensor(values, dtype=torch.float64).to(self.like)

    def _spread(self, vector: Tensor | float) -> list[Tensor | float]:
        return [block.spread(vector) for block in self.blocks]

    def _spread_to_weights(self, vector: Tensor | float) -> list[Tensor | float]:
        return [block.spread_to_weights(vector) for block in self.blocks]

    # -- what an epoch's steps share -----------------------------------------------------------

    def begin_epoch(self, sizes: list[int], targets: _Targets) -> None:
        rates = [model.rates.next_rates(len(sizes)) for model in self.models]
        rate_table = torch.tensor(rates, dtype=torch.float64).T  # (n_batches, n_models)
        self.sums = targets.weight_sums(sizes)  # (n_batches, n_models or 1)
        alphas = torch.tensor([r.alpha for r in self.recipes], dtype=torch.float64)
        over_data = torch.tensor([r.alpha_over_data for r in self.recipes])
        data = torch.tensor(self.data_weights, dtype=torch.float64)
        strengths = alphas / torch.where(over_data, data, self.sums)  # (n_batches, n_models)
        decays = torch.tensor([r.weight_decay for r in self.recipes], dtype=torch.float64)
        self.coupled = strengths + (0.0 if self.solver == "adamw" else decays)
        self.penalises = bool(self.coupled.any())
        self.norms = [self.like.new_zeros(len(sizes), len(owner)) for _, owner in self.weights]
        # that of most steps is the same
        self.rates = _Table(rate_table, self._spread, self._vector)
        penalties = strengths if self.adds_penalty else self.coupled
        self.penalties = _Table(penalties, self._spread_to_weights, self._vector)

    def mean_penalties(self) -> Tensor:
        """What the penalty adds to each network's mean loss of the epoch, (n_models,)."""
        per_model = torch.zeros(self.coupled.shape, dtype=torch.float64, device=self.like.device)
        for norms, (_, owner) in zip(self.norms, self.weights, strict=True):
            per_model.index_add_(1, owner, norms.double().square_())
        shares = self.sums / self.sums.sum(0)
        return (self.coupled / 2 * per_model.cpu() * shares).sum(0)

    # -- a step --------------------------------------------------------------------------------

    def step(self, k: int, gradients: list[Tensor]) -> None:
        """Update all networks with the gradients of their parameters."""
        self.n_steps += 1
        joined = [
            block.joined([gradients[i] for i in places])
            for block, places in zip(self.blocks, self.places, strict=True)
        ]
        if self.penalises:
            for norms, (weights, _) in zip(self.norms, self.weights, strict=True):
                torch.linalg.vector_norm(weights, dim=1, out=norms[k])
            self._add_weights(joined, self.penalties[k])
        if self.clips_value:
            for gradient, limit in zip(joined, self.value_limit, strict=True):
                gradient.clamp_(-limit, limit)  # type: ignore[arg-type]
        if self.clips_norm:
            self._clip_norms(joined)
        if self.adds_penalty and self.solver != "adamw":
            self._add_weights(joined, self.decays)
        update = self._sgd if self.solver == "sgd" else self._adam
        for i, (rate, gradient) in enumerate(zip(self.rates[k], joined, strict=True)):
            update(i, self.blocks[i], gradient, rate)

    def _add_weights(self, gradients: list[Tensor], factors: list[Tensor | float]) -> None:
        for block, gradient, factor in zip(self.blocks, gradients, factors, strict=True):
            _add_scaled(gradient, block.value, factor)

    def _clip_norms(self, gradients: list[Tensor]) -> None:
        squares = self.like.new_zeros(len(self.models))
        for block, gradient in zip(self.blocks, gradients, strict=True):
            of_rows = gradient.square().reshape(block.owner.shape[0], -1).sum(1)
            squares.index_add_(0, block.owner, of_rows)
        factors = (self.norm_limit / (squares.sqrt() + 1e-6)).clamp_(max=1.0)
        for block, gradient in zip(self.blocks, gradients, strict=True):
            gradient.mul_(block.spread(factors))

    def _sgd(self, i: int, block: _Block, gradient: Tensor, rate: Tensor | float) -> None:
        if block.moments:
            momentum = self.constants["momentum"][i]
            buffer = block.moments[0]
            if isinstance(momentum, float):
                torch.add(gradient, buffer, alpha=momentum, out=buffer)
            else:
                buffer.mul_(momentum).add_(gradient)
            if self.nesterov:
                _add_scaled(gradient, buffer, momentum)
            else:
                gradient = buffer
        _subtract_scaled(block.value, gradient, rate)

    def _adam(self, i: int, block: _Block, gradient: Tensor, rate: Tensor | float) -> None:
        beta_1, beta_2, epsilon = (
            self.constants[name][i] for name in ("beta_1", "beta_2", "epsilon")
        )
        if self.solver == "adamw":
            block.value.mul_(1 - rate * self.decays[i])
        mean, square = block.moments
        mean.lerp_(gradient, 1 - beta_1)
        square.mul_(beta_2).add_(gradient.square_().mul_(1 - beta_2))
        root = (square / (1 - beta_2**self.n_steps)).sqrt_().add_(epsilon)
        rate = rate / (1 - beta_1**self.n_steps)
        _subtract_scaled(block.value, root.reciprocal_().mul_(mean), rate)


class _Table:
    """Factors of the networks in each step, (n_batches, n_models), as the blocks want them."""

    def __init__(
        self,
        values: Tensor,
        spread: Callable[[Tensor | float], list[Tensor | float]],
        vector: Callable[[list[float]], Tensor | float],
    ) -> None:
        rows = [tuple(row) for row in values.tolist()]
        few = len(set(rows)) <= 2  # batches of two sizes
        self.rows, self.spread, self.vector = rows, spread, vector
        self.known = {row: self._made(row) for row in set(rows)} if few else {}

    def _made(self, row: tuple[float, ...]) -> list[Tensor | float]:
        return self.spread(self.vector(list(row)))

    def __getitem__(self, step: int) -> list[Tensor | float]:
        row = self.rows[step]
        return self.known[row] if self.known else self._made(row)


def _add_scaled(target: Tensor, source: Tensor, factor: Tensor | float) -> None:
    if isinstance(factor, Tensor):
        target.addcmul_(source, factor)
    elif factor:
        target.add_(source, alpha=factor)


def _subtract_scaled(target: Tensor, source: Tensor, factor: Tensor | float) -> None:
    if isinstance(factor, Tensor):
        target.addcmul_(source, factor, value=-1)
    elif factor:
        target.sub_(source, alpha=factor)
