"""Where figures come from: machine, versions, and data by their hash and by traces of JPEG.

What an image collection is called does not say which pixels it holds: CIFAR-10 is passed on
recoded as JPEG, which costs strong networks several points. The recoding is seen in the pixels.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.fft import dctn

PACKAGES = ("torch", "scikit-learn", "skorch", "numpy", "scipy")

AS_PUBLISHED = "as published"
RECODED = "recoded as JPEG"
NO_TRACE = "no trace of JPEG"
UNKNOWN = "not verified"
# sha256_of(X, y), rows of uint8 and classes of int64 in the order of the published files.
PUBLISHED = {
    "465137bd9111ac30be458962bd15572665fb59910c350a2641aa5a6365460b06": "MNIST, training images",
    "72ece06b896ecb9e62f623db0e994faca2ce5e514b38420d76511f1e2188985a": "MNIST, test images",
    "098209b95cf93b257940b29bae5fc5db8596b563d0ff79d03ab87bcae16a4551": "scikit-learn's digits",
}

IMAGES_LOOKED_AT = 500
# A coefficient is told of from so many values on: the mean of their cosines then has a standard
# error below 0.1, and the best of 63 steps stays below 0.4 where there is no quantisation.
LEAST_VALUES = 60
LEAST_FREQUENCIES = 8
STEPS = range(2, 65)
# Of the coefficients that can be told of, images recoded at qualities from 50 to 98 had at least
# 67% with a mean cosine above 0.5, at least 38% where all blocks were clipped (digits on black
# paper); images not recoded had at most 2%.
ALIKE = 0.5
LEAST_SHARE = 0.25


def provenance(
    kind: str,
    title: str,
    seed: int,
    data: Mapping[str, Any],
    *,
    command: Sequence[str],
    parameters: Iterable[str] | None = None,
) -> dict[str, Any]:
    """What is written beside figures: of the "comparison", the "sweep" or the "reproduction".

    Parameters
    ----------
    data : mapping
        As of :func:`data_provenance`.
    command : sequence of str
        The arguments of the command line, from "compare" (or another command) on.
    parameters : iterable of str, default=None
        Of a sweep, the columns of its table that are parameters.
    """
    record = {
        "command": shlex.join(["python", "-m", "skcifar", *command]),
        "kind": kind,
        "title": title,
        "seed": seed,
        "date": now(),
        "data": dict(data),
        "machine": machine(),
        "versions": versions(),
    }
    return record if parameters is None else record | {"parameters": list(parameters)}


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        names = [line for line in listing.read_text().splitlines() if "model name" in line]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch_threads": torch.get_num_threads(),
        # busy neighbours show here
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        # of the package as it runs, which need not be installed
        "skcifar": sys.modules[__name__.partition(".")[0]].__version__,
        **{name: version(name) for name in PACKAGES},
    }


# -- data ------------------------------------------------------------------------------------------


def data_provenance(
    name: str,
    X: ArrayLike,
    y: ArrayLike,
    X_test: ArrayLike | None = None,
    y_test: ArrayLike | None = None,
    *,
    image_shape: Sequence[int] | None = None,
    class_names: Iterable[object] = (),
    variant: str | None = None,
) -> dict[str, Any]:
    """What identifies the images that were used, as JSON takes it.

    Parameters
    ----------
    X, X_test : array-like of shape (n_samples, h * w * c), or (n_samples, h, w) with or without c
        The images to train on, and the held-out ones, if any.
    y, y_test : array-like of shape (n_samples,)
        Their classes.
    image_shape : (h, w) or (h, w, c), default=None
        By default as the images are, rows being square.
    variant : str, default=None
        By default what :func:`variant_of` says of `X` and `y`. Of a subset say it of the whole:
        a part has another hash.
    """
    X, y = np.asarray(X), np.asarray(y)
    parts = [X, y] if X_test is None or y_test is None else [X, y, X_test, y_test]
    return {
        "name": name,
        "variant": variant_of(X, y, image_shape) if variant is None else variant,
        "sha256": sha256_of(*parts),
        "n_train": len(y),
        "n_test": None if y_test is None else len(np.asarray(y_test)),
        "image_shape": list(_as_images(X, image_shape).shape[1:]),
        "class_names": [str(one) for one in class_names],
    }


def sha256_of(*arrays: ArrayLike) -> str:
    """SHA-256 over type, shape and bytes of each; images count as rows, (n_samples, h * w * c)."""
    digest = hashlib.sha256()
    for array in map(np.asarray, arrays):
        rows = array.reshape(len(array), -1) if array.ndim > 2 else array
        digest.update(f"{rows.dtype.str} {rows.shape};".encode())
        digest.update(np.ascontiguousarray(rows).data)
    return digest.hexdigest()


def variant_of(X: ArrayLike, y: ArrayLike, image_shape: Sequence[int] | None = None) -> str:
    """What can be said of the pixels: published, recoded as JPEG, without trace of it, or nothing.

    "no trace of JPEG" is less than a proof: the finest quality leaves none, nor does a recoding
    before images were cut, turned or resized.
    """
    if sha256_of(X, y) in PUBLISHED:
        return AS_PUBLISHED
    trace = shows_jpeg(_as_images(np.asarray(X), image_shape))
    return {True: RECODED, False: NO_TRACE, None: UNKNOWN}[trace]


def shows_jpeg(images: NDArray[Any]) -> bool | None:
    """Whether whole-valued images, (n, h, w, c) with c of 1 or 3, went through a JPEG codec.

    The codec cuts the luma into blocks of 8 x 8 pixels and rounds each coefficient of their
    cosine transform to multiples of a step, which is the same in all blocks. Decoded again, the
    coefficients lie about the multiples, a quarter of a grey value off for rounded pixels, and
    hardly any between: for such a step q the mean of cos(2 pi c / q) over coefficients c is near
    1, and it is near 0 for others. Values that would round to 0 are left out, for those are near
    0 in any image.

    None where it cannot be told: of too few, too small or too even images, or those with more
    than 8 bits.
    """
    chosen = np.linspace(0, len(images) - 1, min(IMAGES_LOOKED_AT, len(images))).astype(int)
    images = images[np.unique(chosen)]
    if images.dtype != np.uint8 or images.shape[3] not in (1, 3):
        return None
    blocks = _luma_blocks(images)
    coefficients = np.abs(dctn(blocks, axes=(1, 2), norm="ortho").reshape(-1, 64))
    # Of frequencies 0 and 4 the transform has equal weights: the coefficients of whole numbers
    # are multiples of 1/8, those of pixels with few levels even of whole steps.
    rows, columns = np.divmod(np.arange(64), 8)
    coefficients = coefficients[:, (rows % 4 > 0) | (columns % 4 > 0)]  # (n_blocks, 60)

    alike = np.full(coefficients.shape[1], -np.inf)
    for step in STEPS:
        counted = coefficients > step / 2
        n_values = counted.sum(axis=0)
        total = (np.cos(2 * np.pi / step * coefficients) * counted).sum(axis=0)
        mean = np.where(n_values >= LEAST_VALUES, total / np.maximum(n_values, 1), -np.inf)
        alike = np.maximum(alike, mean)
    told = alike[alike > -np.inf]
    if len(told) < LEAST_FREQUENCIES:
        return None
    return bool((told > ALIKE).mean() > LEAST_SHARE)


def _luma_blocks(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The different whole blocks, (n_blocks, 8, 8); without clipped pixels, if those are enough."""
    n_images, height, width, n_channels = images.shape
    cut = images[:, : height // 8 * 8, : width // 8 * 8]
    blocks = cut.reshape(n_images, height // 8, 8, width // 8, 8, n_channels)
    blocks = blocks.swapaxes(2, 3).reshape(-1, 8, 8, n_channels)
    # Copies of one picture agree with each other in any step.
    blocks = np.unique(blocks, axis=0)
    inside = (blocks.min(axis=(1, 2, 3)) > 0) & (blocks.max(axis=(1, 2, 3)) < 255)
    if inside.sum() >= 4 * LEAST_VALUES:
        blocks = blocks[inside]
    weights = [0.299, 0.587, 0.114] if n_channels == 3 else [1.0]
    return blocks @ np.array(weights) - 128.0


def _as_images(X: NDArray[Any], image_shape: Sequence[int] | None) -> NDArray[Any]:
    """View rows or images as (n, h, w, c)."""
    if image_shape is None and X.ndim == 2:
        n_channels = 3 if math.isqrt(X.shape[1] // 3) ** 2 * 3 == X.shape[1] else 1
        side = math.isqrt(X.shape[1] // n_channels)
        square = side * side * n_channels == X.shape[1]
        image_shape = (side, side, n_channels) if square else (1, 1, X.shape[1])
    shape = tuple(image_shape or X.shape[1:])
    return X.reshape(len(X), *shape, *(1 for _ in range(3 - len(shape))))
