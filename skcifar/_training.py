"""Training: one loop, over tensors in memory. The only file that imports skorch.

An estimator describes a fit as a `TrainingJob`, which holds everything the fit needs and nothing
of the estimator; `train` runs it.
"""

from __future__ import annotations

import copy
import dis
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from skorch import NeuralNetClassifier
from skorch.callbacks import Callback
from skorch.dataset import Dataset
from torch import Tensor, nn
from torch.nn import functional as F

from skcifar import _lbfgs
from skcifar._device import BatchReader, Generators, Precision
from skcifar._lbfgs import LBFGSResult
from skcifar._networks import MultilayerPerceptron, has_batch_norm, use_generator

# Schedules whose length is fixed by max_iter: they run to their end whatever the loss does.
FIXED_LENGTH_SCHEDULES = ("auto", "cosine", "one_cycle")

# A larger batch is read and differentiated in pieces of this many rows, whose gradients add up:
# a full batch of CIFAR-10 in float32 would be four times the memory of the images.
_PIECE_ROWS = 4096

# Rows of a forward pass without gradients. A piece of CIFAR-10 in float32 is 12 MB.
_EVALUATION_ROWS = 1024


# -- what a fit is -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How to optimise: the estimator's parameters of the same names, checked and resolved."""

    solver: str
    learning_rate: str | Callable[[torch.optim.Optimizer], Any]
    learning_rate_init: float
    power_t: float
    learning_rate_decay: float
    learning_rate_step: int
    learning_rate_end: float
    learning_rate_warmup: float
    momentum: float
    nesterovs_momentum: bool
    beta_1: float
    beta_2: float
    epsilon: float
    alpha: float
    weight_decay: float
    alpha_over_data: bool  # divide alpha by the weight of the data rather than of the step
    batch_size: int
    max_iter: int
    shuffle: bool
    tol: float
    n_iter_no_change: int
    loss: str
    label_smoothing: float
    clip_grad_norm: float | None
    clip_grad_value: float | None
    early_stopping: bool
    max_fun: int = 15_000  # of solver="lbfgs"

    @property
    def has_fixed_length(self) -> bool:
        return self.learning_rate in FIXED_LENGTH_SCHEDULES


@dataclass(frozen=True, eq=False)
class Samples(Dataset):
    """Rows with targets, on the device they are trained on; a data set to skorch's callbacks.

    Attributes
    ----------
    rows : tensor of shape (n_samples, n_features)
        Any dtype; often the caller's own memory, never written to.
    targets : int64 tensor of shape (n_samples,)
    weight : tensor of shape (n_samples,) or None
    index : int64 tensor of shape (n_used,) or None
        The rows to use; None is all of them.
    """

    rows: Tensor
    targets: Tensor
    weight: Tensor | None = None
    index: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows if self.index is None else self.index)

    @property
    def X(self) -> Tensor:  # where skorch's scoring callbacks look
        return self.rows if self.index is None else self.rows[self.index]

    @property
    def y(self) -> Tensor:
        return self.targets if self.index is None else self.targets[self.index]

    def total_weight(self) -> float:
        if self.weight is None:
            return float(len(self))
        weight = self.weight if self.index is None else self.weight[self.index]
        return float(weight.sum())


@dataclass
class TrainingJob:
    """One fit, self-contained.

    Attributes
    ----------
    module : torch.nn.Module
        Trained in place, on the reader's device.
    augment : callable or None
        From a batch of images and a generator to a batch of images.
    validation_score : callable or None
        The monitored score (larger is better) of the module as it is, once an epoch; None takes
        the accuracy, or with `monitor_loss` the negative loss, on `validation`.
    on_epoch_begin, on_epoch_end : callables
        The latter gets the epoch's row of the history and says whether to stop.
    state : dict or None
        What an earlier fit left (`TrainingResult.state`), to go on from.
    incremental : bool
        One of many short fits (partial_fit), which nobody expects to converge.
    """

    module: nn.Module
    recipe: Recipe
    reader: BatchReader
    precision: Precision
    generators: Generators
    train: Samples
    validation: Samples | None = None
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
    monitor_loss: bool = False
    validation_score: Callable[[], float] | None = None
    on_epoch_begin: Callable[[], None] = lambda: None
    on_epoch_end: Callable[[dict], bool] = lambda row: False
    skorch_callbacks: list = field(default_factory=list)
    state: dict | None = None
    incremental: bool = False
    verbose: bool = False


@dataclass
class TrainingResult:
    """What came of a `TrainingJob`; the weights are in its module.

    Attributes
    ----------
    history : list of dict
        A row an epoch, without those of earlier fits.
    best_score : float or None
        Best monitored validation score, whose weights were restored, with early stopping.
    best_loss : float
        Smallest training loss.
    converged : bool
    state : dict of tensors and numbers
        Of optimizer, schedule and generators.
    skorch_callbacks : list
        As trained.
    """

    history: list[dict]
    best_score: float | None
    best_loss: float
    converged: bool
    state: dict
    skorch_callbacks: list


def train(job: TrainingJob) -> TrainingResult:
    """Train a job's module in place.

    Raises
    ------
    ValueError
        When the loss is no longer finite.
    KeyboardInterrupt
        On Ctrl-C; a callback's own quiet stop ends the training instead.
    """
    use_generator(job.module, job.generators.dropout)
    if job.recipe.solver == "lbfgs":
        return _train_lbfgs(job)
    net = _Net(job).initialize()
    conductor = _Conductor(net)
    net.callbacks_.append(("conductor", conductor))
    try:
        net.notify("on_train_begin", X=None, y=None)
        net.fit_loop(None, None, epochs=job.recipe.max_iter)
        net.notify("on_train_end", X=None, y=None)
    except _Stop:
        net.notify("on_train_end", X=None, y=None)
    conductor.restore_best()
    expected_to_converge = not (job.recipe.has_fixed_length or job.incremental)
    if expected_to_converge and not conductor.converged:
        warn_not_converged(job.recipe.max_iter)
    return conductor.result()


def warn_not_converged(max_iter: int) -> None:
    warnings.warn(
        f"The training has not converged after max_iter={max_iter} iterations; raise max_iter or "
        "tol, or choose a schedule of fixed length such as learning_rate='one_cycle'.",
        ConvergenceWarning,
        stacklevel=4,
    )


# -- the loss ------------------------------------------------------------------------------------


class ClassificationLoss(nn.Module):
    """Weighted mean loss of a batch, from logits (n, n_outputs) and targets (n,) in 0..K-1.

    One output is a binary problem: its logit is class 1's, its squared-error target -1 or 1.
    """

    def __init__(self, loss: str = "cross_entropy", label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.loss = loss
        self.label_smoothing = label_smoothing

    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        weight: Tensor | None = None,
        weight_sum: float | None = None,
    ) -> Tensor:
        """Sum of weight * loss over `weight_sum`, by default the sum of the weights given."""
        if logits.dtype == torch.bfloat16:
            logits = logits.float()
        if weight is None:
            total = self._losses(logits, targets, "sum")
            return total / (len(targets) if weight_sum is None else weight_sum)
        losses = self._losses(logits, targets, "none")
        return (losses @ weight.to(losses.dtype)) / (
            weight.sum() if weight_sum is None else weight_sum
        )

    def _losses(self, logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
        binary = logits.shape[1] == 1
        if self.loss == "squared_error":
            if binary:
                wanted = 2.0 * targets.to(logits.dtype)[:, None] - 1.0
            else:
                wanted = F.one_hot(targets, logits.shape[1]).to(logits.dtype)
            # half the mean over the outputs, as in scikit-learn's MLPRegressor
            losses = (logits - wanted).square().mean(1) / 2
            return losses.sum() if reduction == "sum" else losses
        if binary:
            smoothing = self.label_smoothing
            wanted = targets.to(logits.dtype) * (1 - smoothing) + smoothing / 2
            return F.binary_cross_entropy_with_logits(logits[:, 0], wanted, reduction=reduction)
        return F.cross_entropy(
            logits, targets, label_smoothing=self.label_smoothing, reduction=reduction
        )


def predicted_classes(logits: Tensor) -> Tensor:
    """Codes 0..K-1 of the predicted classes, (n,), from logits (n, n_outputs)."""
    if logits.shape[1] == 1:
        return (logits[:, 0] > 0).long()
    return logits.argmax(1)


# -- the loop ------------------------------------------------------------------------------------


class _Stop(Exception):
    """Training is over before max_iter, for one of the reasons it may be."""


class _Batches:
    """Batches of near-equal size: 129 rows in batches of 128 are 64 and 65, never 128 and 1.

    Yields (rows, targets, weight or None, weight_sum); rows as stored.
    """

    def __init__(
        self, samples: Samples, batch_size: int, order: torch.Generator | None = None
    ) -> None:
        self.samples = samples
        self.order = order
        n_batches = -(-len(samples) // min(batch_size, len(samples)))
        self.bounds = [len(samples) * i // n_batches for i in range(n_batches + 1)]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None, float]]:
        samples, bounds = self.samples, self.bounds
        rows, targets, weight, index = samples.rows, samples.targets, samples.weight, samples.index
        if self.order is not None:
            order = torch.randperm(len(samples), generator=self.order).to(rows.device)
            index = order if index is None else index[order]
        sums = self._weight_sums(index)
        for i in range(len(self)):
            start, stop = bounds[i], bounds[i + 1]
            if index is None:
                picked = slice(start, stop)
                batch = rows[picked], targets[picked], None if weight is None else weight[picked]
            else:
                # index_select is several times faster than rows[index] for wide uint8 rows
                part = index[start:stop]
                batch = (
                    rows.index_select(0, part),
                    targets.index_select(0, part),
                    None if weight is None else weight.index_select(0, part),
                )
            yield *batch, sums[i]

    def _weight_sums(self, index: Tensor | None) -> list[float]:
        sizes = [stop - start for start, stop in zip(self.bounds, self.bounds[1:], strict=False)]
        if self.samples.weight is None:
            return [float(size) for size in sizes]
        weight = self.samples.weight if index is None else self.samples.weight[index]
        # one read-back an epoch, not one a step
        return torch.stack([part.sum() for part in weight.split(sizes)]).tolist()


class _Net(NeuralNetClassifier):
    """skorch's loop and callbacks over batches in memory, with one read-back an epoch.

    skorch's own loop reads the loss back in every step and takes its rows one by one from a
    DataLoader: 1.2 ms a step where this takes 0.1.
    """

    def __init__(self, job: TrainingJob) -> None:
        super().__init__(
            job.module,
            criterion=ClassificationLoss(job.recipe.loss, job.recipe.label_smoothing),
            lr=job.recipe.learning_rate_init,
            max_epochs=job.recipe.max_iter,
            batch_size=job.recipe.batch_size,
            train_split=None,
            callbacks=job.skorch_callbacks,
            predict_nonlinearity=probabilities,
            device=job.reader.device,
            verbose=0,
        )
        self.job = job
        self.classes_inferred_ = job.train.targets.unique().cpu().numpy()

    @property
    def _default_callbacks(self) -> list:
        return []  # the loop records losses and seconds itself

    def initialize(self) -> _Net:
        super().initialize()
        recipe = self.job.recipe
        named = [callback for _, callback in self.callbacks_]
        self.notifies_batches = any(_overrides(c, "on_batch_begin", "on_batch_end") for c in named)
        self.notifies_gradients = any(_overrides(c, "on_grad_computed") for c in named)
        # An optimizer's own weight decay comes after clipping, and AdamW's is decoupled: then the
        # penalty is added to the gradient here. Elsewhere the fused update does it for free.
        self.adds_penalty = recipe.alpha > 0 and (
            recipe.solver == "adamw"
            or recipe.clip_grad_norm is not None
            or recipe.clip_grad_value is not None
        )
        self.piece_rows = None if has_batch_norm(self.module_) else _PIECE_ROWS
        self.data_weight = self.job.train.total_weight() if recipe.alpha_over_data else None
        self.rates = _Rates(self)
        return self

    def initialize_optimizer(self, triggered_directly: Any = None) -> _Net:
        self.optimizer_ = make_optimizer(self.module_, self.job.recipe)
        return self

    def check_data(self, X: Any, y: Any) -> None:
        pass  # the estimator did

    def get_split_datasets(self, X: Any, y: Any = None, **params: Any) -> tuple:
        return self.job.train, self.job.validation

    def get_dataset(self, X: Any, y: Any = None) -> Any:
        return X

    def get_iterator(self, dataset: Any, training: bool = False) -> _Batches:
        if training:
            order = self.job.generators.order if self.job.recipe.shuffle else None
            return _Batches(dataset, self.job.recipe.batch_size, order)
        if not isinstance(dataset, Samples):  # rows that a callback came with
            rows = torch.as_tensor(dataset)
            dataset = Samples(rows, rows.new_zeros(len(rows), dtype=torch.int64))
        return _Batches(dataset, _EVALUATION_ROWS)

    def run_single_epoch(
        self, iterator: Any, training: bool, prefix: str, step_fn: Any, **fit_params: Any
    ) -> None:
        if iterator is None:
            return
        start = time.perf_counter()
        self._set_training(training)
        # 0-d tensors that stay on the device until the epoch is over
        totals = torch.zeros(2, dtype=torch.float64, device=self.job.reader.device)
        weight_sum = 0.0
        for rows, targets, weight, batch_weight in iterator:
            batch = (rows, targets)
            if self.notifies_batches:
                self.notify("on_batch_begin", batch=batch, training=training)
            step = step_fn(batch, weight=weight, weight_sum=batch_weight)
            right = predicted_classes(step["y_pred"]) == targets
            totals[0].add_(step["loss"], alpha=batch_weight)
            totals[1].add_(right.sum() if weight is None else weight @ right.to(weight.dtype))
            weight_sum += batch_weight
            if self.notifies_batches:
                self.history.record_batch(prefix + "_loss", step["loss"].item())
                self.history.record_batch(prefix + "_batch_size", len(targets))
                self.notify("on_batch_end", batch=batch, training=training, **step)
        loss, accuracy = (totals / weight_sum).tolist()
        best = min((row[prefix + "_loss"] for row in self.history[:-1]), default=math.inf)
        self.history.record(prefix + "_loss", loss)
        self.history.record(prefix + "_loss_best", loss < best)
        self.history.record(prefix + "_accuracy", accuracy)
        if training:
            self.history.record("learning_rate", self.optimizer_.param_groups[0]["lr"])
            self.history.record("seconds", time.perf_counter() - start)

    def train_step(
        self, batch: Any, weight: Tensor | None = None, weight_sum: float = 0.0, **_: Any
    ) -> dict:
        """One update; gives the loss it started from, penalty included, and the logits."""
        recipe = self.job.recipe
        strength = recipe.alpha / (self.data_weight or weight_sum) if recipe.alpha else 0.0
        decayed = self.optimizer_.param_groups[0]
        self.optimizer_.zero_grad(set_to_none=True)
        loss, logits = self.accumulate_gradient(batch, weight, weight_sum)
        if strength or recipe.weight_decay:
            coupled = strength + (recipe.weight_decay if recipe.solver != "adamw" else 0.0)
            with torch.no_grad():
                norm = nn.utils.get_total_norm(decayed["params"])
                loss = loss + 0.5 * coupled * norm.square()
                if self.adds_penalty:
                    for parameter in decayed["params"]:
                        parameter.grad.add_(parameter, alpha=strength)
                elif recipe.solver != "adamw":
                    decayed["weight_decay"] = coupled
        if self.notifies_gradients:
            self.notify(
                "on_grad_computed",
                named_parameters=list(self.module_.named_parameters()),
                batch=batch,
                training=True,
            )
        if recipe.clip_grad_value is not None:
            nn.utils.clip_grad_value_(self.module_.parameters(), recipe.clip_grad_value)
        if recipe.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.module_.parameters(), recipe.clip_grad_norm)
        self.rates.before_step()
        self.optimizer_.step()
        return {"loss": loss, "y_pred": logits}

    def accumulate_gradient(
        self, batch: tuple[Tensor, Tensor], weight: Tensor | None, weight_sum: float
    ) -> tuple[Tensor, Tensor]:
        """Loss of a batch without penalty, its gradient added to `.grad`; and the logits."""
        rows, targets = batch
        size = len(rows) if self.piece_rows is None else self.piece_rows
        losses, logits = [], []
        for start in range(0, len(rows), size):
            piece = slice(start, start + size)
            outputs = self.infer(rows[piece])
            loss = self.criterion_(
                outputs, targets[piece], None if weight is None else weight[piece], weight_sum
            )
            loss.backward()
            losses.append(loss.detach())
            logits.append(outputs.detach())
        if len(losses) == 1:
            return losses[0], logits[0]
        return torch.stack(losses).sum(), torch.cat(logits)

    def validation_step(
        self, batch: Any, weight: Tensor | None = None, weight_sum: float | None = None, **_: Any
    ) -> dict:
        with torch.no_grad():
            logits = self.infer(batch[0])
            return {"loss": self.criterion_(logits, batch[1], weight, weight_sum), "y_pred": logits}

    def evaluation_step(self, batch: Any, training: bool = False) -> Tensor:
        self._set_training(training)
        with torch.set_grad_enabled(training):
            return self.infer(batch[0])

    def infer(self, x: Tensor, **_: Any) -> Tensor:
        job = self.job
        augment = None
        if job.augment is not None and self.module_.training:
            augment = self._augment
        with job.precision.autocast(job.reader.device):
            return self.module_(job.reader(x, augment))

    def _augment(self, images: Tensor) -> Tensor:
        assert self.job.augment is not None
        return self.job.augment(images, self.job.generators.augmentation)

    def notify(self, method_name: str, **kwargs: Any) -> None:
        try:
            super().notify(method_name, **kwargs)
        except KeyboardInterrupt as error:
            if _raised_by_statement(error):  # how skorch's callbacks end a training quietly
                raise _Stop from None
            raise


def _overrides(callback: Callback, *methods: str) -> bool:
    return any(getattr(type(callback), name) is not getattr(Callback, name) for name in methods)


def _raised_by_statement(error: BaseException) -> bool:
    """Whether a `raise` statement raised `error`, rather than a signal that arrived meanwhile."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    instruction = traceback.tb_frame.f_code.co_code[traceback.tb_lasti]
    return instruction == dis.opmap["RAISE_VARARGS"]


def probabilities(logits: Tensor) -> Tensor:
    """Class probabilities (n, n_classes) in float64 from logits (n, n_outputs)."""
    logits = logits.double()
    if logits.shape[1] == 1:
        logits = torch.cat([-logits, logits], 1) / 2
    return logits.softmax(1)


class _Conductor(Callback):
    """Watches the loss and the validation score, keeps the best weights, ends the training.

    The rules are those of scikit-learn's MLPClassifier.
    """

    def __init__(self, net: _Net) -> None:
        self.net = net
        self.job = net.job
        self.best_loss = math.inf
        self.best_score: float | None = None
        self.best_weights: dict[str, Tensor] | None = None
        self.epochs_without_improvement = 0
        self.converged = False
        self.history: list[dict] = []

    def on_epoch_begin(self, net: Any, **_: Any) -> None:
        self.job.on_epoch_begin()

    def on_epoch_end(self, net: Any, **_: Any) -> None:
        row = {
            key: value
            for key, value in net.history[-1].items()
            if key != "batches" and not key.endswith("_best")
        }
        self._check_finite(row)
        net._set_training(False)  # for whoever looks at the module between two epochs
        if self.job.validation is not None:
            row["valid_score"] = self._validation_score(row)
        self.history.append(row)
        if self.job.verbose:
            score = f", validation score = {row['valid_score']:.6f}" if "valid_score" in row else ""
            print(f"Epoch {row['epoch']}, loss = {row['train_loss']:.8f}{score}")
        improved = self._improved(row)
        self.epochs_without_improvement = 0 if improved else self.epochs_without_improvement + 1
        # callbacks are told before the training ends, whatever ends it
        stop = self.job.on_epoch_end(row)
        patience = self.job.recipe.n_iter_no_change
        ends_early = self.job.recipe.early_stopping or not self.job.recipe.has_fixed_length
        if ends_early and self.epochs_without_improvement > patience:
            self.epochs_without_improvement = 0
            self.converged = not self.net.rates.lower()
        self.net.rates.after_epoch(row)
        if stop or self.converged:
            raise _Stop

    def _validation_score(self, row: dict) -> float:
        if self.job.validation_score is not None:
            return float(self.job.validation_score())
        return -row["valid_loss"] if self.job.monitor_loss else row["valid_accuracy"]

    def _improved(self, row: dict) -> bool:
        """Whether the monitored figure beat its best by more than tol; keeps what is best."""
        recipe = self.job.recipe
        tol = 0.0 if recipe.has_fixed_length else recipe.tol
        loss_to_beat, self.best_loss = self.best_loss, min(self.best_loss, row["train_loss"])
        if not recipe.early_stopping:
            return row["train_loss"] <= loss_to_beat - tol
        score = row["valid_score"]
        score_to_beat = -math.inf if self.best_score is None else self.best_score
        if score > score_to_beat:
            self.best_score = score
            self.best_weights = {k: v.clone() for k, v in self.job.module.state_dict().items()}
        return score > score_to_beat if tol == 0 else score >= score_to_beat + tol

    def _check_finite(self, row: dict) -> None:
        if math.isfinite(row["train_loss"]):
            return
        clip = self.job.recipe.clip_grad_norm
        remedies = "scale the inputs (normalize=True), lower learning_rate_init" + (
            ", or set clip_grad_norm" if clip is None else ", or lower clip_grad_norm"
        )
        raise ValueError(
            f"The training loss became {row['train_loss']} in epoch {row['epoch']} at learning "
            f"rate {row['learning_rate']:g}: training diverged. Remedies: {remedies}."
        )

    def restore_best(self) -> None:
        if self.best_weights is not None:
            self.job.module.load_state_dict(self.best_weights)

    def result(self) -> TrainingResult:
        state = {
            "optimizer": self.net.optimizer_.state_dict()["state"],
            "rates": self.net.rates.state(),
            "generators": self.job.generators.get_state(),
        }
        return TrainingResult(
            history=self.history,
            best_score=self.best_score,
            best_loss=self.best_loss,
            converged=self.converged,
            state=state,
            skorch_callbacks=[c for _, c in self.net.callbacks_ if c is not self],
        )


# -- optimizers and learning rates ---------------------------------------------------------------


def make_optimizer(module: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Optimizer with two groups: weights, which are penalised, and biases and BatchNorm."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    weights = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    decay = recipe.weight_decay
    groups = [
        {"params": weights, "weight_decay": decay},
        {"params": others, "weight_decay": 0.0},
    ]
    # fused: one pass over parameters, gradients and moments, where torch has one
    fused = parameters[0].device.type in ("cpu", "cuda")
    rate = recipe.learning_rate_init
    if recipe.solver == "sgd":
        nesterov = recipe.nesterovs_momentum and recipe.momentum > 0
        return torch.optim.SGD(
            groups, lr=rate, momentum=recipe.momentum, nesterov=nesterov, fused=fused
        )
    optimizer = torch.optim.AdamW if recipe.solver == "adamw" else torch.optim.Adam
    betas = (recipe.beta_1, recipe.beta_2)
    return optimizer(groups, lr=rate, betas=betas, eps=recipe.epsilon, fused=fused)


class _Rates:
    """The learning rate of every step.

    Counters go on where an earlier fit left them, but a schedule of fixed length starts again,
    since its length is that of one fit.
    """

    def __init__(self, net: _Net) -> None:
        self.recipe = net.job.recipe
        self.optimizer = net.optimizer_
        self.n_rows = len(net.job.train)
        self.n_steps = self.recipe.max_iter * len(net.get_iterator(net.job.train, training=True))
        self.step = 0
        self.epoch = 0
        self.rate = self.recipe.learning_rate_init
        self.scheduler = None
        if callable(self.recipe.learning_rate):
            self.scheduler = self.recipe.learning_rate(self.optimizer)
        if net.job.state is not None:
            self._go_on(net.job.state)

    def _go_on(self, state: dict) -> None:
        whole = self.optimizer.state_dict()
        whole["state"] = copy.deepcopy(state["optimizer"])  # which the estimator keeps
        self.optimizer.load_state_dict(whole)
        self.epoch = state["rates"]["epoch"]
        self.rate = state["rates"]["rate"]
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["rates"]["scheduler"])
        self._set(self.rate)

    def state(self) -> dict:
        scheduler = None if self.scheduler is None else self.scheduler.state_dict()
        rate = self.optimizer.param_groups[0]["lr"]
        return {"epoch": self.epoch, "rate": rate, "scheduler": scheduler}

    def _set(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def before_step(self) -> None:
        self.step += 1
        if self.recipe.has_fixed_length:
            share = self.step / (self.n_steps + 1)  # neither end has the rate 0
            self._set(self.recipe.learning_rate_init * self._shape(share))

    def _shape(self, share: float) -> float:
        """Rate at a share of the training, in (0, 1), relative to the highest."""
        warmup, end = self.recipe.learning_rate_warmup, self.recipe.learning_rate_end
        if share < warmup:
            return share / warmup
        left = (1 - share) / (1 - warmup)
        if self.recipe.learning_rate == "cosine":
            left = (1 - math.cos(math.pi * left)) / 2
        return end + (1 - end) * left

    def after_epoch(self, row: dict) -> None:
        recipe = self.recipe
        self.epoch += 1
        if self.scheduler is not None:
            if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                self.scheduler.step(row.get("valid_loss", row["train_loss"]))
            else:
                self.scheduler.step()
        elif recipe.learning_rate == "invscaling":
            seen = self.epoch * self.n_rows
            self._set(recipe.learning_rate_init / (seen + 1) ** recipe.power_t)
        elif recipe.learning_rate == "exponential":
            self._set(recipe.learning_rate_init * recipe.learning_rate_decay**self.epoch)
        elif recipe.learning_rate == "step":
            n_falls = self.epoch // recipe.learning_rate_step
            self._set(recipe.learning_rate_init * recipe.learning_rate_decay**n_falls)

    def lower(self) -> bool:
        """With "adaptive", divide the rate by 5, if it is still worth it, and go on."""
        rate = self.optimizer.param_groups[0]["lr"]
        if self.recipe.learning_rate != "adaptive" or rate <= 1e-6:
            return False
        self._set(rate / 5)
        return True


# -- full batches --------------------------------------------------------------------------------


def _train_lbfgs(job: TrainingJob) -> TrainingResult:
    """L-BFGS over all of the rows at once; a linear model has a faster way to the same optimum."""
    linear = isinstance(job.module, MultilayerPerceptron) and not len(job.module.features)
    is_cross_entropy = job.recipe.loss == "cross_entropy"
    started = time.perf_counter()
    history: list[dict] = []

    def on_iteration(loss: float) -> bool:
        job.on_epoch_begin()
        if job.verbose:
            print(f"Iteration {len(history) + 1}, loss = {loss:.8f}")
        row = {
            "epoch": len(history) + 1,
            "train_loss": loss,
            "seconds": time.perf_counter() - started,
        }
        history.append(row)
        return job.on_epoch_end(row)

    minimize = _minimize_linear if linear and is_cross_entropy else _minimize_any
    try:
        result = minimize(job, on_iteration)
    except FloatingPointError as error:
        raise ValueError(
            f"The training loss is no longer finite after {len(history)} iterations of L-BFGS "
            f"({error}). Scale the inputs (normalize=True), or raise alpha."
        ) from error
    if not result.converged:
        warn_not_converged(job.recipe.max_iter)
    if not history:  # it began at the optimum
        on_iteration(result.loss)
    return TrainingResult(
        history=history,
        best_score=None,
        best_loss=min(row["train_loss"] for row in history),
        converged=result.converged,
        state={"generators": job.generators.get_state()},
        skorch_callbacks=[],
    )


def _minimize_linear(job: TrainingJob, on_iteration: Callable[[float], bool]) -> LBFGSResult:
    head = job.module.head
    assert isinstance(head, nn.Linear)
    statistics = job.reader.feature_statistics()
    shift, scale = (None, None) if statistics is None else statistics
    samples, recipe = job.train, job.recipe

    def adopt(coefficients: np.ndarray, intercept: np.ndarray, loss: float) -> bool:
        with torch.no_grad():
            head.weight.copy_(torch.as_tensor(coefficients))
            head.bias.copy_(torch.as_tensor(intercept))
        return on_iteration(loss)

    return _lbfgs.minimize_softmax(
        samples.rows,
        samples.targets,
        n_outputs=head.out_features,
        sample_weight=samples.weight,
        index=samples.index,
        alpha=recipe.alpha,
        weight_decay=recipe.weight_decay,
        shift=shift,
        scale=scale,
        label_smoothing=recipe.label_smoothing,
        dtype=job.precision.weights,
        max_iter=recipe.max_iter,
        tol=recipe.tol,
        max_fun=recipe.max_fun,
        initial=(_as_array(head.weight), _as_array(head.bias)),
        callback=adopt,
    ).result


def _as_array(parameter: Tensor) -> np.ndarray:
    return parameter.detach().double().cpu().numpy()


def _minimize_any(job: TrainingJob, on_iteration: Callable[[float], bool]) -> LBFGSResult:
    """As scikit-learn's MLPClassifier(solver="lbfgs")."""
    recipe, samples = job.recipe, job.train
    net = _Net(job).initialize()
    net._set_training(True)
    ((rows, targets, weight, weight_sum),) = _Batches(samples, len(samples))
    strength = recipe.alpha / weight_sum + recipe.weight_decay
    penalised = net.optimizer_.param_groups[0]["params"]

    def closure() -> float:
        loss, _ = net.accumulate_gradient((rows, targets), weight, weight_sum)
        with torch.no_grad():
            for parameter in penalised:
                loss = loss + 0.5 * strength * parameter.square().sum()
                parameter.grad.add_(parameter, alpha=strength)
        return float(loss)

    return _lbfgs.minimize_module(
        job.module,
        closure,
        max_iter=recipe.max_iter,
        tol=recipe.tol,
        max_fun=recipe.max_fun,
        callback=on_iteration,
    )
