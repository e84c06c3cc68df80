"""Activations of networks that were trained on ImageNet."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from numbers import Integral
from typing import Any, Self

import joblib
import numpy as np
import torch
from sklearn.base import _fit_context
from sklearn.utils._param_validation import Interval, StrOptions
from torch import Tensor, nn

from skcifar._architectures import BACKBONES
from skcifar._base import square_image
from skcifar._checkpoints import digest_of, fetch_checkpoint, load_weights, read_state_dict
from skcifar._device import (
    Precision,
    resolve_device,
    resolve_precision,
    seeded_construction,
    skeleton_construction,
)
from skcifar._encoder import TorchEncoder, into
from skcifar._networks import Encoder
from skcifar._parameters import CONSTRAINTS, document_parameters
from skcifar._row_cache import RowCache
from skcifar._stored_rows import Rows

# Of ImageNet's red, green and blue, in shares of the brightest; as torchvision's weights want.
_IMAGENET_MEAN = np.array([0.485, 0.456, 0.406])
_IMAGENET_SCALE = np.array([0.229, 0.224, 0.225])

# ResNet-18 ran 187 images of 224 x 224 a second in batches of 16, 117 in batches of 128, where the
# activations leave the caches of two cores of an AMD Zen 5. Not measured on a GPU.
_PIXELS_OF_A_PASS = {"cpu": 16 * 224**2, "gpu": 256 * 224**2}

_SECONDS_BETWEEN_REPORTS = 5.0

_BYTES_STORED_AT_ONCE = 64 * 2**20


@document_parameters(
    instead={
        "random_state": """
            random_state : int, RandomState instance or None, default={default}
                Seed of the weights where `weights=None`.
        """,
        "verbose": """
            verbose : bool or int, default={default}
                Whether to tell on standard error how many images are done, and of a download.
        """,
        "n_parameters_": """
            n_parameters_ : int
                Weights and biases of the network, the layers behind `layer` included, but of the
                last dense layers only where `layer` is one of them.
        """,
        "mean_": """
            mean_, scale_ : ndarray of shape (n_channels,) or None
                What is subtracted and divided by, in the units of X; grey images have three
                channels by then, but not to a callable backbone. None where pixels are taken as
                they are.
        """,
    },
    without=(
        *("classes_", "n_iter_", "history_", "loss_", "best_loss_", "loss_curve_"),
        *("validation_scores_", "best_validation_score_", "n_outputs_", "t_", "skorch_callbacks_"),
    ),
    image_shape="Flat rows of s² or 3s² features with s >= 8 are taken for square images without "
    "it.",
    precision='"auto" is bfloat16 where the hardware computes in it, else float32.',
)
class PretrainedFeatures(TorchEncoder):
    """Activations of AlexNet or a ResNet with ImageNet weights, as features.

    Nothing is trained. Images are normalised with ImageNet's statistics, resized on the device,
    batch by batch, and run through the network in evaluation mode; a classifier behind it learns
    from the outputs of a layer.

    Parameters
    ----------
    backbone : {"alexnet", "resnet18", "resnet34", "resnet50"} or callable, default="resnet18"
        The network [1]_ [2]_, with torchvision's names and shapes of weights. A callable gets
        `image_shape` (height, width, channels) by name and returns a `torch.nn.Module` from images
        (n, channels, height, width) to any features.
    weights : "imagenet", path or None, default="imagenet"
        "imagenet" is the checkpoint torchvision calls IMAGENET1K_V1: below `data_home`, in torch's
        own cache (TORCH_HOME), or else downloaded; its SHA-256 is checked. A path names a state
        dict, a .pth or .safetensors file. None draws weights at random.
    layer : str, default="pool"
        What the features are: "pool" the pooled last images, flat (9,216 of AlexNet; 512, 512 and
        2,048 of the ResNets), "logits" the scores of ImageNet's 1,000 classes, or the name of
        any part of the network, such as "layer3" or "classifier.4", whose output is flattened. Of a
        callable both "pool" and "logits" are its output.
    image_size : int or None, default=224
        Pixels a side to which images are resized, antialiased; None leaves them as they are.
    interpolation : {"bilinear", "bicubic"}, default="bilinear"
        Of the resizing.
    batch_size : int or "auto", default="auto"
        Images of a forward pass; "auto" is 16 of 224 x 224 pixels on the CPU, 256 on a GPU, and
        as many more as they are smaller. Halved as long as memory does not suffice.
    memory : str, path or None, default=None
        Folder of a store of features: an image whose features were computed with the same weights,
        layer and size by this or another estimator or process is not computed again, so that a
        cross-validation runs the network once for each image, not once for each fold. Entries are
        checked; damaged ones are computed again. A callable backbone is known by its name, weights
        and printed layers. With `weights=None` give `random_state` too, or each fit draws other
        weights and finds nothing.
    cache_size : int, default=4_000_000_000
        Bytes that the store may take; what was stored first leaves first.
    normalize : "auto" or bool, default="auto"
        Whether to normalise with ImageNet's mean and standard deviation of each channel. "auto"
        does so for pixels: numbers within 0 to 1, such as booleans, or within 0 to 255; anything
        else is taken as it is.
    data_home : str, path or None, default=None
        Where `imagenet-weights/` is; scikit-learn's data home by default.
    {parameters}

    Attributes
    ----------
    {attributes}

    References
    ----------
    .. [1] Krizhevsky, "One weird trick for parallelizing convolutional neural networks", 2014.
    .. [2] He, Zhang, Ren and Sun, "Deep residual learning for image recognition", CVPR 2016.

    Examples
    --------
    Random weights, for a download takes its time:

    >>> from skcifar import PretrainedFeatures
    >>> from skcifar.datasets import load_digits
    >>> X, y = load_digits(return_X_y=True)
    >>> features = PretrainedFeatures(weights=None, image_size=32, random_state=0)
    >>> features.fit_transform(X[:20]).shape
    (20, 512)
    """

    _parameter_constraints: dict = {
        **{
            name: CONSTRAINTS[name]
            for name in ("normalize", "image_shape", "layout", "device", "precision")
        },
        "backbone": [StrOptions(set(BACKBONES)), callable],
        "weights": [str, os.PathLike, None],
        "layer": [str],
        "image_size": [Interval(Integral, 1, None, closed="left"), None],
        "interpolation": [StrOptions({"bilinear", "bicubic"})],
        "batch_size": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
        "memory": [str, os.PathLike, None],
        "cache_size": [Interval(Integral, 0, None, closed="left")],
        "data_home": [str, os.PathLike, None],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        backbone="resnet18",
        *,
        weights="imagenet",
        layer="pool",
        image_size=224,
        interpolation="bilinear",
        batch_size="auto",
        memory=None,
        cache_size=4_000_000_000,
        normalize="auto",
        data_home=None,
        image_shape=None,
        layout="HWC",
        device="auto",
        precision="auto",
        random_state=None,
        verbose=False,
    ):
        self.backbone = backbone
        self.weights = weights
        self.layer = layer
        self.image_size = image_size
        self.interpolation = interpolation
        self.batch_size = batch_size
        self.memory = memory
        self.cache_size = cache_size
        self.normalize = normalize
        self.data_home = data_home
        self.image_shape = image_shape
        self.layout = layout
        self.device = device
        self.precision = precision
        self.random_state = random_state
        self.verbose = verbose

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any = None) -> Self:
        """Load the weights, and see from images how they are to be read.

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
        OSError
            When the ImageNet weights are not at hand and cannot be downloaded.
        ValueError
            When images, weights and parameters do not fit together.
        """
        with self._input_kept_on_failure():
            return self._load(X)

    def _load(self, X: Any) -> Self:
        rows, _, given_shape = self._validate_rows(X, reset=True)
        device = resolve_device(self.device)
        precision = resolve_precision(self.precision, device, rows.dtype, convolutional=True)
        shape = self._resolve_image_shape(rows, given_shape)
        self._check_images(shape)
        mean, scale = self._pixel_statistics(rows, shape[2])
        attributes: dict[str, Any] = {
            "image_shape_": shape,
            "dtype_": precision.name,
            "mean_": mean,
            "scale_": scale,
            "device_": str(device),
        }
        module = self._module(attributes, 0, self._seeds()["weights"], device).eval()
        attributes["n_parameters_"] = sum(p.numel() for p in module.parameters())
        attributes["module_"] = module
        attributes["_n_features_out"] = self._count_features(attributes, rows)
        attributes["_weights_digest"] = None if self.memory is None else digest_of(module)
        self.__dict__.update(attributes)
        return self

    # -- the network -------------------------------------------------------------------------------

    def _network(
        self, image_shape: tuple[int, int, int], n_outputs: int
    ) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
        factory = self.backbone
        arguments: dict[str, Any] = {"image_shape": image_shape}
        if isinstance(self.backbone, str):
            factory = BACKBONES[self.backbone]
            head = factory.head_prefix  # type: ignore[attr-defined]
            # what lies before the head wants neither its weights nor that it has 1,000 classes
            with_head = self.layer == "logits" or f"{self.layer}.".startswith(head)
            arguments = {"n_outputs": 1000 if with_head else None}
        return Encoder, {
            "factory": factory,
            "arguments": arguments,
            "image_size": self.image_size,
            "interpolation": self.interpolation,
            "layer": None if self.layer in ("pool", "logits") else self.layer,
        }

    def _module(
        self, attributes: dict[str, Any], n_outputs: int, seed: int, device: torch.device
    ) -> nn.Module:
        factory, arguments = self._network(attributes["image_shape_"], n_outputs)
        attributes["_architecture"] = (factory, arguments)
        module: Any
        if self.weights is None:
            with seeded_construction(seed):
                module = factory(**arguments)
        else:
            with skeleton_construction(factory, arguments):
                module = factory(**arguments)
            load_weights(module.network, read_state_dict(self._find_weights()), self.weights)
        return self._placed(module, device, Precision(attributes["dtype_"]).weights)

    def _find_weights(self) -> str | os.PathLike[str]:
        if self.weights != "imagenet":
            return self.weights
        if not isinstance(self.backbone, str):
            raise ValueError(
                f"weights='imagenet' is for the backbones {sorted(BACKBONES)}; give a callable "
                "backbone the path of its weights, or weights=None."
            )
        return fetch_checkpoint(self.backbone, self.data_home, verbose=bool(self.verbose))

    def _count_features(self, attributes: dict[str, Any], rows: Rows) -> int:
        view = self._view(attributes)
        return view._outputs_of(rows[:1], torch.float32).shape[1]

    # -- images ------------------------------------------------------------------------------------

    def _guess_image_shape(self, rows: Rows) -> tuple[int, int, int]:
        square = square_image(rows.shape[1])
        if square is not None and isinstance(self.backbone, str):
            return square  # no guess that wants a warning: ImageNet's networks read images only
        return super()._guess_image_shape(rows)

    def _check_images(self, shape: tuple[int, int, int]) -> None:
        if not isinstance(self.backbone, str):
            return
        if shape[2] not in (1, 3):
            raise ValueError(
                f"backbone={self.backbone!r} takes grey or colour images, but X holds images of "
                f"shape {shape} (height, width, channels), of {shape[2]} channels; give "
                "image_shape or layout if they are read wrongly, or convert them."
            )
        smallest = BACKBONES[self.backbone].smallest_image  # type: ignore[attr-defined]
        size = min(shape[:2]) if self.image_size is None else self.image_size
        if size < smallest:
            raise ValueError(
                f"backbone={self.backbone!r} needs images of at least {smallest} x {smallest} "
                f"pixels, but image_size={self.image_size!r} with images of shape {shape}; give "
                "image_size=224."
            )

    def _pixel_statistics(
        self, rows: Rows, n_channels: int
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """ImageNet's mean and standard deviation, in units of the rows."""
        normalize = self.normalize
        low, high = map(float, rows.aminmax())
        if normalize == "auto":
            normalize = low >= 0 and high <= 255
        if not normalize:
            return None, None
        unit = 1.0 if high <= 1 else 255.0
        mean, scale = _IMAGENET_MEAN * unit, _IMAGENET_SCALE * unit
        if n_channels == 3 or self._repeats_grey(n_channels):
            return mean, scale
        return np.full(n_channels, mean.mean()), np.full(n_channels, scale.mean())

    def _repeats_grey(self, n_channels: int) -> bool:
        return isinstance(self.backbone, str) and n_channels == 1

    def _rows_of_a_forward_pass(self) -> tuple[int, int]:
        most, least = super()._rows_of_a_forward_pass()
        if self.batch_size == "auto":
            on_cpu = torch.device(self.device_).type == "cpu"
            height, width = (self.image_size or side for side in self.image_shape_[:2])
            pixels = _PIXELS_OF_A_PASS["cpu" if on_cpu else "gpu"]
            most = min(most, max(1, pixels // (height * width)))
        else:
            most = min(most, self.batch_size)
        # one image of 224 x 224 pixels fills the processor as well as 32 do
        return most, 1 if self.image_size is not None else min(most, least)

    # -- features ----------------------------------------------------------------------------------

    def _features(
        self, rows: Rows, dtype: torch.dtype, out: np.ndarray | None = None
    ) -> np.ndarray:
        report = _Report() if self.verbose else None
        namespace = None if self.memory is None else self._namespace()

        def compute(rows: Rows) -> np.ndarray:
            if namespace is None:
                return self._outputs_of(rows, dtype, report)
            parts = [slice(None)] if isinstance(rows, Tensor) else rows.in_turn()
            kept = [self._kept_features(rows[part], namespace, report) for part in parts]
            of_dtype = np.float64 if dtype == torch.float64 else np.float32
            return np.concatenate(kept).astype(of_dtype, copy=False)

        features = into(out, rows, compute)
        if report is not None:
            report.tell()
        return features

    def _kept_features(self, rows: Tensor, namespace: bytes, report: _Report | None) -> np.ndarray:
        """Features out of the store, or computed and put there."""
        stored = torch.float64 if self.dtype_ == "float64" else torch.float32

        def compute(positions: np.ndarray) -> np.ndarray:
            return self._outputs_of(rows[torch.as_tensor(positions)], stored, report)

        return RowCache(self.memory, self.cache_size).compute(
            rows.cpu().numpy(),
            namespace,
            compute,
            n_columns=self._n_features_out,
            dtype=np.float64 if stored == torch.float64 else np.float32,
            batch_size=self._rows_stored_at_once(stored.itemsize),
        )

    def _rows_stored_at_once(self, n_bytes: int) -> int:
        """Few enough that they fit, several times, into the store and into memory."""
        most = min(_BYTES_STORED_AT_ONCE, self.cache_size // 4)
        return max(1, min(1024, most // (self._n_features_out * n_bytes)))

    def _namespace(self) -> bytes:
        """Tell everything that features depend on beside the row itself."""
        digest = self._weights_digest or digest_of(self.module_)
        _, arguments = self._architecture
        network = arguments | {"factory": _identity(arguments["factory"])}
        reading = (self.image_shape_, self.layout, self.dtype_)
        statistics = [None if v is None else v.tolist() for v in (self.mean_, self.scale_)]
        return digest + repr((self.module_, network, reading, statistics)).encode()

    def _with_weights_of(self, trained: Any) -> Self:
        encoder = super()._with_weights_of(trained)
        encoder._weights_digest = None  # that of the weights before
        return encoder


def _identity(factory: Callable[..., nn.Module]) -> str:
    """Return what is the same for the same callable in every process."""
    name = getattr(factory, "__qualname__", None)
    # such as a functools.partial: what it consists of
    if name is not None:
        return f"{factory.__module__}.{name}"
    try:
        return joblib.hash(factory)
    except Exception as error:  # whatever its pickling raises
        raise ValueError(
            f"memory= cannot tell backbone={factory!r} from others, since it does not pickle; give "
            "a function or class of a module, or memory=None."
        ) from error


class _Report:
    """Tells how far a long extraction is; images out of the store do not count."""

    def __init__(self) -> None:
        self.done = self.told = 0
        self.start = self.last = time.perf_counter()

    def __call__(self, n_more: int) -> None:
        self.done += n_more
        if time.perf_counter() - self.last >= _SECONDS_BETWEEN_REPORTS:
            self.tell()

    def tell(self) -> None:
        if self.told == self.done:
            return
        self.told, self.last = self.done, time.perf_counter()
        rate = self.done / max(self.last - self.start, math.ulp(1))
        print(
            f"PretrainedFeatures: {self.done:,} images computed, {rate:.0f} a second",
            file=sys.stderr,
            flush=True,
        )
