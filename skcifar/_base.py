"""What every estimator does: rows of images in, a network trained on them, pickles."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.callback import CallbackSupportMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import (
    check_consistent_length,
    check_is_fitted,
    validate_data,
)
from torch import Tensor, nn

from skcifar._device import (
    BatchReader,
    Precision,
    as_tensor,
    device_or_cpu,
    per_feature_values,
    pixel_statistics,
    resolve_precision,
    seeded_construction,
    skeleton_construction,
)
from skcifar._networks import has_batch_norm
from skcifar._optimization import Recipe
from skcifar._parameters import CONSTRAINTS
from skcifar._training import Samples, TrainingJob

# Rows of one forward pass in prediction; a batch smaller than the least is filled up to it, so
# that a row's figures do not depend on how few rows came with it (kernels differ below it).
_PREDICTION_ROWS = 1024
_LEAST_PREDICTION_ROWS = 32

# Fitted attributes that say how rows are read; decided in the first fit or partial_fit.
_FORMAT_ATTRIBUTES = ("image_shape_", "dtype_", "mean_", "scale_")


class TorchEstimator(CallbackSupportMixin, BaseEstimator):
    """An estimator whose fit is a `TrainingJob`.

    A subclass says which network (`_network`) and, if its rows of pixels are images to it, sets
    `_convolutional`.
    """

    _parameter_constraints: dict = CONSTRAINTS
    _convolutional = False
    _alpha_over_data = False
    # -- rows --------------------------------------------------------------------------------------

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
            self.__dict__.pop("feature_names_in_", None)
        elif X.shape[1] != self.n_features_in_:
            raise ValueError(
                f"X has {X.shape[1]} features, but {type(self).__name__} is expecting "
                f"{self.n_features_in_} features as input."
            )
        if y is not None:
            check_consistent_length(X, y)
        return X.detach()

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

    # -- what is trained, and how ------------------------------------------------------------------

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

    def _seeds(self) -> dict[str, int]:
        """Independent seeds of the initial weights, the training's streams and the split."""
        seed = check_random_state(self.random_state).randint(np.iinfo(np.int32).max)
        states = np.random.SeedSequence(seed).generate_state(3)
        return dict(zip(("weights", "streams", "split"), map(int, states), strict=True))

    def _module(
        self, attributes: dict[str, Any], n_outputs: int, seed: int, device: torch.device
    ) -> nn.Module:
        """A fresh module, ready to be trained; how to build it again goes into the attributes."""
        factory, arguments = self._network(attributes["image_shape_"], n_outputs)
        with seeded_construction(seed):
            module = factory(**arguments)
            self._initialize(module)
        attributes["_architecture"] = (factory, arguments)
        module = module.to(device, Precision(attributes["dtype_"]).weights)
        if self._convolutional:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return module

    def _view(self, attributes: dict[str, Any], module: nn.Module) -> Self:
        """This estimator as if fitting had ended now: `module` is live, not copied."""
        view = object.__new__(type(self))  # copy.copy would copy the fitted network as well
        view.__dict__.update(vars(self) | attributes, module_=module)
        return view

    def _recipe(self, module: nn.Module, samples: Samples, incremental: bool) -> Recipe:
        parameters = {
            f.name: getattr(self, f.name) for f in fields(Recipe) if hasattr(self, f.name)
        }
        parameters["max_iter"] = self._resolve_max_iter()
        parameters["learning_rate_init"] = self._resolve_learning_rate(module)
        parameters["alpha"] = self._resolve_alpha(samples)
        parameters["alpha_over_data"] = self._alpha_over_data
        parameters["batch_size"] = self._resolve_batch_size(len(samples))
        if incremental:
            parameters.update(max_iter=1, learning_rate="constant")
        return Recipe(**parameters)

    def _resolve_max_iter(self) -> int:
        return self.max_iter

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

    # -- the fitted network ------------------------------------------------------------------------

    def _outputs(self, X: Any) -> np.ndarray:
        """Outputs of the network in float64, (n_samples, n_outputs)."""
        check_is_fitted(self)
        rows, _, _ = self._validate_rows(X, reset=False)
        device = weights_device(self.module_)
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
            device = device_or_cpu(state["device_"])
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


def hidden_widths(hidden_layer_sizes: Any) -> list[int]:
    """Widths of the hidden layers, from the parameter: one width or a sequence of them."""
    widths = np.atleast_1d(np.asarray(hidden_layer_sizes if np.size(hidden_layer_sizes) else []))
    if any(width <= 0 or int(width) != width for width in widths):
        raise ValueError(f"hidden_layer_sizes must be > 0 and whole, got {hidden_layer_sizes!r}.")
    return [int(width) for width in widths]


def samples_of(
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


def weights_device(module: nn.Module) -> torch.device:
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
