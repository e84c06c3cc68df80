"""Softmax regression."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import numpy as np
from sklearn.utils._param_validation import Interval, StrOptions
from torch import nn

from skcifar._batches import Samples
from skcifar._classifier import TorchClassifier
from skcifar._networks import MultilayerPerceptron
from skcifar._parameters import document_parameters


@document_parameters(
    max_iter='Iterations of solver="lbfgs"; "auto" is 1000 of these, and 20 epochs of the others.',
    tol='solver="lbfgs" ends when no component of the gradient is larger.',
    image_shape="Of use here only for statistics per channel.",
    precision='"auto" is float64 for float64 rows on the CPU, else float32.',
    skorch_callbacks='solver="lbfgs" calls none.',
    n_iter_='Iterations of solver="lbfgs".',
    history_='Of solver="lbfgs" a row an iteration, without training accuracy and learning rate.',
)
class SoftmaxRegression(TorchClassifier):
    """Multinomial logistic regression on images; of two classes, logistic regression.

    Minimises the mean cross-entropy, weighted by `sample_weight`, plus
    `alpha` / (2 m) times the squared weights, m being the sum of the weights of the data: the
    objective of scikit-learn's `LogisticRegression(C=1/alpha)`.

    Parameters
    ----------
    solver : {"lbfgs", "sgd", "adam", "adamw"}, default="lbfgs"
        "lbfgs" goes to the optimum, preconditioned by the second moments of the data [1]_; the
        others train in mini-batches and take `loss`, schedules and partial_fit.
    alpha : float or "auto", default="auto"
        Strength of the penalty on the squared weights, those of the normalised features. "auto"
        is 0.002 m: as much penalty to the mean loss for a thousand images as for 50,000.
    weight_decay : float, default=0.0
        Further penalty of `weight_decay` / 2 times the squared weights, whatever the number of
        rows (decoupled from the gradient in solver="adamw").
    {parameters}

    Attributes
    ----------
    coef_ : ndarray of shape (n_outputs_, n_features_in_)
        Weights of the features in the units of X.
    intercept_ : ndarray of shape (n_outputs_,)
        Intercepts.
    {attributes}

    See Also
    --------
    sklearn.linear_model.LogisticRegression : The same objective, other solvers.

    References
    ----------
    .. [1] Nocedal and Wright, "Numerical Optimization", 2nd ed., Springer 2006, chapter 7.

    Examples
    --------
    >>> from skcifar import SoftmaxRegression
    >>> from skcifar.datasets import load_digits
    >>> X, y = load_digits(return_X_y=True)
    >>> classifier = SoftmaxRegression(random_state=0).fit(X[:1500], y[:1500])
    >>> bool(classifier.score(X[1500:], y[1500:]) > 0.85)
    True
    """

    _parameter_constraints: dict = {
        **TorchClassifier._parameter_constraints,
        "alpha": [StrOptions({"auto"}), Interval(Real, 0, None, closed="left")],
        "max_iter": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
    }
    _alpha_over_data = True

    def __init__(
        self,
        *,
        solver="lbfgs",
        alpha="auto",
        weight_decay=0.0,
        batch_size="auto",
        learning_rate="auto",
        learning_rate_init=1e-3,
        power_t=0.5,
        learning_rate_decay=0.95,
        learning_rate_step=10,
        learning_rate_end=0.0,
        learning_rate_warmup=0.2,
        max_iter="auto",
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
        max_fun=15000,
        loss="cross_entropy",
        label_smoothing=0.0,
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
        self.max_fun = max_fun
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
    ) -> tuple[type, dict[str, Any]]:
        n_features = image_shape[0] * image_shape[1] * image_shape[2]
        return MultilayerPerceptron, {"n_features": n_features, "n_outputs": n_outputs}

    def _resolve_max_iter(self) -> int:
        if self.max_iter != "auto":
            return self.max_iter
        return 1000 if self.solver == "lbfgs" else 20

    def _resolve_alpha(self, samples: Samples) -> float:
        # The largest penalty with which MNIST and CIFAR-10 both do well (of 0.0002 to 0.02).
        return 2e-3 * samples.total_weight() if self.alpha == "auto" else self.alpha

    def _initialize(self, module: nn.Module) -> None:
        # A convex problem starts best from even probabilities.
        for parameter in module.parameters():
            nn.init.zeros_(parameter)

    @property
    def coef_(self) -> np.ndarray:
        """Weights of the features in the units of X, (n_outputs_, n_features_in_)."""
        return self._first_layer_in_input_units(self.module_.head)[0]

    @property
    def intercept_(self) -> np.ndarray:
        """Intercepts, (n_outputs_,)."""
        return self._first_layer_in_input_units(self.module_.head)[1]
