"""What every estimator does: rows of images in, a network run on them, pickles."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, Self

import numpy as np
import torch
from sklearn import config_context, get_config
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state, get_tags
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
    seeded_construction,
    skeleton_construction,
)
from skcifar._jobs import MEETING, compute
from skcifar._memory import is_out_of_memory
from skcifar._processes import keep_to_own_cores
from skcifar._stored_rows import Rows, StoredRows, is_stored

# Rows of one forward pass in prediction, the most and the least.
_PREDICTION_ROWS = 1024
_LEAST_PREDICTION_ROWS = 32

# To those a batch is filled up, so that a row's figures depend as little as can be on how many rows
# came with it; but a few rows only to these, and more than the least to a multiple of them. Matrix
# products treat what is left of four rows in another way: in float64, of 75 perceptrons 48 gave 31
# rows other last digits than 1024, none gave them to 4, 8 or 32, and 56 to one row as it comes.
# Filled up to 32 it took 203 us through 3072-200-10 units, to 8 115 us, to 4 132 us (MKL); and
# 1622, 549 and 368 us through convolutions of 32, 64 and 64 channels.
_FEW_ROWS, _FEW_IMAGES = 8, 4

# Of arrays that torch reads as they are.
_PLAIN_DTYPES = frozenset(map(np.dtype, ("uint8", "float32", "float64")))


class TorchEstimator(BaseEstimator):
    """An estimator that holds a torch module.

    A subclass says which (`_network`) and, if its rows of pixels are images to it, sets
    `_convolutional`.
    """

    _convolutional = False

    # -- rows --------------------------------------------------------------------------------------

    def _validate_rows(
        self, X: Any, y: Any = None, *, reset: bool
    ) -> tuple[Rows, Any, tuple[int, int, int] | None]:
        """X as rows (n_samples, n_features), checked; y; and the image shape, if X has one.

        A tensor or array is not copied, and not read as yet if it is stored elsewhere.
        """
        keep_to_own_cores()
        if isinstance(X, (list, tuple)):
            X = np.asarray(X)
        shape = None
        form = X.source if isinstance(X, StoredRows) else X
        if len(getattr(form, "shape", ())) > 2:
            shape = self._shape_of_images(form)
        if is_stored(X):
            X = X if isinstance(X, StoredRows) else StoredRows(X)
        elif shape is not None:
            X = X.reshape(X.shape[0], math.prod(X.shape[1:]))
        if not reset and shape is not None and shape != self.image_shape_:
            raise ValueError(
                f"X holds images of shape {shape} (height, width, channels), but "
                f"{type(self).__name__} was fitted on images of shape {self.image_shape_}."
            )
        elsewhere = isinstance(X, StoredRows) or (isinstance(X, Tensor) and X.device.type != "cpu")
        if isinstance(X, Tensor) and not elsewhere:
            X = X.detach().float().numpy() if X.dtype == torch.bfloat16 else X.detach().numpy()
        if isinstance(y, Tensor):
            y = y.detach().cpu().numpy()
        if elsewhere:
            return self._validate_elsewhere(X, y, reset=reset), y, shape
        if not reset and y is None and self._is_as_expected(X):
            return as_tensor(X), None, shape
        with config_context(assume_finite=get_config()["assume_finite"] or _is_known_finite(X)):
            if y is not None:
                X, y = validate_data(self, X, y, reset=reset)
            elif reset:  # an error where labels are needed
                X = validate_data(self, X, y, reset=True)
            else:
                X = validate_data(self, X, reset=False)
        return as_tensor(X), y, shape

    def _is_as_expected(self, X: Any) -> bool:
        """Whether scikit-learn's checks of rows to predict would let X pass as it is.

        Of one row of 3072 features they take 82 to 88 us, this takes 1 of bytes and 6 of floats.
        Whatever is not plainly right is for them to convert, or to find fault with.
        """
        return (
            type(X) is np.ndarray
            and X.dtype in _PLAIN_DTYPES
            and X.ndim == 2
            and X.shape[0] > 0
            and X.shape[1] == self.n_features_in_
            and not hasattr(self, "feature_names_in_")
            and (X.dtype.kind != "f" or _is_known_finite(X) or math.isfinite(as_tensor(X).sum()))
        )

    @contextmanager
    def _input_kept_on_failure(self) -> Iterator[None]:
        """Let what a fit that fails has learned of its input be as it was before."""
        names = ("n_features_in_", "feature_names_in_")
        before = {name: vars(self)[name] for name in names if name in vars(self)}
        try:
            yield
        except BaseException:
            self.__dict__.update(before)
            for name in set(names) - set(before):
                self.__dict__.pop(name, None)
            raise

    def _shape_of_images(self, X: Any) -> tuple[int, int, int]:
        """(height, width, channels) of images (n, height, width[, channels]), or as in `layout`."""
        if len(X.shape) > 4:
            raise ValueError(
                f"X has {len(X.shape)} dimensions; expected rows (n_samples, n_features) or images "
                "(n_samples, height, width) or (n_samples, height, width, channels)."
            )
        if len(X.shape) == 3:
            height, width, channels = X.shape[1], X.shape[2], 1
        elif self.layout == "HWC":
            height, width, channels = X.shape[1:]
        else:
            channels, height, width = X.shape[1:]
        return height, width, channels

    def _validate_elsewhere(self, X: Rows, y: Any, *, reset: bool) -> Rows:
        """validate_data for what NumPy cannot read, or not at once: on a device, or stored."""
        if X.ndim != 2 or X.shape[0] == 0:
            raise ValueError(
                f"X has shape {tuple(X.shape)}; expected (n_samples, n_features), and one sample "
                "at least."
            )
        if y is None and reset and get_tags(self).target_tags.required:
            raise ValueError(
                f"This {type(self).__name__} estimator requires y to be passed, but the target y "
                "is None."
            )
        # of stored rows each is looked at when it is read
        if isinstance(X, Tensor) and X.is_floating_point() and not bool(torch.isfinite(X).all()):
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
        if isinstance(X, StoredRows):
            return X
        return X.detach().float() if X.dtype == torch.bfloat16 else X.detach()

    def _resolve_image_shape(
        self, rows: Rows, given_shape: tuple[int, int, int] | None
    ) -> tuple[int, int, int]:
        """(height, width, channels) of the images, from the parameter or else from X."""
        n_features = rows.shape[1]
        if self.image_shape is None:
            return given_shape or self._guess_image_shape(rows)
        shape = tuple(self.image_shape)
        shape = (*shape, 1) if len(shape) == 2 else shape
        whole = all(isinstance(size, (int, np.integer)) and size > 0 for size in shape)
        if not whole or len(shape) != 3 or math.prod(shape) != n_features:
            raise ValueError(
                f"image_shape={self.image_shape!r} does not fit X, whose rows have {n_features} "
                "features; expected (height, width) or (height, width, channels), whole numbers "
                f"whose product is {n_features}."
            )
        if given_shape is not None and given_shape != shape:
            raise ValueError(
                f"image_shape={self.image_shape!r}, but X holds images of shape {given_shape} "
                "(height, width, channels); leave image_shape=None, or correct layout."
            )
        height, width, channels = map(int, shape)
        return height, width, channels

    def _guess_image_shape(self, rows: Rows) -> tuple[int, int, int]:
        """Of flat rows: square images to a network of convolutions, where the length allows."""
        n_features = rows.shape[1]
        square = square_image(n_features) if self._convolutional else None
        if square is None:
            return 1, 1, n_features
        sample = rows[:1000]
        if sample.is_floating_point() and bool((sample != sample.round()).any()):
            warnings.warn(
                f"Rows of {n_features} features were taken for images of shape {square} (height, "
                "width, channels), but their values are not whole as pixels are. Give "
                f"image_shape={square} if they are images, or image_shape=(1, 1, {n_features}) if "
                "they are not.",
                UserWarning,
                stacklevel=2,
            )
        return square

    def _reader(self, attributes: Mapping[str, Any], device: torch.device) -> BatchReader:
        return BatchReader(
            image_shape=attributes["image_shape_"],
            layout=self.layout,
            as_images=self._convolutional,
            mean=attributes["mean_"],
            scale=attributes["scale_"],
            device=device,
            dtype=Precision(attributes["dtype_"]).weights,
            grey_to_rgb=self._repeats_grey(attributes["image_shape_"][2]),
        )

    def _repeats_grey(self, n_channels: int) -> bool:
        """Whether the network reads images of so many channels with three of them."""
        return False

    # -- the network -------------------------------------------------------------------------------

    def _network(
        self, image_shape: tuple[int, int, int], n_outputs: int
    ) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
        """What builds the module, and its keyword arguments: plain values that pickle."""
        raise NotImplementedError

    def _initialize(self, module: nn.Module) -> None:
        """Draw initial weights other than the module's own."""

    def _module(
        self, attributes: dict[str, Any], n_outputs: int, seed: int, device: torch.device
    ) -> nn.Module:
        """A fresh module, ready to be trained; how to build it again goes into the attributes."""
        factory, arguments = self._network(attributes["image_shape_"], n_outputs)
        with seeded_construction(seed):
            module = factory(**arguments)
            self._initialize(module)
        attributes["_architecture"] = (factory, arguments)
        return self._placed(module, device, Precision(attributes["dtype_"]).weights)

    def _placed(
        self, module: nn.Module, device: torch.device, dtype: torch.dtype | None = None
    ) -> nn.Module:
        module = module.to(device, dtype)
        if self._convolutional:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return module

    def _view(self, attributes: Mapping[str, Any]) -> Self:
        """This estimator with other fitted attributes, whose module is live, not copied."""
        view = object.__new__(type(self))  # copy.copy would copy the fitted network as well
        view.__dict__.update(vars(self) | dict(attributes))
        return view

    def _seeds(self) -> dict[str, int]:
        """Independent seeds of the initial weights, the training's streams and the split."""
        draw = check_random_state(self.random_state).randint
        meeting = MEETING.get()
        seed = None
        if meeting is not None:
            own = None if self.random_state is None else draw(np.iinfo(np.int32).max)
            seed = meeting.seed(own)
        if seed is None:
            seed = draw(np.iinfo(np.int32).max)
        states = np.random.SeedSequence(seed).generate_state(4)
        names = ("weights", "streams", "split", "encoder")
        return dict(zip(names, map(int, states), strict=True))

    # -- the fitted network ------------------------------------------------------------------------

    def _outputs(self, X: Any, dtype: torch.dtype = torch.float64) -> np.ndarray:
        """Outputs of the network, (n_samples, n_outputs)."""
        check_is_fitted(self)
        rows, _, _ = self._validate_rows(X, reset=False)
        return compute(lambda: self._outputs_of(rows, dtype))

    def _outputs_of(
        self, rows: Rows, dtype: torch.dtype, report: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """Outputs for rows that are validated; batches are halved where memory does not suffice."""
        device = weights_device(self.module_)
        reader = self._reader(vars(self), device)
        precision = Precision(self.dtype_)
        size, few, least = self._rows_at_once(device)
        outputs: Tensor | None = None
        done = 0
        with torch.inference_mode(), precision.autocast(device):
            while done < len(rows):
                stop = min(done + size, len(rows))
                n_rows = _enough(stop - done, few, least, size)
                start = max(stop - n_rows, 0)  # rows before them fill up without a copy
                batch = rows[start:stop]
                try:
                    filled_up = _filled_up(batch, n_rows)
                    part = self._forward(reader(filled_up))[done - start : stop - start]
                except (RuntimeError, MemoryError) as error:
                    if size == 1 or not is_out_of_memory(error):
                        raise
                    size = size // 2
                    few, least = min(few, size), min(least, size)
                    continue
                if outputs is None:
                    outputs = torch.empty(len(rows), *part.shape[1:], dtype=dtype)
                outputs[done:stop] = part
                if report is not None:
                    report(stop - done)
                done = stop
        assert outputs is not None
        return outputs.numpy()

    def _rows_at_once(self, device: torch.device) -> tuple[int, int, int]:
        """The most, the least of a few, and the least of others."""
        most, least = self._rows_of_a_forward_pass()
        if device.type != "cpu":
            return most, least, least
        return most, min(least, _FEW_IMAGES if self._convolutional else _FEW_ROWS), least

    def _rows_of_a_forward_pass(self) -> tuple[int, int]:
        """The most and the least."""
        return _PREDICTION_ROWS, _LEAST_PREDICTION_ROWS

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
            state["device_"] = str(device_or_cpu(state["device_"]))
            state["module_"] = self._restored_module(state)
            if "_training_state" in state:
                state["_training_state"] = _to_tensors(state["_training_state"])
        super().__setstate__(state)

    def _restored_module(self, state: Mapping[str, Any]) -> nn.Module:
        """The module of a pickled state, on its device."""
        factory, arguments = state["_architecture"]
        with skeleton_construction(factory, arguments):
            module = factory(**arguments)
        module.load_state_dict(_to_tensors(state["module_"]), assign=True)
        return self._placed(module, device_or_cpu(state["device_"])).eval()

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "module_")


def _is_known_finite(X: Any) -> bool:
    """Whether X are rows that fits share, found finite once for all; others are not looked at."""
    if MEETING.get() is None or not isinstance(X, np.ndarray) or X.dtype.kind != "f":
        return False
    if X.flags.writeable:  # rows that are shared are not
        return False
    what = (X.__array_interface__["data"][0], "is finite", X.shape, X.strides, X.dtype.str)
    return compute(lambda: bool(torch.isfinite(as_tensor(X).sum())), what)


def hidden_widths(hidden_layer_sizes: Any) -> list[int]:
    """Widths of the hidden layers, from the parameter: one width or a sequence of them."""
    widths = np.atleast_1d(np.asarray(hidden_layer_sizes if np.size(hidden_layer_sizes) else []))
    if any(width <= 0 or int(width) != width for width in widths):
        raise ValueError(f"hidden_layer_sizes must be > 0 and whole, got {hidden_layer_sizes!r}.")
    return [int(width) for width in widths]


def weights_device(module: nn.Module) -> torch.device:
    """Where a module runs; one without weights runs anywhere."""
    tensors = chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def square_image(n_features: int) -> tuple[int, int, int] | None:
    """Shape of the grey or colour image of 8 x 8 pixels or more that has so many features."""
    for channels in (1, 3):
        side = math.isqrt(n_features // channels)
        if side >= 8 and side * side * channels == n_features:
            return side, side, channels
    return None


def _enough(n_rows: int, few: int, least: int, most: int) -> int:
    """So many rows, or so many more that kernels treat them alike."""
    return few if n_rows <= few else min(max(least, n_rows + -n_rows % few), most)


def _filled_up(batch: Tensor, n_rows: int) -> Tensor:
    """The batch, and its first row as often as it lacks rows."""
    n_lacking = n_rows - len(batch)
    return torch.cat([batch, batch[:1].expand(n_lacking, -1)]) if n_lacking else batch


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
