"""Training: one loop, over batches of tensors. The only file that imports skorch."""

from __future__ import annotations

import copy
import dis
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from skorch import NeuralNetClassifier
from skorch.callbacks import Callback
from skorch.dataset import Dataset
from torch import Tensor, nn

from skcifar import _lbfgs
from skcifar._architectures import Airbench94
from skcifar._batches import Batches, Samples
from skcifar._conductor import Conductor
from skcifar._jobs import MEETING, TrainingJob, TrainingResult
from skcifar._lbfgs import LBFGSResult
from skcifar._memory import memory_kept
from skcifar._networks import Encoder, MultilayerPerceptron, has_batch_norm, use_generator
from skcifar._optimization import (
    ClassificationLoss,
    LearningRates,
    Lookahead,
    make_optimizer,
    predicted_classes,
    probabilities,
)
from skcifar._recorded import RecordedSteps, records_steps
from skcifar._stored_rows import StoredRows

# A larger batch is read and differentiated in pieces of this many rows, whose gradients add up:
# a full batch of CIFAR-10 in float32 would be four times the memory of the images.
PIECE_ROWS = 4096

# Layers whose steps are all alike: others may decide anew in each of them.
_RECORDABLE = ("torch.nn.", "skcifar.")


def train(job: TrainingJob) -> TrainingResult:
    """Train a job's module in place, together with those of other fits where there is a meeting.

    Raises
    ------
    ValueError
        When the loss is no longer finite.
    KeyboardInterrupt
        On Ctrl-C; a callback's own quiet stop ends the training instead.
    """
    meeting = MEETING.get()
    result = train_alone(job) if meeting is None else meeting.train(job)
    if result.ran_out:
        warn_not_converged(job.recipe.max_iter)
    return result


def train_alone(job: TrainingJob) -> TrainingResult:
    """As `train`, here and now."""
    if job.recipe.solver == "lbfgs":
        return _train_lbfgs(job)
    net = _Net(detached(job)).initialize() if job.paused is None else job.paused
    with memory_kept(job.reader.device):
        net.run(job)
    return net.result(job)


def detached(job: TrainingJob) -> TrainingJob:
    """The job itself; or, if it is to pause, one whose module nobody else will hold then."""
    if job.pause_after is None:
        return job
    return replace(job, module=copy.deepcopy(job.module))


def warn_not_converged(max_iter: int) -> None:
    warnings.warn(
        f"The training has not converged after max_iter={max_iter} iterations; raise max_iter or "
        "tol, or choose a schedule of fixed length such as learning_rate='one_cycle'.",
        ConvergenceWarning,
        stacklevel=4,
    )


# -- the loop --------------------------------------------------------------------------------------


class _Stop(Exception):
    """Training is over before max_iter, for one of the reasons it may be."""


@dataclass(frozen=True, eq=False)
class _Dataset(Samples, Dataset):
    """Samples that skorch's callbacks read."""

    @classmethod
    def of(cls, samples: Samples) -> _Dataset:
        return cls(samples.rows, samples.targets, samples.weight, samples.index)


class _Net(NeuralNetClassifier):
    """skorch's loop and callbacks over batches in memory, with one read-back an epoch.

    skorch's own loop reads the loss back in every step and takes its rows one by one from a
    DataLoader: 1.2 ms a step where this takes 0.1.
    """

    def __init__(self, job: TrainingJob) -> None:
        super().__init__(
            job.module,
            criterion=job.criterion,
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
        self.n_rows_seen = 0
        self.is_over = False
        self.classes_inferred_ = job.train.targets.unique().cpu().numpy()

    @property
    def _default_callbacks(self) -> list:
        return []  # the loop records losses and seconds itself

    def run(self, job: TrainingJob) -> None:
        """Train on behalf of `job`, which this net was made for or which follows that one."""
        self.conductor.act_for(job)
        if self.is_over:
            return
        n_epochs = job.recipe.max_iter
        until = n_epochs if job.pause_after is None else min(job.pause_after, n_epochs)
        try:
            if not self.conductor.history:
                self.notify("on_train_begin", X=None, y=None)
            self.fit_loop(None, None, epochs=until - len(self.conductor.history))
            self.is_over = until == n_epochs
        except _Stop:
            self.is_over = True
        finally:
            if self.recorded is not None:
                # activations and gradients lie in the memory of what was recorded
                self.optimizer_.zero_grad(set_to_none=True)
                self.recorded.forget()
        if self.is_over:
            self.notify("on_train_end", X=None, y=None)
        if not self.conductor.history:
            raise ValueError("A callback ended the training before its first epoch was over.")

    def initialize(self) -> _Net:
        use_generator(self.job.module, self.job.generators.dropout)
        self._tell_module(0.0)
        super().initialize()
        recipe, augment = self.job.recipe, self.job.augment
        named = [callback for _, callback in self.callbacks_]
        self.notifies_batches = any(_overrides(c, "on_batch_begin", "on_batch_end") for c in named)
        self.notifies_gradients = any(_overrides(c, "on_grad_computed") for c in named)
        # An optimizer's own weight decay comes after clipping, and AdamW's is decoupled: then the
        # penalty is added to the gradient here. Elsewhere the fused update does it for free.
        self.adds_penalty = recipe.alpha > 0 and (
            recipe.decays_by_itself
            or recipe.clip_grad_norm is not None
            or recipe.clip_grad_value is not None
        )
        splits = self.criterion_.row_wise and not has_batch_norm(self.module_)
        self.piece_rows = PIECE_ROWS if splits else None
        self.data_weight = self.job.train.total_weight() if recipe.alpha_over_data else None
        n_batches = len(self.get_iterator(self.job.train, training=True))
        self.rates = LearningRates(
            recipe,
            self.optimizer_,
            n_rows=len(self.job.train),
            n_steps=recipe.max_iter * n_batches,
            state=None if recipe.solver == "lbfgs" else self.job.state,
        )
        # which of all rows are flipped, in turn
        self.sides: Tensor | None = None
        if augment is not None and augment.alternating:
            generator = self.job.generators.augmentation
            n_rows, device = len(self.job.train.rows), self.job.reader.device
            self.sides = torch.rand(n_rows, device=device, generator=generator) < 0.5
        self.lookahead = None
        if recipe.lookahead and recipe.has_fixed_length:
            self.lookahead = Lookahead(self.module_, recipe.max_iter * n_batches)
        # only now: an optimizer that takes up an earlier state makes its groups anew
        self.penalised = [g for g in self.optimizer_.param_groups if g["penalised"]]
        self.recorded: RecordedSteps | None = None
        if self._may_be_recorded() and records_steps(self.job.reader.device):
            self._prepare_recording()
        self.conductor = Conductor(self.job, self.rates)
        self.callbacks_.append(("conductor", _Notified()))
        return self

    def result(self, job: TrainingJob) -> TrainingResult:
        return self.conductor.result(
            job,
            self.optimizer_.state_dict()["state"],
            self.n_rows_seen,
            skorch_callbacks=[c for _, c in self.callbacks_ if not isinstance(c, _Notified)],
            paused=None if job.pause_after is None else self,
        )

    def initialize_optimizer(self, triggered_directly: Any = None) -> _Net:
        self.optimizer_ = make_optimizer(self.module_, self.job.recipe)
        return self

    def check_data(self, X: Any, y: Any) -> None:
        pass  # the estimator did

    def get_split_datasets(self, X: Any, y: Any = None, **params: Any) -> tuple:
        validation = self.job.validation
        return _Dataset.of(self.job.train), None if validation is None else _Dataset.of(validation)

    def get_dataset(self, X: Any, y: Any = None) -> Any:
        return X

    def get_iterator(self, dataset: Any, training: bool = False) -> Batches:
        if training:
            job = self.job
            order = job.generators.order if job.recipe.shuffle else None
            return Batches(dataset, job.recipe.batch_size, order, job.sampler, in_pieces=True)
        if not isinstance(dataset, Samples):  # rows that a callback came with
            rows = dataset if isinstance(dataset, StoredRows) else torch.as_tensor(dataset)
            device = self.job.reader.device if isinstance(rows, StoredRows) else rows.device
            dataset = Samples(rows, torch.zeros(len(rows), dtype=torch.int64, device=device))
        # where rows are compared with each other, those of one class must not stand together
        order = None if self.criterion_.row_wise else torch.Generator().manual_seed(0)
        return Batches(dataset, self.job.evaluation_rows, order)

    def run_single_epoch(
        self, iterator: Any, training: bool, prefix: str, step_fn: Any, **fit_params: Any
    ) -> None:
        if iterator is None:
            return
        start = time.perf_counter()
        if training:
            self._tell_module(len(self.conductor.history) / self.job.recipe.max_iter)
        self._set_training(training)
        if training and self.recorded is not None:
            loss, accuracy = self._run_recorded_epoch(iterator)
        else:
            loss, accuracy = self._run_epoch(iterator, training, prefix, step_fn)
        best = min((row[prefix + "_loss"] for row in self.history[:-1]), default=math.inf)
        self.history.record(prefix + "_loss", loss)
        self.history.record(prefix + "_loss_best", loss < best)
        if accuracy is not None:
            self.history.record(prefix + "_accuracy", accuracy)
        if training:
            if self.lookahead is not None and self._is_last_epoch():
                self.lookahead.finish()
            if self.sides is not None:
                self.sides.logical_not_()
            self.history.record("learning_rate", self.optimizer_.param_groups[0]["lr"])
            self.history.record("seconds", time.perf_counter() - start)

    def _run_epoch(
        self, iterator: Batches, training: bool, prefix: str, step_fn: Any
    ) -> tuple[float, float | None]:
        """Loss and, of a classifier, accuracy of an epoch."""
        # Tensors that stay on the device until the epoch is over: what can be done once an epoch
        # is not done in each step.
        classifies = isinstance(self.criterion_, ClassificationLoss)
        n_rows = len(iterator.samples) if classifies else None
        figures = _Figures(n_rows, len(iterator), self.job.reader.device)
        for rows, targets, weight, batch_weight in iterator:
            batch = (rows, targets)
            self.picked = iterator.picked
            if self.notifies_batches:
                self.notify("on_batch_begin", batch=batch, training=training)
            step = step_fn(batch, weight=weight, weight_sum=batch_weight)
            figures.add(step, targets, weight, batch_weight)
            self.n_rows_seen += len(targets) if training else 0
            if self.notifies_batches:
                self.history.record_batch(prefix + "_loss", step["loss"].item())
                self.history.record_batch(prefix + "_batch_size", len(targets))
                self.notify("on_batch_end", batch=batch, training=training, **step)
        return figures.read()

    # -- steps that are recorded -------------------------------------------------------------------

    def _may_be_recorded(self) -> bool:
        """Whether all steps of a size are alike, and nobody looks into one."""
        job = self.job
        return (
            isinstance(self.criterion_, ClassificationLoss)
            and job.train.weight is None
            and not job.train.is_stored
            and job.sampler is None
            and job.precision.weights == torch.float32
            and not callable(job.recipe.learning_rate)
            and not job.incremental
            and not job.skorch_callbacks
            and all(type(m).__module__.startswith(_RECORDABLE) for m in self.module_.modules())
        )

    def _prepare_recording(self) -> None:
        device = self.job.reader.device
        self.rate = torch.zeros((), device=device)
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, penalty, right
        self.trained = [p.requires_grad for p in self.module_.parameters()]
        generators = vars(self.job.generators).values()
        self.recorded = RecordedSteps(device, generators)

    def _run_recorded_epoch(self, iterator: Batches) -> tuple[float, float | None]:
        assert self.recorded is not None
        trained = [p.requires_grad for p in self.module_.parameters()]
        if trained != self.trained:
            self.trained = trained
            self.recorded.forget()
        index, sizes = iterator.epoch()
        if index is None:
            index = torch.arange(len(iterator.samples), device=self.rate.device)
        self.sums.zero_()
        steps = (self._begin_step, self._static_step, self._end_step)
        self.recorded.run(index.split(sizes), *steps)
        self.n_rows_seen += sum(sizes)
        loss, penalty, right = (self.sums / sum(sizes)).tolist()
        return loss + penalty, right

    def _begin_step(self) -> None:
        self.rates.before_step()
        first = self.optimizer_.param_groups[0]
        self.rate.fill_(first["lr"] / first["rate_factor"])

    def _end_step(self) -> None:
        if self.lookahead is not None:
            self.lookahead.after_step(self.rates.step)

    def _static_step(self, picked: Tensor) -> None:
        """Update with the rows picked, and add to the epoch's sums; all of it on the device."""
        train, n_rows = self.job.train, len(picked)
        self.picked = picked
        batch = train.rows.index_select(0, picked), train.targets.index_select(0, picked)
        step = self.update(batch, None, float(n_rows))
        factor, norm = step.get("penalty", (0.0, self.rate))
        right = predicted_classes(step["y_pred"]) == batch[1]
        self.sums += torch.stack(
            [step["loss"].double() * n_rows, norm.double() * (factor * n_rows), right.sum()]
        )

    # -- a step ------------------------------------------------------------------------------------

    def train_step(
        self, batch: Any, weight: Tensor | None = None, weight_sum: float = 0.0, **_: Any
    ) -> dict:
        """One update; gives the loss it started from, the penalty beside it, and the logits."""
        self.rates.before_step()
        step = self.update(batch, weight, weight_sum)
        self._end_step()
        return step

    def update(self, batch: Any, weight: Tensor | None, weight_sum: float) -> dict:
        recipe = self.job.recipe
        strength = recipe.alpha / (self.data_weight or weight_sum) if recipe.alpha else 0.0
        self.optimizer_.zero_grad(set_to_none=True)
        loss, logits = self.accumulate_gradient(batch, weight, weight_sum)
        step: dict[str, Any] = {"loss": loss, "y_pred": logits}
        coupled = strength + (0.0 if recipe.decays_by_itself else recipe.weight_decay)
        if coupled:
            with torch.no_grad():
                weights = self.penalised_weights()
                step["penalty"] = (coupled / 2, squared_norm(weights))
                if self.adds_penalty:
                    _add_penalty(weights, strength)
                else:
                    for group in self.penalised:
                        group["weight_decay"] = coupled
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
        self._move()
        return step

    def _move(self) -> None:
        """Let the optimizer take its step."""
        if self.recorded is None:
            self.optimizer_.step()
            return
        # what is recorded reads the rate from a tensor
        groups = self.optimizer_.param_groups
        capturable = self.recorded.is_recording
        kept = [dict(group) for group in groups]
        try:
            for group in groups:
                group["lr"] = self.rate * group["rate_factor"]
                if "capturable" in group:
                    group["capturable"] = capturable
            self.optimizer_.step()
        finally:
            for group, values in zip(groups, kept, strict=True):
                group.update(values)

    def penalised_weights(self) -> list[Tensor]:
        """Those that have a gradient: a network may hold layers that its output does not use."""
        return [p for group in self.penalised for p in group["params"] if p.grad is not None]

    def accumulate_gradient(
        self, batch: tuple[Tensor, Tensor], weight: Tensor | None, weight_sum: float
    ) -> tuple[Tensor, Tensor]:
        """Loss of a batch without penalty, its gradient added to `.grad`; and the logits."""
        rows, targets = batch
        size = len(rows) if self.piece_rows is None else self.piece_rows
        losses, logits = [], []
        for start in range(0, len(rows), size):
            piece = self.piece = slice(start, start + size)
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

    def validation_figures(self) -> dict[str, float]:
        """Loss, accuracy and score on the validation rows, if any, outside the epoch loop."""
        if self.job.validation is None:
            return {}
        self.history.new_epoch()
        batches = self.get_iterator(self.job.validation)
        self.run_single_epoch(batches, False, "valid", self.validation_step)
        row = {name: self.history[-1][name] for name in ("valid_loss", "valid_accuracy")}
        return row | {"valid_score": self.conductor.validation_score(row)}

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
        flipped = None
        if self.sides is not None:
            flipped = self.sides[self.picked][self.piece]
        return self.job.augment(images, self.job.generators.augmentation, flipped)

    def _tell_module(self, share: float) -> None:
        """Let a network that has a schedule of its own know how much of the training is over."""
        module = self.job.module
        network = module.network if isinstance(module, Encoder) else module
        if isinstance(network, Airbench94):
            network.begin_epoch(share)

    def _is_last_epoch(self) -> bool:
        return len(self.conductor.history) + 1 == self.job.recipe.max_iter

    def notify(self, method_name: str, **kwargs: Any) -> None:
        try:
            super().notify(method_name, **kwargs)
        except KeyboardInterrupt as error:
            if not _raised_by_statement(error):
                raise
            # how skorch's callbacks end a training quietly; the epoch that they end counts
            if method_name == "on_epoch_end":
                _Notified().on_epoch_end(self)
            raise _Stop from None


class _Figures:
    """Loss of an epoch, and accuracy where `n_rows` are classified, from what its steps leave.

    They are written into arrays made beforehand: a small tensor kept from each step would lie
    between the large ones, whose memory the next step could then not take up again (with lists in
    their place CIFAR-10 took 200 MB more).
    """

    def __init__(self, n_rows: int | None, n_steps: int, device: torch.device) -> None:
        self.classifies = n_rows is not None
        self.right = torch.zeros(n_rows or 0, dtype=torch.bool, device=device)
        self.weights = torch.ones(n_rows or 0, dtype=torch.float64, device=device)
        self.losses = torch.zeros(n_steps, dtype=torch.float64, device=device)
        self.norms = torch.zeros(n_steps, dtype=torch.float64, device=device)
        self.factors = [0.0] * n_steps
        self.weight_sums = [0.0] * n_steps
        self.step = self.row = 0

    def add(self, step: dict, targets: Tensor, weight: Tensor | None, weight_sum: float) -> None:
        if self.classifies:
            rows = slice(self.row, self.row + len(targets))
            torch.eq(predicted_classes(step["y_pred"]), targets, out=self.right[rows])
            if weight is not None:
                self.weights[rows] = weight
            self.row = rows.stop
        self.losses[self.step] = step["loss"]
        if "penalty" in step:
            self.factors[self.step], self.norms[self.step] = step["penalty"]
        self.weight_sums[self.step] = weight_sum
        self.step += 1

    def read(self) -> tuple[float, float | None]:
        """The epoch's weighted means; the only time the host waits for the device."""
        losses = self.losses + self.norms * self.norms.new_tensor(self.factors)
        shares = losses.new_tensor(self.weight_sums)
        right = self.weights @ self.right.double()
        loss, accuracy = (torch.stack([losses @ shares, right]) / shares.sum()).tolist()
        return loss, accuracy if self.classifies else None


def squared_norm(weights: list[Tensor]) -> Tensor:
    """Sum of all squared weights, 0-d."""
    if len(weights) > 4:
        return nn.utils.get_total_norm(weights).square()
    # one product for each is quicker than the general way, for a few
    return sum(torch.linalg.vecdot(w.flatten(), w.flatten()) for w in weights)


def _add_penalty(parameters: list[Tensor], strength: float) -> None:
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.grad.add_(parameter, alpha=strength)


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


class _Notified(Callback):
    """Hands skorch's epochs over to the conductor, after the callbacks of the user."""

    def on_epoch_begin(self, net: Any, **_: Any) -> None:
        net.job.on_epoch_begin()

    def on_epoch_end(self, net: Any, **_: Any) -> None:
        row = {
            key: value
            for key, value in net.history[-1].items()
            if key != "batches" and not key.endswith("_best")
        }
        net._set_training(False)  # for whoever looks at the module between two epochs
        if net.conductor.epoch_over(row):
            raise _Stop


# -- full batches ----------------------------------------------------------------------------------


def _train_lbfgs(job: TrainingJob) -> TrainingResult:
    """L-BFGS over all of the rows at once; a linear model has a faster way to the same optimum.

    It cannot pause: a job that is to go on begins anew, and comes to the same iterations.
    """
    if job.pause_after is not None:
        n_iterations = min(job.pause_after, job.recipe.max_iter)
        job = replace(job, recipe=replace(job.recipe, max_iter=n_iterations))
    linear = isinstance(job.module, MultilayerPerceptron) and not len(job.module.features)
    is_cross_entropy = job.criterion.loss == "cross_entropy"
    net = _Net(job).initialize()
    history: list[dict] = []
    clock = [time.perf_counter()]
    stopped = [False]

    def on_iteration(loss: float) -> bool:
        job.on_epoch_begin()
        if job.verbose:
            print(f"Iteration {len(history) + 1}, loss = {loss:.8f}")
        clock.append(time.perf_counter())
        seconds = clock[-1] - clock[-2]
        row = {"epoch": len(history) + 1, "train_loss": loss, "seconds": seconds}
        history.append(row | net.validation_figures())
        stopped[0] = bool(job.on_epoch_end(history[-1]))
        return stopped[0]

    minimize = _minimize_linear if linear and is_cross_entropy else _minimize_any
    try:
        result = minimize(net, on_iteration)
    except FloatingPointError as error:
        raise ValueError(
            f"The training loss is no longer finite after {len(history)} iterations of L-BFGS "
            f"({error}). Scale the inputs (normalize=True), or raise alpha."
        ) from error
    if not history:  # it began at the optimum
        on_iteration(result.loss)
    return TrainingResult(
        history=history,
        best_score=None,
        state={"solver": job.recipe.solver, "generators": job.generators.get_state()},
        n_rows_seen=len(history) * len(job.train),
        ran_out=not result.converged and not stopped[0] and job.pause_after is None,
    )


def _minimize_linear(net: _Net, on_iteration: Callable[[float], bool]) -> LBFGSResult:
    job = net.job
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
        label_smoothing=float(job.criterion.label_smoothing),  # type: ignore[arg-type]
        dtype=job.precision.weights,
        max_iter=recipe.max_iter,
        tol=recipe.tol,
        max_fun=recipe.max_fun,
        initial=(_as_array(head.weight), _as_array(head.bias)),
        callback=adopt,
    ).result


def _as_array(parameter: Tensor) -> np.ndarray:
    return parameter.detach().double().cpu().numpy()


def _minimize_any(net: _Net, on_iteration: Callable[[float], bool]) -> LBFGSResult:
    """As scikit-learn's MLPClassifier(solver="lbfgs")."""
    recipe, samples = net.job.recipe, net.job.train
    ((rows, targets, weight, weight_sum),) = Batches(samples, len(samples), in_pieces=True)
    strength = recipe.alpha / weight_sum + recipe.weight_decay

    def closure() -> float:
        net._set_training(True)
        loss, _ = net.accumulate_gradient((rows, targets), weight, weight_sum)
        with torch.no_grad():
            penalised = net.penalised_weights()
            for parameter in penalised:
                loss = loss + 0.5 * strength * parameter.square().sum()
            _add_penalty(penalised, strength)
        return float(loss)

    return _lbfgs.minimize_module(
        net.job.module,
        closure,
        max_iter=recipe.max_iter,
        tol=recipe.tol,
        max_fun=recipe.max_fun,
        callback=on_iteration,
    )
