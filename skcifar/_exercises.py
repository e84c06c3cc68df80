"""The reports' exercises: a fixed filter, a convolution fitted to another, gradients by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import nn

from skcifar import plotting
from skcifar._fitted import epoch_records
from skcifar._protocols import Images, Outcome, Protocol, Scale, timed


@dataclass(frozen=True)
class Blur(Protocol):
    """Filter images with a fixed Gaussian, and compare with SciPy's."""

    sigma: float = 0.8
    radius: int = 2

    def __call__(self, estimator: Any, images: Images, scale: Scale) -> Outcome:
        with timed() as seconds:
            blurred = estimator.fit_transform(images.X).reshape(-1, *images.image_shape)
        originals = images.X[:16].reshape(-1, *images.image_shape)
        wanted = ndimage.gaussian_filter(
            originals.astype(float), self.sigma, radius=self.radius, axes=(1, 2), mode="mirror"
        )
        figures = {
            "images per second": len(images.X) / sum(seconds),
            "largest difference from SciPy (of 255)": float(np.abs(blurred[:16] - wanted).max()),
        }
        shown = np.concatenate([originals[:8], np.rint(blurred[:8]).astype(np.uint8)])
        titles = ["as it is"] * 8 + [f"σ = {self.sigma}"] * 8
        return Outcome(
            figures,
            sum(seconds),
            pictures=[
                lambda: plotting.ImageGridDisplay.from_images(shown, titles=titles, n_columns=8)
            ],
        )


@dataclass(frozen=True)
class Diverging(Protocol):
    """Fit a convolution to what another one says of the first images, which may end in an error.

    The class of an image is the number of the teacher's strongest output, each relative to its
    mean. Pixels are taken from 0 to 51, at which the squared error is too steep for a rate of 0.01.
    """

    fits_as_given: ClassVar[bool] = True
    n_images: int = 100

    def __call__(self, estimator: Any, images: Images, scale: Scale) -> Outcome:
        X = (images.X[: self.n_images] / 5).astype(np.float32)
        y = _strongest_output(X, images.image_shape)
        with timed() as seconds:
            try:
                estimator.fit(X, y)
                diverged = ""
            except ValueError as error:
                diverged = str(error)
                if "training diverged" not in diverged:
                    raise
        if diverged:
            return Outcome({"diverged": 1.0}, sum(seconds), note=diverged)
        wanted = np.eye(len(estimator.classes_))[np.searchsorted(estimator.classes_, y)]
        outputs = estimator.decision_function(X)
        figures = {
            "diverged": 0.0,
            "first loss": estimator.loss_curve_[0],
            "last loss": estimator.loss_curve_[-1],
            "norm of the difference": float(np.linalg.norm(outputs - wanted)),
        }
        return Outcome(figures, sum(seconds), estimator.n_iter_, epoch_records(estimator))


@dataclass(frozen=True)
class Gradients(Protocol):
    """Compare gradients derived by hand with torch's, in float64, on the first images."""

    def __call__(self, estimator: None, images: Images, scale: Scale) -> Outcome:
        with timed() as seconds:
            differences = dict(_gradient_differences(images))
        return Outcome(
            {f"largest difference, {name}": x for name, x in differences.items()}, sum(seconds)
        )


class OneConvolution(nn.Sequential):
    """Filters of 5 x 5 pixels with uniform weights; an output is a filter's mean over the image."""

    def __init__(self, image_shape: tuple[int, int, int], n_outputs: int) -> None:
        convolution = nn.Conv2d(image_shape[2], n_outputs, 5)
        nn.init.uniform_(convolution.weight)
        super().__init__(convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _strongest_output(
    X: NDArray[np.float32], image_shape: tuple[int, int, int]
) -> NDArray[np.int64]:
    """The number of the strongest of four filters' mean outputs, relative to their means."""
    height, width, channels = image_shape
    pixels = torch.from_numpy(X.reshape(-1, height, width, channels)).permute(0, 3, 1, 2)
    weights = torch.empty(4, channels, 5, 5)
    weights.uniform_(generator=torch.Generator().manual_seed(0))
    outputs = nn.functional.conv2d(pixels, weights).mean((2, 3))  # (n_samples, 4)
    return (outputs - outputs.mean(0)).argmax(1).numpy()


def _gradient_differences(images: Images) -> Iterator[tuple[str, float]]:
    """For each model the largest difference of a gradient derived by hand from torch's."""
    rng = np.random.default_rng(0)
    n, n_units, n_classes = min(64, len(images.X)), 20, len(images.class_names)
    X = images.X[:n] / 255.0  # (n, d)
    T = np.eye(n_classes)[images.y[:n]]  # one-hot targets, (n, k)
    W, b = rng.normal(0, 0.1, (X.shape[1], n_classes)), rng.normal(0, 0.1, n_classes)

    # E = sum((XW + b - T)²) / (nk): dE/dY = 2 (Y - T) / (nk), and Y is linear in W and b.
    G = 2 * (X @ W + b - T) / T.size  # (n, k)
    yield (
        "linear, squared error",
        _difference(
            lambda W, b: ((torch.from_numpy(X) @ W + b - torch.from_numpy(T)) ** 2).mean(),
            (W, b),
            (X.T @ G, G.sum(0)),
        ),
    )

    # H = s(XU + c) with s' = s (1 - s); Y = HV + b.
    U, c = rng.normal(0, 0.1, (X.shape[1], n_units)), rng.normal(0, 0.1, n_units)
    V = rng.normal(0, 0.1, (n_units, n_classes))
    H = 1 / (1 + np.exp(-(X @ U + c)))  # (n, u)
    G = 2 * (H @ V + b - T) / T.size
    G_hidden = (G @ V.T) * H * (1 - H)  # (n, u)
    yield (
        "two layers, sigmoid, squared error",
        _difference(
            lambda U, c, V, b: (
                ((torch.from_numpy(X) @ U + c).sigmoid() @ V + b - torch.from_numpy(T)) ** 2
            ).mean(),
            (U, c, V, b),
            (X.T @ G_hidden, G_hidden.sum(0), H.T @ G, G.sum(0)),
        ),
    )

    # Y[n, f, i, j] = sum of K[f, c, p, q] times the patch of X at i + p, j + q; E = sum(Y²) / 2.
    height, width, channels = images.image_shape
    pictures = X.reshape(n, height, width, channels).transpose(0, 3, 1, 2)
    K = rng.normal(0, 0.1, (4, channels, 5, 5))
    patches = np.lib.stride_tricks.sliding_window_view(pictures, (5, 5), axis=(2, 3))
    Y = np.einsum("ncijpq,fcpq->nfij", patches, K, optimize=True)
    yield (
        "convolution",
        _difference(
            lambda K: (
                torch.nn.functional.conv2d(torch.from_numpy(pictures.copy()), K).square().sum() / 2
            ),
            (K,),
            (np.einsum("ncijpq,nfij->fcpq", patches, Y, optimize=True),),
        ),
    )


def _difference(
    error: Callable[..., torch.Tensor],
    parameters: tuple[NDArray[np.float64], ...],
    by_hand: tuple[NDArray[np.float64], ...],
) -> float:
    """Largest difference of the gradients, relative to the largest component."""
    tensors = [torch.from_numpy(each.copy()).requires_grad_() for each in parameters]
    gradients = torch.autograd.grad(error(*tensors), tensors)
    return max(
        float(np.abs(theirs.numpy() - ours).max() / np.abs(ours).max())
        for theirs, ours in zip(gradients, by_hand, strict=True)
    )
