"""What the estimators share: validation, labels, probabilities, fitted attributes, pickling."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Self

import numpy as np
import torch
from scipy.special import expit, softmax
from sklearn.base import BaseEstimator, ClassifierMixin, _fit_context
from sklearn.callback import CallbackSupportMixin, with_callbacks
from sklearn.metrics import get_scorer
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state, column_or_1d, compute_class_weight
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets, unique_labels
from sklearn.utils.validation import (
    _check_sample_weight,
    check_consistent_length,
    check_is_fitted,
    validate_data,
)
from torch import Tensor, nn

from skcifar._device import (
    BatchReader,
    Generators,
    Precision,
    as_tensor,
    per_feature_values,
    pixel_statistics,
    resolve_device,
    resolve_precision,
    seeded_construction,
    skeleton_construction,
)
from skcifar._networks import has_batch_norm
from skcifar._parameters import CONSTRAINTS
from skcifar._training import Recipe, Samples, TrainingJob, TrainingResult, train

# Rows of one forward pass in prediction; a batch smaller than the least is filled up to it, so
# that a row's figures do not depend on how few rows came with it (kernels differ below it).
_PREDICTION_ROWS = 1024
_LEAST_PREDICTION_ROWS = 32


def _is_stochastic(estimator: TorchClassifier) -> bool:
    if estimator.solver == "lbfgs":
        raise AttributeError(
            "partial_fit is only available for the stochastic solvers 'sgd', 'adam' and 'adamw'; "
            f"solver={estimator.solver!r}."
        )
    return True


def _gives_probabilities(estimator: TorchClassifier) -> bool:
    if estimator.loss == "squared_error":
        raise AttributeError(
            "Probabilities are not available for loss='squared_error'; use loss='cross_entropy', "
            "or decision_function for the outputs."
        )
    return True


class TorchClassifier(CallbackSupportMixin, ClassifierMixin, BaseEstimator):
    """A classifier whose fit is a `TrainingJob`.

    A subclass adds `__init__`, `_network` (which module) and, if rows of pixels are images to
    it, sets `_convolutional`. `fit` is three steps: `_prepare` checks everything and describes
    the training, `train` runs it, `_adopt` sets the fitted attributes.
    """

    _parameter_constraints: dict = CONSTRAINTS
    _convolutional = False
    _alpha_over_data = False

    # -- fitting ---------------------------------------------------------------------------------

    @with_callbacks
    @_fit_context(prefer_skip_nested_validation=True)
    def fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any = None,
        *,
        X_val: Any = None,
        y_val: Any = None,
        sample_weight_val: Any = None,
    ) -> Self:
        """Train on images and their labels.

        Parameters
        ----------
        X : array-like or tensor of shape (n_samples, n_features), (n_samples, height, width) or \
                (n_samples, height, width, channels)
            Images, as rows or as images. A tensor on the device of the fit is not copied.
        y : array-like of shape (n_samples,)
            Labels: strings, integers or booleans.
        sample_weight : array-like of shape (n_samples,), default=None
            Non-negative weights; rows of weight 0 are left out.
        X_val : array-like or tensor of the same form as X, default=None
            Validation images. With `early_stopping=True` they take the place of the share held
            out; without, their loss and score are only recorded. In a `Pipeline` pass them
            through `transform_input=["X_val"]`, so that they are transformed like X.
        y_val : array-like of shape (n_val,), default=None
            Labels of `X_val`, all of them in y.
        sample_weight_val : array-like of shape (n_val,), default=None
            Weights of `X_val`.

        Returns
        -------
        self : object
            The fitted estimator.

        Raises
        ------
        ValueError
            When the input or the parameters do not fit together, or when training diverges: its
            loss is no longer finite. The message names what to do.
        """
        context = self._init_callback_context(max_subtasks=self.max_iter)
        context.call_on_fit_task_begin(estimator=self, X=X, y=y)
        going_on = self.warm_start and hasattr(self, "module_")
        job, attributes = self._prepare(
            X, y, sample_weight, X_val, y_val, sample_weight_val, going_on=going_on
        )
        self._report_epochs(context, job, attributes, X, y)
        result = train(job)
        self._adopt(job, attributes, result, going_on=going_on, keep_state=self.warm_start)
        context.call_on_fit_task_end(estimator=self, X=X, y=y, reconstruction_attributes={})
        return self

    @available_if(_is_stochastic)
    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> Self:
        """Train for one epoch more on the rows given, at the constant rate `learning_rate_init`.

        Whether and how to normalise is decided from the rows of the first call.

        Parameters
        ----------
        X : array-like or tensor, as for fit
            Images.
        y : array-like of shape (n_samples,)
            Labels.
        classes : array-like of shape (n_classes,), default=None
            All labels there will be; required in the first call, where y may lack some.
        sample_weight : array-like of shape (n_samples,), default=None
            Non-negative weights.

        Returns
        -------
        self : object
            The estimator, trained further.

        Raises
        ------
        ValueError
            When `classes` is missing in the first call or changes later, when y holds others,
            or with `early_stopping=True` or a `learning_rate` schedule.
        """
        if self.early_stopping:
            raise ValueError("partial_fit does not support early_stopping=True.")
        if self.learning_rate not in ("auto", "constant"):
            raise ValueError(
                f"partial_fit trains at a constant rate, but learning_rate={self.learning_rate!r}; "
                "use 'auto' or 'constant'."
            )
        if self.class_weight == "balanced":
            raise ValueError(
                "class_weight='balanced' needs all of y and is not supported by partial_fit; pass "
                "sample_weight or a dict of class weights."
            )
        going_on = hasattr(self, "module_")
        if classes is None and not going_on:
            raise ValueError("classes must be passed on the first call to partial_fit.")
        if classes is not None:
            classes = unique_labels(classes)
            if going_on and not np.array_equal(classes, self.classes_):
                raise ValueError(
                    f"classes={classes} is not the same as on the last call to partial_fit, was: "
                    f"{self.classes_}."
                )
        job, attributes = self._prepare(
            X, y, sample_weight, going_on=going_on, incremental=True, classes=classes
        )
        result = train(job)
        return self._adopt(job, attributes, result, going_on=going_on, keep_state=True)

    def _prepare(
        self,
        X: Any,
        y: Any,
        sample_weight: Any,
        X_val: Any = None,
        y_val: Any = None,
        sample_weight_val: Any = None,
        *,
        going_on: bool,
        incremental: bool = False,
        classes: np.ndarray | None = None,
    ) -> tuple[TrainingJob, dict[str, Any]]:
        """Check everything; give the training to do and the attributes it will leave.

        `going_on` continues from the fitted module (from a copy: a training that fails leaves it
        as it was); `incremental` is a partial_fit.
        """
        self._check_parameters()
        rows, y, given_shape = self._validate_rows(X, y, reset=not going_on)
        classes, codes = self._encode(y, classes, going_on, incremental)
        weight, index = self._weights(sample_weight, rows, classes, codes)
        has_validation = X_val is not None or y_val is not None
        state = getattr(self, "_training_state", None) if going_on else None
        seeds = self._seeds() if state is None else (0, 0, 0)
        held_out = None
        if self.early_stopping and not has_validation:
            index, held_out = self._split(index, codes, seeds[2])
        device = _weights_device(self.module_) if going_on else resolve_device(self.device)
        attributes = self._format(rows, given_shape, device, going_on)
        attributes["classes_"] = classes
        samples = _samples(rows, codes, weight, index, device, attributes["dtype_"])
        if not going_on:
            attributes.update(self._statistics(samples, attributes))
        reader = self._reader(attributes, device)
        module = self._module(attributes, seeds[0], device, going_on)
        view = self._view(attributes, module)
        validation, score = None, None
        if has_validation:
            validation, score = self._given_validation(
                view, X_val, y_val, sample_weight_val, device
            )
        elif held_out is not None:
            validation = _samples(rows, codes, weight, held_out, device, attributes["dtype_"])
            score = self._scorer(view, lambda: _as_array(rows[held_out]), classes[codes[held_out]])
        generators = Generators.from_seed(seeds[1], device)
        if state is not None:
            generators.set_state(state["generators"])
        job = TrainingJob(
            module=module,
            recipe=self._recipe(module, samples, incremental),
            reader=reader,
            precision=Precision(attributes["dtype_"]),
            generators=generators,
            train=samples,
            validation=validation,
            augment=self._augmentation(attributes["image_shape_"]),
            monitor_loss=self.scoring == "loss",
            validation_score=score,
            skorch_callbacks=copy.deepcopy(list(self.skorch_callbacks or [])),
            state=state,
            incremental=incremental,
            verbose=bool(self.verbose),
        )
        self._check_batches(job)
        return job, attributes

    def _check_parameters(self) -> None:
        """What no single parameter's constraint can say; a subclass adds its own."""
        if self.solver == "lbfgs" and self.early_stopping:
            raise ValueError(
                "early_stopping=True has no meaning for solver='lbfgs', which works on all rows at "
                "once; use solver='sgd', 'adam' or 'adamw', or early_stopping=False."
            )
        if self.loss == "squared_error" and self.label_smoothing:
            raise ValueError(
                f"label_smoothing={self.label_smoothing!r} applies to loss='cross_entropy' only; "
                "set it to 0 for loss='squared_error'."
            )

    # -- input -----------------------------------------------------------------------------------

    def _validate_rows(
        self, X: Any, y: Any = None, *, reset: bool
    ) -> tuple[Tensor, Any, tuple[int, int, int] | None]:
        """X as rows (n_samples, n_features), checked; y; and the image shape, if X has one.

        A tensor or array is not copied.
        """
        if isinstance(X, (list, tuple)):
            X = np.asarray(X)
        shape = None
        if getattr(X, "ndim", 2) > 2:
            X, shape = self._flatten(X)
        if not reset and shape is not None and shape != self.image_shape_:
            raise ValueError(
                f"X holds images of shape {shape} (height, width, channels), but "
                f"{type(self).__name__} was fitted on images of shape {self.image_shape_}."
            )
        on_device = isinstance(X, Tensor) and X.device.type != "cpu"
        if isinstance(X, Tensor) and not on_device:
            X = X.detach().float().numpy() if X.dtype == torch.bfloat16 else X.detach().numpy()
        if isinstance(y, Tensor):
            y = y.detach().cpu().numpy()
        if on_device:
            return self._validate_tensor(X, y, reset=reset), y, shape
        if not reset and y is None:
            X = validate_data(self, X, reset=False)
        else:
            X, y = validate_data(self, X, y, reset=reset)
        return as_tensor(X), y, shape

    def _flatten(self, X: Any) -> tuple[Any, tuple[int, int, int]]:
        """Images (n, height, width[, channels]), or as `layout` has them, as rows."""
        if X.ndim > 4:
            raise ValueError(
                f"X has {X.ndim} dimensions; expected rows (n_samples, n_features) or images "
                "(n_samples, height, width) or (n_samples, height, width, channels)."
            )
        if X.ndim == 3:
            height, width, channels = X.shape[1], X.shape[2], 1
        elif self.layout == "HWC":
            height, width, channels = X.shape[1:]
        else:
            channels, height, width = X.shape[1:]
        return X.reshape(X.shape[0], math.prod(X.shape[1:])), (height, width, channels)

    def _validate_tensor(self, X: Tensor, y: Any, *, reset: bool) -> Tensor:
        """validate_data for a tensor that NumPy cannot read, because it lives on a device."""
        if X.ndim != 2 or X.shape[0] == 0:
            raise ValueError(f"X has shape {tuple(X.shape)}; expected (n_samples, n_features).")
        if X.is_floating_point() and not bool(torch.isfinite(X).all()):
            raise ValueError(f"Input X of {type(self).__name__} contains NaN or infinity.")
        if reset:
            self.n_features_in_ = X.shape[1]
        elif X.shape[1] != self.n_features_in_:
            raise ValueError(
                f"X has {X.shape[1]} features, but {type(self).__name__} is expecting "
                f"{self.n_features_in_} features as input."
            )
        if y is not None:
            check_consistent_length(X, y)
        return X.detach()

    def _encode(
        self, y: Any, classes: np.ndarray | None, going_on: bool, incremental: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sorted labels, (n_classes,), and their codes for y, int64 (n_samples,)."""
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        found, codes = np.unique(y, return_inverse=True)
        if going_on:
            classes = self.classes_
        if classes is None:
            if len(found) < 2:
                raise ValueError(
                    f"{type(self).__name__} needs samples of at least 2 classes in the data, but "
                    f"the data contains only one class: {found[0]!r}"
                )
            return found, codes
        if not incremental and not np.array_equal(found, classes):
            raise ValueError(
                "warm_start can only be used where y has the same classes as in the previous call "
                f"to fit. Previously got {classes}, y has {found}."
            )
        return classes, _codes_of(found, classes, "y")[codes]

    def _weights(
        self, sample_weight: Any, rows: Tensor, classes: np.ndarray, codes: np.ndarray
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Weight of every row, or None for 1; and the rows whose weight is not 0, or None."""
        if sample_weight is None and self.class_weight is None:
            return None, None
        if isinstance(sample_weight, Tensor):
            sample_weight = sample_weight.detach().cpu().numpy()
        weight = _check_sample_weight(
            sample_weight, codes, dtype=np.float64, ensure_non_negative=True
        )
        if self.class_weight is not None:
            counted = weight > 0
            present = np.unique(codes[counted])
            per_class = np.ones(len(classes))
            per_class[present] = compute_class_weight(
                self.class_weight,
                classes=classes[present],
                y=classes[codes[counted]],
                sample_weight=weight[counted] if self.class_weight == "balanced" else None,
            )
            weight = weight * per_class[codes]
        if weight.all():
            return weight, None
        index = np.flatnonzero(weight)
        left = np.unique(codes[index])
        if len(left) < 2:
            raise ValueError(
                f"{type(self).__name__} needs samples of at least 2 classes with non-zero weight, "
                f"but sample_weight and class_weight leave {len(left)}: {classes[left]}."
            )
        return weight, index

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
        self, view: TorchClassifier, X_val: Any, y_val: Any, weight: Any, device: torch.device
    ) -> tuple[Samples, Callable[[], float] | None]:
        if X_val is None or y_val is None:
            given, missing = ("y_val", "X_val") if X_val is None else ("X_val", "y_val")
            raise ValueError(f"{given} is provided, but {missing} was not provided.")
        rows, labels, _ = view._validate_rows(X_val, y_val, reset=False)
        labels = column_or_1d(labels)
        found, inverse = np.unique(labels, return_inverse=True)
        codes = _codes_of(found, view.classes_, "y_val")[inverse]
        if weight is not None:
            weight = _check_sample_weight(weight, codes, dtype=np.float64, ensure_non_negative=True)
        validation = _samples(rows, codes, weight, None, device, view.dtype_)
        return validation, self._scorer(view, lambda: X_val, labels, weight)

    def _scorer(
        self,
        view: TorchClassifier,
        get_rows: Callable[[], Any],
        labels: np.ndarray,
        weight: np.ndarray | None = None,
    ) -> Callable[[], float] | None:
        """The monitored score where it is not the loop's own accuracy or loss."""
        if self.scoring in ("accuracy", "loss"):
            return None
        scorer = get_scorer(self.scoring) if isinstance(self.scoring, str) else self.scoring
        params = {} if weight is None else {"sample_weight": weight}
        rows = get_rows()
        return lambda: scorer(view, rows, labels, **params)

    # -- the job's parts -------------------------------------------------------------------------

    def _seeds(self) -> tuple[int, int, int]:
        """Independent seeds of the initial weights, the training's streams and the split."""
        seed = check_random_state(self.random_state).randint(np.iinfo(np.int32).max)
        weights, streams, split = np.random.SeedSequence(seed).generate_state(3)
        return int(weights), int(streams), int(split)

    def _format(
        self,
        rows: Tensor,
        given_shape: tuple[int, int, int] | None,
        device: torch.device,
        going_on: bool,
    ) -> dict[str, Any]:
        """Fitted attributes that say how rows are read."""
        if going_on:
            return {name: getattr(self, name) for name in _FORMAT_ATTRIBUTES}
        precision = resolve_precision(
            self.precision, device, rows.dtype, convolutional=self._convolutional
        )
        return {
            "image_shape_": self._resolve_image_shape(rows, given_shape),
            "dtype_": precision.name,
        }

    def _resolve_image_shape(
        self, rows: Tensor, given_shape: tuple[int, int, int] | None
    ) -> tuple[int, int, int]:
        """(height, width, channels) of the images, from the parameter or else from X."""
        n_features = rows.shape[1]
        if self.image_shape is None:
            return given_shape or (1, 1, n_features)
        shape = tuple(int(size) for size in self.image_shape)
        shape = (*shape, 1) if len(shape) == 2 else shape
        if len(shape) != 3 or math.prod(shape) != n_features:
            raise ValueError(
                f"image_shape={self.image_shape!r} does not fit X, whose rows have {n_features} "
                "features; expected (height, width) or (height, width, channels) whose product "
                f"is {n_features}."
            )
        if given_shape is not None and given_shape != shape:
            raise ValueError(
                f"image_shape={self.image_shape!r}, but X holds images of shape {given_shape} "
                "(height, width, channels); leave image_shape=None, or correct layout."
            )
        return shape

    def _statistics(self, samples: Samples, attributes: dict[str, Any]) -> dict[str, Any]:
        """`mean_` and `scale_` of the rows trained on, in input units; None where not wanted."""
        normalize = self.normalize
        if normalize == "auto":
            rows = samples.rows
            normalize = not rows.is_floating_point() and (
                rows.dtype == torch.uint8 or (int(rows.min()) >= 0 and int(rows.max()) <= 255)
            )
        if not normalize:
            return {"mean_": None, "scale_": None}
        mean, scale = pixel_statistics(
            samples.rows, attributes["image_shape_"], self.layout, samples.index, samples.weight
        )
        return {"mean_": mean, "scale_": scale}

    def _reader(self, attributes: Mapping[str, Any], device: torch.device) -> BatchReader:
        return BatchReader(
            image_shape=attributes["image_shape_"],
            layout=self.layout,
            as_images=self._convolutional,
            mean=attributes["mean_"],
            scale=attributes["scale_"],
            device=device,
            dtype=Precision(attributes["dtype_"]).weights,
        )

    def _network(
        self, image_shape: tuple[int, int, int], n_outputs: int
    ) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
        """What builds the module, and its keyword arguments: plain values that pickle."""
        raise NotImplementedError

    def _initialize(self, module: nn.Module) -> None:
        """Draw initial weights other than the module's own."""

    def _augmentation(
        self, image_shape: tuple[int, int, int]
    ) -> Callable[[Tensor, torch.Generator], Tensor] | None:
        """What is done to images (n, height, width, channels) in training only."""
        return None

    def _module(
        self, attributes: dict[str, Any], seed: int, device: torch.device, going_on: bool
    ) -> nn.Module:
        """A fresh module, or a copy of the fitted one, ready to be trained."""
        if going_on:
            attributes["_architecture"] = self._architecture
            return copy.deepcopy(self.module_)
        factory, arguments = self._network(
            attributes["image_shape_"], _n_outputs(attributes["classes_"])
        )
        with seeded_construction(seed):
            module = factory(**arguments)
            self._initialize(module)
        attributes["_architecture"] = (factory, arguments)
        module = module.to(device, Precision(attributes["dtype_"]).weights)
        if self._convolutional:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return module

    def _view(self, attributes: dict[str, Any], module: nn.Module) -> TorchClassifier:
        """This estimator as if fitting had ended now: `module` is live, not copied."""
        view = copy.copy(self)
        view.__dict__.update(attributes, module_=module)
        return view

    def _recipe(self, module: nn.Module, samples: Samples, incremental: bool) -> Recipe:
        parameters = {
            f.name: getattr(self, f.name) for f in fields(Recipe) if hasattr(self, f.name)
        }
        parameters["learning_rate_init"] = self._resolve_learning_rate(module)
        parameters["alpha"] = self._resolve_alpha(samples)
        parameters["alpha_over_data"] = self._alpha_over_data
        parameters["batch_size"] = self._resolve_batch_size(len(samples))
        if incremental:
            parameters.update(max_iter=1, learning_rate="constant")
        return Recipe(**parameters)

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
        if min(job.recipe.batch_size, len(job.train)) == 1 and has_batch_norm(job.module):
            raise ValueError(
                f"BatchNorm cannot train on batches of one: batch_size={self.batch_size!r} with "
                f"n_samples = {len(job.train)}. Raise batch_size, or use a network without it."
            )

    def _report_epochs(
        self, context: Any, job: TrainingJob, attributes: dict[str, Any], X: Any, y: Any
    ) -> None:
        """Let scikit-learn's callbacks follow the epochs."""
        current: list[Any] = []
        view = self._view(attributes, job.module)

        def begin() -> None:
            current[:] = [context.subcontext(task_name="epoch")]
            current[0].call_on_fit_task_begin(estimator=self, X=X, y=y)

        def end(row: dict) -> bool:
            return current[0].call_on_fit_task_end(
                estimator=self,
                X=X,
                y=y,
                metadata=row,
                reconstruction_attributes=lambda: vars(view),
            )

        job.on_epoch_begin, job.on_epoch_end = begin, end

    # -- fitted attributes -----------------------------------------------------------------------

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
        module = job.module.eval()
        module.zero_grad(set_to_none=True)
        attributes |= {
            "module_": module,
            "history_": history,
            "n_iter_": len(history),
            "loss_curve_": [row["train_loss"] for row in history],
            "loss_": history[-1]["train_loss"],
            "best_loss_": None if early else result.best_loss,
            "validation_scores_": scores or None,
            "best_validation_score_": max(scores) if scores else None,
            "t_": len(history) * len(job.train),
            "n_outputs_": _n_outputs(attributes["classes_"]),
            "n_parameters_": sum(p.numel() for p in module.parameters()),
            "device_": str(job.reader.device),
            "skorch_callbacks_": result.skorch_callbacks,
        }
        self.__dict__.pop("_training_state", None)
        if keep_state:
            attributes["_training_state"] = result.state
        self.__dict__.update(attributes)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Arrays, not tensors: smaller, loads without CUDA and torch's own pickle format, and can
        # be memory-mapped by joblib.
        state = dict(super().__getstate__())
        if "module_" in state:
            state["module_"] = _to_arrays(state["module_"].state_dict())
        if "_training_state" in state:
            state["_training_state"] = _to_arrays(state["_training_state"])
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if "module_" in state:
            factory, arguments = state["_architecture"]
            device = torch.device(state["device_"])
            if device.type == "cuda" and not torch.cuda.is_available():
                device = torch.device("cpu")
            state["device_"] = str(device)
            with skeleton_construction(factory):
                module = factory(**arguments)
            weights = _to_tensors(state["module_"])
            module.load_state_dict(weights, assign=True)
            state["module_"] = module.to(device).eval()
            if "_training_state" in state:
                state["_training_state"] = _to_tensors(state["_training_state"])
        super().__setstate__(state)

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "module_")

    # -- prediction ------------------------------------------------------------------------------

    def _logits(self, X: Any) -> np.ndarray:
        """Outputs of the network in float64, (n_samples, n_outputs)."""
        check_is_fitted(self)
        rows, _, _ = self._validate_rows(X, reset=False)
        device = _weights_device(self.module_)
        reader = self._reader(vars(self), device)
        precision = Precision(self.dtype_)
        outputs = []
        with torch.inference_mode(), precision.autocast(device):
            for batch in rows.split(_PREDICTION_ROWS):
                images = reader(_filled_up(batch, _LEAST_PREDICTION_ROWS))
                outputs.append(self._forward(images)[: len(batch)].double().cpu())
        return torch.cat(outputs).numpy()

    def _forward(self, batch: Tensor) -> Tensor:
        return self.module_(batch)

    def _first_layer_in_input_units(self, layer: nn.Linear) -> tuple[np.ndarray, np.ndarray]:
        """Weights (n_out, n_features) and biases (n_out,) that act on X as it is given."""
        weight = layer.weight.detach().cpu().numpy()
        bias = layer.bias.detach().cpu().numpy()
        if self.mean_ is None:
            return weight, bias
        mean, scale = (
            per_feature_values(values, self.image_shape_, self.layout)
            for values in (self.mean_, self.scale_)
        )
        weight = weight / scale
        return weight, bias - (weight * mean).sum(1)

    def decision_function(self, X: Any) -> np.ndarray:
        """Return the outputs of the network before the softmax.

        Parameters
        ----------
        X : array-like or tensor, as for fit
            Images.

        Returns
        -------
        outputs : ndarray of shape (n_samples,) or (n_samples, n_classes)
            Float64. Of two classes the log-odds of `classes_[1]`, of more the logits; with
            `loss="squared_error"` the outputs fitted to -1 and 1, or to the one-hot targets.
        """
        logits = self._logits(X)
        return logits[:, 0] if logits.shape[1] == 1 else logits

    def predict(self, X: Any) -> np.ndarray:
        """Predict the most probable class of each image.

        Parameters
        ----------
        X : array-like or tensor, as for fit
            Images.

        Returns
        -------
        y : ndarray of shape (n_samples,)
            Labels out of `classes_`.
        """
        outputs = self.decision_function(X)
        codes = (outputs > 0).astype(np.intp) if outputs.ndim == 1 else outputs.argmax(1)
        return self.classes_[codes]

    @available_if(_gives_probabilities)
    def predict_proba(self, X: Any) -> np.ndarray:
        """Predict the probabilities of the classes, computed in float64.

        Parameters
        ----------
        X : array-like or tensor, as for fit
            Images.

        Returns
        -------
        probabilities : ndarray of shape (n_samples, n_classes)
            In the order of `classes_`; rows sum to 1.
        """
        outputs = self.decision_function(X)
        if outputs.ndim == 1:
            return expit(np.column_stack([-outputs, outputs]))
        return softmax(outputs, axis=1)

    @available_if(_gives_probabilities)
    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Predict the logarithms of the probabilities of the classes.

        Parameters
        ----------
        X : array-like or tensor, as for fit
            Images.

        Returns
        -------
        log_probabilities : ndarray of shape (n_samples, n_classes)
            In the order of `classes_`.
        """
        with np.errstate(divide="ignore"):
            return np.log(self.predict_proba(X))


# Fitted attributes that say how rows are read; decided in the first fit or partial_fit.
_FORMAT_ATTRIBUTES = ("image_shape_", "dtype_", "mean_", "scale_")


def hidden_widths(hidden_layer_sizes: Any) -> list[int]:
    """Widths of the hidden layers, from the parameter: one width or a sequence of them."""
    widths = np.atleast_1d(np.asarray(hidden_layer_sizes if np.size(hidden_layer_sizes) else []))
    if any(width <= 0 or int(width) != width for width in widths):
        raise ValueError(f"hidden_layer_sizes must be > 0 and whole, got {hidden_layer_sizes!r}.")
    return [int(width) for width in widths]


def _n_outputs(classes: np.ndarray) -> int:
    return 1 if len(classes) == 2 else len(classes)


def _codes_of(found: np.ndarray, classes: np.ndarray, name: str) -> np.ndarray:
    """Positions of the labels found in the sorted classes."""
    unknown = np.setdiff1d(found, classes)
    if len(unknown):
        raise ValueError(
            f"{name} contains labels {unknown} that are not among the classes {classes}."
        )
    return np.searchsorted(classes, found)


def _samples(
    rows: Tensor,
    codes: np.ndarray,
    weight: np.ndarray | None,
    index: np.ndarray | None,
    device: torch.device,
    dtype: str,
) -> Samples:
    def moved(array: np.ndarray | None, to: torch.dtype) -> Tensor | None:
        return None if array is None else torch.as_tensor(array, dtype=to, device=device)

    return Samples(
        rows.to(device),
        torch.as_tensor(codes, dtype=torch.int64, device=device),
        moved(weight, Precision(dtype).weights),
        moved(index, torch.int64),
    )


def _as_array(rows: Tensor) -> np.ndarray:
    return rows.cpu().numpy()


def _weights_device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _filled_up(batch: Tensor, least: int) -> Tensor:
    if len(batch) >= least:
        return batch
    return torch.cat([batch, batch[:1].expand(least - len(batch), -1)])


def _to_arrays(state: Any) -> Any:
    """The same nest of dicts with arrays in place of tensors."""
    if isinstance(state, Tensor):
        return state.detach().cpu().numpy()
    if isinstance(state, dict):
        return {key: _to_arrays(value) for key, value in state.items()}
    return state


def _to_tensors(state: Any) -> Any:
    """The inverse of `_to_arrays`; a memory-mapped array stays where it is."""
    if isinstance(state, np.ndarray):
        return as_tensor(state)
    if isinstance(state, dict):
        return {key: _to_tensors(value) for key, value in state.items()}
    return state
