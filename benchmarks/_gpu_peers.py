"""Peers for a GPU, with their data there: loops written by hand, skorch, and a published script.

Those that are tuned let cuDNN try its algorithms. What it finds serves every convolution of the
same shapes and types in the process, and so does what it takes without trying: their batches or
types are others than ours, or the first to come would choose for both.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _contestants import Task, network, optimizer_of
from _measure import Images
from skorch import NeuralNetClassifier
from torch import Tensor, nn
from torch.nn import functional as F

from skcifar._architectures import ARCHITECTURES, Airbench94

CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
MEAN, SCALE = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10's pixels / 255
IMAGENET_MEAN, IMAGENET_SCALE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LABEL_SMOOTHING = 0.2  # this and what is below are CNNClassifier's
MOMENTUM_BESIDE_FILTERS = 0.85
WEIGHT_DECAY = 5e-4


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- small networks ------------------------------------------------------------------------------


def eager(task: Task, inputs: Tensor, labels: Tensor, epochs: int) -> list[float]:
    """As one writes it, with the rows on the device; gives the seconds of each epoch."""
    model = network(task).to(inputs.device)
    factory, settings = optimizer_of(task)
    optimizer = factory(model.parameters(), **settings)
    clock = [time.perf_counter()]
    for _ in range(epochs):
        for picked in torch.randperm(len(inputs), device=inputs.device).split(task.batch_size):
            optimizer.zero_grad()
            outputs = model(inputs.index_select(0, picked))
            F.cross_entropy(outputs, labels.index_select(0, picked)).backward()
            optimizer.step()
        wait_for(inputs.device)
        clock.append(time.perf_counter())
    return np.diff(clock).tolist()


def skorch(
    task: Task, rows: np.ndarray, targets: np.ndarray, epochs: int, device: torch.device
) -> None:
    """As it comes, without its hold-out, shuffled as ours: its DataLoader, its callbacks."""
    factory, settings = optimizer_of(task)
    NeuralNetClassifier(
        network(task),
        criterion=nn.CrossEntropyLoss,
        optimizer=factory,
        **{f"optimizer__{name}": value for name, value in settings.items()},
        max_epochs=epochs,
        batch_size=task.batch_size,
        iterator_train__shuffle=True,
        train_split=None,
        device=str(device),
        verbose=0,
    ).fit(rows, targets)
    wait_for(device)


# -- the recipe of airbench94 --------------------------------------------------------------------


def bare_fit(
    train: Images, seed: int, device: torch.device, epochs: int | None = None
) -> Airbench94:
    """Train by the recipe, and nothing else: no records, no checks, no choices, drawn as it comes.

    All weights but BatchNorm's are half as wide as float32, so that nothing is cast; losses are
    summed rather than averaged, which keeps small gradients within float16's range.
    """
    recipe = Airbench94.recipes["muon"]
    epochs = recipe["max_iter"] if epochs is None else epochs
    torch.manual_seed(seed)
    images, labels = on_device(train, device, half_of(device))
    model = Airbench94((32, 32, 3), len(CLASSES)).to(device)
    model.whitening.whiten(images[:5000].float())
    model = narrowed(model, images.dtype)
    # of fewer images than CIFAR-10's as ours
    batch_size = min(len(images), max(64, min(recipe["batch_size"], len(images) // 25)))
    n_batches = len(images) // batch_size
    n_steps = epochs * n_batches
    filters = [p for p in model.parameters() if p.ndim > 2 and p.requires_grad]
    buffers = [torch.zeros_like(weight) for weight in filters]
    optimizer = beside_filters(model, recipe, batch_size)
    highest = [group["lr"] for group in optimizer.param_groups]
    padded = F.pad(flipped_at_random(images), (2, 2, 2, 2), mode="reflect")
    model.train()
    step = 0
    with tuned():
        for epoch in range(epochs):
            model.begin_epoch(epoch / epochs)
            moved = translated(padded, 2)
            if epoch % 2:
                moved = moved.flip(3)
            order = torch.randperm(len(images), device=device)[: n_batches * batch_size]
            for picked in order.split(batch_size):
                batch = moved[picked].contiguous(memory_format=torch.channels_last)
                loss_of(model(batch), labels[picked]).backward()
                step += 1
                rate = 1 - step / (n_steps + 1)
                for group, lr in zip(optimizer.param_groups, highest, strict=True):
                    group["lr"] = rate * lr
                optimizer.step()
                muon_step(filters, buffers, rate * recipe["learning_rate_init"], recipe["momentum"])
                model.zero_grad(set_to_none=True)
    return model


@torch.inference_mode()
def bare_accuracy(model: Airbench94, test: Images, device: torch.device) -> float:
    """On images that are averaged over as ours are, blocks of 2,000 at a time."""
    images, labels = on_device(test, device, half_of(device))
    model.eval()
    right = torch.zeros((), dtype=torch.int64, device=device)
    with tuned():
        for block, truth in zip(images.split(2000), labels.split(2000), strict=True):
            outputs = over_moves(model, block) + over_moves(model, block.flip(3))
            right += (outputs.argmax(1) == truth).sum()
    return int(right) / len(images)


def over_moves(model: nn.Module, images: Tensor) -> Tensor:
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    corners = model(padded[:, :, :-2, :-2]) + model(padded[:, :, 2:, 2:])
    return model(images) / 2 + corners / 4


def half_of(device: torch.device) -> torch.dtype:
    """float16 on a GPU, other than ours: a processor has no fast one."""
    return torch.float16 if device.type == "cuda" else torch.bfloat16


def narrowed(model: Airbench94, dtype: torch.dtype) -> Airbench94:
    model = model.to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def beside_filters(model: nn.Module, recipe: Mapping[str, Any], batch_size: int) -> torch.optim.SGD:
    """For biases and the dense layer, whose rates are those of a mean over the batch."""
    trained = [p for p in model.parameters() if p.requires_grad and p.ndim <= 2]
    rate = recipe["learning_rate_init"] * recipe["rate_factor_beside_muon"] / batch_size
    groups = [
        {
            "params": [p for p in trained if p.ndim == 2],
            "lr": rate,
            "weight_decay": recipe["weight_decay"] * batch_size,
        },
        {"params": [p for p in trained if p.ndim == 1], "lr": rate * recipe["bias_rate_factor"]},
    ]
    return torch.optim.SGD(
        groups, lr=rate, momentum=MOMENTUM_BESIDE_FILTERS, nesterov=True, fused=True
    )


def loss_of(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(
        outputs.float(), labels, label_smoothing=LABEL_SMOOTHING, reduction="sum"
    )


@torch.no_grad()
def muon_step(
    filters: Sequence[Tensor], buffers: Sequence[Tensor], rate: float, momentum: float
) -> None:
    for weight, buffer in zip(filters, buffers, strict=True):
        assert weight.grad is not None
        buffer.mul_(momentum).add_(weight.grad)
        ahead = weight.grad.add(buffer, alpha=momentum)
        weight.mul_(len(weight) ** 0.5 / weight.norm())
        weight.sub_(newton_schulz(ahead.flatten(1)).view_as(weight), alpha=rate)


def newton_schulz(matrix: Tensor) -> Tensor:
    """(rows, columns) with singular values of about one, by three rounds in bfloat16."""
    x = matrix.bfloat16()
    if len(matrix) > matrix.shape[1]:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(3):
        square = x @ x.T
        x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
    if len(matrix) > matrix.shape[1]:
        x = x.T
    return x.to(matrix.dtype)


def flipped_at_random(images: Tensor) -> Tensor:
    sides = torch.rand(len(images), device=images.device) < 0.5
    return torch.where(sides[:, None, None, None], images.flip(3), images)


def translated(padded: Tensor, reach: int) -> Tensor:
    """An image from each padded one, moved by up to `reach` pixels; all at once, in 25 copies."""
    n, channels, height, width = padded.shape
    height, width = height - 2 * reach, width - 2 * reach
    moves = torch.randint(2 * reach + 1, (2, n), device=padded.device)
    moved = padded.new_empty((n, channels, height, width)).to(memory_format=torch.channels_last)
    for down in range(2 * reach + 1):
        for right in range(2 * reach + 1):
            alike = ((moves[0] == down) & (moves[1] == right)).nonzero()[:, 0]
            part = padded[:, :, down : down + height, right : right + width]
            moved[alike] = part[alike]
    return moved


# -- larger convolutional networks ---------------------------------------------------------------


def by_hand(
    name: str, images: Tensor, labels: Tensor, batch_size: int, rate: float, epochs: int
) -> list[float]:
    """Tuned; gives the seconds of each epoch.

    Its batches are of 512 images and a smaller last one, ours of 510 or 511.
    """
    device = images.device
    torch.manual_seed(0)
    model = ARCHITECTURES[name](image_shape=(32, 32, 3), n_outputs=10).to(device)
    model = model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=rate,
        momentum=0.9,
        nesterov=True,
        weight_decay=WEIGHT_DECAY,
        fused=True,
    )
    clock = [time.perf_counter()]
    with tuned():
        for _ in range(epochs):
            padded = F.pad(flipped_at_random(images), (2, 2, 2, 2), mode="reflect")
            moved = translated(padded, 2)
            for picked in torch.randperm(len(images), device=device).split(batch_size):
                batch = moved[picked].contiguous(memory_format=torch.channels_last)
                with torch.autocast(device.type, dtype=torch.bfloat16):
                    outputs = model(batch)
                    loss = F.cross_entropy(outputs, labels[picked], label_smoothing=LABEL_SMOOTHING)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            wait_for(device)
            clock.append(time.perf_counter())
    return np.diff(clock).tolist()


@torch.inference_mode()
def bare_features(model: nn.Module, X: np.ndarray, device: torch.device) -> np.ndarray:
    """Tuned, by batches of twice the size of ours."""
    features = []
    with tuned():
        for part in torch.from_numpy(X).split(512):
            batch = normalised(part, device, IMAGENET_MEAN, IMAGENET_SCALE)
            batch = F.interpolate(batch, 224, mode="bilinear", antialias=True)
            batch = batch.bfloat16().contiguous(memory_format=torch.channels_last)
            features.append(model(batch))
    return torch.cat(features).flatten(1).float().cpu().numpy()


# -- what the loops share ------------------------------------------------------------------------


def on_device(images: Images, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Normalised images (n, 3, 32, 32) in channels_last memory, and labels."""
    labels = torch.from_numpy(images.y).to(device)
    return normalised(torch.from_numpy(images.X), device, MEAN, SCALE).to(dtype), labels


def normalised(
    rows: Tensor, device: torch.device, mean: tuple[float, ...], scale: tuple[float, ...]
) -> Tensor:
    pixels = rows.to(device).view(-1, 32, 32, 3).permute(0, 3, 1, 2).float() / 255
    shift, spread = (torch.tensor(v, device=device)[:, None, None] for v in (mean, scale))
    return (pixels - shift) / spread


@contextmanager
def tuned() -> Iterator[None]:
    """Let cuDNN try its algorithms."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


# -- a published script --------------------------------------------------------------------------


@dataclass(frozen=True)
class Printed:
    """What a script said.

    Attributes
    ----------
    accuracy : float or None
        Mean, in per cent.
    seconds : float or None
        Median of its runs'.
    end : str
        The last lines.
    """

    accuracy: float | None
    seconds: float | None
    end: str


def run_script(path: Path, train: Images, test: Images) -> Printed:
    """Run a copy of airbench94_muon.py, as it is, on our images.

    It looks for them in cifar10/train.pt and test.pt of its working directory, and would otherwise
    download others.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "cifar10").mkdir()
        for name, images in (("train", train), ("test", test)):
            content = {
                "images": torch.from_numpy(images.X.reshape(-1, 32, 32, 3)),
                "labels": torch.from_numpy(images.y),
                "classes": CLASSES,
            }
            torch.save(content, Path(folder) / "cifar10" / f"{name}.pt")
        command = [sys.executable, str(path.resolve())]
        process = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if process.returncode:
        end = process.stderr.strip().splitlines()[-1:] or ["no message"]
        return Printed(None, None, f"the script ended with status {process.returncode}: {end[0]}")
    return read_printed(process.stdout)


def read_printed(text: str) -> Printed:
    """Of a table "| run | epoch | ... | seconds |" with "eval" in a run's last line, and a mean."""
    means = re.findall(r"mean\D*(\d*\.\d+)", text, flags=re.IGNORECASE)
    accuracy = float(means[-1]) if means else None
    if accuracy is not None and accuracy <= 1:
        accuracy *= 100
    seconds = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|") if cell.strip()]
        if "eval" in cells and re.fullmatch(r"\d+(\.\d+)?", cells[-1]):
            seconds.append(float(cells[-1]))
    # the first run of the script is its warm-up
    median = float(np.median(seconds[1:] or seconds)) if seconds else None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if re.search("mean", line, flags=re.IGNORECASE)]
    return Printed(accuracy, median, " ".join((said or lines)[-1:]))
