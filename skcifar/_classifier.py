"""What every classifier does: labels, weights, probabilities."""

from __future__ import annotations

from numbers import Integral
from typing import Any, Self

import numpy as np
import torch
from scipy.special import expit
from sklearn.base import ClassifierMixin, _fit_context
from sklearn.callback import with_callbacks
from sklearn.utils import check_scalar, compute_class_weight
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import unique_labels
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from skcifar._device import Generators, Precision
from skcifar._jobs import compute
from skcifar._networks import Step, hidden_steps
from skcifar._optimization import ClassificationLoss
from skcifar._stored_rows import StoredRows, is_stored
from skcifar._supervised import SupervisedEstimator


def _is_stochastic(estimator: TorchClassifier) -> bool:
    if estimator.solver == "lbfgs":
        raise AttributeError(
            "partial_fit is only available for the stochastic solvers 'sgd', 'adam' and 'adamw'; "
            f"solver={estimator.solver!r}."
        )
    return True


def _gives_probabilities(estimator: TorchClassifier) -> bool:
    if estimator.loss == "squared_error":
        raise AttributeError(
            "Probabilities are not available for loss='squared_error'; use loss='cross_entropy', "
            "or decision_function for the outputs."
        )
    return True


class TorchClassifier(ClassifierMixin, SupervisedEstimator):
    """A classifier whose network has an output for each class, or one for two classes."""

    # -- fitting -----------------------------------------------------------------------------------

    @with_callbacks
    @_fit_context(prefer_skip_nested_validation=True)
    def fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any = None,
        *,
        X_val: Any = None,
        y_val: Any = None,
        sample_weight_val: Any = None,
    ) -> Self:
        """Train on images and their labels.

        Parameters
        ----------
        X : array-like or tensor of shape (n_samples, n_features), (n_samples, height, width) or \
                (n_samples, height, width, channels)
            Images, as rows or as images. A tensor on the device of the fit is not copied.
            A memory-mapped file of 1 GB or more, and an array that only gives slices (HDF5, Zarr),
            is read while it is trained on, and not loaded.
        y : array-like of shape (n_samples,)
            Labels: strings, integers or booleans.
        sample_weight : array-like of shape (n_samples,), default=None
            Non-negative weights; rows of weight 0 are left out.
        X_val : array-like or tensor of the same form as X, default=None
            Validation images. With `early_stopping=True` they take the place of the share held
            out; without, their loss and score are only recorded. In a `Pipeline` pass them
            through `transform_input=["X_val"]`, so that they are transformed like X.
        y_val : array-like of shape (n_val,), default=None
            Labels of `X_val`, all of them in y.
        sample_weight_val : array-like of shape (n_val,), default=None
            Weights of `X_val`.

        Returns
        -------
        self : object
            The fitted estimator.

        Raises
        ------
        ValueError
            When the input or the parameters do not fit together, or when training diverges: its
            loss is no longer finite. The message names what to do.
        """
        return self._fit(X, y, sample_weight, X_val, y_val, sample_weight_val)

    @available_if(_is_stochastic)
    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> Self:
        """Train for one epoch more on the rows given, at the constant rate `learning_rate_init`.

        Whether and how to normalise is decided from the rows of the first call.

        Parameters
        ----------
        X : array-like or tensor, as for fit
            Images.
        y : array-like of shape (n_samples,)
            Labels.
        classes : array-like of shape (n_classes,), default=None
            All labels there will be; required in the first call, where y may lack some.
        sample_weight : array-like of shape (n_samples,), default=None
            Non-negative weights.

        Returns
        -------
        self : object
            The estimator, trained further.

        Raises
        ------
        ValueError
            When `classes` is missing in the first call or changes later, when y holds others,
            or with `early_stopping=True` or a `learning_rate` schedule.
        """
        if self.class_weight == "balanced":
            raise ValueError(
                "class_weight='balanced' needs all of y and is not supported by partial_fit; pass "
                "sample_weight or a dict of class weights."
            )
        going_on = hasattr(self, "module_")
        if classes is None and not going_on:
            raise ValueError("classes must be passed on the first call to partial_fit.")
        if classes is not None:
            classes = unique_labels(classes)
            if len(classes) < 2:
                raise ValueError(f"classes={classes} must hold at least 2 classes.")
            if going_on and not np.array_equal(classes, self.classes_):
                raise ValueError(
                    f"classes={classes} is not the same as on the last call to partial_fit, was: "
                    f"{self.classes_}."
                )
        return self._partial_fit(X, y, sample_weight, classes)

    # -- labels and weights ------------------------------------------------------------------------

    def _check_parameters(self, incremental: bool) -> None:
        if self.solver == "lbfgs" and self.early_stopping:
            raise ValueError(
                "early_stopping=True has no meaning for solver='lbfgs', which works on all rows at "
                "once; use solver='sgd', 'adam' or 'adamw', or early_stopping=False."
            )
        super()._check_parameters(incremental)

    def _encode(
        self, y: np.ndarray, classes: np.ndarray | None, going_on: bool, incremental: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        if going_on:
            classes = self.classes_
        if classes is None:
            return super()._encode(y, classes, going_on, incremental)
        found, codes = np.unique(y, return_inverse=True)
        if not incremental and not np.array_equal(found, classes):
            raise ValueError(
                "warm_start can only be used where y has the same classes as in the previous call "
                f"to fit. Previously got {classes}, y has {found}."
            )
        return classes, _codes_of(found, classes, "y")[codes]

    def _encode_validation(self, labels: np.ndarray, classes: np.ndarray) -> np.ndarray:
        found, codes = np.unique(labels, return_inverse=True)
        return _codes_of(found, classes, "y_val")[codes]

    def _label_attributes(self, classes: np.ndarray) -> dict[str, Any]:
        return {"classes_": classes, "n_outputs_": self._count_outputs(classes)}

    def _weights(
        self,
        sample_weight: np.ndarray | None,
        classes: np.ndarray,
        codes: np.ndarray,
        at_least: int,
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        if sample_weight is None and self.class_weight is None:
            return None, None
        weight = np.ones(len(codes)) if sample_weight is None else sample_weight
        if self.class_weight is not None:
            weight = weight * self._class_weights(weight, classes, codes)[codes]
        if weight.all():
            return weight, None
        index = np.flatnonzero(weight)
        left = np.unique(codes[index])
        if len(left) < at_least:
            raise ValueError(
                f"{type(self).__name__} needs samples of at least {at_least} classes with "
                "non-zero weight, but sample_weight and class_weight leave "
                f"{len(left)}: {classes[left]}."
            )
        return weight, index

    def _class_weights(
        self, weight: np.ndarray, classes: np.ndarray, codes: np.ndarray
    ) -> np.ndarray:
        """`class_weight` as one weight for each class; balanced among those that are present."""
        if self.class_weight != "balanced":
            return compute_class_weight(self.class_weight, classes=classes, y=classes)
        counted = weight > 0
        present = np.unique(codes[counted])
        per_class = np.ones(len(classes))
        per_class[present] = compute_class_weight(
            "balanced",
            classes=classes[present],
            y=classes[codes[counted]],
            sample_weight=weight[counted],
        )
        return per_class

    # -- what is trained ---------------------------------------------------------------------------

    def _count_outputs(self, classes: np.ndarray) -> int:
        return 1 if len(classes) == 2 else len(classes)

    def _criterion(self, generators: Generators) -> nn.Module:
        return ClassificationLoss(self.loss, self.label_smoothing)

    # -- prediction --------------------------------------------------------------------------------

    def decision_function(self, X: Any) -> np.ndarray:
        """Return the outputs of the network before the softmax.

        Parameters
        ----------
        X : array-like or tensor, as for fit
            Images.

        Returns
        -------
        outputs : ndarray of shape (n_samples,) or (n_samples, n_classes)
            Float64. Of two classes the log-odds of `classes_[1]`, of more the logits; with
            `loss="squared_error"` the outputs fitted to -1 and 1, or to the one-hot targets.
        """
        logits = self._outputs(X)
        return logits[:, 0] if logits.shape[1] == 1 else logits

    def predict(self, X: Any) -> np.ndarray:
        """Predict the most probable class of each image.

        Parameters
        ----------
        X : array-like or tensor, as for fit
            Images.

        Returns
        -------
        y : ndarray of shape (n_samples,)
            Labels out of `classes_`.
        """
        if is_stored(X):  # their outputs may be more than memory holds
            rows, _, _ = self._validate_rows(X, reset=False)
            assert isinstance(rows, StoredRows)
            return np.concatenate([self.predict(rows[part]) for part in rows.in_turn()])
        outputs = self.decision_function(X)
        codes = (outputs > 0).astype(np.intp) if outputs.ndim == 1 else outputs.argmax(1)
        return self.classes_[codes]

    @available_if(_gives_probabilities)
    def predict_proba(self, X: Any) -> np.ndarray:
        """Predict the probabilities of the classes, computed in float64.

        Parameters
        ----------
        X : array-like or tensor, as for fit
            Images.

        Returns
        -------
        probabilities : ndarray of shape (n_samples, n_classes)
            In the order of `classes_`; rows sum to 1.
        """
        outputs = self.decision_function(X)
        if outputs.ndim == 1:
            return expit(np.column_stack([-outputs, outputs]))
        return torch.from_numpy(outputs).softmax(1).numpy()  # scipy.special takes 4 us more

    @available_if(_gives_probabilities)
    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Predict the logarithms of the probabilities of the classes.

        Parameters
        ----------
        X : array-like or tensor, as for fit
            Images.

        Returns
        -------
        log_probabilities : ndarray of shape (n_samples, n_classes)
            In the order of `classes_`.
        """
        with np.errstate(divide="ignore"):
            return np.log(self.predict_proba(X))

    # -- hidden layers -----------------------------------------------------------------------------

    def hidden_layer_output(self, X: Any, layer: int = -1) -> np.ndarray:
        """Return the activations of a hidden layer, for a picture or another estimator.

        Hidden layers are counted from 0 at the images, or from -1 at the outputs:

        - an `MLPClassifier` has one for each of `hidden_layer_sizes`;
        - a `CNNClassifier` one for each stage of `channels`, pooling included, then one for each
          of `hidden_layer_sizes`; by name "lenet5" has two convolutions and two dense layers, a
          VGG its five stages, a ResNet its first convolution and four stages. The last stage comes
          after the pooling of its whole image, if there is one;
        - a `FineTunedClassifier` has its encoder's output, then one for each of
          `hidden_layer_sizes`;
        - of a network of one's own that is a `torch.nn.Sequential` every part but the last is one;
          the layers of others are not known.

        Parameters
        ----------
        X : array-like or tensor, as for fit
            Images.
        layer : int, default=-1
            Which hidden layer; -1 is the one that the outputs are computed from.

        Returns
        -------
        activations : ndarray of shape (n_samples, n_units)
            What comes out of the activation function, in the precision of the weights: without
            dropout, and without the averages of `tta`. The image of a convolution is flat, one
            channel after the other and each of them row by row.

        Raises
        ------
        ValueError
            When there is no such hidden layer.
        TypeError
            When `layer` is no integer, or the network is one's own and no Sequential.

        Examples
        --------
        >>> from skcifar import MLPClassifier
        >>> from skcifar.datasets import load_digits
        >>> X, y = load_digits(return_X_y=True)
        >>> classifier = MLPClassifier((64, 16), max_iter=2, random_state=0).fit(X, y)
        >>> classifier.hidden_layer_output(X[:5]).shape
        (5, 16)
        >>> classifier.hidden_layer_output(X[:5], layer=0).shape
        (5, 64)
        """
        check_is_fitted(self)
        steps = self._steps_to(layer)
        rows, _, _ = self._validate_rows(X, reset=False)

        def forward(batch: Tensor) -> Tensor:
            for step in steps:
                batch = step(batch)
            return batch.flatten(1)

        view = self._view({"_forward": forward})  # up to the layer, rather than to the outputs
        dtype = Precision(self.dtype_).weights
        return compute(lambda: view._outputs_of(rows, dtype))

    def _steps_to(self, layer: int) -> list[Step]:
        """What leads from the images to a hidden layer's output."""
        if isinstance(layer, bool):  # which is an int
            raise TypeError(f"layer must be an instance of int, not {layer}.")
        check_scalar(layer, "layer", Integral)
        steps = hidden_steps(self.module_)
        name, n_layers = type(self).__name__, len(steps)
        if not steps:
            raise ValueError(
                f"layer={layer}, but this {name} has no hidden layer: its outputs are computed "
                "from the images themselves; decision_function gives them."
            )
        if not -n_layers <= layer < n_layers:
            raise ValueError(
                f"layer={layer}, but this {name} has {n_layers} hidden layer(s); expected 0 to "
                f"{n_layers - 1}, or -1 (the last) to {-n_layers}."
            )
        return steps[: layer % n_layers + 1]


def _codes_of(found: np.ndarray, classes: np.ndarray, name: str) -> np.ndarray:
    """Positions of the labels found in the sorted classes."""
    unknown = np.setdiff1d(found, classes)
    if len(unknown):
        raise ValueError(
            f"{name} contains labels {unknown} that are not among the classes {classes}."
        )
    return np.searchsorted(classes, found)
