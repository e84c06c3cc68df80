"""What is done to images before they are learned from."""

from __future__ import annotations

import math
import warnings
from numbers import Integral, Real
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin, _fit_context
from sklearn.utils import Tags
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils._set_output import _get_output_config
from sklearn.utils.validation import check_is_fitted, validate_data

__all__ = ["GaussianBlur"]

ImageShape = tuple[int, int, int]  # height, width, channels

# Values that are filtered at once: 341 images of CIFAR-10, 4 MiB in float32.
_BLOCK_VALUES = 2**20


class GaussianBlur(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """Blur images by a fixed Gaussian filter, one channel as the other.

    Whole pixels stay whole, and of their dtype, so that a classifier that comes after it in a
    `Pipeline` takes them for pixels as before.

    Parameters
    ----------
    sigma : float, default=0.8
        Standard deviation of the Gaussian in pixels.
    kernel_size : odd int, default=5
        Side of the filter in pixels. The Gaussian is cut off there, and scaled so that the filter
        sums to 1: brightness stays.
    border : {"reflect", "symmetric", "edge", "wrap", "constant"}, default="reflect"
        What lies outside an image, as in :func:`numpy.pad`: the image mirrored at its outermost
        pixels or beside them, these pixels repeated, the opposite side, or 0.
    image_shape : tuple of int, default=None
        (height, width) or (height, width, channels) of flat rows. Flat rows of s² or 3s² features
        with s >= 8 are taken for square images without it. Other rows are images of one pixel, as
        they are to a `CNNClassifier`: of the borders only "constant" changes them, by making
        them darker.
    layout : {"HWC", "CHW"}, default="HWC"
        Order of height, width and channels in rows and images.
    device : "auto", str or torch.device, default="auto"
        Where it is computed; "auto" is CUDA where there is any.

    Attributes
    ----------
    kernel_ : ndarray of shape (kernel_size, kernel_size)
        The filter, in float64.
    image_shape_ : tuple of int
        (height, width, channels) of the images.
    n_features_in_ : int
        height * width * channels.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the columns, where X has string names.

    See Also
    --------
    scipy.ndimage.gaussian_filter : Of one array, by other names of borders.

    References
    ----------
    .. [1] Gonzalez and Woods, "Digital image processing", 4th ed., Pearson 2018, section 3.5:
           lowpass Gaussian filter kernels.

    Examples
    --------
    >>> from sklearn.pipeline import make_pipeline
    >>> from skcifar import SoftmaxRegression
    >>> from skcifar.datasets import load_digits
    >>> from skcifar.preprocessing import GaussianBlur
    >>> X, y = load_digits(return_X_y=True)
    >>> blurred = GaussianBlur(sigma=0.8).fit_transform(X)
    >>> blurred.shape, blurred.dtype
    ((1797, 64), dtype('uint8'))
    >>> classifier = make_pipeline(GaussianBlur(), SoftmaxRegression()).fit(X[:1500], y[:1500])
    >>> bool(classifier.score(X[1500:], y[1500:]) > 0.85)
    True
    """

    _parameter_constraints: dict = {
        "sigma": [Interval(Real, 0, None, closed="neither")],
        "kernel_size": [Interval(Integral, 1, None, closed="left")],
        "border": [StrOptions({"reflect", "symmetric", "edge", "wrap", "constant"})],
        "image_shape": ["array-like", None],
        "layout": [StrOptions({"HWC", "CHW"})],
        "device": [str, torch.device],
    }

    def __init__(
        self,
        sigma: float = 0.8,
        kernel_size: int = 5,
        *,
        border: str = "reflect",
        image_shape: tuple[int, ...] | None = None,
        layout: str = "HWC",
        device: str | torch.device = "auto",
    ) -> None:
        self.sigma = sigma
        self.kernel_size = kernel_size
        self.border = border
        self.image_shape = image_shape
        self.layout = layout
        self.device = device

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any = None) -> Self:
        """Compute the filter and learn the shape of the images.

        Parameters
        ----------
        X : array-like or tensor of shape (n_samples, n_features), (n_samples, height, width) or \
                (n_samples, height, width, channels)
            Images, as rows or as images.
        y : None
            Ignored.

        Returns
        -------
        self : object
            The fitted transformer.

        Raises
        ------
        ValueError
            When `kernel_size` is even, or `image_shape` is not of positive integers or does not
            fit X.
        """
        if self.kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size={self.kernel_size} is even; give an odd one, which has a centre."
            )
        rows, given_shape = self._validated(X, reset=True)
        self.image_shape_ = self._resolved_shape(rows, given_shape)
        offsets = np.arange(self.kernel_size) - self.kernel_size // 2
        profile = np.exp(-0.5 * (offsets / self.sigma) ** 2)
        self.kernel_ = np.outer(profile, profile) / profile.sum() ** 2
        return self

    def transform(self, X: Any) -> NDArray[Any]:
        """Return the blurred images.

        Parameters
        ----------
        X : array-like or tensor, as for fit
            Images.

        Returns
        -------
        blurred : ndarray of the shape of X
            Float64 or float32 as X is; of integers the nearest ones, of their dtype.

        Raises
        ------
        ValueError
            When X holds images of another shape than in fit, there is no such device, or
            `set_output` asks for a data frame while X is not flat rows.
        """
        check_is_fitted(self)
        rows, given_shape = self._validated(X, reset=False)
        self._check_output(X, given_shape)
        if given_shape not in (None, self.image_shape_):
            raise ValueError(
                f"X holds images of shape {given_shape} (height, width, channels), but "
                f"{type(self).__name__} was fitted on images of shape {self.image_shape_}."
            )
        # float32 holds integers of two bytes and less exactly
        single = np.promote_types(rows.dtype, np.float32) == np.float32
        computed = np.dtype(np.float32 if single else np.float64)
        whole = rows.dtype.kind in "ui"
        blurred = np.empty(rows.shape, rows.dtype if whole else computed)
        device = self._resolved_device()
        down, across = (torch.from_numpy(m.astype(computed)).to(device) for m in self._matrices())
        size = max(1, _BLOCK_VALUES // rows.shape[1])
        for start in range(0, len(rows), size):
            block = torch.from_numpy(rows[start : start + size].astype(computed)).to(device)
            planes = block.reshape(-1, len(down), len(across))
            filtered = (down @ planes @ across.T).reshape(block.shape)
            if whole:
                filtered = filtered.round_()
            blurred[start : start + size] = filtered.cpu().numpy()
        return blurred if given_shape is None else blurred.reshape(np.shape(X))

    def _matrices(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Make the filter of an image's columns and the one of its rows, as matrices.

        A Gaussian of two dimensions is the product of two of one. The matrices hold the border
        too, and blur CIFAR-10's images eight times as fast as a padded convolution does.
        """
        height, width, channels = self.image_shape_
        profile = self.kernel_.sum(0)
        down, across = (_blurring_matrix(size, profile, self.border) for size in (height, width))
        if self.layout == "HWC" and height * width > 1:
            # (height, width * channels): the channels of a pixel lie side by side
            across = np.kron(across, np.eye(channels))
        return down, across

    # -- images ------------------------------------------------------------------------------------

    def _validated(self, X: Any, *, reset: bool) -> tuple[NDArray[Any], ImageShape | None]:
        """Give X as rows (n_samples, n_features), checked, and the image shape if X has one."""
        shape = None
        if isinstance(X, torch.Tensor):
            X = X.detach().cpu().numpy()
        if isinstance(X, (list, tuple)):
            X = np.asarray(X)
        if getattr(X, "ndim", 2) in (3, 4):
            planar = self.layout == "CHW" and X.ndim == 4
            channels, height, width = X.shape[1:] if planar else _channels_first(X.shape[1:])
            shape = (height, width, channels)
            X = X.reshape(len(X), math.prod(shape))
        return validate_data(self, X, reset=reset), shape

    def _resolved_shape(self, rows: NDArray[Any], given_shape: ImageShape | None) -> ImageShape:
        n_features = rows.shape[1]
        if self.image_shape is None:
            return given_shape or _guessed_shape(rows)
        shape = _checked_shape(self.image_shape)
        shape = (*shape, 1) if len(shape) == 2 else shape
        if len(shape) != 3 or math.prod(shape) != n_features or given_shape not in (None, shape):
            found = f"images of shape {given_shape}" if given_shape else f"{n_features} features"
            raise ValueError(
                f"image_shape={self.image_shape!r} does not fit X, which holds {found}; expected "
                "(height, width) or (height, width, channels) of the images, or None."
            )
        return shape

    def _check_output(self, X: Any, given_shape: ImageShape | None) -> None:
        """Refuse to make a data frame, whose rows are flat, of images."""
        container = _get_output_config("transform", self)["dense"]
        if given_shape is not None and container != "default":
            raise ValueError(
                f"X holds images, of shape {np.shape(X)}, of which there is no data frame, but "
                f"set_output(transform={container!r}) asks for one; give X.reshape(len(X), -1) "
                f"and image_shape={given_shape}, or set_output(transform='default')."
            )

    def _resolved_device(self) -> torch.device:
        if isinstance(self.device, str) and self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            return torch.empty(0, device=self.device).device
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"device={self.device!r} is not to be had; give 'auto', 'cpu' or one of torch's "
                f"devices that this machine has ({error})."
            ) from error

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _checked_shape(image_shape: Any) -> tuple[int, ...]:
    sizes = tuple(image_shape)
    whole = all(isinstance(size, Integral) and not isinstance(size, bool) for size in sizes)
    if not whole or min(sizes, default=0) < 1:
        raise ValueError(
            f"image_shape={image_shape!r} is not of positive integers; expected (height, width) or "
            "(height, width, channels) of the images in pixels, or None."
        )
    return tuple(int(size) for size in sizes)


def _blurring_matrix(size: int, profile: NDArray[Any], border: str) -> NDArray[Any]:
    """Make the matrix (size, size) whose product with a line of pixels is the line blurred."""
    radius = len(profile) // 2
    # row i: which pixel of the line stands in place i of the padded line
    padded = np.pad(np.eye(size), [(radius, radius), (0, 0)], mode=border)  # type: ignore[call-overload]
    return sum(weight * padded[k : k + size] for k, weight in enumerate(profile))


def _channels_first(shape: tuple[int, ...]) -> tuple[int, int, int]:
    height, width, channels = (*shape, 1)[:3]
    return channels, height, width


def _guessed_shape(rows: NDArray[Any]) -> ImageShape:
    """Take flat rows for square images where their length allows, as a CNNClassifier does."""
    n_features = rows.shape[1]
    for channels in (1, 3):
        side = math.isqrt(n_features // channels)
        if side < 8 or side * side * channels != n_features:
            continue
        shape = (side, side, channels)
        sample = rows[:1000]
        if sample.dtype.kind == "f" and (sample != sample.round()).any():
            warnings.warn(
                f"Rows of {n_features} features were taken for images of shape {shape} (height, "
                "width, channels), but their values are not whole as pixels are. Give "
                f"image_shape={shape} if they are images; rows that are none are not to be "
                "blurred.",
                UserWarning,
                stacklevel=5,
            )
        return shape
    return 1, 1, n_features
