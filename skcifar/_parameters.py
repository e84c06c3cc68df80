"""The parameters that every classifier has: the values they take and what they mean."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import TypeVar

import torch
from sklearn.utils._param_validation import Interval, Options, StrOptions

SCHEDULES = {
    "auto",
    "constant",
    "invscaling",
    "adaptive",
    "exponential",
    "step",
    "cosine",
    "one_cycle",
}

_not_negative = Interval(Real, 0, None, closed="left")
_positive = Interval(Real, 0, None, closed="neither")
share = Interval(Real, 0, 1, closed="left")
_count = Interval(Integral, 1, None, closed="left")

CONSTRAINTS: dict = {
    "solver": [StrOptions({"sgd", "adam", "adamw", "lbfgs"})],
    "alpha": [_not_negative],
    "weight_decay": [_not_negative],
    "batch_size": [StrOptions({"auto", "full"}), _count],
    "learning_rate": [StrOptions(SCHEDULES), callable],
    "learning_rate_init": [_positive],
    "power_t": [_not_negative],
    "learning_rate_decay": [Interval(Real, 0, 1, closed="right")],
    "learning_rate_step": [_count],
    "learning_rate_end": [share],
    "learning_rate_warmup": [share],
    "max_iter": [_count],
    "shuffle": ["boolean"],
    "random_state": ["random_state"],
    "tol": [_not_negative],
    "verbose": ["verbose"],
    "warm_start": ["boolean"],
    "momentum": [Interval(Real, 0, 1, closed="both")],
    "nesterovs_momentum": ["boolean"],
    "early_stopping": ["boolean"],
    "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
    "scoring": [str, callable],
    "beta_1": [share],
    "beta_2": [share],
    "epsilon": [_positive],
    "n_iter_no_change": [_count, Options(Real, {math.inf})],
    "max_fun": [_count],
    "loss": [StrOptions({"cross_entropy", "squared_error"})],
    "label_smoothing": [share],
    "class_weight": [StrOptions({"balanced"}), dict, None],
    "clip_grad_norm": [_positive, None],
    "clip_grad_value": [_positive, None],
    "normalize": [StrOptions({"auto"}), "boolean"],
    "image_shape": ["array-like", None],
    "layout": [StrOptions({"HWC", "CHW"})],
    "device": [str, torch.device],
    "precision": [StrOptions({"auto", "float32", "float64", "bfloat16"})],
    "skorch_callbacks": [list, tuple, None],
}

_PARAMETERS = """\
batch_size : int, "auto" or "full", default={batch_size}
        Rows of a step. {auto_batch_size} "full" takes all of them, read in pieces. Batches
        are of nearly equal size.
    learning_rate : str or callable, default="auto"
        Schedule of the learning rate. Of fixed length, ignoring `tol` and running for
        `max_iter` epochs: "one_cycle" (a linear rise over the share
        `learning_rate_warmup` of the steps, a linear fall to `learning_rate_end`) and "cosine"
        (the fall follows a cosine). Of open length, ended by `tol`: "constant", "invscaling"
        and "adaptive" as in scikit-learn's MLPClassifier, "exponential" (times
        `learning_rate_decay` every epoch), "step" (times `learning_rate_decay` every
        `learning_rate_step` epochs), or a callable that makes a torch scheduler of an
        optimizer, stepped once an epoch. "auto" is "one_cycle", and "constant" in partial_fit,
        which has no end to plan for.
    learning_rate_init : float, default={learning_rate_init}
        Initial learning rate; of the schedules of fixed length the highest.{auto_learning_rate}
    power_t : float, default=0.5
        Exponent of "invscaling".
    learning_rate_decay : float, default={learning_rate_decay}
        Factor of "exponential" and "step".
    learning_rate_step : int, default=10
        Epochs between two falls of "step".
    learning_rate_end : float, default=0.0
        Rate at the end of "one_cycle" and "cosine", as a share of `learning_rate_init`.
    learning_rate_warmup : float, default={learning_rate_warmup}
        Share of the steps in which "one_cycle" and "cosine" rise.
    max_iter : int, default={max_iter}
        Epochs, at most; iterations of solver="lbfgs".{auto_max_iter}
    shuffle : bool, default=True
        Whether to draw a new order of the rows for every epoch.
    random_state : int, RandomState instance or None, default=None
        Seed of initial weights, order, dropout, augmentation and validation split, each of
        which has a stream of its own. NumPy's and torch's global generators are left alone.
    tol : float, default=1e-4
        A schedule of open length ends when the loss (or the validation score) has not
        improved by this for `n_iter_no_change` epochs; solver="lbfgs" when no component of the
        gradient is larger.
    verbose : bool or int, default=False
        Whether to print the loss of every epoch.
    warm_start : bool, default=False
        Whether fit goes on from the weights, optimizer and counters of the last fit. A schedule
        of fixed length starts again.
    momentum : float, default=0.9
        Of solver="sgd".
    nesterovs_momentum : bool, default=True
        Whether solver="sgd" uses Nesterov's momentum.
    early_stopping : bool, default=False
        Whether to hold out `validation_fraction` of the rows (or to use `X_val`), to end the
        training when the validation score has not improved for `n_iter_no_change` epochs, and
        to restore the weights of the best epoch.
    validation_fraction : float, default=0.1
        Share of the rows to hold out, stratified.
    scoring : "accuracy", "loss", str or callable, default="accuracy"
        What is monitored on the validation rows: "loss" is the negative loss; any other scorer
        of scikit-learn's is called once an epoch.
    beta_1, beta_2 : float, default=0.9, 0.999
        Decay rates of the moments of "adam" and "adamw".
    epsilon : float, default=1e-8
        Numerical stability of "adam" and "adamw".
    n_iter_no_change : int, default=10
        Epochs without improvement that are waited for.
{max_fun}    loss : {{"cross_entropy", "squared_error"}}, default="cross_entropy"
        "squared_error" fits one-hot targets, or -1 and 1 of two classes: half the mean over the
        outputs. It gives no probabilities.
    label_smoothing : float, default={label_smoothing}
        Share of the target, of either loss, that is spread over all classes, in training.
    class_weight : dict, "balanced" or None, default=None
        Weights of the classes; "balanced" makes them inversely proportional to their frequency.
    clip_grad_norm : float or None, default=None
        Largest norm of the gradient.
    clip_grad_value : float or None, default=None
        Largest absolute component of the gradient.
    normalize : "auto" or bool, default="auto"
        Whether to standardise each channel with its mean and standard deviation over the
        training rows; rows that are not known to be images share one. "auto" does so for
        integers within 0 to 255. Decided in the first fit or partial_fit.
    image_shape : (height, width) or (height, width, channels), default=None
        Shape of the images that flat rows hold. {image_shape}
    layout : {{"HWC", "CHW"}}, default="HWC"
        Order of height, width and channels in rows and images; "CHW" is that of torch and of
        CIFAR-10's own files.
    device : str or torch.device, default="auto"
        "auto" is CUDA where there is any, else the CPU.
    precision : {{"auto", "float32", "float64", "bfloat16"}}, default="auto"
        {precision} "bfloat16" computes in bfloat16 on float32 weights.
    skorch_callbacks : list of skorch callbacks or None, default=None
        Copied before use; as trained in `skorch_callbacks_`. solver="lbfgs" calls none.
"""

_MAX_FUN = """\
    max_fun : int, default=15000
        Evaluations of the loss, at most, of solver="lbfgs".
"""

_ATTRIBUTES = """\
classes_ : ndarray of shape (n_classes,)
        Sorted labels.
    n_features_in_ : int
        Features of a row: height x width x channels.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the features, where X has such.
    image_shape_ : tuple of int
        Height, width and channels; (1, 1, n_features_in_) for rows that are no images.
    mean_, scale_ : ndarray of shape (n_channels,) or None
        What is subtracted and divided by, in the units of X; None without normalisation.
    n_iter_ : int
        Epochs trained, or iterations of solver="lbfgs", over all calls of partial_fit and of fit
        with `warm_start`.
    history_ : list of dict
        A row an epoch: epoch, losses, accuracies, validation score, learning rate, seconds; of
        solver="lbfgs" a row an iteration, without training accuracy and learning rate.
        `pandas.DataFrame(history_)` shows it.
    loss_ : float
        Loss of the last epoch, penalty included.
    best_loss_ : float or None
        Smallest loss; None with early stopping.
    loss_curve_ : list of float
        Loss of every epoch.
    validation_scores_ : list of float or None
        Monitored score of every epoch, where there are validation rows.
    best_validation_score_ : float or None
        The best of them.
    module_ : torch.nn.Module
        The network.
    n_outputs_ : int
        1 for two classes, else the number of classes.
    n_parameters_ : int
        Weights and biases of the network.
    t_ : int
        Rows seen in training.
    dtype_ : str
        The precision used.
    device_ : str
        The device trained on.
    skorch_callbacks_ : list
        The callbacks as trained.
"""

_Class = TypeVar("_Class", bound=type)


def document_parameters(**defaults: str) -> Callable[[_Class], _Class]:
    """Fill {parameters} and {attributes} of a class's docstring with what all of them share."""

    def fill(cls: _Class) -> _Class:
        assert cls.__doc__ is not None
        fields = {"auto_learning_rate": "", "auto_max_iter": "", "max_fun": "", **defaults}
        if "max_fun" in inspect.signature(cls).parameters:
            fields["max_fun"] = _MAX_FUN
        parameters = _PARAMETERS.format(**fields).rstrip()
        cls.__doc__ = cls.__doc__.replace("{parameters}", parameters).replace(
            "{attributes}", _ATTRIBUTES.rstrip()
        )
        return cls

    return fill
