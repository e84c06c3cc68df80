"""Convolutional networks."""

from __future__ import annotations

import math
import warnings
from numbers import Integral, Real
from typing import Any

import torch
from sklearn.utils._param_validation import Interval, StrOptions
from torch import Tensor, nn

from skcifar._base import hidden_widths
from skcifar._classifier import TorchClassifier
from skcifar._device import Augmentation, reflected
from skcifar._networks import ACTIVATIONS, ARCHITECTURES, ConvolutionalNetwork, has_batch_norm
from skcifar._parameters import document_parameters, share

_AUTO_LEARNING_RATE = (
    ' "auto" is 1e-3 for "adam" and "adamw"; for "sgd" 0.5 for a network of parameters with\n'
    "        BatchNorm, 0.1 for another network with BatchNorm and 0.05 without."
)


@document_parameters(
    batch_size='"auto"',
    auto_batch_size='"auto" is n_samples // 50, within 64 to 256.',
    learning_rate_init='"auto"',
    auto_learning_rate=_AUTO_LEARNING_RATE,
    learning_rate_decay="0.95",
    learning_rate_warmup="0.2",
    max_iter="13",
    label_smoothing="0.2",
    image_shape="Flat rows of s² or 3s² features with s >= 8 are taken for square images without "
    "it;\n        other rows for images of one pixel, on which a convolution is a dense layer.",
    precision='"auto" is bfloat16 where the hardware computes in it, else float32.',
)
class CNNClassifier(TorchClassifier):
    """Convolutional network, of parameters or by name.

    Minimises the mean loss of each step plus `alpha` / (2 m) times the squared weights, m being
    the sum of the weights of the step's rows.

    Parameters
    ----------
    channels : sequence of int or of sequences of int, \
            default=(32, (64, 64), (128, 128), (256, 256))
        Stages of the network: the width of a stage's convolution, or the widths of its
        convolutions. A stage ends with a 2x2 max pooling behind its last convolution, before
        BatchNorm and activation.
    hidden_layer_sizes : array-like of int, default=()
        Widths of the dense layers before the output.
    kernel_size : odd int or sequence of such, default=3
        Of all convolutions, or of each.
    activation : str or sequence of str, default="relu"
        "identity", "logistic", "tanh", "relu", "gelu" or "silu": of all layers, or of each
        convolution and hidden dense layer.
    batch_norm : bool, default=True
        Whether BatchNorm follows each convolution, which then has no bias.
    dropout : float, default=0.0
        Share of the inputs of each dense layer that is left out in training.
    global_pool : {"max", "average"} or None, default="max"
        Pooling of the last stage's whole image; None flattens it.
    architecture : {"lenet5", "vgg11", "vgg16", "resnet18"}, callable or None, default=None
        A network by name in place of the parameters above: LeNet-5 [1]_, VGG with BatchNorm [2]_
        or ResNet-18 with the stem for small images [3]_. A callable gets `image_shape` (height,
        width, channels) and `n_outputs` (1 for two classes) by name and returns a
        `torch.nn.Module` from images (n, channels, height, width) to logits (n, n_outputs). Its
        `torch.nn.Dropout` layers draw from `random_state`; other random layers would draw from
        torch's global generator.
    horizontal_flip : bool, default=False
        Whether to mirror half of the images in training, anew in each epoch. A flip relabels
        digits; for photographs it helps.
    translate : int, default=2
        Pixels by which images are moved at most in training, in each direction; images with a
        side below 16 pixels are not moved.
    cutout : int, default=0
        Side in pixels of a square of each image that is blanked in training.
    tta : bool, default=False
        Whether prediction averages the logits over the image and its moves by one pixel up and
        left and down and right and, with `horizontal_flip`, over their flips. The accuracies in
        `history_` are without.
    solver : {"sgd", "adam", "adamw"}, default="sgd"
        Optimizer.
    alpha : float, default=0.0
        Strength of the penalty on the squared weights; biases and BatchNorm are not penalised.
    weight_decay : float, default=5e-4
        Further penalty of `weight_decay` / 2 times the squared weights, whatever the number of
        rows (decoupled from the gradient in solver="adamw").
    {parameters}

    Attributes
    ----------
    {attributes}

    References
    ----------
    .. [1] LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document
           recognition", Proceedings of the IEEE 86 (1998).
    .. [2] Simonyan and Zisserman, "Very deep convolutional networks for large-scale image
           recognition", ICLR 2015.
    .. [3] He, Zhang, Ren and Sun, "Deep residual learning for image recognition", CVPR 2016.

    Examples
    --------
    >>> from skcifar import CNNClassifier
    >>> from skcifar.datasets import load_digits
    >>> X, y = load_digits(return_X_y=True)
    >>> classifier = CNNClassifier((16, 32), max_iter=4, random_state=0).fit(X[:1500], y[:1500])
    >>> classifier.image_shape_
    (8, 8, 1)
    >>> bool(classifier.score(X[1500:], y[1500:]) > 0.85)
    True
    """

    _parameter_constraints: dict = {
        **{
            name: constraint
            for name, constraint in TorchClassifier._parameter_constraints.items()
            if name != "max_fun"  # of solver="lbfgs", which networks of convolutions do not have
        },
        "channels": ["array-like"],
        "hidden_layer_sizes": ["array-like", Interval(Integral, 1, None, closed="left")],
        "kernel_size": ["array-like", Interval(Integral, 1, None, closed="left")],
        "activation": ["array-like", StrOptions(set(ACTIVATIONS))],
        "batch_norm": ["boolean"],
        "dropout": [share],
        "global_pool": [StrOptions({"max", "average"}), None],
        "architecture": [StrOptions(set(ARCHITECTURES)), callable, None],
        "horizontal_flip": ["boolean"],
        "translate": [Interval(Integral, 0, None, closed="left")],
        "cutout": [Interval(Integral, 0, None, closed="left")],
        "tta": ["boolean"],
        "solver": [StrOptions({"sgd", "adam", "adamw"})],
        "learning_rate_init": [StrOptions({"auto"}), Interval(Real, 0, None, closed="neither")],
    }
    _convolutional = True

    def __init__(
        self,
        channels=(32, (64, 64), (128, 128), (256, 256)),
        hidden_layer_sizes=(),
        *,
        kernel_size=3,
        activation="relu",
        batch_norm=True,
        dropout=0.0,
        global_pool="max",
        architecture=None,
        horizontal_flip=False,
        translate=2,
        cutout=0,
        tta=False,
        solver="sgd",
        alpha=0.0,
        weight_decay=5e-4,
        batch_size="auto",
        learning_rate="auto",
        learning_rate_init="auto",
        power_t=0.5,
        learning_rate_decay=0.95,
        learning_rate_step=10,
        learning_rate_end=0.0,
        learning_rate_warmup=0.2,
        max_iter=13,
        shuffle=True,
        random_state=None,
        tol=1e-4,
        verbose=False,
        warm_start=False,
        momentum=0.9,
        nesterovs_momentum=True,
        early_stopping=False,
        validation_fraction=0.1,
        scoring="accuracy",
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-8,
        n_iter_no_change=10,
        loss="cross_entropy",
        label_smoothing=0.2,
        class_weight=None,
        clip_grad_norm=None,
        clip_grad_value=None,
        normalize="auto",
        image_shape=None,
        layout="HWC",
        device="auto",
        precision="auto",
        skorch_callbacks=None,
    ):
        self.channels = channels
        self.hidden_layer_sizes = hidden_layer_sizes
        self.kernel_size = kernel_size
        self.activation = activation
        self.batch_norm = batch_norm
        self.dropout = dropout
        self.global_pool = global_pool
        self.architecture = architecture
        self.horizontal_flip = horizontal_flip
        self.translate = translate
        self.cutout = cutout
        self.tta = tta
        self.solver = solver
        self.alpha = alpha
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.learning_rate_init = learning_rate_init
        self.power_t = power_t
        self.learning_rate_decay = learning_rate_decay
        self.learning_rate_step = learning_rate_step
        self.learning_rate_end = learning_rate_end
        self.learning_rate_warmup = learning_rate_warmup
        self.max_iter = max_iter
        self.shuffle = shuffle
        self.random_state = random_state
        self.tol = tol
        self.verbose = verbose
        self.warm_start = warm_start
        self.momentum = momentum
        self.nesterovs_momentum = nesterovs_momentum
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.scoring = scoring
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon
        self.n_iter_no_change = n_iter_no_change
        self.loss = loss
        self.label_smoothing = label_smoothing
        self.class_weight = class_weight
        self.clip_grad_norm = clip_grad_norm
        self.clip_grad_value = clip_grad_value
        self.normalize = normalize
        self.image_shape = image_shape
        self.layout = layout
        self.device = device
        self.precision = precision
        self.skorch_callbacks = skorch_callbacks

    def _network(
        self, image_shape: tuple[int, int, int], n_outputs: int
    ) -> tuple[Any, dict[str, Any]]:
        arguments: dict[str, Any] = {"image_shape": image_shape, "n_outputs": n_outputs}
        if callable(self.architecture):
            return self.architecture, arguments
        if self.architecture is not None:
            network: Any = ARCHITECTURES[self.architecture]
            if min(image_shape[:2]) < network.smallest_image:
                raise ValueError(
                    f"architecture={self.architecture!r} needs images of at least "
                    f"{network.smallest_image} x {network.smallest_image} pixels, but X holds "
                    f"{image_shape[0]} x {image_shape[1]}; give image_shape if these are flat "
                    "rows of larger images, or describe a smaller network by channels."
                )
            return network, arguments
        kernels = self.kernel_size
        if any(size % 2 == 0 for size in ([kernels] if isinstance(kernels, Integral) else kernels)):
            raise ValueError(
                f"kernel_size={kernels!r} holds an even number; convolutions keep the image's "
                "size, which takes odd kernels."
            )
        return ConvolutionalNetwork, arguments | {
            "channels": [
                int(stage) if isinstance(stage, Integral) else [int(width) for width in stage]
                for stage in self.channels
            ],
            "hidden_layer_sizes": hidden_widths(self.hidden_layer_sizes),
            "kernel_size": int(kernels) if isinstance(kernels, Integral) else list(kernels),
            "activation": (
                self.activation if isinstance(self.activation, str) else list(self.activation)
            ),
            "batch_norm": self.batch_norm,
            "dropout": self.dropout,
            "global_pool": self.global_pool,
        }

    def _resolve_image_shape(
        self, rows: Tensor, given_shape: tuple[int, int, int] | None
    ) -> tuple[int, int, int]:
        shape = super()._resolve_image_shape(rows, given_shape)
        if self.image_shape is not None or given_shape is not None:
            return shape
        square = _square_image(shape[2])
        if square is None:
            return shape
        sample = rows[:1000]
        if sample.is_floating_point() and bool((sample != sample.round()).any()):
            warnings.warn(
                f"Rows of {shape[2]} features were taken for images of shape {square} (height, "
                "width, channels), but their values are not whole as pixels are. Give "
                f"image_shape={square} if they are images, or image_shape=(1, 1, {shape[2]}) if "
                "they are not.",
                UserWarning,
                stacklevel=2,
            )
        return square

    def _augmentation(self, image_shape: tuple[int, int, int]) -> Augmentation | None:
        # The 8 x 8 digits lose 1.6 points of accuracy by moves of one pixel.
        translate = self.translate if min(image_shape[:2]) >= 16 else 0
        if not (translate or self.horizontal_flip or self.cutout):
            return None
        return Augmentation(self.horizontal_flip, translate, self.cutout)

    def _resolve_learning_rate(self, module: nn.Module) -> float:
        if self.learning_rate_init != "auto":
            return self.learning_rate_init
        if self.solver != "sgd":
            return 1e-3
        if not has_batch_norm(module):
            return 0.05
        return 0.5 if isinstance(module, ConvolutionalNetwork) else 0.1

    def _forward(self, batch: Tensor) -> Tensor:
        if not self.tta:
            return self.module_(batch)
        sides = [batch, batch.flip(3)] if self.horizontal_flip else [batch]
        logits = [self._over_translations(side) for side in sides]
        return torch.stack(logits).mean(0)

    def _over_translations(self, batch: Tensor) -> Tensor:
        """Mean of the logits over moves by one pixel, half of it for the image in place."""
        height, width = batch.shape[2:]
        logits = self.module_(batch) / 2
        for step in (-1, 1):
            rows = reflected(torch.arange(height, device=batch.device) + step, height)
            columns = reflected(torch.arange(width, device=batch.device) + step, width)
            moved = batch.index_select(2, rows).index_select(3, columns)
            logits = logits + self.module_(moved) / 4
        return logits


def _square_image(n_features: int) -> tuple[int, int, int] | None:
    """Shape of the grey or colour image of 8 x 8 pixels or more that has so many features."""
    for channels in (1, 3):
        side = math.isqrt(n_features // channels)
        if side >= 8 and side * side * channels == n_features:
            return side, side, channels
    return None
