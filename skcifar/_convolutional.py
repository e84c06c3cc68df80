"""What estimators of images share: the network of their parameters, augmentation, averaging."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from skcifar._architectures import ARCHITECTURES, WhiteningConvolution
from skcifar._base import hidden_widths
from skcifar._batches import Samples
from skcifar._device import Augmentation, reflected
from skcifar._networks import ConvolutionalNetwork, has_batch_norm
from skcifar._supervised import SupervisedEstimator

AUTO_LEARNING_RATE = (
    '"auto" is 1e-3 for "adam" and "adamw"; for "sgd" 0.5 for a network of parameters with '
    "BatchNorm, 0.1 for another network with BatchNorm and 0.05 without."
)


# Of images in one forward pass on a CPU: 128 of 32 x 32 pixels. Their activations stay in its
# caches, and malloc keeps their memory. Of the default CNNClassifier 7,490 and 3,991 images a
# second (bfloat16, float32), where 1,024 at once make 4,633 and 2,009.
_PIXELS_OF_A_PASS = 128 * 32**2


# Of images in which whitening finds its components: 5,000 of CIFAR-10.
_WHITENING_PIXELS = 5000 * 32**2


class AugmentedEstimator(SupervisedEstimator):
    """Moves images at random in training, and averages over moves in prediction."""

    _convolutional = True

    def _augmentation(self, image_shape: tuple[int, int, int]) -> Augmentation | None:
        # The 8 x 8 digits lose 1.6 points of accuracy by moves of one pixel.
        translate = self.translate if min(image_shape[:2]) >= 16 else 0
        flip = self._flip(image_shape)
        if not (translate or flip or self.cutout):
            return None
        return Augmentation(bool(flip), translate, self.cutout, alternating=flip == "alternating")

    def _flip(self, image_shape: tuple[int, int, int]) -> bool | str:
        """Whether images are mirrored, and how."""
        return self.horizontal_flip

    def _rows_of_a_forward_pass(self) -> tuple[int, int]:
        most, least = super()._rows_of_a_forward_pass()
        if torch.device(self.device_).type != "cpu":
            return most, least
        height, width, _ = self.image_shape_
        whole = _PIXELS_OF_A_PASS // (height * width) // least * least
        return min(most, max(least, whole)), least

    def _forward(self, batch: Tensor) -> Tensor:
        if not self.tta:
            return self.module_(batch)
        sides = [batch, batch.flip(3)] if self._flip(self.image_shape_) else [batch]
        outputs = [self._over_translations(side) for side in sides]
        return torch.stack(outputs).mean(0)

    def _over_translations(self, batch: Tensor) -> Tensor:
        """Mean of the outputs over moves by one pixel, half of it for the image in place."""
        height, width = batch.shape[2:]
        outputs = self.module_(batch) / 2
        for step in (-1, 1):
            rows = reflected(torch.arange(height, device=batch.device) + step, height)
            columns = reflected(torch.arange(width, device=batch.device) + step, width)
            moved = batch.index_select(2, rows).index_select(3, columns)
            outputs = outputs + self.module_(moved) / 4
        return outputs


class ConvolutionalEstimator(AugmentedEstimator):
    """Has a network described by `channels` and its kin, or named by `architecture`."""

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

    def _show_images(
        self,
        module: nn.Module,
        samples: Samples,
        attributes: dict[str, Any],
        device: torch.device,
    ) -> None:
        layers = [layer for layer in module.modules() if isinstance(layer, WhiteningConvolution)]
        if not layers:
            return
        height, width, _ = attributes["image_shape_"]
        n_shown = min(len(samples), max(1, _WHITENING_PIXELS // (height * width)))
        # of all rows, as classes may stand together
        shown = torch.arange(n_shown, device=device) * len(samples) // n_shown
        if samples.index is not None:
            shown = samples.index[shown]
        images = self._reader(attributes, device)(samples.rows.index_select(0, shown))
        for layer in layers:
            layer.whiten(images)

    def _resolve_learning_rate(self, module: nn.Module) -> float:
        rate = self._value("learning_rate_init")
        if rate != "auto":
            return rate
        return 1e-3 if self._value("solver") in ("adam", "adamw") else self._rate_of_sgd(module)

    def _rate_of_sgd(self, module: nn.Module) -> float:
        if not has_batch_norm(module):
            return 0.05
        return 0.1 if self.architecture is not None else 0.5
