"""Multilayer perceptron."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np
from sklearn.utils._param_validation import Interval, StrOptions
from torch import nn

from skcifar._base import hidden_widths
from skcifar._classifier import TorchClassifier
from skcifar._networks import MultilayerPerceptron, glorot_uniform_
from skcifar._parameters import document_parameters, share


@document_parameters(
    max_iter='Iterations of solver="lbfgs".',
    tol='solver="lbfgs" ends when no component of the gradient is larger.',
    image_shape="Of use here only for statistics per channel.",
    precision='"auto" is float64 for float64 rows on the CPU, else float32.',
    skorch_callbacks='solver="lbfgs" calls none.',
    n_iter_='Iterations of solver="lbfgs".',
    history_='Of solver="lbfgs" a row an iteration, without training accuracy and learning rate.',
)
class MLPClassifier(TorchClassifier):
    """Multilayer perceptron with the parameters of scikit-learn's.

    Minimises the mean loss of each step plus `alpha` / (2 m) times the squared weights, m being
    the sum of the weights of the step's rows, as scikit-learn's MLPClassifier does.

    What differs from scikit-learn's by default, because it serves images better:

    - `learning_rate="auto"` plans the rates for `max_iter=20` epochs, and training does not end
      before; there it is constant, for up to 200 epochs, until the loss stops falling;
    - `hidden_layer_sizes=(512,)` instead of (100,), and `learning_rate_init=2e-3` of 1e-3;
    - integers within 0 to 255 are taken for pixels and normalised;
    - schedules serve "adam" and "adamw" too, and batches are of nearly equal size;
    - `batch_size="auto"` grows with the data instead of staying at 200;
    - `warm_start` and a pickle keep the optimizer's state.

    Parameters
    ----------
    hidden_layer_sizes : array-like of int, default=(512,)
        Widths of the hidden layers; () is a linear model.
    activation : {"identity", "logistic", "tanh", "relu", "gelu", "silu"}, default="relu"
        Activation of the hidden layers.
    solver : {"sgd", "adam", "adamw", "lbfgs"}, default="adam"
        "lbfgs" works on all rows at once.
    alpha : float, default=1e-4
        Strength of the penalty on the squared weights; biases are not penalised.
    weight_decay : float, default=0.0
        Further penalty of `weight_decay` / 2 times the squared weights, whatever the number of
        rows (decoupled from the gradient in solver="adamw").
    dropout : float, default=0.0
        Share of the outputs of each hidden layer that is left out in training.
    {parameters}

    Attributes
    ----------
    coefs_ : list of ndarray of shape (n_in, n_out)
        Weights of each layer, the first in the units of X.
    intercepts_ : list of ndarray of shape (n_out,)
        Biases of each layer.
    n_layers_ : int
        Layers, input and output included.
    out_activation_ : str
        "logistic" for two classes, else "softmax"; "identity" for the squared error.
    {attributes}

    See Also
    --------
    sklearn.neural_network.MLPClassifier : The same parameters, in NumPy.

    References
    ----------
    .. [1] Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural
           networks", AISTATS 2010: the initial weights.
    .. [2] Kingma and Ba, "Adam: A method for stochastic optimization", ICLR 2015.

    Examples
    --------
    >>> from skcifar import MLPClassifier
    >>> from skcifar.datasets import load_digits
    >>> X, y = load_digits(return_X_y=True)
    >>> classifier = MLPClassifier((64,), random_state=0).fit(X[:1500], y[:1500])
    >>> bool(classifier.score(X[1500:], y[1500:]) > 0.85)
    True
    """

    _parameter_constraints: dict = {
        **TorchClassifier._parameter_constraints,
        "hidden_layer_sizes": ["array-like", Interval(Integral, 1, None, closed="left")],
        "activation": [StrOptions({"identity", "logistic", "tanh", "relu", "gelu", "silu"})],
        "dropout": [share],
    }

    def __init__(
        self,
        hidden_layer_sizes=(512,),
        activation="relu",
        *,
        solver="adam",
        alpha=1e-4,
        weight_decay=0.0,
        dropout=0.0,
        batch_size="auto",
        learning_rate="auto",
        learning_rate_init=2e-3,
        power_t=0.5,
        learning_rate_decay=0.95,
        learning_rate_step=10,
        learning_rate_end=0.0,
        learning_rate_warmup=0.2,
        max_iter=20,
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
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.solver = solver
        self.alpha = alpha
        self.weight_decay = weight_decay
        self.dropout = dropout
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

    def _check_parameters(self, incremental: bool) -> None:
        super()._check_parameters(incremental)
        if self.solver == "lbfgs" and self.dropout:
            raise ValueError(
                f"dropout={self.dropout!r} gives solver='lbfgs' another loss at every evaluation; "
                "use solver='sgd', 'adam' or 'adamw', or dropout=0."
            )

    def _network(
        self, image_shape: tuple[int, int, int], n_outputs: int
    ) -> tuple[type, dict[str, Any]]:
        return MultilayerPerceptron, {
            "n_features": image_shape[0] * image_shape[1] * image_shape[2],
            "n_outputs": n_outputs,
            "hidden_layer_sizes": hidden_widths(self.hidden_layer_sizes),
            "activation": self.activation,
            "dropout": self.dropout,
        }

    def _initialize(self, module: nn.Module) -> None:
        glorot_uniform_(module, self.activation)

    @property
    def coefs_(self) -> list[np.ndarray]:
        """Weights of each layer, (n_in, n_out), the first in the units of X."""
        first, *others = self._dense_layers()
        coefs = [self._first_layer_in_input_units(first)[0].T]
        return coefs + [layer.weight.detach().cpu().numpy().T for layer in others]

    @property
    def intercepts_(self) -> list[np.ndarray]:
        """Biases of each layer, (n_out,)."""
        first, *others = self._dense_layers()
        intercepts = [self._first_layer_in_input_units(first)[1]]
        return intercepts + [layer.bias.detach().cpu().numpy() for layer in others]

    @property
    def n_layers_(self) -> int:
        """Number of layers, input and output included."""
        return len(self._dense_layers()) + 1

    @property
    def out_activation_(self) -> str:
        """Activation of the output layer."""
        if self.loss == "squared_error":
            return "identity"
        return "logistic" if self.n_outputs_ == 1 else "softmax"

    def _dense_layers(self) -> list[nn.Linear]:
        return [layer for layer in self.module_.modules() if isinstance(layer, nn.Linear)]
