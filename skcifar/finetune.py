"""Fine-tuning: an encoder and a classifier behind it, trained together."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import clone
from sklearn.callback import CallbackSupportMixin
from sklearn.frozen import FrozenEstimator
from sklearn.utils._param_validation import HasMethods, Interval, StrOptions
from sklearn.utils.validation import check_is_fitted
from torch import nn

from skcifar._base import TorchEstimator, hidden_widths
from skcifar._batches import Samples
from skcifar._classifier import TorchClassifier
from skcifar._convolutional import AugmentedEstimator
from skcifar._device import BatchReader, Precision, seeded_construction
from skcifar._encoder import TorchEncoder
from skcifar._jobs import TrainingJob, TrainingResult
from skcifar._networks import ACTIVATIONS, FineTunedNetwork, MultilayerPerceptron, glorot_uniform_
from skcifar._optimization import Recipe
from skcifar._parameters import (
    AUGMENTATION_CONSTRAINTS,
    STOCHASTIC_CONSTRAINTS,
    document_parameters,
    share,
)

# What the encoder decides.
_OF_THE_ENCODER = ("normalize", "image_shape", "layout")
_READING_ATTRIBUTES = ("image_shape_", "mean_", "scale_")

# Of a frozen encoder, kept for a training; beyond it they are computed in every epoch.
_MOST_FEATURE_BYTES = 2**30


@document_parameters(
    instead={
        "activation": """
            activation : {"identity", "logistic", "tanh", "relu", "gelu", "silu"}, default={default}
                Of the hidden layers.
        """,
        "dropout": """
            dropout : float, default={default}
                Share of each hidden layer that is left out in training.
        """,
    },
    learning_rate_init="That of the head.",
    random_state="An encoder whose own is None is given one, too.",
    precision='"auto" is bfloat16 where the hardware computes in it, else float32.',
)
class FineTunedClassifier(AugmentedEstimator, TorchClassifier):
    """Classifier made of an encoder and dense layers behind it, trained together.

    First the encoder is cloned and fitted to the rows that are trained on, as it would be in a
    `Pipeline`; then the dense layers, which begin at random, and the encoder, or parts of it,
    are trained on the loss of the classes. The encoder says how images are read.

    Minimises the mean loss of each step plus `alpha` / (2 m) times the squared weights that are
    trained, m being the sum of the weights of the step's rows.

    Parameters
    ----------
    encoder : TripletEmbedder, PretrainedFeatures or FrozenEstimator of such
        The first is cloned and fitted in fit (in partial_fit, to the rows of the first call),
        without sample weights. Of a
        `sklearn.frozen.FrozenEstimator` the fitted weights are copied, so that it stays as it is;
        its own parameters cannot be searched then. Its `tta` is for its own transform, and its
        `verbose` for its own fit.
    hidden_layer_sizes : array-like of int, default=()
        Widths of the dense layers between the encoder and the output.
    trainable : "all", "head" or list of str, default="all"
        What is trained: all weights, those of the dense layers alone, or these and the parts of
        the encoder's network that are listed, by their names in `encoder_.module_.network`: layer1
        to layer4 of a ResNet, features, dense and head of a TripletEmbedder's network. The rest
        stays in evaluation mode. With "head" and no augmentation (`translate=0`) each image goes
        through the encoder once, not once an epoch.
    encoder_learning_rate : float or "auto", default="auto"
        Initial learning rate of the encoder's weights, which follows the same schedule; "auto" is
        a tenth of `learning_rate_init`.
    {parameters}

    Attributes
    ----------
    encoder_ : estimator
        The encoder as trained here, which shares the weights of `module_`.
    {attributes}

    Examples
    --------
    An embedding, and a classifier that goes on training it:

    >>> from skcifar import FineTunedClassifier, TripletEmbedder
    >>> from skcifar.datasets import load_digits
    >>> X, y = load_digits(return_X_y=True)
    >>> embedder = TripletEmbedder(8, channels=(16, 32), max_iter=2)
    >>> classifier = FineTunedClassifier(embedder, (16,), max_iter=4, random_state=0)
    >>> classifier = classifier.fit(X[:1500], y[:1500])
    >>> bool(classifier.score(X[1500:], y[1500:]) > 0.85)
    True
    >>> classifier.encoder_.transform(X[:2]).shape
    (2, 8)

    ImageNet's ResNet-18 with a new head, all of it trained with Adam for ten epochs:

    >>> from skcifar import PretrainedFeatures
    >>> resnet = FineTunedClassifier(
    ...     PretrainedFeatures("resnet18"),
    ...     solver="adam",
    ...     learning_rate="constant",
    ...     learning_rate_init=1e-3,
    ...     encoder_learning_rate=1e-3,
    ...     max_iter=10,
    ... )
    """

    _parameter_constraints: dict = {
        **{k: v for k, v in STOCHASTIC_CONSTRAINTS.items() if k not in _OF_THE_ENCODER},
        **AUGMENTATION_CONSTRAINTS,
        "encoder": [HasMethods(["fit", "transform"])],
        "hidden_layer_sizes": ["array-like", Interval(Integral, 1, None, closed="left")],
        "trainable": [StrOptions({"all", "head"}), list, tuple],
        "encoder_learning_rate": [
            StrOptions({"auto"}),
            Interval(Real, 0, None, closed="neither"),
        ],
        "activation": [StrOptions(set(ACTIVATIONS))],
        "dropout": [share],
        "learning_rate_init": [Interval(Real, 0, None, closed="neither")],
    }
    _decided_once = (
        *TorchClassifier._decided_once,
        *("encoder_", "_encoder_architecture", "_trainable"),
    )

    def __init__(
        self,
        encoder,
        hidden_layer_sizes=(),
        *,
        trainable="all",
        encoder_learning_rate="auto",
        activation="relu",
        dropout=0.0,
        horizontal_flip=False,
        translate=2,
        cutout=0,
        tta=False,
        solver="adam",
        alpha=0.0,
        weight_decay=5e-4,
        batch_size="auto",
        learning_rate="auto",
        learning_rate_init=1e-2,
        power_t=0.5,
        learning_rate_decay=0.95,
        learning_rate_step=10,
        learning_rate_end=0.0,
        learning_rate_warmup=0.2,
        max_iter=10,
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
        label_smoothing=0.1,
        class_weight=None,
        clip_grad_norm=None,
        clip_grad_value=None,
        device="auto",
        precision="auto",
        skorch_callbacks=None,
    ):
        self.encoder = encoder
        self.hidden_layer_sizes = hidden_layer_sizes
        self.trainable = trainable
        self.encoder_learning_rate = encoder_learning_rate
        self.activation = activation
        self.dropout = dropout
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
        self.device = device
        self.precision = precision
        self.skorch_callbacks = skorch_callbacks

    def _validate_params(self) -> None:
        super()._validate_params()
        encoder = self._plain_encoder()
        # here, since an estimator that another one fits leaves its own parameters unchecked
        if not isinstance(self.encoder, FrozenEstimator):
            encoder._validate_params()

    # -- the encoder -------------------------------------------------------------------------------

    @property
    def layout(self) -> str:
        """Order of height, width and channels in rows and images: the encoder's."""
        return getattr(self._unfrozen(), "layout", "HWC")

    def _unfrozen(self) -> Any:
        frozen = isinstance(self.encoder, FrozenEstimator)
        return self.encoder.estimator if frozen else self.encoder

    def _plain_encoder(self) -> TorchEncoder:
        encoder = self._unfrozen()
        if not isinstance(encoder, TorchEncoder):
            raise TypeError(
                f"encoder={self.encoder!r} cannot be trained further; expected a TripletEmbedder, "
                "a PretrainedFeatures, or one of these, fitted, in a FrozenEstimator."
            )
        return encoder

    def _reading(
        self,
        samples: Samples,
        given_shape: tuple[int, int, int] | None,
        y: np.ndarray,
        seeds: dict[str, int],
        context: Any,
    ) -> dict[str, Any]:
        encoder = self._plain_encoder()
        if isinstance(self.encoder, FrozenEstimator):
            check_is_fitted(encoder)
            _check_same_images(encoder, self, samples, given_shape)
            encoder = copy.deepcopy(encoder)
        else:
            encoder = self._fit_encoder(clone(encoder), samples, given_shape, y, seeds, context)
        reading = {name: getattr(encoder, name) for name in _READING_ATTRIBUTES}
        return {"encoder_": encoder, **reading}

    def _fit_encoder(
        self,
        encoder: TorchEncoder,
        samples: Samples,
        given_shape: tuple[int, int, int] | None,
        y: np.ndarray,
        seeds: dict[str, int],
        context: Any,
    ) -> TorchEncoder:
        """Fit to the rows that are trained on: rows held out or of weight 0 are unknown to it."""
        if encoder.random_state is None:
            encoder.set_params(random_state=seeds["encoder"])
        images = samples.X
        if given_shape is not None:
            height, width, channels = given_shape
            planar = encoder.layout == "CHW"
            shape = (channels, height, width) if planar else (height, width, channels)
            images = images.reshape(-1, *shape)
        labels = y if samples.index is None else y[samples.index.cpu().numpy()]
        if context is None:
            encoder.fit(images, labels)
            return self._with_feature_names(encoder)
        task = context.subcontext(task_name="encoder")
        task.call_on_fit_task_begin(estimator=self, X=images, y=labels)
        if isinstance(encoder, CallbackSupportMixin):
            with task.propagate_callback_context(encoder):
                encoder.fit(images, labels)
        else:  # its fit has no epochs to follow
            encoder.fit(images, labels)
        task.call_on_fit_task_end(estimator=self, X=images, y=labels)
        return self._with_feature_names(encoder)

    def _with_feature_names(self, encoder: TorchEncoder) -> TorchEncoder:
        """Let it know the columns of X, of which it was fitted to the values alone."""
        if hasattr(self, "feature_names_in_"):
            encoder.feature_names_in_ = self.feature_names_in_
        return encoder

    def _count_subtasks(self) -> int:
        return super()._count_subtasks() + (not isinstance(self.encoder, FrozenEstimator))

    # -- what is trained ---------------------------------------------------------------------------

    def _prepare(
        self, *args: Any, going_on: bool, **others: Any
    ) -> tuple[TrainingJob, dict[str, Any]]:
        job, attributes = super()._prepare(*args, going_on=going_on, **others)
        network = attributes["module_"]
        if going_on:  # with more or less of it than before, maybe
            trainable_before = network.trainable
            network = FineTunedNetwork(network.encoder, network.head, self.trainable)
            if network.trainable != trainable_before:
                job.state = None  # of an optimizer of other weights
            job.module = attributes["module_"] = network
            attributes["_trainable"] = self.trainable
        if self.trainable == "head" and job.augment is None and not job.skorch_callbacks:
            self._train_head_alone(job, attributes)
        return job, attributes

    def _view(self, attributes: Mapping[str, Any]) -> Self:
        view = super()._view(attributes)
        view.encoder_ = view.encoder_._with_weights_of(view)
        return view

    def _train_head_alone(self, job: TrainingJob, attributes: dict[str, Any]) -> None:
        """Let the job see what the encoder makes of its rows, computed once, not once an epoch."""
        encoder = self._view(attributes).encoder_
        parts = [part for part in (job.train, job.validation) if part is not None]
        dtype = Precision(attributes["dtype_"]).weights
        n_bytes = sum(map(len, parts)) * encoder._n_features_out * dtype.itemsize
        if n_bytes > _MOST_FEATURE_BYTES:
            return
        attributes["module_"].eval()
        device = job.reader.device
        features = [
            Samples(
                torch.as_tensor(encoder._features(part.X, dtype), device=device),
                part.y,
                part.used_weight(),
            )
            for part in parts
        ]
        job.module = attributes["module_"].head
        job.evaluation_rows = TorchEstimator._rows_of_a_forward_pass(self)[0]
        job.train, *others = features
        job.validation = others[0] if others else None
        job.reader = BatchReader(
            image_shape=(1, 1, encoder._n_features_out),
            layout="HWC",
            as_images=False,
            mean=None,
            scale=None,
            device=device,
            dtype=dtype,
        )

    def _module(
        self, attributes: dict[str, Any], n_outputs: int, seed: int, device: torch.device
    ) -> nn.Module:
        arguments = {
            "n_features": attributes["encoder_"]._n_features_out,
            "n_outputs": n_outputs,
            "hidden_layer_sizes": hidden_widths(self.hidden_layer_sizes),
            "activation": self.activation,
            "dropout": self.dropout,
        }
        with seeded_construction(seed):
            head = MultilayerPerceptron(**arguments)
            glorot_uniform_(head, self.activation)
        attributes["_architecture"] = (MultilayerPerceptron, arguments)  # the head's, see pickling
        attributes["_encoder_architecture"] = attributes["encoder_"]._architecture
        attributes["_trainable"] = self.trainable
        module = FineTunedNetwork(attributes["encoder_"].module_, head, self.trainable)
        return self._placed(module, device, Precision(attributes["dtype_"]).weights)

    def _recipe(self, module: nn.Module, samples: Samples, incremental: bool) -> Recipe:
        recipe = super()._recipe(module, samples, incremental)
        rate = self.encoder_learning_rate
        factor = 0.1 if rate == "auto" else rate / self.learning_rate_init
        return replace(recipe, rate_factors=(("encoder.", factor),))

    def _reader(self, attributes: Mapping[str, Any], device: torch.device) -> BatchReader:
        return attributes["encoder_"]._reader(attributes, device)

    def _rows_of_a_forward_pass(self) -> tuple[int, int]:
        return self.encoder_._rows_of_a_forward_pass()

    def _adopt(
        self,
        job: TrainingJob,
        attributes: dict[str, Any],
        result: TrainingResult,
        *,
        going_on: bool,
        keep_state: bool,
    ) -> Self:
        super()._adopt(job, attributes, result, going_on=going_on, keep_state=keep_state)
        # at rest in this training only: encoder_ can be trained further by itself
        self.module_.requires_grad_(True)
        self.encoder_: TorchEncoder = attributes["encoder_"]._with_weights_of(self)
        return self

    # -- pickling ----------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # The encoder's weights are in encoder_ too, unless that was trained further by itself:
        # then and only then they stay here as well.
        state = super().__getstate__()
        if "module_" in state and self.encoder_.module_ is self.module_.encoder:
            weights = state["module_"].items()
            state["module_"] = {k: v for k, v in weights if k.startswith("head.")}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "module_" not in state:
            super().__setstate__(state)
            return
        head, encoder_weights = (
            {k.removeprefix(part): v for k, v in state["module_"].items() if k.startswith(part)}
            for part in ("head.", "encoder.")
        )
        super().__setstate__(state | {"module_": head})
        encoder = self.encoder_.module_
        if encoder_weights:
            encoder = self._restored_module(
                {
                    "_architecture": self._encoder_architecture,
                    "device_": self.device_,
                    "module_": encoder_weights,
                }
            )
        module = FineTunedNetwork(encoder, vars(self)["module_"], self._trainable)
        self.module_ = module.eval().requires_grad_(True)


def _check_same_images(
    encoder: TorchEncoder,
    classifier: FineTunedClassifier,
    samples: Samples,
    given_shape: tuple[int, int, int] | None,
) -> None:
    names, given_names = (
        getattr(estimator, "feature_names_in_", None) for estimator in (encoder, classifier)
    )
    if names is not None and given_names is not None and list(names) != list(given_names):
        raise ValueError(
            "X has other column names, or in another order, than the frozen encoder was fitted "
            f"on: {list(given_names[:3])} ... instead of {list(names[:3])} ...."
        )
    n_features = samples.rows.shape[1]
    if n_features != encoder.n_features_in_ or given_shape not in (None, encoder.image_shape_):
        found = f"{n_features} features" if given_shape is None else f"shape {given_shape}"
        raise ValueError(
            f"X holds images of {found}, but the frozen encoder was fitted on images of shape "
            f"{encoder.image_shape_} (height, width, channels), {encoder.n_features_in_} features."
        )
