"""What a fit is: all that a training needs, and what comes of it; where the fits of a study meet.

An estimator describes a fit as a `TrainingJob`, which holds everything the fit needs and nothing
of the estimator.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from skcifar._batches import Samples
from skcifar._device import Augmentation, BatchReader, Generators, Precision
from skcifar._optimization import Recipe


@dataclass
class TrainingJob:
    """One fit, self-contained.

    Attributes
    ----------
    module : torch.nn.Module
        Trained in place, on the reader's device.
    criterion : torch.nn.Module
        From outputs, targets, weights (or None) and the sum of weights to a 0-d loss; `row_wise`
        says whether the rows' losses just add up. A `ClassificationLoss` has accuracies too.
    sampler : callable or None
        From targets, batch size, number of batches and a generator to an epoch's batches, as
        positions in the rows to train on; None takes all rows in turn.
    augment : Augmentation or None
        What is done to a batch of images.
    validation_score : callable or None
        The monitored score (larger is better) of the module as it is, once an epoch; None takes
        the accuracy, or with `monitor_loss` the negative loss, on `validation`.
    only_watched : bool
        Whether the validation rows decide on nothing: neither rates nor the end.
    on_epoch_begin, on_epoch_end : callables
        The latter gets the epoch's row of the history and says whether to stop.
    state : dict or None
        What an earlier fit left (`TrainingResult.state`), to go on from.
    incremental : bool
        One of many short fits (partial_fit), which nobody expects to converge.
    evaluation_rows : int
        Rows of a forward pass without gradients.
    pause_after : int or None
        Epoch after which to stop for now: the result holds what a later job goes on from.
    paused : object or None
        `TrainingResult.paused` of an earlier job of the same data and recipe, to go on from.
    """

    module: nn.Module
    criterion: nn.Module
    recipe: Recipe
    reader: BatchReader
    precision: Precision
    generators: Generators
    train: Samples
    validation: Samples | None = None
    sampler: Callable[[Tensor, int, int, torch.Generator], list[Tensor]] | None = None
    augment: Augmentation | None = None
    monitor_loss: bool = False
    validation_score: Callable[[], float] | None = None
    only_watched: bool = False
    on_epoch_begin: Callable[[], None] = lambda: None
    on_epoch_end: Callable[[dict], bool] = lambda row: False
    skorch_callbacks: list = field(default_factory=list)
    state: dict | None = None
    incremental: bool = False
    evaluation_rows: int = 1024
    verbose: bool = False
    pause_after: int | None = None
    paused: Any = None


@dataclass
class TrainingResult:
    """What came of a `TrainingJob`; the weights are in its module.

    Attributes
    ----------
    history : list of dict
        A row an epoch, without those of earlier fits.
    best_score : float or None
        Best monitored validation score, whose weights were restored, with early stopping.
    state : dict of tensors and numbers
        Of optimizer, learning rates and generators, with the solver they belong to.
    n_rows_seen : int
        Rows trained on, each as often as it was.
    skorch_callbacks : list
        As trained.
    ran_out : bool
        Whether max_iter ended a training that was to go on until it converges.
    paused : object or None
        What a job with `pause_after` left, over or not, for the next one to go on from.
    """

    history: list[dict]
    best_score: float | None
    state: dict
    n_rows_seen: int
    skorch_callbacks: list = field(default_factory=list)
    ran_out: bool = False
    paused: Any = None


class Meeting(Protocol):
    """Where the fits of one study meet, to be trained together."""

    def train(self, job: TrainingJob) -> TrainingResult:
        """What `train_alone` does, when the meeting sees fit."""

    def seed(self, seed: int | None) -> int | None:
        """The seed of a fit whose own is `seed`; None, for both, is one drawn at random."""

    def compute(self, function: Callable[[], Any], what: tuple | None = None) -> Any:
        """What `function` gives. `what` names it: the address of rows, and what it is of them.

        For rows that fits share it is computed once.
        """


# The meeting that the fits of this thread take part in, if any.
MEETING: ContextVar[Meeting | None] = ContextVar("MEETING", default=None)


def compute(function: Callable[[], Any], what: tuple | None = None) -> Any:
    """What `function` gives, by way of the meeting if there is one: see `Meeting.compute`."""
    meeting = MEETING.get()
    return function() if meeting is None else meeting.compute(function, what)
