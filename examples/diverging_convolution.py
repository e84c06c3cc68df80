"""Gradient clipping: a convolution that diverges without, and converges with it.

The teacher is a convolution with uniform random weights; its strongest output, of four, is the
class of an image. The student, a convolution of the same size, is fitted to the classes with the
squared error, on pixels as they are. At these the error is so steep that a step of gradient
descent leads far beyond the minimum: each loss is larger than the one before, and `fit` ends with
a ValueError as soon as it is no longer finite. With `clip_grad_value=1` no step follows the
gradient by more than the learning rate in any weight, and the same training converges.

Run it with ``python examples/diverging_convolution.py``; it takes some seconds.
"""

import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import nn

from skcifar import CNNClassifier
from skcifar.datasets import load_digits

N_IMAGES, N_EPOCHS, N_FILTERS = 100, 50, 4


class OneConvolution(nn.Sequential):
    """Filters of 5 x 5 pixels with uniform weights; an output is a filter's mean over the image."""

    def __init__(self, image_shape: tuple[int, int, int], n_outputs: int) -> None:
        convolution = nn.Conv2d(image_shape[2], n_outputs, 5)
        nn.init.uniform_(convolution.weight)
        super().__init__(convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def labelled_images() -> tuple[np.ndarray, np.ndarray]:
    """Give digits (100, 8, 8), and for each the number of the teacher's strongest output."""
    images = load_digits().images[:N_IMAGES]
    torch.manual_seed(0)
    teacher = OneConvolution((8, 8, 1), N_FILTERS)
    with torch.no_grad():
        outputs = teacher(torch.from_numpy(images).float()[:, None])  # (100, 4)
    # relative to its mean, or else the filter with the largest weights would always win
    return images, (outputs - outputs.mean(0)).argmax(1).numpy()


def student(batch_size: int, clip_grad_value: float | None) -> CNNClassifier:
    """Make a classifier that descends the gradient of the squared error on raw pixels."""
    return CNNClassifier(
        architecture=OneConvolution,
        loss="squared_error",
        label_smoothing=0,
        normalize=False,
        solver="sgd",
        momentum=0,
        learning_rate="constant",
        learning_rate_init=1e-2,
        weight_decay=1e-3,
        batch_size=batch_size,
        clip_grad_value=clip_grad_value,
        max_iter=N_EPOCHS,
        n_iter_no_change=N_EPOCHS,
        precision="float32",
        random_state=0,
    )


def error_without_clipping(batch_size: int) -> str:
    """Give the error with which `fit` ends a training that diverges; empty if it does not."""
    images, classes = labelled_images()
    try:
        student(batch_size, clip_grad_value=None).fit(images, classes)
    except ValueError as error:
        return str(error)
    return ""


def losses_with_clipping(batch_size: int) -> tuple[float, float, float]:
    """Give the first and the last epoch's loss, and the norm of outputs less one-hot classes."""
    images, classes = labelled_images()
    model = student(batch_size, clip_grad_value=1.0)
    with warnings.catch_warnings():
        # clipped steps of equal length go back and forth around the minimum
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(images, classes)
    difference = model.decision_function(images) - np.eye(N_FILTERS)[classes]
    return model.loss_curve_[0], model.loss_curve_[-1], float(np.linalg.norm(difference))


def main() -> None:
    """Print what becomes of batches of 1, 4 and 8 images."""
    print(f"A convolution fitted for {N_EPOCHS} epochs to {N_IMAGES} images\n")
    print("batch   unclipped     clipped: first loss   last loss   norm of the difference")
    for batch_size in (1, 4, 8):
        error = error_without_clipping(batch_size)
        first, last, norm = losses_with_clipping(batch_size)
        outcome = "diverges" if error else "converges"
        print(f"{batch_size:5}   {outcome:10} {first:23.1f} {last:11.3f} {norm:24.1f}")
        print(f"        {error}")


if __name__ == "__main__":
    main()
