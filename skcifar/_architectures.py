"""The networks that have a name: for small images by ARCHITECTURES, for ImageNet by BACKBONES."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from skcifar._matmul import Linear
from skcifar._networks import STATISTICS_MOMENTUM, Dropout, Step, pass_through_, sliced


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

    def hidden_steps(self) -> list[Step]:
        return sliced(self.features, [3, 7]) + sliced(self.dense, [2, 4])


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
        stage_ends: list[int] = []
        for stage in stages:
            for position, n_out in enumerate(stage):
                layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.BatchNorm2d(n_out)]
                if position == len(stage) - 1:
                    layers.append(nn.MaxPool2d(2))
                layers.append(nn.ReLU(inplace=True))
                n_in = n_out
            stage_ends.append(len(layers))
        self.features = nn.Sequential(*layers)
        self.stage_ends = tuple(stage_ends)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(n_in, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.avgpool(self.features(x)).flatten(1))

    def hidden_steps(self) -> list[Step]:
        layers = nn.Sequential(*self.features, self.avgpool, nn.Flatten())
        return sliced(layers, [*self.stage_ends[:-1], len(layers)])


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


class ResNet(nn.Module):
    """He et al. (2016), named as torchvision's, whose weights then load.

    Parameters
    ----------
    block : BasicBlock or Bottleneck
    n_blocks : sequence of four int
        Blocks of each stage; stages are 1, 2, 4 and 8 times 64 wide.
    n_outputs : int, optional
        None leaves the dense layer out: the pooled activations come out.
    n_channels : int
        Of the images.
    small_images : bool
        Whether the stem is a 3x3 convolution that keeps the image's size, rather than ImageNet's
        7x7 convolution and 3x3 max pooling of stride 2 each.
    """

    smallest_image = 1  # all windows are padded
    head_prefix = "fc."

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        n_blocks: Sequence[int],
        n_outputs: int | None,
        *,
        n_channels: int = 3,
        small_images: bool = False,
    ) -> None:
        super().__init__()
        self.maxpool: nn.Module
        if small_images:
            self.conv1 = nn.Conv2d(n_channels, 64, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(n_channels, 64, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(block, n_blocks[0], 64, 64, stride=1)
        self.layer2 = _stage(block, n_blocks[1], 64 * block.expansion, 128, stride=2)
        self.layer3 = _stage(block, n_blocks[2], 128 * block.expansion, 256, stride=2)
        self.layer4 = _stage(block, n_blocks[3], 256 * block.expansion, 512, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = _dense_or_nothing(512 * block.expansion, n_outputs)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self._stem(x))))
        return self._last_stage(x)

    def _stem(self, x: Tensor) -> Tensor:
        return self.maxpool(torch.relu(self.bn1(self.conv1(x))))

    def _last_stage(self, x: Tensor) -> Tensor:
        return self.avgpool(self.layer4(x)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.forward_features(x))

    def hidden_steps(self) -> list[Step]:
        return [self._stem, self.layer1, self.layer2, self.layer3, self._last_stage]


def _stage(
    block: type[BasicBlock] | type[Bottleneck], n_blocks: int, n_in: int, width: int, stride: int
) -> nn.Sequential:
    n_out = width * block.expansion
    first = block(n_in, width, stride)
    return nn.Sequential(first, *(block(n_out, width, 1) for _ in range(n_blocks - 1)))


def _dense_or_nothing(n_in: int, n_outputs: int | None) -> nn.Module:
    return nn.Identity() if n_outputs is None else nn.Linear(n_in, n_outputs)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    expansion = 1

    def __init__(self, n_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(n_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(x)) + shortcut)


class Bottleneck(nn.Module):
    """A 3x3 convolution between two of 1x1, beside a shortcut; the output is four times as wide.

    The stride is the 3x3 convolution's, as in the weights that are to be had for ImageNet, and not
    the first one's as in the paper.
    """

    expansion = 4

    def __init__(self, n_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = _shortcut(n_in, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return torch.relu(self.bn3(self.conv3(x)) + shortcut)


def _shortcut(n_in: int, n_out: int, stride: int) -> nn.Module | None:
    """What fits a block's input to its output where their shapes differ."""
    if stride == 1 and n_in == n_out:
        return None
    return nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))


class ResNet18(ResNet):
    """ResNet-18 with the stem for small images."""

    smallest_image = 8

    def __init__(self, image_shape: tuple[int, int, int], n_outputs: int) -> None:
        super().__init__(
            BasicBlock, [2, 2, 2, 2], n_outputs, n_channels=image_shape[2], small_images=True
        )


class Airbench94(nn.Module):
    """The network of Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", arXiv:2404.00498.

    A fixed convolution of 2x2 pixels makes neighbouring pixels uncorrelated, three groups of two
    convolutions follow, each pooled after the first. 118 million multiplications for an image of
    32x32 pixels, 1.97 million parameters.

    Parameters
    ----------
    image_shape : (height, width, channels)
    n_outputs : int
    """

    smallest_image = 9
    # What "auto" stands for in a CNNClassifier, by its solver; the first is the default. The rates
    # of Jordan's are of summed losses and of outputs divided by 256: these are the same for means
    # and outputs divided by 9.
    recipes: Mapping[str, Mapping[str, Any]] = {
        "muon": {
            "max_iter": 8,
            "batch_size": 2000,
            "learning_rate_init": 0.24,
            "learning_rate_warmup": 0.0,
            "learning_rate_end": 0.0,
            "rate_factor_beside_muon": 6.9,
            "bias_rate_factor": 64.0,
            "momentum": 0.6,
            "weight_decay": 2.4e-3,
            "lookahead": False,
        },
        "sgd": {
            "max_iter": 10,
            "batch_size": 1024,
            "learning_rate_init": 1.5,
            "learning_rate_warmup": 0.23,
            "learning_rate_end": 0.07,
            "bias_rate_factor": 64.0,
            "momentum": 0.85,
            "weight_decay": 1.3e-3,
            "lookahead": True,
        },
    }

    def __init__(self, image_shape: tuple[int, int, int], n_outputs: int) -> None:
        super().__init__()
        self.whitening = WhiteningConvolution(image_shape[2])
        widths = [self.whitening.out_channels, 64, 256, 256]
        groups = [layer for pair in pairwise(widths) for layer in _group(*pair)]
        # 3x3 pixels are left of 32x32
        self.features = nn.Sequential(nn.GELU(), *groups, nn.AdaptiveMaxPool2d(1), nn.Flatten())
        self.head = nn.Linear(widths[-1], n_outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(self.whitening(x))) / 9

    def begin_epoch(self, share: float) -> None:
        """Let the whitening's biases rest after 3/8 of the training.

        Then no gradient goes back through the first group's widest activations.
        """
        assert self.whitening.bias is not None
        self.whitening.bias.requires_grad_(share < 3 / 8)

    def hidden_steps(self) -> list[Step]:
        layers = nn.Sequential(self.whitening, *self.features)
        return sliced(layers, [2, 9, 16, len(layers)])


def _group(n_in: int, n_out: int) -> list[nn.Module]:
    """Two convolutions that begin as the identity, with BatchNorms that do not scale."""
    layers: list[nn.Module] = []
    for position in range(2):
        convolution = nn.Conv2d(n_in, n_out, 3, padding=1, bias=False)
        pass_through_(convolution.weight)
        layers.append(convolution)
        if position == 0:
            layers.append(nn.MaxPool2d(2))
        norm = nn.BatchNorm2d(n_out, momentum=STATISTICS_MOMENTUM)
        norm.weight.requires_grad_(False)
        layers += [norm, nn.GELU()]
        n_in = n_out
    return layers


class WhiteningConvolution(nn.Conv2d):
    """2x2 pixels' principal components and their negatives, scaled to unit variance.

    `whiten` finds them in images. Only the biases are trained, but for fine-tuning.
    """

    def __init__(self, n_channels: int) -> None:
        super().__init__(n_channels, 8 * n_channels, 2)
        self.weight.requires_grad_(False)

    @torch.no_grad()
    def whiten(self, images: Tensor) -> None:
        """Take the components of images (n, channels, height, width), as the network reads them."""
        second_moments = torch.zeros(2 * [self.weight[0].numel()], dtype=torch.float64)
        n_patches = 0
        n_rows = max(1, 256 * 32**2 // images[0, 0].numel())  # 12 MB of CIFAR-10's patches
        for block in images.split(n_rows):
            patches = nn.functional.unfold(block, 2).transpose(1, 2).flatten(0, 1)
            second_moments += (patches.T @ patches).double().cpu()
            n_patches += len(patches)
        variances, components = torch.linalg.eigh(second_moments / n_patches)
        scaled = components.T / (variances.clamp_min(0)[:, None] + 5e-4).sqrt()
        self.weight.copy_(torch.cat([scaled, -scaled]).view_as(self.weight))


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "airbench94": Airbench94,
    "lenet5": LeNet5,
    "vgg11": VGG11,
    "vgg16": VGG16,
    "resnet18": ResNet18,
}


# -- ImageNet's ------------------------------------------------------------------------------------
#
# Of RGB images, with the names and shapes of torchvision's weights. n_outputs=None leaves the
# classifying layers out, whose entries in the weights begin with head_prefix.


class AlexNet(nn.Module):
    """Krizhevsky, "One weird trick for parallelizing convolutional neural networks", 2014."""

    smallest_image = 63
    head_prefix = "classifier."

    def __init__(self, n_outputs: int | None = 1000) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(6)
        self.classifier: nn.Module = nn.Identity()
        if n_outputs is not None:
            self.classifier = nn.Sequential(
                Dropout(0.5),
                Linear(256 * 6 * 6, 4096),
                nn.ReLU(inplace=True),
                Dropout(0.5),
                Linear(4096, 4096),
                nn.ReLU(inplace=True),
                Linear(4096, n_outputs),
            )

    def forward_features(self, x: Tensor) -> Tensor:
        return self.avgpool(self.features(x)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.forward_features(x))


class ImageNetResNet18(ResNet):
    """Basic blocks, 18 layers with weights."""

    def __init__(self, n_outputs: int | None = 1000) -> None:
        super().__init__(BasicBlock, [2, 2, 2, 2], n_outputs)
        _he_normal_(self)


class ImageNetResNet34(ResNet):
    """Basic blocks, 34 layers with weights."""

    def __init__(self, n_outputs: int | None = 1000) -> None:
        super().__init__(BasicBlock, [3, 4, 6, 3], n_outputs)
        _he_normal_(self)


class ImageNetResNet50(ResNet):
    """Bottlenecks, 50 layers with weights."""

    def __init__(self, n_outputs: int | None = 1000) -> None:
        super().__init__(Bottleneck, [3, 4, 6, 3], n_outputs)
        _he_normal_(self)


def _he_normal_(module: nn.Module) -> None:
    """Draw convolutions as He et al., "Delving Deep into Rectifiers", 2015, by their outputs."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "alexnet": AlexNet,
    "resnet18": ImageNetResNet18,
    "resnet34": ImageNetResNet34,
    "resnet50": ImageNetResNet50,
}
