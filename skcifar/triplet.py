"""Metric learning: embeddings in which images of one class lie together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from numbers import Integral, Real
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import _fit_context
from sklearn.callback import with_callbacks
from sklearn.utils import Tags
from sklearn.utils._param_validation import Interval, StrOptions
from torch import Tensor, nn
from torch.nn import functional as F

from skcifar._convolutional import AUTO_LEARNING_RATE, ConvolutionalEstimator
from skcifar._device import Generators, Precision
from skcifar._encoder import TorchEncoder
from skcifar._metric_learning import MetricLoss, balanced_batches, recall_at_1
from skcifar._networks import Encoder
from skcifar._parameters import (
    AUGMENTATION_CONSTRAINTS,
    CONVOLUTIONAL_CONSTRAINTS,
    STOCHASTIC_CONSTRAINTS,
    document_parameters,
)

# Of classifiers only.
_LEFT_OUT = ("loss", "label_smoothing", "class_weight", "scoring")


@document_parameters(
    instead={
        "architecture": """
            architecture : str, callable or None, default={default}
                A network by name in place of the parameters above: "lenet5" [4]_, "vgg11" or
                "vgg16" with BatchNorm [5]_, or "resnet18" with the stem for small images [6]_. A
                callable gets
                `image_shape` (height, width, channels) and `n_outputs`, which is `n_components`,
                by name and returns a `torch.nn.Module` from images (n, channels, height, width) to
                embeddings (n, n_outputs). Its `torch.nn.Dropout` layers draw from `random_state`;
                other random layers would draw from torch's global generator.
        """,
        "batch_size": """
            batch_size : int, "auto" or "full", default={default}
                Rows of a step, among which triplets are found; "auto" is n_samples // 50, within
                64 to 256. "full" takes all of them. Batches are of nearly equal size.
        """,
        "tta": """
            tta : bool, default={default}
                Whether transform averages the embedding over the image and its moves by one pixel
                up and left and down and right and, with `horizontal_flip`, over their flips. So
                do monitored scores.
        """,
        "scoring": """
            scoring : "recall_at_1", "loss" or callable, default={default}
                What is monitored on the validation rows: the share of them whose nearest other
                one is of their class, the negative loss, or `scoring(embedder, X, y)`, such as
                `skcifar.metrics.map_at_r_scorer`.
        """,
        "history_": """
            history_ : list of dict
                A row an epoch: epoch, losses, validation score, learning rate, seconds.
                `pandas.DataFrame(history_)` shows it.
        """,
    },
    without=("classes_", "n_outputs_"),
    learning_rate_init=AUTO_LEARNING_RATE,
    tol='The loss of mining="all" may rise while fewer and fewer triplets are left: let '
    "`early_stopping` end such a schedule.",
    shuffle="False takes them as they lie, whatever the `sampler`.",
    random_state="The triplets have one too.",
    image_shape="Flat rows of s² or 3s² features with s >= 8 are taken for square images without "
    "it; other rows for images of one pixel, on which a convolution is a dense layer.",
    precision='"auto" is bfloat16 where the hardware computes in it, else float32.',
)
class TripletEmbedder(TorchEncoder, ConvolutionalEstimator):
    """Embed images by a network trained on triplets, or by supervised contrast.

    A triplet is an image (the anchor), another of its class (the positive) and one of another
    class (the negative), out of one batch. The loss is the mean of
    max(0, d(anchor, positive) - d(anchor, negative) + `margin`), d being the distance of
    embeddings [1]_; plus `alpha` / (2 m) times the squared weights, m being the batch's rows. A
    nearest-neighbour or linear classifier behind the embedder then classifies.

    Parameters
    ----------
    n_components : int, default=64
        Width of the embedding.
    loss : {"triplet", "supcon"}, default="triplet"
        The loss above, or supervised contrast [2]_: cross-entropy of finding the images of the
        anchor's class among all others of the batch, by their cosine.
    mining : {"random", "semihard", "hard", "all"}, default="all"
        Triplets of a batch. For each anchor, "random" draws a positive and a negative;
        "semihard" draws a positive and takes the nearest negative that is farther away, or, for
        want of such, the farthest [1]_; "hard" takes the farthest positive and the nearest
        negative [3]_. "all" takes every triplet of the batch, and the mean of those whose loss is
        not 0 [3]_. Anchors without positive or negative are left out. Of loss="triplet".
    margin : float, default=0.2
        By how much the negative should be farther away than the positive. Of loss="triplet".
    p : float, default=2.0
        Norm of the distance, at least 1. Of loss="triplet".
    temperature : float, default=0.1
        What cosines are divided by. Of loss="supcon".
    normalize_embedding : bool, default=True
        Whether embeddings are scaled to length 1. Euclidean distances are then 2 at most.
    sampler : {"shuffle", "balanced"}, default="shuffle"
        How batches are drawn: all rows in a new order, or `samples_per_class` images of each of
        `batch_size` // `samples_per_class` classes, drawn anew for each batch [3]_.
    samples_per_class : int, default=8
        Of sampler="balanced". Raised where there are too few classes to fill the batch.
    {parameters}

    Attributes
    ----------
    {attributes}

    References
    ----------
    .. [1] Schroff, Kalenichenko and Philbin, "FaceNet: a unified embedding for face recognition
           and clustering", CVPR 2015.
    .. [2] Khosla et al., "Supervised contrastive learning", NeurIPS 2020.
    .. [3] Hermans, Beyer and Leibe, "In defense of the triplet loss for person
           re-identification", 2017.
    .. [4] LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document
           recognition", Proceedings of the IEEE 86 (1998).
    .. [5] Simonyan and Zisserman, "Very deep convolutional networks for large-scale image
           recognition", ICLR 2015.
    .. [6] He, Zhang, Ren and Sun, "Deep residual learning for image recognition", CVPR 2016.

    Examples
    --------
    >>> from sklearn.neighbors import KNeighborsClassifier
    >>> from sklearn.pipeline import make_pipeline
    >>> from skcifar import TripletEmbedder
    >>> from skcifar.datasets import load_digits
    >>> X, y = load_digits(return_X_y=True)
    >>> embedder = TripletEmbedder(8, channels=(16, 32), max_iter=4, random_state=0)
    >>> model = make_pipeline(embedder, KNeighborsClassifier()).fit(X[:1500], y[:1500])
    >>> model[0].transform(X[1500:]).shape
    (297, 8)
    >>> bool(model.score(X[1500:], y[1500:]) > 0.85)
    True
    """

    _parameter_constraints: dict = {
        **{k: v for k, v in STOCHASTIC_CONSTRAINTS.items() if k not in _LEFT_OUT},
        **CONVOLUTIONAL_CONSTRAINTS,
        **AUGMENTATION_CONSTRAINTS,
        "n_components": [Interval(Integral, 1, None, closed="left")],
        "loss": [StrOptions({"triplet", "supcon"})],
        "mining": [StrOptions({"random", "semihard", "hard", "all"})],
        "margin": [Interval(Real, 0, None, closed="neither")],
        "p": [Interval(Real, 1, None, closed="left")],
        "temperature": [Interval(Real, 0, None, closed="neither")],
        "normalize_embedding": ["boolean"],
        "sampler": [StrOptions({"shuffle", "balanced"})],
        "samples_per_class": [Interval(Integral, 2, None, closed="left")],
        "scoring": [StrOptions({"recall_at_1", "loss"}), callable],
    }
    _decided_once = (*ConvolutionalEstimator._decided_once, "_n_features_out")

    def __init__(
        self,
        n_components=64,
        *,
        loss="triplet",
        mining="all",
        margin=0.2,
        p=2.0,
        temperature=0.1,
        normalize_embedding=True,
        sampler="shuffle",
        samples_per_class=8,
        channels=(32, (64, 64), (128, 128), (256, 256)),
        hidden_layer_sizes=(),
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
        scoring="recall_at_1",
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-8,
        n_iter_no_change=10,
        clip_grad_norm=None,
        clip_grad_value=None,
        normalize="auto",
        image_shape=None,
        layout="HWC",
        device="auto",
        precision="auto",
        skorch_callbacks=None,
    ):
        self.n_components = n_components
        self.loss = loss
        self.mining = mining
        self.margin = margin
        self.p = p
        self.temperature = temperature
        self.normalize_embedding = normalize_embedding
        self.sampler = sampler
        self.samples_per_class = samples_per_class
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
        self.clip_grad_norm = clip_grad_norm
        self.clip_grad_value = clip_grad_value
        self.normalize = normalize
        self.image_shape = image_shape
        self.layout = layout
        self.device = device
        self.precision = precision
        self.skorch_callbacks = skorch_callbacks

    @with_callbacks
    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, *, X_val: Any = None, y_val: Any = None) -> Self:
        """Train on images and their labels.

        Parameters
        ----------
        X : array-like or tensor of shape (n_samples, n_features), (n_samples, height, width) or \
                (n_samples, height, width, channels)
            Images, as rows or as images. A tensor on the device of the fit is not copied.
            A memory-mapped file of 1 GB or more, and an array that only gives slices (HDF5, Zarr),
            is read while it is trained on, and not loaded.
        y : array-like of shape (n_samples,)
            Labels: strings, integers or booleans, of two classes at least.
        X_val : array-like or tensor of the same form as X, default=None
            Validation images. With `early_stopping=True` they take the place of the share held
            out; without, their loss and score are only recorded.
        y_val : array-like of shape (n_val,), default=None
            Labels of `X_val`; they may be of other classes than those in y.

        Returns
        -------
        self : object
            The fitted embedder.

        Raises
        ------
        ValueError
            When the input or the parameters do not fit together, or when training diverges: its
            loss is no longer finite. The message names what to do.
        """
        return self._fit(X, y, X_val=X_val, y_val=y_val)

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: Any, y: Any) -> Self:
        """Train for one epoch more on the rows given, at the constant rate `learning_rate_init`.

        Whether and how to normalise is decided from the rows of the first call.

        Parameters
        ----------
        X : array-like or tensor, as for fit
            Images.
        y : array-like of shape (n_samples,)
            Labels of two classes or more, known or new.

        Returns
        -------
        self : object
            The embedder, trained further.

        Raises
        ------
        ValueError
            With labels of one class, `early_stopping=True` or a `learning_rate` schedule.
        """
        return self._partial_fit(X, y)

    def _network(
        self, image_shape: tuple[int, int, int], n_outputs: int
    ) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
        factory, arguments = super()._network(image_shape, n_outputs)
        return Encoder, {
            "factory": factory,
            "arguments": arguments,
            "unit_norm": self.normalize_embedding,
        }

    def _count_outputs(self, classes: np.ndarray) -> int:
        return int(self.n_components)

    def _encode(
        self, y: np.ndarray, classes: np.ndarray | None, going_on: bool, incremental: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        found, codes = super()._encode(y, classes, going_on, incremental)
        if not incremental and len(found) == len(y):
            raise ValueError(
                f"y has {len(y)} samples of as many classes, so no two images belong together; "
                "TripletEmbedder needs classes of two samples or more."
            )
        return found, codes

    def _label_attributes(self, classes: np.ndarray) -> dict[str, Any]:
        return {"_n_features_out": int(self.n_components)}

    def _criterion(self, generators: Generators) -> nn.Module:
        return MetricLoss(
            self.loss,
            self.mining,
            margin=self.margin,
            p=self.p,
            temperature=self.temperature,
            generator=generators.mining,
        )

    def _sampler(self) -> Callable[..., list[Tensor]] | None:
        if self.sampler == "shuffle":
            return None
        return partial(balanced_batches, n_per_class=self.samples_per_class)

    def _scorer(
        self,
        view: Self,
        get_rows: Callable[[], Any],
        labels: np.ndarray,
        weight: np.ndarray | None,
    ) -> Callable[[], float] | None:
        if self.scoring == "loss":
            return None
        scoring, rows = self.scoring, get_rows()
        if callable(scoring):
            return lambda: scoring(view, rows, labels)
        codes = torch.as_tensor(np.unique(labels, return_inverse=True)[1])
        # not of transform, which gives a DataFrame where `set_output` says so
        dtype = Precision(view.dtype_).weights
        return lambda: recall_at_1(torch.as_tensor(view._outputs(rows, dtype)), codes)

    def _forward(self, batch: Tensor) -> Tensor:
        embedding = super()._forward(batch)
        # a mean of vectors of length 1 is shorter
        return F.normalize(embedding) if self.tta and self.module_.unit_norm else embedding

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags
