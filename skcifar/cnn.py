"""Convolutional networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sklearn.utils._param_validation import StrOptions
from torch import nn

from skcifar._architectures import ARCHITECTURES
from skcifar._batches import Samples
from skcifar._classifier import TorchClassifier
from skcifar._convolutional import AUTO_LEARNING_RATE, ConvolutionalEstimator
from skcifar._optimization import Recipe
from skcifar._parameters import (
    AUGMENTATION_CONSTRAINTS,
    CONVOLUTIONAL_CONSTRAINTS,
    STOCHASTIC_CONSTRAINTS,
    document_parameters,
)

# What "auto" stands for, where the architecture has no recipe of its own.
_AUTO: dict[str, Any] = {
    "solver": "sgd",
    "max_iter": 13,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "learning_rate_warmup": 0.2,
    "learning_rate_end": 0.0,
    "lookahead": False,
}
_AUTO_ENTRY = (
    '"auto" is {}, or of the recipe of architecture="airbench94" with solver="muon" or "sgd".'
)
_AUTO_OF_MUON = {"learning_rate_init": 0.24, "momentum": 0.6, "learning_rate_warmup": 0.0}


@document_parameters(
    horizontal_flip='"auto" is "alternating" for colour images with architecture="airbench94", '
    "else False.",
    weight_decay=_AUTO_ENTRY.format("5e-4")
    + ' With solver="muon" it is for all but filters, whose norm is fixed.',
    batch_size='With architecture="airbench94" "auto" is n_samples // 25, within 64 to 2,000 with '
    'solver="muon" and to 1,024 with "sgd".',
    learning_rate_init=AUTO_LEARNING_RATE
    + ' For "muon" it is 0.24, at which filters learn; all else learns at the rate of "sgd" or of '
    "the recipe, in the same proportion for other values.",
    learning_rate_warmup=_AUTO_ENTRY.format('0.2, and 0 with solver="muon"'),
    learning_rate_end=_AUTO_ENTRY.format("0"),
    max_iter=_AUTO_ENTRY.format("13"),
    momentum='With solver="muon" of filters, and 0.85 for all else. '
    + _AUTO_ENTRY.format('0.9, and 0.6 with solver="muon"'),
    lookahead=_AUTO_ENTRY.format("False"),
    instead={
        "solver": """
            solver : {"auto", "sgd", "adam", "adamw", "muon"}, default={default}
                Optimizer; "auto" is "sgd", or "muon" with architecture="airbench94". "muon" makes
                steps of convolutions orthogonal [6]_, and is Nesterov's "sgd" for all else.
        """,
    },
    image_shape="Flat rows of s² or 3s² features with s >= 8 are taken for square images without "
    "it; other rows for images of one pixel, on which a convolution is a dense layer.",
    precision='"auto" is bfloat16 where the hardware computes in it, else float32.',
)
class CNNClassifier(ConvolutionalEstimator, TorchClassifier):
    """Convolutional network, of parameters or by name.

    Minimises the mean loss of each step plus `alpha` / (2 m) times the squared weights, m being
    the sum of the weights of the step's rows.

    With ``architecture="airbench94"`` the parameters that are "auto" are those of the recipe that
    the network comes with: 8 epochs of solver="muon", or with solver="sgd" 10 of Nesterov's
    momentum and lookahead.

    Parameters
    ----------
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
    .. [4] Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", arXiv:2404.00498.
    .. [5] Zhang, Lucas, Hinton and Ba, "Lookahead optimizer: k steps forward, 1 step back",
           NeurIPS 2019.
    .. [6] Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.

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
        **STOCHASTIC_CONSTRAINTS,
        **CONVOLUTIONAL_CONSTRAINTS,
        **AUGMENTATION_CONSTRAINTS,
        **{
            name: [StrOptions({"auto"}), *constraints]
            for name, constraints in STOCHASTIC_CONSTRAINTS.items()
            if name in _AUTO
        },
        "solver": [StrOptions({"auto", "sgd", "adam", "adamw", "muon"})],
        "lookahead": [StrOptions({"auto"}), "boolean"],
        "horizontal_flip": [StrOptions({"auto", "alternating"}), "boolean"],
    }

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
        horizontal_flip="auto",
        translate=2,
        cutout=0,
        tta=False,
        solver="auto",
        alpha=0.0,
        weight_decay="auto",
        batch_size="auto",
        learning_rate="auto",
        learning_rate_init="auto",
        power_t=0.5,
        learning_rate_decay=0.95,
        learning_rate_step=10,
        learning_rate_end="auto",
        learning_rate_warmup="auto",
        max_iter="auto",
        shuffle=True,
        random_state=None,
        tol=1e-4,
        verbose=False,
        warm_start=False,
        momentum="auto",
        nesterovs_momentum=True,
        lookahead="auto",
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
        self.lookahead = lookahead
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

    def _own_recipes(self) -> Mapping[str, Mapping[str, Any]]:
        """Of the architecture, by solver."""
        network = None if callable(self.architecture) else ARCHITECTURES.get(self.architecture)
        return getattr(network, "recipes", {})

    def _auto_values(self) -> Mapping[str, Any]:
        recipes = self._own_recipes()
        solver = self.solver
        if solver == "auto":
            solver = next(iter(recipes), _AUTO["solver"])
        of_solver = _AUTO_OF_MUON if solver == "muon" else {}
        return {**_AUTO, **of_solver, **recipes.get(solver, {}), "solver": solver}

    def _flip(self, image_shape: tuple[int, int, int]) -> bool | str:
        if self.horizontal_flip != "auto":
            return self.horizontal_flip
        # a flip relabels digits, which are grey
        return "alternating" if self._own_recipes() and image_shape[2] == 3 else False

    def _resolve_batch_size(self, n_samples: int) -> int:
        largest = self._auto_values().get("batch_size")
        if self.batch_size != "auto" or largest is None:
            return super()._resolve_batch_size(n_samples)
        # no fewer steps an epoch than the recipe has for CIFAR-10
        return min(n_samples, max(64, min(largest, n_samples // 25)))

    def _recipe(self, module: nn.Module, samples: Samples, incremental: bool) -> Recipe:
        recipe = super()._recipe(module, samples, incremental)
        auto = self._auto_values()
        # what is no filter learns at the rate that SGD would take for this network
        beside = self._rate_of_sgd(module) / _AUTO_OF_MUON["learning_rate_init"]
        return replace(
            recipe,
            bias_rate_factor=auto.get("bias_rate_factor", 1.0),
            rate_factor_beside_muon=auto.get("rate_factor_beside_muon", beside),
        )
