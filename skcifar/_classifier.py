"""What every classifier does: labels, weights, validation rows, probabilities."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
from scipy.special import expit, softmax
from sklearn.base import ClassifierMixin, _fit_context
from sklearn.callback import with_callbacks
from sklearn.metrics import get_scorer
from sklearn.model_selection import train_test_split
from sklearn.utils import column_or_1d, compute_class_weight
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets, unique_labels
from sklearn.utils.validation import (
    _check_sample_weight,
)
from torch import Tensor

from skcifar._base import TorchEstimator, samples_of, weights_device
from skcifar._device import (
    Generators,
    Precision,
    resolve_device,
)
from skcifar._training import Samples, TrainingJob, TrainingResult, train


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


class TorchClassifier(ClassifierMixin, TorchEstimator):
    """A classifier whose fit is a `TrainingJob`.

    `fit` is three steps: `_prepare` checks everything and describes the training, `train` runs it,
    `_adopt` sets the fitted attributes.
    """

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
        context = self._init_callback_context(max_subtasks=self._resolve_max_iter())
        context.call_on_fit_task_begin(estimator=self, X=X, y=y)
        going_on = self.warm_start and hasattr(self, "module_")
        job, attributes = self._prepare(
            X, y, sample_weight, X_val, y_val, sample_weight_val, going_on=going_on
        )
        self._report_epochs(context, job, attributes, X, y)
        result = train(job)
        self._adopt(job, attributes, result, going_on=going_on, keep_state=self.warm_start)
        context.call_on_fit_task_end(estimator=self, X=X, y=y, reconstruction_attributes={})
        return self

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
        if self.early_stopping:
            raise ValueError("partial_fit does not support early_stopping=True.")
        if self.learning_rate not in ("auto", "constant"):
            raise ValueError(
                f"partial_fit trains at a constant rate, but learning_rate={self.learning_rate!r}; "
                "use 'auto' or 'constant'."
            )
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
        job, attributes = self._prepare(
            X, y, sample_weight, going_on=going_on, incremental=True, classes=classes
        )
        result = train(job)
        return self._adopt(job, attributes, result, going_on=going_on, keep_state=True)

    def _prepare(
        self,
        X: Any,
        y: Any,
        sample_weight: Any,
        X_val: Any = None,
        y_val: Any = None,
        sample_weight_val: Any = None,
        *,
        going_on: bool,
        incremental: bool = False,
        classes: np.ndarray | None = None,
    ) -> tuple[TrainingJob, dict[str, Any]]:
        """Check everything; give the training to do and the attributes it will leave.

        `going_on` continues from the fitted module (from a copy: a training that fails leaves it
        as it was); `incremental` is a partial_fit.
        """
        self._check_parameters()
        rows, y, given_shape = self._validate_rows(X, y, reset=not going_on)
        classes, codes = self._encode(y, classes, going_on, incremental)
        sample_weight = _checked_weight(sample_weight, codes)
        weight, index = self._weights(sample_weight, classes, codes, 1 if incremental else 2)
        state = self._state_to_go_on_from() if going_on else None
        seeds = self._seeds() if state is None else {}
        device = weights_device(self.module_) if going_on else resolve_device(self.device)
        attributes = self._format(rows, given_shape, device, going_on)
        attributes["classes_"] = classes
        # rows that were held out once are never trained on later
        attributes["_split_seed"] = self._split_seed if going_on else seeds["split"]
        held_out = None
        if self.early_stopping and X_val is None and y_val is None:
            index, held_out = self._split(index, codes, attributes["_split_seed"])
        samples = samples_of(rows, codes, weight, index, device, attributes["dtype_"])
        if not going_on:
            attributes.update(self._statistics(samples, attributes))
        reader = self._reader(attributes, device)
        if going_on:
            attributes["_architecture"] = self._architecture
            module = copy.deepcopy(self.module_)
        else:
            module = self._module(attributes, _n_outputs(classes), seeds["weights"], device)
        view = self._view(attributes, module)
        validation, score = None, None
        if held_out is not None:
            validation = samples_of(
                samples.rows, codes, sample_weight, held_out, device, attributes["dtype_"]
            )
            score = self._held_out_scorer(view, validation, sample_weight, held_out)
        elif X_val is not None or y_val is not None:
            validation, score = self._given_validation(
                view, X_val, y_val, sample_weight_val, device
            )
        generators = Generators.from_seed(seeds.get("streams", 0), device)
        if state is not None:
            generators.set_state(state["generators"])
        job = TrainingJob(
            module=module,
            recipe=self._recipe(module, samples, incremental),
            reader=reader,
            precision=Precision(attributes["dtype_"]),
            generators=generators,
            train=samples,
            validation=validation,
            augment=self._augmentation(attributes["image_shape_"]),
            monitor_loss=self.scoring == "loss",
            validation_score=score,
            skorch_callbacks=copy.deepcopy(list(self.skorch_callbacks or [])),
            state=state,
            incremental=incremental,
            verbose=bool(self.verbose),
        )
        self._check_batches(job)
        return job, attributes

    def _state_to_go_on_from(self) -> dict[str, Any] | None:
        """State of the optimizer that trained last, if it was of the same kind."""
        state = getattr(self, "_training_state", None)
        return state if state is not None and state["solver"] == self.solver else None

    def _adopt(
        self,
        job: TrainingJob,
        attributes: dict[str, Any],
        result: TrainingResult,
        *,
        going_on: bool,
        keep_state: bool,
    ) -> Self:
        """Set everything a fit leaves, now that nothing can fail any more."""
        history = list(self.history_) if going_on else []
        history += [{**row, "epoch": len(history) + i} for i, row in enumerate(result.history, 1)]
        scores = [row["valid_score"] for row in history if "valid_score" in row]
        early = self.early_stopping
        module = job.module.eval()
        module.zero_grad(set_to_none=True)
        attributes |= {
            "module_": module,
            "history_": history,
            "n_iter_": len(history),
            "loss_curve_": [row["train_loss"] for row in history],
            "loss_": history[-1]["train_loss"],
            "best_loss_": None if early else min(row["train_loss"] for row in history),
            "validation_scores_": scores or None,
            # with early stopping that of the weights restored
            "best_validation_score_": result.best_score if early else max(scores, default=None),
            "t_": len(result.history) * len(job.train) + (self.t_ if going_on else 0),
            "n_outputs_": _n_outputs(attributes["classes_"]),
            "n_parameters_": sum(p.numel() for p in module.parameters()),
            "device_": str(job.reader.device),
            "skorch_callbacks_": result.skorch_callbacks,
        }
        self.__dict__.pop("_training_state", None)
        if keep_state:
            attributes["_training_state"] = result.state
        self.__dict__.update(attributes)
        return self

    # -- labels, weights, validation ---------------------------------------------------------------

    def _check_parameters(self) -> None:
        """What no single parameter's constraint can say; a subclass adds its own."""
        if self.solver == "lbfgs" and self.early_stopping:
            raise ValueError(
                "early_stopping=True has no meaning for solver='lbfgs', which works on all rows at "
                "once; use solver='sgd', 'adam' or 'adamw', or early_stopping=False."
            )

    def _encode(
        self, y: Any, classes: np.ndarray | None, going_on: bool, incremental: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sorted labels, (n_classes,), and their codes for y, int64 (n_samples,)."""
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        found, codes = np.unique(y, return_inverse=True)
        if going_on:
            classes = self.classes_
        if classes is None:
            if len(found) < 2:
                raise ValueError(
                    f"{type(self).__name__} needs samples of at least 2 classes in the data, but "
                    f"the data contains only one class: {found[0]!r}"
                )
            return found, codes
        if not incremental and not np.array_equal(found, classes):
            raise ValueError(
                "warm_start can only be used where y has the same classes as in the previous call "
                f"to fit. Previously got {classes}, y has {found}."
            )
        return classes, _codes_of(found, classes, "y")[codes]

    def _weights(
        self,
        sample_weight: np.ndarray | None,
        classes: np.ndarray,
        codes: np.ndarray,
        at_least: int,
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Weight of every row, or None for 1; and the rows whose weight is not 0, or None.

        Of these, rows of `at_least` so many classes must be left.
        """
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

    def _split(
        self, index: np.ndarray | None, codes: np.ndarray, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows to train on and rows held out, stratified."""
        index = np.arange(len(codes)) if index is None else index
        try:
            return train_test_split(
                index, test_size=self.validation_fraction, random_state=seed, stratify=codes[index]
            )
        except ValueError as error:
            raise ValueError(
                f"early_stopping=True could not hold out validation_fraction="
                f"{self.validation_fraction} of {len(index)} samples with every class on both "
                f"sides ({error}). Pass X_val and y_val, or more samples."
            ) from error

    def _given_validation(
        self, view: TorchClassifier, X_val: Any, y_val: Any, weight: Any, device: torch.device
    ) -> tuple[Samples, Callable[[], float] | None]:
        if X_val is None or y_val is None:
            given, missing = ("y_val", "X_val") if X_val is None else ("X_val", "y_val")
            raise ValueError(f"{given} is provided, but {missing} was not provided.")
        rows, labels, _ = view._validate_rows(X_val, y_val, reset=False)
        labels = column_or_1d(labels)
        weight = _checked_weight(weight, labels)
        index = None if weight is None or weight.all() else np.flatnonzero(weight)
        found, inverse = np.unique(labels, return_inverse=True)
        codes = _codes_of(found, view.classes_, "y_val")[inverse]
        validation = samples_of(rows, codes, weight, index, device, view.dtype_)
        return validation, self._scorer(view, lambda: X_val, labels, weight)

    def _held_out_scorer(
        self,
        view: TorchClassifier,
        held_out: Samples,
        sample_weight: np.ndarray | None,
        index: np.ndarray,
    ) -> Callable[[], float] | None:
        # An array, though X may have been a DataFrame: its names do not matter here.
        view.__dict__.pop("feature_names_in_", None)
        weight = None if sample_weight is None else sample_weight[index]
        labels = view.classes_[held_out.y.cpu().numpy()]
        return self._scorer(view, lambda: held_out.X, labels, weight)

    def _scorer(
        self,
        view: TorchClassifier,
        get_rows: Callable[[], Any],
        labels: np.ndarray,
        weight: np.ndarray | None,
    ) -> Callable[[], float] | None:
        """The monitored score where it is not the loop's own accuracy or loss."""
        if self.scoring in ("accuracy", "loss"):
            return None
        scorer = get_scorer(self.scoring) if isinstance(self.scoring, str) else self.scoring
        params = {} if weight is None else {"sample_weight": weight}
        rows = get_rows()
        return lambda: scorer(view, rows, labels, **params)

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
        return softmax(outputs, axis=1)

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


def _n_outputs(classes: np.ndarray) -> int:
    return 1 if len(classes) == 2 else len(classes)


def _codes_of(found: np.ndarray, classes: np.ndarray, name: str) -> np.ndarray:
    """Positions of the labels found in the sorted classes."""
    unknown = np.setdiff1d(found, classes)
    if len(unknown):
        raise ValueError(
            f"{name} contains labels {unknown} that are not among the classes {classes}."
        )
    return np.searchsorted(classes, found)


def _checked_weight(weight: Any, like: np.ndarray) -> np.ndarray | None:
    """Weights as float64, (n_samples,), as many as in `like`."""
    if weight is None:
        return None
    if isinstance(weight, Tensor):
        weight = weight.detach().cpu().numpy()
    return _check_sample_weight(weight, like, dtype=np.float64, ensure_non_negative=True)
