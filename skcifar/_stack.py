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
from collections.abc import Sequence
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

# Bytes of weights, gradients and moments of one stack on a CPU: what stays in its cache. Of 100 units
# on MNIST in batches of 32 an epoch takes 12 ms a network in stacks of 12 (11 MB), 19 in stacks of 96.
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
    if job.skorch_callbacks:
        return "skorch_callbacks want a net of their own"
    if callable(job.recipe.learning_rate):
        return "a learning_rate that is a callable wants an optimizer of its own"
    if job.state is not None:
        return "it goes on from an earlier fit"
    return None


def groups_of(jobs: Sequence[TrainingJob]) -> list[list[int]]:
    """Positions of the jobs that train as one program, in groups of at least one."""
    groups: list[list[int]] = []
    stacks: dict[tuple, list[list[int]]] = {}
    for i, job in enumerate(jobs):
        if why_alone(job) is not None:
            groups.append([i])
            continue
        alike = stacks.setdefault(_stack_key(job), [])
        group = next((g for g in alike if _sees_the_same(job, jobs[g[0]])), None)
        if group is None:
            group = []
            alike.append(group)
            groups.append(group)
        group.append(i)
    return [part for group in groups for part in _parts(group, jobs)]


def _stack_key(job: TrainingJob) -> tuple:
    """What jobs of one stack have in common, as far as it is quickly compared."""
    recipe, criterion = job.recipe, job.criterion
    n_features = job.train.rows.shape[1]
    validation = job.validation
    return (
        (n_features, job.module.head.out_features, criterion.loss),  # type: ignore[union-attr]
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


def _parts(group: list[int], jobs: Sequence[TrainingJob]) -> list[list[int]]:
    """A group cut into stacks that the memory holds, of nearly equal size."""
    device = jobs[group[0]].reader.device
    cache = _CACHE_BYTES if device.type == "cpu" else math.inf
    memory = free_memory(device) * _MEMORY_SHARE
    cached = sum(_bytes_of_weights(jobs[i]) for i in group)
    whole = sum(stack_bytes(jobs[i]) for i in group)
    n_parts = max(1, math.ceil(cached / cache), math.ceil(whole / memory))
    n_parts = min(n_parts, len(group))
    bounds = [len(group) * i // n_parts for i in range(n_parts + 1)]
    return [group[start:stop] for start, stop in pairwise(bounds)]


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
    try:
        _train_models(models)
    except (RuntimeError, MemoryError) as error:
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
    middle = len(jobs) // 2
    return train_group(jobs[:middle]) + train_group(jobs[middle:])


def _train_models(models: list[_Model]) -> None:
    """Train until each is over or paused; those that are make room for the others."""
    while left := [model for model in models if not model.is_done]:
        stack = _Stack(left)
        try:
            while not any(model.is_done for model in left):
                stack.run_epoch()
        finally:
            stack.dissolve()


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
    operations : float
        Multiplications and additions of its training so far, up to a common factor.
    """

    def __init__(self, job: TrainingJob) -> None:
        self.job = detached(job)
        recipe = job.recipe
        n_batches = len(Batches(job.train, recipe.batch_size))
        rate = SimpleNamespace(param_groups=[{"lr": recipe.learning_rate_init, "rate_factor": 1.0}])
        self.rates = LearningRates(recipe, rate, len(job.train), recipe.max_iter * n_batches)  # type: ignore[arg-type]
        self.conductor = Conductor(self.job, self.rates)
        layers = _dense_layers(self.job.module)
        self.parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
        self.moments: list[list[Tensor]] = []
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

    @property
    def is_done(self) -> bool:
        if self.is_over or self.error is not None:
            return True
        return len(self.conductor.history) >= self.until

    def epoch_over(self, row: dict) -> None:
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
        The rows of the first network, of the second, and so on.
    owner : int64 tensor of shape (n_rows,)
        Position of the network that a row belongs to.
    parts : list of tensors
        The networks' own parameters, which become views of `value`.
    """

    def __init__(
        self, owners: list[int], own: list[nn.Parameter], moments: list[list[Tensor]], tail: bool
    ) -> None:
        # Tails of one architecture have a dimension for the network, (n, n_out, n_in), and biases
        # one for the samples: (n_rows, 1) or (n, n_out, 1).
        self.owners, self.own, self.tail = owners, own, tail
        self.penalised = own[0].ndim > 1
        self.value = self._joined([p.data for p in own])
        self.sizes = [1 if tail else len(p) for p in own]
        self.owner = torch.tensor(
            [owner for owner, size in zip(owners, self.sizes, strict=True) for _ in range(size)],
            device=self.value.device,
        )
        self.moments = [self._joined(list(m)) for m in zip(*moments, strict=True)]
        for parameter, view in zip(own, self._views(self.value), strict=True):
            parameter.data = view

    def _joined(self, parts: list[Tensor]) -> Tensor:
        parts = [part if part.ndim > 1 else part[:, None] for part in parts]
        return torch.stack(parts) if self.tail else torch.cat(parts)

    def _views(self, joined: Tensor) -> list[Tensor]:
        views = list(joined) if self.tail else list(joined.split(self.sizes))
        return [v if self.penalised else v[:, 0] for v in views]

    def dissolve(self) -> list[list[Tensor]]:
        """Give the networks memory of their own again; the moments of each."""
        for parameter, view in zip(self.own, self._views(self.value), strict=True):
            parameter.data = view.clone()
        moments = [[view.clone() for view in self._views(m)] for m in self.moments]
        return [list(of_one) for of_one in zip(*moments, strict=True)] or [[] for _ in self.own]

    def spread(self, vector: Tensor | float) -> Tensor | float:
        """Values of the networks as values of the rows, to multiply `value` with."""
        if isinstance(vector, float):
            return vector
        return vector.index_select(0, self.owner).view(-1, *[1] * (self.value.ndim - 1))


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
            z = torch.baddbmm(biases.value.to(h.dtype), weights.value.to(h.dtype), h)
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
            of_bias = d.sum(2, keepdim=True).to(dtype)
            of_weight = torch.bmm(d, h.transpose(1, 2)).to(dtype)
            gradients[:0] = [of_weight, of_bias]
            d = torch.bmm(weights.value.to(d.dtype).transpose(1, 2), d)
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
        self.optimizer = _Optimizer(self.models, self.parameters)

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

    def dissolve(self) -> None:
        """Give every network its own weights, moments and place in the order of the rows."""
        moments: list[list[list[Tensor]]] = [[] for _ in self.models]
        for first, second in zip(self.parameters[::2], self.parameters[1::2], strict=True):
            for parameters in (first, second):
                for owner, own in zip(parameters.owners, parameters.dissolve(), strict=True):
                    moments[owner].append(own)
        for model, own in zip(self.models, moments, strict=True):
            model.moments = own if any(own) else []
            model.job.generators.order.set_state(self.order.get_state())

    # -- an epoch ----------------------------------------------------------------------------------

    def run_epoch(self) -> None:
        start = time.perf_counter()
        for model in self.models:
            model.job.on_epoch_begin()
        with torch.no_grad():
            index, sizes = self.batches.epoch()
            targets = self.loss.targets(index)
            logits = self._space_for_logits(len(self.train))
            self.optimizer.begin_epoch(sizes, targets)
            at = 0
            for k, size in enumerate(sizes):
                rows = self.train.rows
                picked = slice(at, at + size)
                batch = rows[picked] if index is None else rows.index_select(0, index[picked])
                self.optimizer.step(k, self._gradients(batch, at, k, targets, logits))
                at += size
            losses, accuracies = self.loss.figures(logits, targets)
            if self.optimizer.penalises:
                losses = losses + self.optimizer.penalties()
            figures = {"train_loss": losses, "train_accuracy": accuracies}
            if self.validation is not None:
                figures["valid_loss"], figures["valid_accuracy"] = self._validate(self.validation)
        self._close_epoch({name: values.tolist() for name, values in figures.items()}, start)

    def _space_for_logits(self, n_rows: int) -> list[Tensor]:
        """Of each tower's networks, (n_models, n_outputs, n_rows): they are read once an epoch."""
        like = self.first[0].value
        sizes = [len(tower.models) for tower in self.towers]
        return [like.new_empty(size, self.loss.n_outputs, n_rows) for size in sizes]

    def _close_epoch(self, figures: dict[str, list[float]], start: float) -> None:
        seconds = time.perf_counter() - start
        operations = [_operations(model.job) for model in self.models]
        for i, model in enumerate(self.models):
            model.n_rows_seen += len(self.train)
            model.operations += operations[i]
            row = {
                "epoch": len(model.conductor.history) + 1,
                "train_loss": figures["train_loss"][i],
                "train_accuracy": figures["train_accuracy"][i],
                "learning_rate": model.rates.optimizer.param_groups[0]["lr"],
                "seconds": seconds * operations[i] / sum(operations),
            }
            valid = ("valid_loss", "valid_accuracy")
            model.epoch_over(row | {name: figures[name][i] for name in valid if name in figures})

    def _gradients(
        self, rows: Tensor, start: int, step: int, targets: _Targets, logits: list[Tensor]
    ) -> list[Tensor]:
        """Of the mean losses of one batch, for all parameters in order."""
        gradients: list[Tensor] = []
        for at in range(0, len(rows), PIECE_ROWS):
            piece = rows[at : at + PIECE_ROWS]
            part = slice(start + at, start + at + len(piece))
            more = self._gradients_of_piece(piece, part, step, targets, logits)
            if not gradients:
                gradients = more
            else:
                for gradient, addition in zip(gradients, more, strict=True):
                    gradient.add_(addition)
        return gradients

    def _gradients_of_piece(
        self, rows: Tensor, part: slice, step: int, targets: _Targets, logits: list[Tensor]
    ) -> list[Tensor]:
        x, z = self._first_layer(rows)  # (n_rows, n_features), (n_units of all, n_rows)
        shares = self.optimizer.share(step)
        of_first, tails = [], []
        for i, tower in enumerate(self.towers):
            outputs, trail = tower.forward(z[tower.rows], training=True)
            logits[i][:, :, part] = outputs
            d = self.loss.gradient(outputs, i, part, targets, shares)
            back, gradients = tower.backward(d.to(self.dtype), trail)
            of_first.append(back)
            tails += gradients
        d = of_first[0] if len(of_first) == 1 else torch.cat(of_first)
        dtype = self.first[0].value.dtype
        of_weights = matrix_product(d, x.t()).to(dtype)
        return [of_weights, d.sum(1, keepdim=True).to(dtype), *tails]

    def _first_layer(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        weights, biases = self.first
        x = self.reader(rows).to(self.dtype)
        z = matrix_product(weights.value.to(self.dtype), x)
        return x, z.add_(biases.value.to(self.dtype))

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


def _architecture(module: nn.Module) -> tuple[tuple[int, ...], str, bool]:
    """Widths of all layers, the activation's class and whether there is dropout."""
    widths = tuple(layer.out_features for layer in _dense_layers(module))
    names = [type(layer).__name__ for layer in module.features]  # type: ignore[union-attr]
    activation = next((name for name in names if name in _ACTIVATIONS), "")
    return widths, activation, "Dropout" in names


def _dropout(module: nn.Module) -> float:
    return next(layer.p for layer in module.modules() if isinstance(layer, nn.Dropout))


def _operations(job: TrainingJob) -> float:
    """Of one epoch, up to a common factor."""
    return float(sum(layer.weight.numel() for layer in _dense_layers(job.module)) * len(job.train))


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
        self.n_outputs = jobs[0].module.head.out_features  # type: ignore[union-attr]
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

    def of(self, tower: int, values: Tensor) -> Tensor:
        """A tower's part of what all networks or each have."""
        return values if len(values) == 1 else values[self.bounds[tower]]

    def gradient(
        self, logits: Tensor, tower: int, part: slice, targets: _Targets, shares: Tensor | float
    ) -> Tensor:
        """Of the mean loss of a batch; `shares` are its rows' weights over their sum."""
        logits = logits.to(self.dtype)
        wanted = self.of(tower, targets.wanted)[:, :, part]
        if self.kind == "squared_error":
            d = (logits - wanted).div_(self.n_outputs)
        elif self.n_outputs == 1:
            d = torch.sigmoid(logits).sub_(wanted)
        else:
            d = torch.softmax(logits, 1).sub_(wanted)
        if isinstance(shares, float):
            return d.mul_(shares)
        return d.mul_(self.of(tower, shares)[:, None, part])

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
        for tower, outputs in enumerate(logits):
            losses = self.losses(outputs, self.of(tower, targets.wanted))
            right = self._right(outputs, self.of(tower, targets.codes))
            both = torch.stack([losses.double(), right.double()])  # (2, n_models, n_rows)
            if targets.weights is None:
                means.append(both.mean(2))
            else:
                weights = self.of(tower, targets.weights).double()
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
        self.like = parameters[0].value
        self.data_weights = [model.job.train.total_weight() for model in models]
        self.n_steps = models[0].rates.step
        n_moments = {"sgd": 1 if any(r.momentum for r in self.recipes) else 0}.get(self.solver, 2)
        for p in parameters:
            if not p.moments:
                p.moments = [torch.zeros_like(p.value) for _ in range(n_moments)]
        names = ("momentum", "beta_1", "beta_2", "epsilon", "weight_decay")
        self.constants = {name: self._spread(self._vector(name)) for name in names}
        if self.clips_norm:
            limits = [r.clip_grad_norm for r in self.recipes]
            self.norm_limit = torch.tensor(limits, dtype=torch.float64).to(self.like)
        if self.clips_value:
            self.value_limit = self._spread(self._vector("clip_grad_value"))

    def _vector(self, values: str | list[float] | Tensor) -> Tensor | float:
        """A value for each network, or the one they share; by the parameter's name or as given."""
        if isinstance(values, str):
            values = [float(getattr(recipe, values)) for recipe in self.recipes]
        if isinstance(values, Tensor):
            values = values.tolist()
        if len(set(values)) == 1:
            return values[0]
        return torch.tensor(values, dtype=torch.float64).to(self.like)

    def _spread(self, vector: Tensor | float) -> list[Tensor | float]:
        return [p.spread(vector) for p in self.parameters]

    # -- what an epoch's steps share -----------------------------------------------------------

    def begin_epoch(self, sizes: list[int], targets: _Targets) -> None:
        rates = [model.rates.next_rates(len(sizes)) for model in self.models]
        self.rates = torch.tensor(rates, dtype=torch.float64).T  # (n_batches, n_models)
        self.sums = targets.weight_sums(sizes)  # (n_batches, n_models or 1)
        self.shares: Tensor | list[float] = [1.0 / size for size in sizes]
        if targets.weights is not None:
            repeats = torch.tensor(sizes)
            per_row = self.sums.repeat_interleave(repeats, 0).T.to(targets.weights)
            self.shares = targets.weights / per_row
        alphas = torch.tensor([r.alpha for r in self.recipes], dtype=torch.float64)
        over_data = torch.tensor([r.alpha_over_data for r in self.recipes])
        data = torch.tensor(self.data_weights, dtype=torch.float64)
        self.strengths = alphas / torch.where(over_data, data, self.sums)  # (n_batches, n_models)
        decays = torch.tensor([r.weight_decay for r in self.recipes], dtype=torch.float64)
        self.coupled = self.strengths + (0.0 if self.solver == "adamw" else decays)
        self.penalises = bool(self.coupled.any())
        self.cached: dict[tuple, list[Tensor | float]] = {}
        rows = [p.owner for p in self.parameters if p.penalised]
        self.owner_of_norm = torch.cat(rows)
        self.norms = self.like.new_zeros(len(sizes), len(self.owner_of_norm))

    def share(self, step: int) -> Tensor | float:
        return self.shares[step] if isinstance(self.shares, list) else self.shares

    def _of_step(self, name: str, step: int) -> list[Tensor | float]:
        """A table's row, spread; few of them differ within an epoch."""
        row = getattr(self, name)[step]
        key = (name, *row.tolist())
        if key not in self.cached:
            if len(self.cached) > 16:
                self.cached.clear()
            self.cached[key] = self._spread(self._vector(row))
        return self.cached[key]

    def penalties(self) -> Tensor:
        """What the penalty adds to each network's mean loss of the epoch, (n_models,)."""
        squares = self.norms.double().square_()
        per_model = squares.new_zeros(len(squares), len(self.models))
        per_model.index_add_(1, self.owner_of_norm, squares)
        shares = self.sums / self.sums.sum(0)
        return (self.coupled / 2 * per_model.cpu() * shares).sum(0)

    # -- a step --------------------------------------------------------------------------------

    def step(self, k: int, gradients: list[Tensor]) -> None:
        self.n_steps += 1
        if self.penalises:
            self._record_norms(k)
        strengths = self._of_step("strengths" if self.adds_penalty else "coupled", k)
        self._add_weights(gradients, strengths)
        if self.clips_value:
            for gradient, limit in zip(gradients, self.value_limit, strict=True):
                gradient.clamp_(-limit, limit)  # type: ignore[arg-type]
        if self.clips_norm:
            self._clip_norms(gradients)
        if self.adds_penalty and self.solver != "adamw":
            self._add_weights(gradients, self.constants["weight_decay"])
        update = self._sgd if self.solver == "sgd" else self._adam
        for i, (rate, gradient) in enumerate(
            zip(self._of_step("rates", k), gradients, strict=True)
        ):
            update(i, self.parameters[i], gradient, rate)

    def _record_norms(self, k: int) -> None:
        at = 0
        for p in self.parameters:
            if p.penalised:
                rows = slice(at, at + len(p.value))
                torch.linalg.vector_norm(p.value.flatten(1), dim=1, out=self.norms[k, rows])
                at = rows.stop

    def _add_weights(self, gradients: list[Tensor], factors: list[Tensor | float]) -> None:
        for p, gradient, factor in zip(self.parameters, gradients, factors, strict=True):
            if p.penalised:
                _add_scaled(gradient, p.value, factor)

    def _clip_norms(self, gradients: list[Tensor]) -> None:
        squares = self.like.new_zeros(len(self.models))
        for p, gradient in zip(self.parameters, gradients, strict=True):
            squares.index_add_(0, p.owner, gradient.flatten(1).square().sum(1))
        factors = (self.norm_limit / (squares.sqrt() + 1e-6)).clamp_(max=1.0)
        for p, gradient in zip(self.parameters, gradients, strict=True):
            gradient.mul_(p.spread(factors))

    def _sgd(self, i: int, p: _Parameters, gradient: Tensor, rate: Tensor | float) -> None:
        if p.moments:
            momentum = self.constants["momentum"][i]
            if isinstance(momentum, float):
                torch.add(gradient, p.moments[0], alpha=momentum, out=p.moments[0])
            else:
                p.moments[0].mul_(momentum).add_(gradient)
            if self.nesterov:
                _add_scaled(gradient, p.moments[0], momentum)
            else:
                gradient = p.moments[0]
        _add_scaled(p.value, gradient, -rate)

    def _adam(self, i: int, p: _Parameters, gradient: Tensor, rate: Tensor | float) -> None:
        beta_1, beta_2, epsilon, decay = (
            self.constants[name][i] for name in ("beta_1", "beta_2", "epsilon", "weight_decay")
        )
        if self.solver == "adamw" and p.penalised:
            p.value.mul_(1 - rate * decay)
        mean, square = p.moments
        mean.lerp_(gradient, 1 - beta_1)
        square.mul_(beta_2).add_(gradient.square_().mul_(1 - beta_2))
        root = (square / (1 - beta_2**self.n_steps)).sqrt_().add_(epsilon)
        _add_scaled(p.value, mean / root, -rate / (1 - beta_1**self.n_steps))


def _add_scaled(target: Tensor, source: Tensor, factor: Tensor | float) -> None:
    if isinstance(factor, Tensor):
        target.addcmul_(source, factor)
    elif factor:
        target.add_(source, alpha=factor)
