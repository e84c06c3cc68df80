"""Convolutional networks."""

from __future__ import annotations

from skcifar._classifier import TorchClassifier
from skcifar._convolutional import AUTO_LEARNING_RATE, ConvolutionalEstimator
from skcifar._parameters import (
    AUGMENTATION_CONSTRAINTS,
    CONVOLUTIONAL_CONSTRAINTS,
    STOCHASTIC_CONSTRAINTS,
    document_parameters,
)


@document_parameters(
    learning_rate_init=AUTO_LEARNING_RATE,
    image_shape="Flat rows of s² or 3s² features with s >= 8 are taken for square images without "
    "it; other rows for images of one pixel, on which a convolution is a dense layer.",
    precision='"auto" is bfloat16 where the hardware computes in it, else float32.',
)
class CNNClassifier(ConvolutionalEstimator, TorchClassifier):
    """Convolutional network, of parameters or by name.

    Minimises the mean loss of each step plus `alpha` / (2 m) times the squared weights, m being
    the sum of the weights of the step's rows.

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

    _parameter_constraints: dict = (
        STOCHASTIC_CONSTRAINTS | CONVOLUTIONAL_CONSTRAINTS | AUGMENTATION_CONSTRAINTS
    )

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
        horizontal_flip=False,
        translate=2,
        cutout=0,
        tta=False,
        solver="sgd",
        alpha=0.0,
        weight_decay=5e-4,
        batch_size="auto",
        learning_rate="auto",
        learning_rate_init="auto",
        power_t=0.5,
        learning_rate_decay=0.95,
        learning_rate_step=10,
        learning_rate_end=0.0,
        learning_rate_warmup=0.2,
        max_iter=13,
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
