"""What every estimator that is trained on labels does: a fit from checks to fitted attributes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Self

import numpy as np
import torch
from sklearn.callback import CallbackSupportMixin
from sklearn.metrics import get_scorer
from sklearn.model_selection import train_test_split
from sklearn.utils import column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight
from torch import Tensor, nn

from skcifar._base import TorchEstimator, weights_device
from skcifar._batches import Samples
from skcifar._device import (
    Augmentation,
    Generators,
    Precision,
    pixel_statistics,
    resolve_device,
    resolve_precision,
)
from skcifar._jobs import TrainingJob, TrainingResult, compute
from skcifar._networks import has_batch_norm
from skcifar._optimization import Recipe
from skcifar._parameters import CONSTRAINTS
from skcifar._processes import warn_if_gpu_is_shared
from skcifar._stored_rows import Rows, StoredRows, on_device
from skcifar._training import train


class SupervisedEstimator(CallbackSupportMixin, TorchEstimator):
    """An estimator whose fit is a `TrainingJob`.

    `fit` is three steps: `_prepare` checks everything and describes the training, `train` runs it,
    `_adopt` sets the fitted attributes. A subclass says how many outputs the network has
    (`_count_outputs`), what their loss is (`_criterion`) and how they are scored (`_scorer`).
    """

    _parameter_constraints: dict = CONSTRAINTS
    _alpha_over_data = False
    # Fitted attributes that are decided in the first fit or partial_fit.
    _decided_once: tuple[str, ...] = ("image_shape_", "mean_", "scale_", "dtype_", "_architecture")

    def _fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any = None,
        X_val: Any = None,
        y_val: Any = None,
        sample_weight_val: Any = None,
    ) -> Self:
        context = self._init_callback_context(max_subtasks=self._count_subtasks())
        context.call_on_fit_task_begin(estimator=self, X=X, y=y)
        going_on = self.warm_start and hasattr(self, "module_")
        with self._input_kept_on_failure():
            job, attributes = self._prepare(
                X,
                y,
                sample_weight,
                X_val,
                y_val,
                sample_weight_val,
                going_on=going_on,
                context=context,
            )
            self._report_epochs(context, job, attributes, X, y, sample_weight)
            result = train(job)
            self._adopt(job, attributes, result, going_on=going_on, keep_state=self.warm_start)
        context.call_on_fit_task_end(estimator=self, X=X, y=y, reconstruction_attributes={})
        return self

    def _partial_fit(
        self, X: Any, y: Any, sample_weight: Any = None, classes: np.ndarray | None = None
    ) -> Self:
        going_on = hasattr(self, "module_")
        with self._input_kept_on_failure():
            job, attributes = self._prepare(
                X, y, sample_weight, going_on=going_on, incremental=True, classes=classes
            )
            return self._adopt(job, attributes, train(job), going_on=going_on, keep_state=True)

    def _prepare(
        self,
        X: Any,
        y: Any,
        sample_weight: Any = None,
        X_val: Any = None,
        y_val: Any = None,
        sample_weight_val: Any = None,
        *,
        going_on: bool,
        incremental: bool = False,
        classes: np.ndarray | None = None,
        context: Any = None,
    ) -> tuple[TrainingJob, dict[str, Any]]:
        """Check everything; give the training to do and the attributes it will leave.

        `going_on` continues from the fitted module (from a copy: a training that fails leaves it
        as it was); `incremental` is a partial_fit; `context` is that of scikit-learn's callbacks.
        """
        self._check_parameters(incremental)
        rows, y, given_shape = self._validate_rows(X, y, reset=not going_on)
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        classes, codes = self._encode(y, classes, going_on, incremental)
        sample_weight = _checked_weight(sample_weight, codes)
        weight, index = self._weights(sample_weight, classes, codes, 1 if incremental else 2)
        state = self._state_to_go_on_from() if going_on else None
        seeds = self._seeds() if state is None else {}
        device = weights_device(self.module_) if going_on else resolve_device(self.device)
        warn_if_gpu_is_shared(device)
        attributes = self._label_attributes(classes) | {"device_": str(device)}
        # rows that were held out once are never trained on later
        attributes["_split_seed"] = self._split_seed if going_on else seeds["split"]
        held_out = None
        if self.early_stopping and X_val is None and y_val is None:
            index, held_out = self._split(index, codes, attributes["_split_seed"])
            if isinstance(rows, StoredRows):  # which lie in this order
                index, held_out = np.sort(index), np.sort(held_out)
        attributes["dtype_"] = self.dtype_ if going_on else self._precision(rows, device)
        samples = samples_of(rows, codes, weight, index, device, attributes["dtype_"])
        if going_on:
            attributes |= {name: getattr(self, name) for name in self._decided_once}
            module = copy.deepcopy(self.module_)
        else:
            attributes |= self._reading(samples, given_shape, y, seeds, context)
            module = self._module(
                attributes, self._count_outputs(classes), seeds["weights"], device
            )
            self._show_images(module, samples, attributes, device)
        attributes["module_"] = module
        view = self._view(attributes)
        validation, score = None, None
        if held_out is not None:
            rows_held_out = samples_of(
                samples.rows, codes, sample_weight, held_out, device, attributes["dtype_"]
            )
            # A tensor, though X may have been a DataFrame: its names do not matter here.
            view.__dict__.pop("feature_names_in_", None)
            held_out_weight = None if sample_weight is None else sample_weight[held_out]
            score = self._scorer(view, lambda: rows_held_out.X, y[held_out], held_out_weight)
            validation = rows_held_out
        elif X_val is not None or y_val is not None:
            validation, score = self._given_validation(
                view, X_val, y_val, sample_weight_val, classes, device
            )
        generators = Generators.from_seed(seeds.get("streams", 0), device)
        if state is not None:
            generators.set_state(state["generators"])
        job = TrainingJob(
            module=module,
            criterion=self._criterion(generators),
            recipe=self._recipe(module, samples, incremental),
            reader=self._reader(attributes, device),
            precision=Precision(attributes["dtype_"]),
            generators=generators,
            train=samples,
            validation=validation,
            sampler=self._sampler(),
            augment=self._augmentation(attributes["image_shape_"]),
            monitor_loss=self.scoring == "loss",
            validation_score=score,
            skorch_callbacks=copy.deepcopy(list(self.skorch_callbacks or [])),
            state=state,
            incremental=incremental,
            evaluation_rows=view._rows_of_a_forward_pass()[0],
            verbose=bool(self.verbose),
        )
        self._check_batches(job)
        return job, attributes

    def _state_to_go_on_from(self) -> dict[str, Any] | None:
        """State of the optimizer that trained last, if it was of the same kind."""
        state = getattr(self, "_training_state", None)
        same = state is not None and state["solver"] == self._value("solver")
        return state if same else None

    def _adopt(
        self,
        job: TrainingJob,
        attributes: dict[str, Any],
        result: TrainingResult,
        *,
        going_on: bool,
        keep_state: bool,
    ) -> Self:
        """Set everything a fit leaves, now that nothing can fail any more."""
        history = list(self.history_) if going_on else []
        history += [{**row, "epoch": len(history) + i} for i, row in enumerate(result.history, 1)]
        scores = [row["valid_score"] for row in history if "valid_score" in row]
        early = self.early_stopping
        module = attributes["module_"].eval()
        module.zero_grad(set_to_none=True)
        attributes |= {
            "history_": history,
            "n_iter_": len(history),
            "loss_curve_": [row["train_loss"] for row in history],
            "loss_": history[-1]["train_loss"],
            "best_loss_": None if early else min(row["train_loss"] for row in history),
            "validation_scores_": scores or None,
            # with early stopping that of the weights restored
            "best_validation_score_": result.best_score if early else max(scores, default=None),
            "t_": result.n_rows_seen + (self.t_ if going_on else 0),
            "n_parameters_": sum(p.numel() for p in module.parameters()),
            "skorch_callbacks_": result.skorch_callbacks,
        }
        self.__dict__.pop("_training_state", None)
        if keep_state:
            attributes["_training_state"] = result.state
        self.__dict__.update(attributes)
        return self

    # -- labels ------------------------------------------------------------------------------------

    def _check_parameters(self, incremental: bool) -> None:
        """What no single parameter's constraint can say; a subclass adds its own."""
        if not incremental:
            return
        if self.early_stopping:
            raise ValueError("partial_fit does not support early_stopping=True.")
        if self.learning_rate not in ("auto", "constant"):
            raise ValueError(
                f"partial_fit trains at a constant rate, but learning_rate={self.learning_rate!r}; "
                "use 'auto' or 'constant'."
            )

    def _encode(
        self, y: np.ndarray, classes: np.ndarray | None, going_on: bool, incremental: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sorted labels, (n_classes,), and their codes for y, int64 (n_samples,)."""
        found, codes = np.unique(y, return_inverse=True)
        if len(found) < 2:
            raise ValueError(
                f"{type(self).__name__} needs samples of at least 2 classes in the data, but "
                f"the data contains only one class: {found[0]}"
            )
        return found, codes

    def _label_attributes(self, classes: np.ndarray) -> dict[str, Any]:
        """Fitted attributes that tell of the labels."""
        return {}

    def _weights(
        self,
        sample_weight: np.ndarray | None,
        classes: np.ndarray,
        codes: np.ndarray,
        at_least: int,
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Weight of every row, or None for 1; and the rows whose weight is not 0, or None.

        Of these, rows of `at_least` so many classes must be left.
        """
        return None, None

    # -- rows --------------------------------------------------------------------------------------

    def _precision(self, rows: Rows, device: torch.device) -> str:
        return resolve_precision(
            self.precision, device, rows.dtype, convolutional=self._convolutional
        ).name

    def _reading(
        self,
        samples: Samples,
        given_shape: tuple[int, int, int] | None,
        y: np.ndarray,
        seeds: dict[str, int],
        context: Any,
    ) -> dict[str, Any]:
        """Fitted attributes that say how rows are read, from those that are trained on.

        `mean_` and `scale_` are in input units, and None where rows are not to be normalised.
        """
        image_shape = self._resolve_image_shape(samples.rows, given_shape)
        normalize = self.normalize
        if normalize == "auto":
            rows = samples.rows
            normalize = not rows.is_floating_point() and (
                rows.dtype == torch.uint8 or _are_pixels(rows)
            )
        mean = scale = None
        if normalize:
            rows, index, weight = samples.rows, samples.index, samples.weight
            what = None
            if isinstance(rows, Tensor) and index is None and weight is None:
                form = (rows.shape, rows.stride(), rows.dtype)
                what = (rows.data_ptr(), "statistics", *form, image_shape, self.layout)
            mean, scale = compute(
                lambda: pixel_statistics(rows, image_shape, self.layout, index, weight), what
            )
        return {"image_shape_": image_shape, "mean_": mean, "scale_": scale}

    def _show_images(
        self,
        module: nn.Module,
        samples: Samples,
        attributes: dict[str, Any],
        device: torch.device,
    ) -> None:
        """Let layers of a fresh module that take their weights from images see some."""

    # -- what is trained, and how ------------------------------------------------------------------

    def _value(self, name: str) -> Any:
        """A parameter, or what its "auto" stands for where that does not depend on the data."""
        value = getattr(self, name)
        is_auto = isinstance(value, str) and value == "auto"
        return self._auto_values().get(name, value) if is_auto else value

    def _auto_values(self) -> Mapping[str, Any]:
        return {}

    def _count_outputs(self, classes: np.ndarray) -> int:
        raise NotImplementedError

    def _criterion(self, generators: Generators) -> nn.Module:
        """The loss of a batch."""
        raise NotImplementedError

    def _sampler(self) -> Callable[..., list[Tensor]] | None:
        """What draws an epoch's batches, other than all rows in turn."""
        return None

    def _augmentation(self, image_shape: tuple[int, int, int]) -> Augmentation | None:
        """What is done to images (n, height, width, channels) in training only."""
        return None

    def _recipe(self, module: nn.Module, samples: Samples, incremental: bool) -> Recipe:
        parameters = {f.name: self._value(f.name) for f in fields(Recipe) if hasattr(self, f.name)}
        parameters["max_iter"] = self._resolve_max_iter()
        parameters["learning_rate_init"] = self._resolve_learning_rate(module)
        parameters["alpha"] = self._resolve_alpha(samples)
        parameters["alpha_over_data"] = self._alpha_over_data
        parameters["batch_size"] = self._resolve_batch_size(len(samples))
        if incremental:
            parameters.update(max_iter=1, learning_rate="constant")
        return Recipe(**parameters)

    def _resolve_max_iter(self) -> int:
        return self._value("max_iter")

    def _resolve_learning_rate(self, module: nn.Module) -> float:
        return self.learning_rate_init

    def _resolve_alpha(self, samples: Samples) -> float:
        return self.alpha

    def _resolve_batch_size(self, n_samples: int) -> int:
        if self.batch_size == "full":
            return n_samples
        if self.batch_size == "auto":  # some 50 steps an epoch for small data, 200 for CIFAR-10
            return min(n_samples, max(64, min(256, n_samples // 50)))
        return min(self.batch_size, n_samples)

    def _check_batches(self, job: TrainingJob) -> None:
        n_batches = -(-len(job.train) // job.recipe.batch_size)
        if len(job.train) // n_batches == 1 and has_batch_norm(job.module):
            raise ValueError(
                f"BatchNorm cannot train on batches of one: batch_size={self.batch_size!r} with "
                f"n_samples = {len(job.train)}. Raise batch_size, or use a network without it."
            )

    def _count_subtasks(self) -> int:
        return self._resolve_max_iter()

    def _report_epochs(
        self,
        context: Any,
        job: TrainingJob,
        attributes: dict[str, Any],
        X: Any,
        y: Any,
        sample_weight: Any,
    ) -> None:
        """Let scikit-learn's callbacks follow the epochs."""
        current: list[Any] = []
        # what they hand on to scorers, so nothing that scorers do not take
        metadata = None if sample_weight is None else {"sample_weight": sample_weight}
        view = self._view(attributes)

        def begin() -> None:
            current[:] = [context.subcontext(task_name="epoch")]
            current[0].call_on_fit_task_begin(estimator=self, X=X, y=y)

        def end(row: dict) -> bool:
            return current[0].call_on_fit_task_end(
                estimator=self,
                X=X,
                y=y,
                metadata=metadata,
                reconstruction_attributes=lambda: vars(view),
            )

        job.on_epoch_begin, job.on_epoch_end = begin, end

    # -- validation rows ---------------------------------------------------------------------------

    def _split(
        self, index: np.ndarray | None, codes: np.ndarray, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows to train on and rows held out, stratified."""
        index = np.arange(len(codes)) if index is None else index
        try:
            return train_test_split(
                index, test_size=self.validation_fraction, random_state=seed, stratify=codes[index]
            )
        except ValueError as error:
            raise ValueError(
                f"early_stopping=True could not hold out validation_fraction="
                f"{self.validation_fraction} of {len(index)} samples with every class on both "
                f"sides ({error}). Pass X_val and y_val, or more samples."
            ) from error

    def _given_validation(
        self,
        view: Self,
        X_val: Any,
        y_val: Any,
        weight: Any,
        classes: np.ndarray,
        device: torch.device,
    ) -> tuple[Samples, Callable[[], float] | None]:
        if X_val is None or y_val is None:
            given, missing = ("y_val", "X_val") if X_val is None else ("X_val", "y_val")
            raise ValueError(f"{given} is provided, but {missing} was not provided.")
        rows, labels, _ = view._validate_rows(X_val, y_val, reset=False)
        labels = column_or_1d(labels)
        weight = _checked_weight(weight, labels)
        index = None if weight is None or weight.all() else np.flatnonzero(weight)
        codes = self._encode_validation(labels, classes)
        validation = samples_of(rows, codes, weight, index, device, view.dtype_)
        return validation, self._scorer(view, lambda: X_val, labels, weight)

    def _encode_validation(self, labels: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """Codes of validation labels; by default they need not be among the classes."""
        return np.unique(labels, return_inverse=True)[1]

    def _scorer(
        self,
        view: Self,
        get_rows: Callable[[], Any],
        labels: np.ndarray,
        weight: np.ndarray | None,
    ) -> Callable[[], float] | None:
        """The monitored score where it is not the loop's own accuracy or loss."""
        if self.scoring in ("accuracy", "loss"):
            return None
        scorer = get_scorer(self.scoring) if isinstance(self.scoring, str) else self.scoring
        params = {} if weight is None else {"sample_weight": weight}
        rows = get_rows()
        return lambda: scorer(view, rows, labels, **params)


def _are_pixels(rows: Rows) -> bool:
    least, greatest = map(int, rows.aminmax())
    return least >= 0 and greatest <= 255


def samples_of(
    rows: Rows,
    codes: np.ndarray,
    weight: np.ndarray | None,
    index: np.ndarray | None,
    device: torch.device,
    dtype: str,
) -> Samples:
    def moved(array: np.ndarray | None, to: torch.dtype) -> Tensor | None:
        return None if array is None else torch.as_tensor(array, dtype=to, device=device)

    return Samples(
        on_device(rows, device),
        torch.as_tensor(codes, dtype=torch.int64, device=device),
        moved(weight, Precision(dtype).weights),
        moved(index, torch.int64),
    )


def _checked_weight(weight: Any, like: np.ndarray) -> np.ndarray | None:
    """Weights as float64, (n_samples,), as many as in `like`."""
    if weight is None:
        return None
    if isinstance(weight, Tensor):
        weight = weight.detach().cpu().numpy()
    return _check_sample_weight(weight, like, dtype=np.float64, ensure_non_negative=True)
