"""Who races whom: the same networks, batches and optimizers in skcifar, its peers and torch alone.

Ours are estimators to be fitted, which get raw uint8 rows (n, 3072). The others are functions that
train at once, on standardised float32 rows (n, 3072), or for convolutions `as_torch_has_them`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.neural_network import MLPClassifier as ScikitLearnMLPClassifier
from skorch import NeuralNetClassifier
from torch import Tensor, nn
from torch.nn import functional as F

from skcifar import CNNClassifier, MLPClassifier, SoftmaxRegression

RATE = 0.01
PENALTY = 2e-3  # SoftmaxRegression's alpha="auto", per image
COMMON = {"image_shape": (32, 32, 3), "device": "cpu"}


@dataclass(frozen=True)
class Task:
    """What is trained, and how.

    Attributes
    ----------
    units : tuple of int
        Of hidden dense layers.
    channels : tuple of int
        Of 3x3 convolutions, each with a ReLU and pooling behind it.
    solver : {"sgd", "adam"}
        The former with Nesterov's momentum of 0.9.
    penalty : float
        Half of it times the squared weights is added to the mean loss.
    """

    batch_size: int
    units: tuple[int, ...] = ()
    channels: tuple[int, ...] = ()
    solver: str = "sgd"
    rate: float = RATE
    penalty: float = 0.0


TASKS = {
    "softmax": Task(batch_size=256, penalty=PENALTY),
    "mlp": Task(batch_size=500, units=(200,), penalty=1e-4 / 500),  # alpha of both libraries
    "cnn": Task(batch_size=128, units=(64,), channels=(32, 64, 64), solver="adam", rate=1e-3),
}

# -- skcifar -------------------------------------------------------------------------------------


def our_softmax(precision: str, epochs: int, seed: int) -> SoftmaxRegression:
    return SoftmaxRegression(
        solver="sgd",
        batch_size=256,
        learning_rate_init=RATE,
        max_iter=epochs,
        precision=precision,
        random_state=seed,
        **COMMON,
    )


def our_mlp(precision: str, epochs: int, seed: int) -> MLPClassifier:
    return MLPClassifier(
        (200,),
        solver="sgd",
        batch_size=500,
        learning_rate_init=RATE,
        max_iter=epochs,
        precision=precision,
        random_state=seed,
        **COMMON,
    )


def our_cnn(precision: str, epochs: int, seed: int) -> CNNClassifier:
    return CNNClassifier(
        (32, 64, 64),
        (64,),
        batch_norm=False,
        global_pool=None,
        translate=0,
        solver="adam",
        learning_rate_init=1e-3,
        weight_decay=0.0,
        label_smoothing=0.0,
        batch_size=128,
        max_iter=epochs,
        precision=precision,
        random_state=seed,
        **COMMON,
    )


OURS: dict[str, Callable[[str, int, int], Any]] = {
    "softmax": our_softmax,
    "mlp": our_mlp,
    "cnn": our_cnn,
}

# -- torch alone, and skorch ---------------------------------------------------------------------


def bare_softmax(rows: Tensor, targets: Tensor, shift: Tensor, factor: Tensor, epochs: int) -> None:
    """Over uint8 rows, as our own loop; the plain loop below has float32 rows."""
    model = nn.Linear(rows.shape[1], 10)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=RATE,
        momentum=0.9,
        nesterov=True,
        weight_decay=PENALTY,
        fused=True,
    )
    for _ in range(epochs):
        for picked in torch.randperm(len(rows)).split(256):
            batch = rows.index_select(0, picked).float().sub_(shift).mul_(factor)
            optimizer.zero_grad()
            F.cross_entropy(model(batch), targets.index_select(0, picked)).backward()
            optimizer.step()


def plain_torch(task: Task, images: np.ndarray, targets: np.ndarray, epochs: int) -> nn.Module:
    model = network(task)
    factory, settings = optimizer_of(task)
    optimizer = factory(model.parameters(), **settings)
    inputs, labels = torch.from_numpy(images), torch.from_numpy(targets)
    for _ in range(epochs):
        for picked in torch.randperm(len(inputs)).split(task.batch_size):
            optimizer.zero_grad()
            outputs = model(inputs.index_select(0, picked))
            F.cross_entropy(outputs, labels.index_select(0, picked)).backward()
            optimizer.step()
    return model


def skorch(task: Task, images: np.ndarray, targets: np.ndarray, epochs: int) -> NeuralNetClassifier:
    """Fit with skorch's own DataLoader and callbacks, without its hold-out, shuffled as ours."""
    factory, settings = optimizer_of(task)
    return NeuralNetClassifier(
        network(task),
        criterion=nn.CrossEntropyLoss,
        optimizer=factory,
        **{f"optimizer__{name}": value for name, value in settings.items()},
        max_epochs=epochs,
        batch_size=task.batch_size,
        iterator_train__shuffle=True,
        train_split=None,
        verbose=0,
    ).fit(images, targets)


def network(task: Task) -> nn.Module:
    """As one writes it with torch: convolution, ReLU, pooling."""
    layers: list[nn.Module] = []
    n_in = 3
    for n_out in task.channels:
        layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        n_in = n_out
    if task.channels:
        layers.append(nn.Flatten())
    n_in *= (32 // 2 ** len(task.channels)) ** 2
    for n_out in task.units:
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        n_in = n_out
    return nn.Sequential(*layers, nn.Linear(n_in, 10))


def optimizer_of(task: Task) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    settings: dict[str, Any] = {"lr": task.rate, "weight_decay": task.penalty}
    if task.solver == "adam":
        return torch.optim.Adam, settings
    return torch.optim.SGD, settings | {"momentum": 0.9, "nesterov": True}


def as_torch_has_them(task: Task, rows: np.ndarray) -> np.ndarray:
    """Images (n, 3, 32, 32) where there are convolutions, else rows."""
    if not task.channels:
        return rows
    return np.ascontiguousarray(rows.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2))


# -- other libraries -----------------------------------------------------------------------------


def scikit_learn(
    task: Task, rows: np.ndarray, targets: np.ndarray, epochs: int
) -> ScikitLearnMLPClassifier:
    """Fit; without hidden layers that is softmax regression. It has no convolutions."""
    batch_size = min(task.batch_size, len(rows))
    return ScikitLearnMLPClassifier(
        task.units,
        solver=task.solver,
        alpha=task.penalty * batch_size,
        batch_size=batch_size,
        learning_rate_init=task.rate,
        max_iter=epochs,
        tol=0.0,
    ).fit(rows, targets)


def scikeras(task: Task, images: np.ndarray, targets: np.ndarray, epochs: int) -> Any:
    keras = import_keras()
    from scikeras.wrappers import KerasClassifier

    optimizer: Any = keras.optimizers.Adam(task.rate)
    if task.solver == "sgd":
        optimizer = keras.optimizers.SGD(task.rate, momentum=0.9, nesterov=True)
    with keras.device("cpu"):
        return KerasClassifier(
            lambda: keras_network(task),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            optimizer=optimizer,
            batch_size=task.batch_size,
            epochs=epochs,
            verbose=0,
        ).fit(images, targets)


def import_keras() -> Any:
    """Keras on torch, or on what KERAS_BACKEND names."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    return keras


def keras_network(task: Task) -> Any:
    layers = import_keras().layers
    penalty = import_keras().regularizers.L2(task.penalty / 2) if task.penalty else None
    stack: list[Any] = [layers.Input((3, 32, 32) if task.channels else (3072,))]
    # On torch the small CNN takes 1.1 to 1.4 times as long with Keras's own layout, NHWC.
    form = {"data_format": "channels_first"}
    for n_channels in task.channels:
        stack.append(layers.Conv2D(n_channels, 3, padding="same", activation="relu", **form))
        stack.append(layers.MaxPooling2D(2, **form))
    if task.channels:
        stack.append(layers.Flatten())
    stack += [layers.Dense(n, activation="relu", kernel_regularizer=penalty) for n in task.units]
    return import_keras().Sequential([*stack, layers.Dense(10, kernel_regularizer=penalty)])
