"""The parameters that estimators share: the values they take and what they mean."""

from __future__ import annotations

import inspect
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import TypeVar

import torch
from sklearn.utils._param_validation import Interval, Options, StrOptions

from skcifar._architectures import ARCHITECTURES
from skcifar._networks import ACTIVATIONS

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

# Of every estimator that is trained on labels.
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

# Of a network described by parameters or by name, and of what happens to its images.
CONVOLUTIONAL_CONSTRAINTS: dict = {
    "channels": ["array-like"],
    "hidden_layer_sizes": ["array-like", _count],
    "kernel_size": ["array-like", _count],
    "activation": ["array-like", StrOptions(set(ACTIVATIONS))],
    "batch_norm": ["boolean"],
    "dropout": [share],
    "global_pool": [StrOptions({"max", "average"}), None],
    "architecture": [StrOptions(set(ARCHITECTURES)), callable, None],
}
AUGMENTATION_CONSTRAINTS: dict = {
    "horizontal_flip": [StrOptions({"alternating"}), "boolean"],
    "translate": [Interval(Integral, 0, None, closed="left")],
    "cutout": [Interval(Integral, 0, None, closed="left")],
    "tta": ["boolean"],
}
# Of networks of convolutions, which L-BFGS does not train.
STOCHASTIC_CONSTRAINTS: dict = {
    **{name: constraint for name, constraint in CONSTRAINTS.items() if name != "max_fun"},
    "solver": [StrOptions({"sgd", "adam", "adamw"})],
    "learning_rate_init": [StrOptions({"auto"}), _positive],
}

# What they mean, in the order of signatures. {default} is taken from the signature.
_PARAMETERS = """\
channels : sequence of int or of sequences of int, default={default}
    Stages of the network: the width of a stage's convolution, or the widths of its
    convolutions. A stage ends with a 2x2 max pooling behind its last convolution, before
    BatchNorm and activation; a side of one pixel is not pooled.
hidden_layer_sizes : array-like of int, default={default}
    Widths of the dense layers before the output.
kernel_size : odd int or sequence of such, default={default}
    Of all convolutions, or of each.
activation : str or sequence of str, default={default}
    "identity", "logistic", "tanh", "relu", "gelu" or "silu": of all layers, or of each
    convolution and hidden dense layer.
batch_norm : bool, default={default}
    Whether BatchNorm follows each convolution, which then has no bias.
dropout : float, default={default}
    Share of the inputs of each dense layer that is left out in training.
global_pool : {"max", "average"} or None, default={default}
    Pooling of the last stage's whole image; None flattens it.
architecture : str, callable or None, default={default}
    A network by name in place of the parameters above: "lenet5" [1]_, "vgg11" or "vgg16" with
    BatchNorm [2]_, "resnet18" with the stem for small images [3]_, or "airbench94", the
    network of the fastest known training to 94% of CIFAR-10 [4]_. A callable gets
    `image_shape` (height, width, channels) and `n_outputs` (1 for two classes) by name and
    returns a `torch.nn.Module` from images (n, channels, height, width) to logits
    (n, n_outputs). Its `torch.nn.Dropout` layers draw from `random_state`; other random
    layers would draw from torch's global generator.
horizontal_flip : bool or "alternating", default={default}
    Whether to mirror half of the images in training, anew in each epoch, or "alternating":
    each image in every second epoch. A flip relabels digits; for photographs it helps.
translate : int, default={default}
    Pixels by which images are moved at most in training, in each direction; images with a
    side below 16 pixels are not moved.
cutout : int, default={default}
    Side in pixels of a square of each image that is blanked in training.
tta : bool, default={default}
    Whether prediction averages the logits over the image and its moves by one pixel up and
    left and down and right and, with `horizontal_flip`, over their flips. The accuracies in
    `history_` are without.
solver : {"sgd", "adam", "adamw"}, default={default}
    Optimizer.
alpha : float, default={default}
    Strength of the penalty on the squared weights; biases and BatchNorm are not penalised.
weight_decay : float, default={default}
    Further penalty of `weight_decay` / 2 times the squared weights, whatever the number of
    rows (decoupled from the gradient in solver="adamw").
batch_size : int, "auto" or "full", default={default}
    Rows of a step; "auto" is n_samples // 50, within 64 to 256. "full" takes all of them, read
    in pieces. Batches are of nearly equal size.
learning_rate : str or callable, default={default}
    Schedule of the learning rate. Of fixed length, ignoring `tol` and running for
    `max_iter` epochs: "one_cycle" (a linear rise over the share
    `learning_rate_warmup` of the steps, a linear fall to `learning_rate_end`) and "cosine"
    (the fall follows a cosine). Of open length, ended by `tol`: "constant", "invscaling"
    and "adaptive" as in scikit-learn's MLPClassifier, "exponential" (times
    `learning_rate_decay` every epoch), "step" (times `learning_rate_decay` every
    `learning_rate_step` epochs), or a callable that makes a torch scheduler of an
    optimizer, stepped once an epoch. "auto" is "one_cycle", and "constant" in partial_fit,
    which has no end to plan for.
learning_rate_init : float, default={default}
    Initial learning rate; of the schedules of fixed length the highest.
power_t : float, default={default}
    Exponent of "invscaling".
learning_rate_decay : float, default={default}
    Factor of "exponential" and "step".
learning_rate_step : int, default={default}
    Epochs between two falls of "step".
learning_rate_end : float, default={default}
    Rate at the end of "one_cycle" and "cosine", as a share of `learning_rate_init`.
learning_rate_warmup : float, default={default}
    Share of the steps in which "one_cycle" and "cosine" rise.
max_iter : int, default={default}
    Epochs, at most.
shuffle : bool, default={default}
    Whether to draw a new order of the rows for every epoch.
random_state : int, RandomState instance or None, default={default}
    Seed of initial weights, order, dropout, augmentation and validation split, each of
    which has a stream of its own. NumPy's and torch's global generators are left alone.
tol : float, default={default}
    A schedule of open length ends when the loss (or the validation score) has not
    improved by this for `n_iter_no_change` epochs.
verbose : bool or int, default={default}
    Whether to print the loss of every epoch.
warm_start : bool, default={default}
    Whether fit goes on from the weights, optimizer and counters of the last fit. A schedule
    of fixed length starts again.
momentum : float, default={default}
    Of solver="sgd".
nesterovs_momentum : bool, default={default}
    Whether solver="sgd" uses Nesterov's momentum.
lookahead : bool, default={default}
    Whether slow weights follow those that are trained, which go on from them every five
    steps: a mean over the end of a training of fixed length [5]_, which one that ends early
    does not come to.
early_stopping : bool, default={default}
    Whether to hold out `validation_fraction` of the rows (or to use `X_val`), to end the
    training when the validation score has not improved for `n_iter_no_change` epochs, and
    to restore the weights of the best epoch.
validation_fraction : float, default={default}
    Share of the rows to hold out, stratified.
scoring : "accuracy", "loss", str or callable, default={default}
    What is monitored on the validation rows: "loss" is the negative loss; any other scorer
    of scikit-learn's is called once an epoch.
beta_1, beta_2 : float, default=0.9, 0.999
    Decay rates of the moments of "adam" and "adamw".
epsilon : float, default={default}
    Numerical stability of "adam" and "adamw".
n_iter_no_change : int, default={default}
    Epochs without improvement that are waited for.
loss : {"cross_entropy", "squared_error"}, default={default}
    "squared_error" fits one-hot targets, or -1 and 1 of two classes: half the mean over the
    outputs. It gives no probabilities.
label_smoothing : float, default={default}
    Share of the target, of either loss, that is spread over all classes, in training.
class_weight : dict, "balanced" or None, default={default}
    Weights of the classes; "balanced" makes them inversely proportional to their frequency.
clip_grad_norm : float or None, default={default}
    Largest norm of the gradient.
clip_grad_value : float or None, default={default}
    Largest absolute component of the gradient.
normalize : "auto" or bool, default={default}
    Whether to standardise each channel with its mean and standard deviation over the
    training rows; rows that are not known to be images share one. "auto" does so for
    integers within 0 to 255. Decided in the first fit or partial_fit.
image_shape : (height, width) or (height, width, channels), default={default}
    Shape of the images that flat rows hold.
layout : {"HWC", "CHW"}, default={default}
    Order of height, width and channels in rows and images; "CHW" is that of torch and of
    CIFAR-10's own files.
device : str or torch.device, default={default}
    "auto" is what the environment variable SKCIFAR_DEVICE names, or CUDA where there is any, else
    the CPU.
precision : {"auto", "float32", "float64", "bfloat16"}, default={default}
    "bfloat16" computes in bfloat16 on float32 weights.
skorch_callbacks : list of skorch callbacks or None, default={default}
    Copied before use; as trained in `skorch_callbacks_`.
max_fun : int, default={default}
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
    Epochs trained, over all calls of partial_fit and of fit with `warm_start`.
history_ : list of dict
    A row an epoch: epoch, losses, accuracies, validation score, learning rate, seconds.
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
    The device computed on.
skorch_callbacks_ : list
    The callbacks as trained."""

_Class = TypeVar("_Class", bound=type)


def document_parameters(
    instead: Mapping[str, str] | None = None, without: Iterable[str] = (), **additions: str
) -> Callable[[_Class], _Class]:
    """Fill {parameters} and {attributes} of a class's docstring with what it shares with others.

    Parameters
    ----------
    instead : mapping of parameter or attribute to its whole entry
        Where it means something else here.
    without : iterable of str
        Attributes that the class does not have.
    additions : str
        What is to be said of a parameter (or attribute) beside its shared entry.
    """
    parameters, attributes = (
        _entries(text, instead or {}, additions) for text in (_PARAMETERS, _ATTRIBUTES)
    )

    def fill(cls: _Class) -> _Class:
        assert cls.__doc__ is not None
        own = set(re.findall(r"^    (\w+)(?:, \w+)* : ", cls.__doc__, re.MULTILINE))
        signature = inspect.signature(cls).parameters
        wanted = [
            _with_default(parameters[name], signature[name].default)
            for name in signature
            if name in parameters and name not in own
        ]
        kept = [text for name, text in attributes.items() if name not in own | set(without)]
        cls.__doc__ = cls.__doc__.replace("{parameters}", _indented(wanted)).replace(
            "{attributes}", _indented(kept)
        )
        return cls

    return fill


def _entries(text: str, instead: Mapping[str, str], additions: Mapping[str, str]) -> dict[str, str]:
    """Entries by the first of the names that they describe."""
    entries: dict[str, str] = {}
    for entry in re.split(r"\n(?=\w)", text.rstrip()):
        name = re.split(r"\W", entry, maxsplit=1)[0]
        if name in instead:
            entry = textwrap.dedent(instead[name]).strip()
        elif name in additions:
            entry += "\n" + textwrap.fill(
                additions[name], 91, initial_indent="    ", subsequent_indent="    "
            )
        entries[name] = entry
    return entries


def _with_default(entry: str, default: object) -> str:
    """An entry with the default of a class, which may allow "auto" where others do not."""
    line, rest = entry.split("\n", 1)
    shown = f'"{default}"' if isinstance(default, str) else repr(default)
    if shown == '"auto"' and shown not in line and "str" not in line:
        line = line.replace(", default", f" or {shown}, default")
    return f"{line}\n{rest}".replace("{default}", shown)


def _indented(entries: list[str]) -> str:
    return "\n".join(entries).replace("\n", "\n    ")
