"""Many dense networks as one program.

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

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skcifar._batches import Batches, Samples
from skcifar._conductor import Conductor
from skcifar._jobs import TrainingJob, TrainingResult
from skcifar._matmul import matrix_product
from skcifar._optimization import LearningRates
from skcifar._stacked_loss import Loss, Targets
from skcifar._stacked_parameters import Factors, Optimizer, Parameters
from skcifar._tape import Tapes, records_operations
from skcifar._training import PIECE_ROWS, detached

# Bytes of rows of which a stack holds a copy in bfloat16, half as large.
_MOST_NARROWED = 2**26


class Model:
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
        self.conductor.act_for(job)
        self.job.module.eval()  # for whoever looks at it between two epochs
        layers = dense_layers(self.job.module)
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

    def taken_up(self, job: TrainingJob) -> Model:
        """This model, to be trained further on behalf of `job`."""
        self.conductor.act_for(job)
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

    def result(self, job: TrainingJob) -> TrainingResult:
        paused = None if job.pause_after is None else self
        return self.conductor.result(job, self._optimizer_state(), self.n_rows_seen, paused=paused)

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


def dense_layers(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


# -- the stack -------------------------------------------------------------------------------------


class Stack:
    """Networks that see the same batches, with their parameters in common tensors."""

    def __init__(self, models: list[Model]) -> None:
        towers: dict[tuple, list[Model]] = {}
        for model in models:
            towers.setdefault(_architecture(model.job.module), []).append(model)
        self.models = [model for alike in towers.values() for model in alike]
        job = self.models[0].job
        self.reader, self.train, self.validation = job.reader, job.train, job.validation
        # whether rows are more than the network's input as they are, which need not be asked twice
        self.reads_in = job.reader.mean is not None or job.train.rows.device != job.reader.device
        self.evaluation_rows = job.evaluation_rows
        self.recipe = job.recipe  # what all have in common is read from it
        bounds = [0, *accumulate(len(alike) for alike in towers.values())]
        jobs = [model.job for model in self.models]
        n_outputs = dense_layers(job.module)[-1].out_features
        self.loss = Loss(jobs, self.train, n_outputs, [slice(*pair) for pair in pairwise(bounds)])
        # a generator of its own: the jobs' are set where this one is once they are over
        self.order = torch.Generator()
        self.order.set_state(job.generators.order.get_state())
        self.batches = Batches(
            self.train, job.recipe.batch_size, self.order if job.recipe.shuffle else None
        )
        self._join(towers)

    def _join(self, towers: dict[tuple, list[Model]]) -> None:
        owners = list(range(len(self.models)))

        def joined(layer: int, of: list[int], tail: bool) -> tuple[Parameters, Parameters]:
            weights, biases = (
                Parameters(
                    of,
                    [self.models[i].parameters[place] for i in of],
                    self._moments(of, place),
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
            tower = Tower(alike, slice(row, row + n_rows), activation, shares)
            tower.tails = [joined(layer, of, tail=True) for layer in range(1, len(widths))]
            self.towers.append(tower)
            start, row = start + len(alike), row + n_rows
        pairs = [self.first, *(pair for tower in self.towers for pair in tower.tails)]
        self.parameters = [parameters for pair in pairs for parameters in pair]
        self.optimizer = Optimizer(
            [model.job.recipe for model in self.models],
            [model.rates for model in self.models],
            [model.job.train.total_weight() for model in self.models],
            self.parameters,
        )
        for parameters in self.parameters:
            parameters.lend()
        narrows = self.models[0].job.precision.name == "bfloat16"
        self.narrowed = [p for p in self.parameters if narrows and p.is_weight and p.is_large]
        self.rows = self._narrowed_rows() if self.first[0] in self.narrowed else self.train.rows
        # Adam counts its steps, and dropout draws: two steps of theirs are not the same
        repeats = self.recipe.solver == "sgd" and all(t.dropout is None for t in self.towers)
        self.tapes = Tapes() if repeats and records_operations(self.reader.device) else None

    def _narrowed_rows(self) -> Any:
        """The rows to train on in bfloat16, if that is all that is done to them and they are few.

        Of a batch, half as many bytes are picked then and none converted: a study of 27
        perceptrons of 32 units takes .95 s for 1.0, in batches of 200.
        """
        rows: Any = self.train.rows
        if self.reads_in or rows.dtype != torch.float32 or rows.nbytes > _MOST_NARROWED:
            return rows
        return rows.to(torch.bfloat16)

    def _narrow(self) -> None:
        """Have the products of large weights be bfloat16's, with the weights of now.

        Small ones are quicker as they are than converted, and so is what lies between products:
        27 perceptrons of 32 units train 1.17 times as fast on MNIST in batches of 200 as with all
        of it in bfloat16.
        """
        for parameters in self.narrowed:
            parameters.narrow(torch.bfloat16)

    def _moments(self, of: list[int], place: int) -> list[list[Tensor]]:
        """Of one parameter; zeros for networks that have none as yet, where others have."""
        own = [self.models[i].moments[place] if self.models[i].moments else [] for i in of]
        n_moments = max(map(len, own))
        if not n_moments:
            return []
        weights = [self.models[i].parameters[place].data for i in of]
        return [
            moments or [torch.zeros_like(weight)] * n_moments
            for moments, weight in zip(own, weights, strict=True)
        ]

    def dissolve(self) -> None:
        """Give every network its own weights, moments and place in the order of the rows."""
        moments: list[list[list[Tensor]]] = [[] for _ in self.models]
        for parameters in self.parameters:
            for owner, of_one in zip(parameters.owners, parameters.dissolve(), strict=True):
                moments[owner].append(of_one)
        for model, of_all in zip(self.models, moments, strict=True):
            model.moments = of_all if any(of_all) else []
            if self.batches.order is not None and len(self.batches) > 1:  # then it was drawn from
                model.job.generators.order.set_state(self.order.get_state())

    # -- an epoch ----------------------------------------------------------------------------------

    def run_epoch(self, is_cancelled: Callable[[], bool]) -> list[dict[str, Any]]:
        """Train for an epoch; a row of the history for each network, or none if cancelled."""
        start = time.perf_counter()
        with torch.no_grad():
            index, sizes = self.batches.epoch()
            targets = self.loss.targets(index)
            self.optimizer.begin_epoch(targets.weight_sums(sizes))
            parts = [
                (min(PIECE_ROWS, size - at), 1.0 / size)
                for size in sizes
                for at in range(0, size, PIECE_ROWS)
            ]
            logits = self._space_for_logits([length for length, _ in parts])
            pieces = self._pieces(index, parts, targets, sizes, logits)
            self._narrow()
            for k, size in enumerate(sizes):
                if is_cancelled():
                    return []
                factors = self.optimizer.factors(k)
                if self.tapes is not None and size <= PIECE_ROWS:
                    self._step_on_tape(self.tapes, next(pieces), factors)
                else:
                    self._step_in_pieces(pieces, size, factors)
            in_order = [torch.cat(of_tower, 2) for of_tower in logits]
            losses, accuracies = self.loss.figures(in_order, targets)
            if self.optimizer.penalises:
                losses = losses + self.optimizer.mean_penalties()
            figures = {"train_loss": losses, "train_accuracy": accuracies}
            if self.validation is not None:
                figures["valid_loss"], figures["valid_accuracy"] = self._validate(self.validation)
        return self._rows({name: v.tolist() for name, v in figures.items()}, start)

    def _pieces(
        self,
        index: Tensor | None,
        parts: list[tuple[int, float]],
        targets: Targets,
        sizes: list[int],
        logits: list[list[Tensor]],
    ) -> Iterator[Piece]:
        """The batches of an epoch, large ones in pieces; cut all at once, which is quicker.

        `parts` are the numbers of rows and their shares in the loss of the batch.
        """
        lengths = [length for length, _ in parts]
        which = self.rows[: sum(lengths)] if index is None else index
        rows = which.split(lengths)
        wanted = [w.split(lengths, 2) for w in self.loss.of_towers(targets.wanted)]
        weights = targets.shares(sizes)
        shares = [w[:, None].split(lengths, 2) for w in self.loss.of_towers(weights)]
        for i, (_, share) in enumerate(parts):
            yield Piece(
                rows[i],
                index is not None,
                [w[i] for w in wanted],
                [w[i] for w in shares] if shares else [share] * len(wanted),
                [space[i] for space in logits],
            )

    def _space_for_logits(self, lengths: list[int]) -> list[list[Tensor]]:
        """Of each tower's networks and each piece, (n_models, n_outputs, n_rows).

        They are read once an epoch. A piece's lie in one run, where a product can put them.
        """
        spaces = []
        for tower in self.towers:
            n_models, n_outputs = len(tower.models), self.loss.n_outputs
            space = self.first[0].value.new_empty(n_models * n_outputs * sum(lengths))
            runs = space.split([n_models * n_outputs * length for length in lengths])
            spaces.append([run.view(n_models, n_outputs, -1) for run in runs])
        return spaces

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

    def _step_on_tape(self, tapes: Tapes, piece: Piece, factors: Factors) -> None:
        """A step of a batch in one piece, without Python once there have been some like it.

        A study of 27 perceptrons of 32 units takes .92 s for four epochs of MNIST-10k in batches
        of 32, on two threads, where Python's steps take 1.16.
        """

        def step() -> None:
            self._differentiate(piece)
            self._update(factors)

        given = [len(piece.rows), piece.rows, *piece.wanted, *piece.shares, *piece.logits]
        tapes.run(step, [*given, *factors.norms, *factors.penalties, *factors.rates])

    def _step_in_pieces(self, pieces: Iterator[Piece], size: int, factors: Factors) -> None:
        """A step of a batch of so many rows, in as many pieces as it has."""
        self._differentiate(next(pieces))
        for _ in range(PIECE_ROWS, size, PIECE_ROWS):
            sums = [p.gradient.clone() for p in self.parameters]
            self._differentiate(next(pieces))
            for parameters, addition in zip(self.parameters, sums, strict=True):
                parameters.gradient.add_(addition)
        self._update(factors)

    def _update(self, factors: Factors) -> None:
        self.optimizer.step(factors)
        self._narrow()

    def _differentiate(self, piece: Piece) -> None:
        """Give all parameters their gradients, of the mean losses."""
        rows = piece.rows
        if piece.are_positions:
            rows = self.rows.index_select(0, rows)
        x, z = self._first_layer(rows)  # (n_rows, n_features), (n_units of all, n_rows)
        of_first = []
        for tower, wanted, shares, space in zip(
            self.towers, piece.wanted, piece.shares, piece.logits, strict=True
        ):
            trail = tower.forward(z[tower.rows], space, training=True)
            of_first.append(tower.backward(self.loss.gradient(space, wanted, shares), trail))
        d = of_first[0] if len(of_first) == 1 else torch.cat(of_first)
        weights, biases = self.first
        weights.take(matrix_product(_as(d, x.dtype), x.t()))
        torch.sum(d, 1, keepdim=True, out=biases.gradient)

    def _first_layer(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        weights, biases = self.first
        x = rows
        if self.reads_in or x.dtype != weights.operand.dtype:
            x = _as(self.reader(rows), weights.operand.dtype)
        z = _as(matrix_product(weights.operand, x), biases.value.dtype)
        return x, z.add_(biases.value)

    def _validate(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of each network on the validation rows, (n_models,)."""
        batches = Batches(samples, self.evaluation_rows)
        logits = self._space_for_logits(batches.sizes)
        self._narrow()
        for i, (rows, *_) in enumerate(batches):
            _, z = self._first_layer(rows)
            for tower, spaces in zip(self.towers, logits, strict=True):
                tower.forward(z[tower.rows], spaces[i], training=False)
        in_order = [torch.cat(of_tower, 2) for of_tower in logits]
        return self.loss.figures(in_order, self.loss.validation_targets(samples))


@dataclass(slots=True)
class Piece:
    """What a forward pass and the way back take; lists have an entry for each tower."""

    rows: Tensor  # or their positions among all of them
    are_positions: bool
    wanted: list[Tensor]  # (n_models or 1, n_outputs, n_rows)
    shares: Sequence[Tensor | float]  # of the rows in the loss, (n_models or 1, 1, n_rows)
    logits: list[Tensor]  # where they go


def _architecture(module: nn.Module) -> tuple[tuple[int, ...], str, bool]:
    """Widths of all layers, the activation's class and whether there is dropout."""
    widths = tuple(layer.out_features for layer in dense_layers(module))
    names = [type(layer).__name__ for layer in module.features]  # type: ignore[union-attr]
    activation = next((name for name in names if name in _ACTIVATIONS), "")
    return widths, activation, "Dropout" in names


def _dropout(module: nn.Module) -> float:
    return next(layer.p for layer in module.modules() if isinstance(layer, nn.Dropout))


# -- behind the first layer ------------------------------------------------------------------------


@dataclass
class Tower:
    """The networks of one architecture in a stack, behind the first layer's product.

    Attributes
    ----------
    models : list of Model
    rows : slice
        Of the first layer's outputs, (n_units of all networks, n_rows).
    activation : str
        Name of a class of `_ACTIVATIONS`; "" without hidden layers.
    dropout : list of float or None
        Each network's share of units left out in training.
    tails : list of pairs of Parameters
        Weights (n_models, n_out, n_in) and biases (n_models, n_out, 1) behind the first layer.
    """

    models: list[Model]
    rows: slice
    activation: str
    dropout: list[float] | None
    tails: list[tuple[Parameters, Parameters]] = field(default_factory=list)

    def forward(
        self, block: Tensor, logits: Tensor, training: bool
    ) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Write `logits`, (n_models, n_outputs, n_rows); of each hidden layer what goes back.

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
            out = logits if biases is self.tails[-1][1] else None
            operand = weights.operand
            if operand.dtype == h.dtype:
                z = torch.baddbmm(biases.value, operand, h, out=out)
            else:
                product = torch.bmm(operand, h.to(operand.dtype))
                z = torch.add(product, biases.value, out=out)
        if not self.tails:
            logits.copy_(z)
        return trail

    def backward(self, d: Tensor, trail: list[tuple[Tensor, Tensor, Tensor | None]]) -> Tensor:
        """Gradient of the first layer's outputs from the logits' `d`; the tails get their own."""
        for (weights, biases), (kept, h, mask) in zip(
            reversed(self.tails), reversed(trail), strict=True
        ):
            torch.sum(d, 2, keepdim=True, out=biases.gradient)
            operand = weights.operand
            if operand.dtype == d.dtype:
                torch.bmm(d, h.transpose(1, 2), out=weights.gradient)
                d = torch.bmm(operand.transpose(1, 2), d)
            else:
                narrow = d.to(operand.dtype)
                weights.take(torch.bmm(narrow, h.to(operand.dtype).transpose(1, 2)))
                d = torch.bmm(operand.transpose(1, 2), narrow).to(d.dtype)
            if mask is not None:
                d = d * mask
            d = _ACTIVATIONS[self.activation].backward(d, kept)
        return d.flatten(0, 1)

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
