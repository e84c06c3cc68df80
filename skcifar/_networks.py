"""Networks: plain torch modules with explicit arguments, each split into features and head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "logistic": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


class Dropout(nn.Module):
    """Dropout whose masks come from a generator of its own rather than torch's global one.

    The generator is handed over before training with `use_generator`; outside training the
    module does nothing.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep = torch.empty_like(x).bernoulli_(1 - self.p, generator=self.generator)
        return x * keep.div_(1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def use_generator(module: nn.Module, generator: torch.Generator) -> None:
    """Let every dropout in `module` draw from `generator`; torch's own layers are replaced."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Dropout:
                child = Dropout(child.p)
                setattr(parent, name, child)
            if isinstance(child, Dropout):
                child.generator = generator


def has_batch_norm(module: nn.Module) -> bool:
    """Whether a row's output in training depends on the other rows of its batch."""
    return any(isinstance(child, nn.modules.batchnorm._BatchNorm) for child in module.modules())


class Linear(nn.Linear):
    """torch's dense layer with its float32 products in oneDNN where that is the CPU's own.

    torch takes MKL for them. On an AMD Zen 5 with two threads oneDNN is 2.2 times as fast
    (500 x 3072 by 200: 1.45 ms against 3.1 forward, 3.4 for the weights' gradient), with a
    relative difference of 1e-6. `torch.backends.mkldnn.flags(enabled=False)` turns it off.
    """

    def forward(self, x: Tensor) -> Tensor:
        if (
            _onednn_linear is not None
            and x.dtype == torch.float32
            and x.ndim == 2
            and x.device.type == "cpu"
            and torch.backends.mkldnn.enabled
            and not torch.is_autocast_enabled("cpu")
        ):
            return _OneDNNLinear.apply(x, self.weight, self.bias)
        return super().forward(x)


def _find_onednn_linear() -> Callable[..., Tensor] | None:
    """The operator, private to torch, which may do without it one day."""
    try:
        operator = torch.ops.mkldnn._linear_pointwise
        operator(torch.zeros(1, 2), torch.zeros(1, 2), None, "none", [], "")
    except (AttributeError, RuntimeError):
        return None
    return operator


_onednn_linear = _find_onednn_linear()


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        assert _onednn_linear is not None
        ctx.save_for_backward(x, weight)
        return _onednn_linear(x, weight, bias, "none", [], "")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        assert _onednn_linear is not None
        x, weight = ctx.saved_tensors
        of_x = None
        if ctx.needs_input_grad[0]:  # not of the rows themselves
            of_x = _onednn_linear(gradient, weight.t(), None, "none", [], "")
        transposed = gradient.t().contiguous()
        of_weight = _onednn_linear(transposed, x.t(), None, "none", [], "")
        return of_x, of_weight, gradient.sum(0)


class MultilayerPerceptron(nn.Module):
    """Dense layers over flat rows (n_samples, n_features); no hidden layer is a linear model."""

    def __init__(
        self,
        n_features: int,
        n_outputs: int,
        hidden_layer_sizes: Sequence[int] = (),
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [n_features, *hidden_layer_sizes]
        self.features = nn.Sequential(
            *_dense_layers(widths, [activation] * len(hidden_layer_sizes), dropout)
        )
        self.head = Linear(widths[-1], n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def _dense_layers(widths: Sequence[int], activations: Sequence[str], dropout: float) -> list:
    layers: list[nn.Module] = []
    for (n_in, n_out), activation in zip(pairwise(widths), activations, strict=True):
        layers += [Linear(n_in, n_out), ACTIVATIONS[activation]()]
        if dropout:
            layers.append(Dropout(dropout))
    return layers


def glorot_uniform_(module: nn.Module, activation: str) -> None:
    """Draw weights and biases as scikit-learn's MLPClassifier does (Glorot and Bengio, 2010)."""
    gain = 2.0 if activation == "logistic" else 6.0
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            bound = (gain / (layer.in_features + layer.out_features)) ** 0.5
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.uniform_(layer.bias, -bound, bound)


class ConvolutionalNetwork(nn.Module):
    """Stages of convolutions, each ending in a 2x2 max pooling, then dense layers.

    A stage is one or several "same" convolutions, each followed by BatchNorm (if wanted) and an
    activation. The pooling stands directly behind the stage's last convolution, where BatchNorm
    and activation are left with a quarter of the work; for an increasing activation without
    BatchNorm that is the same function. A side of one pixel is not pooled.

    Parameters
    ----------
    image_shape : (height, width, channels)
    n_outputs : int
    channels : sequence of int or of sequences of int
        One entry per stage: the width of its convolution, or the widths of its convolutions.
    hidden_layer_sizes : sequence of int
        Widths of the dense layers before the head.
    kernel_size : odd int, or one for each convolution
    activation : str, or one for each convolution and each hidden dense layer
    batch_norm : bool
    dropout : float
        Share of the inputs of each dense layer, the head included, left out in training.
    global_pool : {"max", "average", None}
        What becomes of the last stage's image: None flattens it.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        n_outputs: int,
        channels: Sequence[int | Sequence[int]],
        hidden_layer_sizes: Sequence[int] = (),
        kernel_size: int | Sequence[int] = 3,
        activation: str | Sequence[str] = "relu",
        batch_norm: bool = True,
        dropout: float = 0.0,
        global_pool: str | None = "max",
    ) -> None:
        super().__init__()
        height, width, n_in = image_shape
        stages = [(stage,) if isinstance(stage, int) else tuple(stage) for stage in channels]
        n_convolutions = sum(map(len, stages))
        kernel_sizes = iter(per_layer(kernel_size, n_convolutions, "kernel_size"))
        activations = per_layer(activation, n_convolutions + len(hidden_layer_sizes), "activation")
        layers: list[nn.Module] = []
        i = 0
        for stage in stages:
            for position, n_out in enumerate(stage):
                # BatchNorm subtracts the mean, and any bias with it
                kernel = next(kernel_sizes)
                convolution = nn.Conv2d(
                    n_in, n_out, kernel, padding=kernel // 2, bias=not batch_norm
                )
                if batch_norm:
                    _pass_through_(convolution.weight)
                layers.append(convolution)
                if position == len(stage) - 1 and height * width > 1:
                    window = (min(2, height), min(2, width))
                    layers.append(nn.MaxPool2d(window))
                    height, width = height // window[0], width // window[1]
                if batch_norm:
                    layers.append(nn.BatchNorm2d(n_out, momentum=_STATISTICS_MOMENTUM))
                layers.append(ACTIVATIONS[activations[i]]())
                n_in = n_out
                i += 1
        if global_pool is not None and height * width > 1:
            pool = nn.AdaptiveMaxPool2d if global_pool == "max" else nn.AdaptiveAvgPool2d
            layers.append(pool(1))
            height = width = 1
        layers.append(nn.Flatten())
        self.features = nn.Sequential(*layers)
        widths = [height * width * n_in, *hidden_layer_sizes]
        dense: list[nn.Module] = []
        for (n_before, n_after), name in zip(pairwise(widths), activations[i:], strict=True):
            dense += [Dropout(dropout), Linear(n_before, n_after), ACTIVATIONS[name]()]
        self.dense = nn.Sequential(*dense, Dropout(dropout))
        self.head = Linear(widths[-1], n_outputs)
        self.output_scale = _OUTPUT_SCALE if batch_norm else 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dense(self.features(x))) * self.output_scale


# With BatchNorm the convolutions bear a rate at which the head, which has none, would leap: an
# eighth of its outputs is a 64th of its rate. Together with label_smoothing=0.2 in place of 0.1
# worth 1.4 points of CIFAR-10's test accuracy (20,000 rows, 6 epochs).
_OUTPUT_SCALE = 1 / 8

# Of BatchNorm's running statistics: torch's 0.1 lags behind a training of few epochs.
_STATISTICS_MOMENTUM = 0.4


def _pass_through_(weight: Tensor) -> None:
    """Let the first filters of a convolution pass on its inputs, as in ResNets' shortcuts.

    Zagoruyko and Komodakis, "DiracNets", 2017. Worth 1.5 points of CIFAR-10's test accuracy
    (20,000 rows, 6 epochs).
    """
    if weight.device.type != "meta":
        nn.init.dirac_(weight.data[: weight.shape[1]])


def per_layer(value: object, n_layers: int, name: str) -> list:
    """One value for each layer, from one for all or a sequence of as many."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * n_layers
    if len(value) != n_layers:
        raise ValueError(
            f"{name}={value!r} has {len(value)} values for {n_layers} layers; give one value for "
            "all of them or one for each (convolutions first, then hidden dense layers)."
        )
    return list(value)


class LeNet5(nn.Module):
    """LeCun et al. (1998), with the ReLU and max pooling of today's use.

    The first convolution is padded, so that 28x28 images fit as the paper's padded 32x32 do.
    """

    smallest_image = 12

    def __init__(self, image_shape: tuple[int, int, int], n_outputs: int) -> None:
        super().__init__()
        height, width, channels = image_shape
        self.features = nn.Sequential(
            nn.Conv2d(channels, 6, 5, padding=2),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(6, 16, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
        )
        n_pixels = ((height // 2 - 4) // 2) * ((width // 2 - 4) // 2)
        self.dense = nn.Sequential(
            Linear(16 * n_pixels, 120), nn.ReLU(), Linear(120, 84), nn.ReLU()
        )
        self.head = Linear(84, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dense(self.features(x)))


class VGG(nn.Module):
    """Simonyan and Zisserman (2015) with BatchNorm, average pooling and one dense layer."""

    smallest_image = 32

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        n_outputs: int,
        stages: Sequence[Sequence[int]],
    ) -> None:
        super().__init__()
        n_in = image_shape[2]
        layers: list[nn.Module] = []
        for stage in stages:
            for position, n_out in enumerate(stage):
                layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.BatchNorm2d(n_out)]
                if position == len(stage) - 1:
                    layers.append(nn.MaxPool2d(2))
                layers.append(nn.ReLU(inplace=True))
                n_in = n_out
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(n_in, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.avgpool(self.features(x)).flatten(1))


class VGG11(VGG):
    """Eight convolutions in five stages."""

    def __init__(self, image_shape: tuple[int, int, int], n_outputs: int) -> None:
        super().__init__(image_shape, n_outputs, [[64], [128], [256] * 2, [512] * 2, [512] * 2])


class VGG16(VGG):
    """Thirteen convolutions in five stages."""

    def __init__(self, image_shape: tuple[int, int, int], n_outputs: int) -> None:
        super().__init__(
            image_shape, n_outputs, [[64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3]
        )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; named as torchvision's, whose weights then load."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.downsample: nn.Module | None = None
        if stride != 1 or n_in != n_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(x)) + shortcut)


class ResNet18(nn.Module):
    """He et al. (2016) with the stem for small images: a 3x3 convolution and no pooling."""

    smallest_image = 8

    def __init__(self, image_shape: tuple[int, int, int], n_outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(image_shape[2], 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, 2), BasicBlock(128, 128, 1))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, 2), BasicBlock(256, 256, 1))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, 2), BasicBlock(512, 512, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, n_outputs)

    def forward_features(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.avgpool(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.forward_features(x))


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "lenet5": LeNet5,
    "vgg11": VGG11,
    "vgg16": VGG16,
    "resnet18": ResNet18,
}
