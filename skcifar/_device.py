"""Devices, precision, seeds, and the way from rows of numbers to batches a network reads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

# torch's modules draw their initial weights from the global generator, so one thread at a time.
_construction_lock = threading.Lock()

# Rows and numbers read at once, at most, where the whole of X is passed through (statistics): a
# block stays in the processor's cache.
_BLOCK_ROWS = 256
_BLOCK_NUMBERS = 2**20
# Squares of bytes whose sum is exact in float32: it counts to 2**24, and 256 * 255**2 is less.
_MOST_EXACT_SQUARES = 256

# -- devices and precision -------------------------------------------------------------------------


def resolve_device(device: str | torch.device) -> torch.device:
    """The torch device for a `device` parameter; "auto" is CUDA where there is any.

    Where the environment has SKCIFAR_DEVICE, "auto" is what it names: workers of a cluster that
    share a machine are each given a GPU of their own so.
    """
    given = f"device={device!r}"
    if isinstance(device, str) and device == "auto":
        named = os.environ.get("SKCIFAR_DEVICE", "auto")
        if named == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        device, given = named, f"SKCIFAR_DEVICE={named} in the environment"
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"{given} is not a torch device; give 'auto', 'cpu', 'cuda' or 'cuda:1'."
        ) from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"{given} was asked for, but torch finds no CUDA device; "
            "give device='auto' or 'cpu', or install a CUDA build of torch."
        )
    return resolved


def indexed(device: torch.device) -> torch.device:
    """The device itself, also once another one is CUDA's current."""
    if str(device) == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def device_or_cpu(name: str) -> torch.device:
    """The device of that name where this machine has it, else the CPU."""
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        return torch.device("cpu")
    return device


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 run on hardware of their own."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # oneDNN emulates bfloat16 on plain AVX-512; the instructions for it have a flag of their own.
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return device.type == "cpu" and supported()


@dataclass(frozen=True)
class Precision:
    """The arithmetic of one fit.

    Attributes
    ----------
    name : {"float32", "float64", "bfloat16"}
        What the estimator reports as `dtype_`.
    weights : torch.dtype
        Of parameters and of the rows a network reads: bfloat16 is autocast over float32 weights.
    """

    name: str

    @property
    def weights(self) -> torch.dtype:
        return torch.float64 if self.name == "float64" else torch.float32

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.name == "bfloat16":
            return torch.autocast(device.type, dtype=torch.bfloat16)
        return nullcontext()


def resolve_precision(
    precision: str, device: torch.device, row_dtype: torch.dtype, *, convolutional: bool
) -> Precision:
    """The arithmetic for a `precision` parameter, given where and on what it computes."""
    if precision != "auto":
        return Precision(precision)
    if convolutional:
        return Precision("bfloat16" if has_fast_bfloat16(device) else "float32")
    follows_rows = device.type == "cpu" and row_dtype == torch.float64
    return Precision("float64" if follows_rows else "float32")


# -- seeds -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Generators:
    """Independent streams of one fit, so that no setting of one shifts the draws of another.

    The order of the rows is drawn on the CPU, where it is the same for every device; masks,
    augmentation and triplets are drawn where they are used.
    """

    order: torch.Generator
    dropout: torch.Generator
    augmentation: torch.Generator
    mining: torch.Generator

    @classmethod
    def from_seed(cls, seed: int, device: torch.device) -> Generators:
        order, *others = map(int, np.random.SeedSequence(seed).generate_state(4))
        return cls(
            torch.Generator().manual_seed(order),
            *(torch.Generator(device).manual_seed(other) for other in others),
        )

    def get_state(self) -> dict[str, Tensor]:
        return {name: generator.get_state() for name, generator in vars(self).items()}

    def set_state(self, state: dict[str, Tensor]) -> None:
        for name, generator in vars(self).items():
            # a state of another kind of device's generator has another length: it starts anew
            if len(state[name]) == len(generator.get_state()):
                generator.set_state(state[name])


@contextmanager
def seeded_construction(seed: int) -> Iterator[None]:
    """Let modules draw their initial weights from `seed` and leave the global generator as it was.

    Weights are made on the CPU, so they are the same for every device.
    """
    with _construction_lock, torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would reseed every CUDA device as well.
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def skeleton_construction(
    factory: Callable[..., Any], arguments: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Build a module whose weights are to be replaced: without memory or draws where possible.

    What a caller's own factory, if only among the arguments, does on the meta device is not
    known, so it runs as it is.
    """
    factories = [factory, *filter(callable, (arguments or {}).values())]
    if all(made_by.__module__.startswith("skcifar._") for made_by in factories):
        with torch.device("meta"):
            yield
    else:
        with seeded_construction(0):
            yield


# -- rows ------------------------------------------------------------------------------------------


def as_tensor(X: np.ndarray | Tensor) -> Tensor:
    """X as a tensor that shares its memory wherever torch can; it is to be read only."""
    if isinstance(X, Tensor):
        return X.detach()
    if X.dtype == bool:
        X = X.view(np.uint8)
    if X.dtype.kind == "u" and X.dtype.itemsize > 1:  # torch computes on uint8 only
        X = X.astype(np.float64 if X.dtype.itemsize == 8 else np.int64)
    if X.dtype.kind == "f" and X.dtype.itemsize > 8:
        X = X.astype(np.float64)
    if not X.dtype.isnative or any(stride < 0 for stride in X.strides):
        X = np.ascontiguousarray(X, dtype=X.dtype.newbyteorder("="))
    if X.flags.writeable:
        return torch.from_numpy(X)
    # torch warns that a read-only array might be written through the tensor, which nothing here
    # does. A warnings filter is process-wide; the array interface of a view is not.
    return torch.from_numpy(_writeable_view(X))


class _ArrayInterface:
    def __init__(self, interface: dict[str, Any], owner: np.ndarray) -> None:
        self.__array_interface__ = interface
        self.owner = owner  # keeps the memory (or the memmap's file) alive


def _writeable_view(array: np.ndarray) -> np.ndarray:
    """A view that claims to be writeable, for libraries that ask although they only read."""
    interface = dict(array.__array_interface__)
    interface["data"] = (interface["data"][0], False)
    return np.asarray(_ArrayInterface(interface, array))


def pixel_statistics(
    rows: Any,
    image_shape: tuple[int, int, int],
    layout: str,
    index: Tensor | None,
    weight: Tensor | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean and standard deviation of each channel, in the units of `rows`.

    Rows that are no image (1 pixel) share one mean and one standard deviation: of a flat row of
    pixels nothing else is known.

    Parameters
    ----------
    rows : tensor or StoredRows of shape (n_samples, n_features)
    image_shape : (height, width, channels)
    layout : {"HWC", "CHW"}
        Order within a row.
    index : int64 tensor of shape (n_used,) or None
        The rows to use.
    weight : tensor of shape (n_samples,) or None

    Returns
    -------
    mean, scale : float64 arrays of shape (n_channels,)
        A constant channel has scale 1.
    """
    height, width, channels = image_shape
    n_channels = channels if height * width > 1 else 1
    # Bytes sum exactly in float32, in half the time. Other values are taken relative to the first
    # row's mean, so that their squares do not cancel.
    exact = rows.dtype == torch.uint8 and weight is None
    origin = 0.0 if exact else float(rows[:1].to(torch.float64).mean())
    dtype = torch.float32 if exact else torch.float64
    total, squares, weight_sum = _sums(rows, index, weight, origin, dtype)
    per_channel = (-1, n_channels) if layout == "HWC" else (n_channels, -1)
    over = 0 if layout == "HWC" else 1
    mean = (total / weight_sum).reshape(per_channel).mean(over)
    variance = (squares / weight_sum).reshape(per_channel).mean(over) - mean.square()
    scale = variance.clamp_min_(0).sqrt_()
    scale[scale < 1e-7 * (1 + mean.abs())] = 1.0
    return (mean + origin).cpu().numpy(), scale.cpu().numpy()


def _sums(
    rows: Any, index: Tensor | None, weight: Tensor | None, origin: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, float]:
    """Sums over the rows that are used, computed in `dtype`.

    Of each feature less `origin` and of the square of that, weighted, both (n_features,) in
    float64; and of the weights.

    Blocks are added up element by element, so that each core stays with the rows that it has in
    its cache: 50,000 images of CIFAR-10 take 25 ms. As products with a vector of ones they take
    34, and 140 at times when what one core of a virtual machine has cached is slow for the other.
    """
    n_used = len(rows) if index is None else len(index)
    n_features = rows.shape[1]
    n_rows = min(n_used, _BLOCK_ROWS, max(1, _BLOCK_NUMBERS // n_features))
    n_exact = n_rows * _MOST_EXACT_SQUARES
    totals = torch.zeros(2, n_features, dtype=torch.float64, device=rows.device)
    for first in range(0, n_used, n_exact):
        sums = torch.zeros(2, n_rows, n_features, dtype=dtype, device=rows.device)
        for start in range(first, min(first + n_exact, n_used), n_rows):
            picked: slice | Tensor = slice(start, min(start + n_rows, n_used))
            if index is None:
                block = rows[picked].to(dtype, copy=True)
            else:
                picked = index[picked]
                block = rows.index_select(0, picked).to(dtype, copy=True)
            if origin:
                block.sub_(origin)
            weighted = block if weight is None else block * weight[picked, None].to(dtype)
            sums[0, : len(block)].add_(weighted)
            sums[1, : len(block)].addcmul_(weighted, block)
        totals += sums.sum(1, dtype=torch.float64)
    if weight is None:
        return totals[0], totals[1], float(n_used)
    used = weight if index is None else weight[index]
    return totals[0], totals[1], float(used.sum(dtype=torch.float64))


@dataclass(frozen=True)
class BatchReader:
    """Turns a batch of rows, whatever their dtype and device, into what a network reads.

    Attributes
    ----------
    image_shape : (height, width, channels)
    layout : {"HWC", "CHW"}
        Order within a row.
    as_images : bool
        Give (n, channels, height, width) in channels_last memory, rather than (n, n_features).
    mean, scale : float64 arrays of shape (n_channels,) or None
        Subtracted and divided by; None leaves the values as they are.
    device, dtype : where the batch goes and the floating-point type it gets
    grey_to_rgb : bool
        Give the one channel of the images three times, before it is normalised.
    """

    image_shape: tuple[int, int, int]
    layout: str
    as_images: bool
    mean: np.ndarray | None
    scale: np.ndarray | None
    device: torch.device
    dtype: torch.dtype
    grey_to_rgb: bool = False

    def __post_init__(self) -> None:
        shift = factor = None
        if self.mean is not None and self.scale is not None:
            height, width, channels = self.image_shape
            shape = (height, width, 3 if self.grey_to_rgb else channels)
            layout = "HWC" if self.as_images else self.layout
            shift, factor = (
                _per_feature(
                    tuple(values.tolist()), shape, layout, self.dtype, indexed(self.device)
                )
                for values in (self.mean, 1.0 / self.scale)
            )
        object.__setattr__(self, "_shift", shift)
        object.__setattr__(self, "_factor", factor)

    def feature_statistics(self) -> tuple[Tensor, Tensor] | None:
        """Mean and scale of every feature in row order, (n_features,) or (1,), in float64."""
        if self.mean is None or self.scale is None:
            return None
        mean, scale = (
            per_feature_values(values, self.image_shape, self.layout)
            for values in (self.mean, self.scale)
        )
        return torch.tensor(mean), torch.tensor(scale)

    def __call__(self, rows: Tensor, augment: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        height, width, channels = self.image_shape
        batch = rows.to(self.device)
        if self.as_images:
            if self.layout == "CHW":
                batch = batch.reshape(-1, channels, height, width).permute(0, 2, 3, 1)
            batch = batch.reshape(-1, height, width, channels)
            if self.grey_to_rgb:
                channels = 3
                batch = batch.expand(-1, -1, -1, channels)
            if augment is not None:  # on the rows' own dtype: pixels move a quarter of the bytes
                batch = augment(batch)
            batch = batch.reshape(len(rows), -1)
        shift, factor = self._shift, self._factor  # type: ignore[attr-defined]
        if shift is None:
            batch = batch.to(self.dtype)
        else:
            batch = batch.to(self.dtype, copy=True).sub_(shift).mul_(factor)
        if not self.as_images:
            return batch
        return batch.reshape(-1, height, width, channels).permute(0, 3, 1, 2)


# Readers are made for every call of predict: of 3072 features in 21 us, with these kept in 6.
@lru_cache(maxsize=16)
def _per_feature(
    values: tuple[float, ...],
    image_shape: tuple[int, int, int],
    layout: str,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """One value per channel as a vector that is to be read only."""
    # A channel's value is repeated for each of its pixels: subtracting a vector as long as
    # the row is one pass at memory speed, broadcasting over 3 channels is several times that.
    per_feature = per_feature_values(np.array(values), image_shape, layout)
    with torch.inference_mode(False):  # or training could not use what a prediction left
        return torch.tensor(per_feature, dtype=dtype, device=device)


def per_feature_values(
    values: np.ndarray, image_shape: tuple[int, int, int], layout: str
) -> np.ndarray:
    """One value per channel, (n_channels,), as one value per feature in row order; (1,) stays."""
    if len(values) == 1:
        return values
    height, width, channels = image_shape
    pixels = np.broadcast_to(values, (height * width, channels))
    return np.ascontiguousarray(pixels if layout == "HWC" else pixels.T).ravel()


# -- augmentation ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augmentation:
    """Random flips, translations and cut-outs of a batch of images (n, height, width, channels).

    Flip and translation are one gather, whatever they are; the images keep their dtype.

    Attributes
    ----------
    horizontal_flip : bool
        Mirror half of the images.
    alternating : bool
        Let the caller say which: each image in every second epoch.
    translate : int
        Most pixels by which an image is moved, in each direction; what comes in is reflected.
    cutout : int
        Side in pixels of a square that is replaced by the image's mean.
    """

    horizontal_flip: bool = False
    translate: int = 0
    cutout: int = 0
    alternating: bool = False

    def __call__(
        self, images: Tensor, generator: torch.Generator, flipped: Tensor | None = None
    ) -> Tensor:
        if self.translate or self.horizontal_flip:
            images = self._move(images, generator, flipped)
        if self.cutout:
            images = self._cut_out(images, generator)
        return images

    def _move(self, images: Tensor, generator: torch.Generator, flipped: Tensor | None) -> Tensor:
        n, height, width, channels = images.shape
        device = images.device
        rows = torch.arange(height, device=device).expand(n, -1)
        columns = torch.arange(width, device=device).expand(n, -1)
        if self.horizontal_flip:
            if flipped is None:
                flipped = torch.rand(n, device=device, generator=generator) < 0.5
            columns = torch.where(flipped[:, None], width - 1 - columns, columns)
        if self.translate:
            reach = self.translate
            moves = torch.randint(-reach, reach + 1, (2, n, 1), device=device, generator=generator)
            rows = reflected(rows + moves[0], height)
            columns = reflected(columns + moves[1], width)
        first = torch.arange(n, device=device)[:, None] * height
        picked = ((first + rows)[:, :, None] * width + columns[:, None, :]).reshape(-1)
        return images.reshape(-1, channels).index_select(0, picked).reshape(images.shape)

    def _cut_out(self, images: Tensor, generator: torch.Generator) -> Tensor:
        n, height, width, _ = images.shape
        device = images.device
        centre = torch.rand(2, n, 1, device=device, generator=generator)

        def inside(size: int, at: Tensor) -> Tensor:
            distance = torch.arange(size, device=device) - (at * size).floor()
            return (distance >= -(self.cutout // 2)) & (distance < (self.cutout + 1) // 2)

        hole = (
            inside(height, centre[0])[:, :, None, None] & inside(width, centre[1])[:, None, :, None]
        )
        mean = images.float().mean((1, 2), keepdim=True).to(images.dtype)
        return torch.where(hole, mean, images)


def reflected(index: Tensor, size: int) -> Tensor:
    """Positions beyond 0..size-1 mirrored at the border, those beyond that too held at the end."""
    index = index.abs()
    index = (size - 1) - (size - 1 - index).abs()
    return index.clamp_(0, size - 1)
