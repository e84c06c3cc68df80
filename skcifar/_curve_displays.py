"""Displays of numbers: learning curves, accuracies and counts of classes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from sklearn.utils import check_consistent_length, column_or_1d

from skcifar._display import (
    FEW_COLOURS,
    WIDTH,
    ClassNames,
    Display,
    colours_for,
    named_legend,
    names_of,
)
from skcifar._fitted import epoch_records, fitted_model

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PolyCollection
    from matplotlib.container import BarContainer
    from matplotlib.legend import Legend
    from matplotlib.lines import Line2D
    from matplotlib.text import Text

History = pd.DataFrame | Iterable[Mapping[str, Any]]

# Of what is drawn: the end of its columns' names, the factor to its unit.
QUANTITIES = {"loss": ("_loss", 1.0), "accuracy": ("_accuracy", 100.0)}
PARTS: dict[str, tuple[str, Any]] = {"train": ("training", "-"), "valid": ("validation", "--")}
TIMES = {"epoch": "epoch", "seconds": "training time (s)"}


class LearningCurvesDisplay(Display):
    """Loss and accuracy against epochs or seconds, of several models in one pair of axes.

    Training rows have solid lines, validation rows dashed ones; a model has one colour. Create it
    with `from_histories` or `from_estimators`.

    Parameters
    ----------
    histories : dict of str to pandas.DataFrame
        Of each model a row an epoch: ``epoch`` and what there is of ``train_loss``,
        ``valid_loss``, ``train_accuracy``, ``valid_accuracy`` and ``seconds`` (of the epoch).
        Several runs are told apart by ``fold`` and ``repeat``.
    x : {"epoch", "seconds"}, default="epoch"
        What runs to the right: epochs, or the seconds since the first began.
    loss_name : str, default="loss"
        What stands beside the losses: ``"cross-entropy (nats)"``, say, where all are.
    loss_scale : {"linear", "log"}, default="linear"
        Of the losses' axis.

    Attributes
    ----------
    lines_ : dict of tuple to matplotlib Line2D
        By (model, column), column being ``"train_loss"``, say; means over the runs.
    ranges_ : dict of tuple to matplotlib PolyCollection
        By (model, column): from the least to the greatest of several runs.
    legend_ : matplotlib Legend
        Names of the models and of the lines.
    axes_ : ndarray of matplotlib Axes
        Those of the loss and of the accuracy, as far as there are values.
    ax_ : matplotlib Axes
        The first of `axes_`.
    figure_ : matplotlib Figure
        Figure with the axes.

    Notes
    -----
    Where runs end after different numbers of epochs, the mean at an epoch is over those that got
    so far. Seconds of an epoch are such means, too, and added up from epoch to epoch. A point
    without neighbours to draw a line to is a dot.

    Examples
    --------
    >>> from skcifar import MLPClassifier
    >>> from skcifar.datasets import load_digits
    >>> from skcifar.plotting import LearningCurvesDisplay
    >>> X, y = load_digits(return_X_y=True)
    >>> models = {
    ...     f"{width} units": MLPClassifier(width, max_iter=3, random_state=0).fit(
    ...         X[:1500], y[:1500], X_val=X[1500:], y_val=y[1500:]
    ...     )
    ...     for width in (8, 64)
    ... }
    >>> display = LearningCurvesDisplay.from_estimators(models)
    >>> display.lines_["64 units", "valid_loss"].get_xdata()
    array([1., 2., 3.])
    """

    lines_: dict[tuple[str, str], Line2D]
    ranges_: dict[tuple[str, str], PolyCollection]
    legend_: Legend
    axes_: NDArray[Any]

    def __init__(
        self,
        *,
        histories: Mapping[str, pd.DataFrame],
        x: str = "epoch",
        loss_name: str = "loss",
        loss_scale: str = "linear",
    ) -> None:
        self.histories = histories
        self.x = x
        self.loss_name = loss_name
        self.loss_scale = loss_scale

    def plot(self, ax: Axes | Sequence[Axes] | NDArray[Any] | None = None) -> Self:
        """Draw the curves.

        Parameters
        ----------
        ax : matplotlib Axes or sequence of them, default=None
            Where to draw: axes for the loss and for the accuracy, or one whose place they share.
            None makes a figure.

        Returns
        -------
        display : LearningCurvesDisplay
            This object.

        Raises
        ------
        ValueError
            If there is nothing to draw, if a history lacks the column of `x`, has an epoch twice
            in one run or holds what is no number, or if `ax` are too few.
        ImportError
            If matplotlib is not installed.
        """
        if self.x not in TIMES:
            raise ValueError(f"x={self.x!r} was given, expected one of {', '.join(TIMES)}.")
        runs = {name: _runs(name, history, self.x) for name, history in self.histories.items()}
        quantities = [q for q in QUANTITIES if any(_columns(run, q) for run in runs.values())]
        if not quantities:
            raise ValueError(
                f"The histories of {list(runs)} have no losses and no accuracies, expected columns "
                f"such as train_loss or valid_accuracy."
            )
        self.lines_, self.ranges_ = {}, {}
        self.axes_ = self._open_pair(ax, len(quantities))
        for axes, quantity in zip(self.axes_, quantities, strict=True):
            for (name, run), colour in zip(runs.items(), colours_for(len(runs)), strict=True):
                for column in _columns(run, quantity):
                    self._draw_curve(axes, run, name, column, colour)
            self._label(axes, quantity)
        self._add_legend(dict(zip(runs, colours_for(len(runs)), strict=True)), ax is None)
        return self

    @classmethod
    def from_histories(
        cls,
        histories: Mapping[str, History],
        *,
        x: str = "epoch",
        loss_name: str = "loss",
        loss_scale: str = "linear",
        ax: Axes | Sequence[Axes] | NDArray[Any] | None = None,
    ) -> Self:
        """Draw histories: those of estimators, or read from a file.

        Parameters
        ----------
        histories : dict of str to list of dict or pandas.DataFrame
            Of each model a row an epoch, with columns as in the class. Of the file of a
            comparison: ``dict(iter(pandas.read_csv("histories.csv").groupby("model")))``.
        x : {"epoch", "seconds"}, default="epoch"
            What runs to the right.
        loss_name : str, default="loss"
            What stands beside the losses.
        loss_scale : {"linear", "log"}, default="linear"
            Of the losses' axis.
        ax : matplotlib Axes or sequence of them, default=None
            As in `plot`.

        Returns
        -------
        display : LearningCurvesDisplay
            The display, drawn.

        Raises
        ------
        ValueError
            As in `plot`.
        """
        frames = {
            str(name): history if isinstance(history, pd.DataFrame) else pd.DataFrame(list(history))
            for name, history in histories.items()
        }
        display = cls(histories=frames, x=x, loss_name=loss_name, loss_scale=loss_scale)
        return display.plot(ax)

    @classmethod
    def from_estimators(
        cls,
        estimators: Mapping[str, Any],
        **kwargs: Any,
    ) -> Self:
        """Draw the histories of fitted estimators.

        These are `history_`, or of scikit-learn's networks `loss_curve_` and `validation_scores_`,
        which are accuracies.

        Parameters
        ----------
        estimators : dict of str to estimator
            Fitted; of a Pipeline the last step with a history is meant, of a search the best
            estimator.
        **kwargs : dict
            Of `from_histories`: `x`, `loss_name`, `loss_scale` and `ax`.

        Returns
        -------
        display : LearningCurvesDisplay
            The display, drawn.

        Raises
        ------
        TypeError
            If an estimator has neither.
        ValueError
            As in `plot`.
        """
        histories = {name: _history_of(name, step) for name, step in estimators.items()}
        return cls.from_histories(histories, **kwargs)

    def _open_pair(self, ax: Any, n: int) -> NDArray[Any]:
        plt = self._pyplot()
        if ax is None:
            _, pair = plt.subplots(
                1, n, figsize=(WIDTH * (0.4 + 0.3 * n), 4), layout="constrained", squeeze=False
            )
            pair = pair[0]
        elif np.ndim(ax) == 0 and n > 1:
            place = ax.get_subplotspec()
            if place is None:
                raise ValueError(
                    f"One axes was given for {n} pictures, loss and accuracy, and it has no place "
                    f"in a grid that could be shared; give {n} axes, or one of plt.subplots()."
                )
            ax.set_axis_off()
            # a layout engine sees to the room between the two itself
            wspace = 0.45 if ax.figure.get_layout_engine() is None else None
            inner = place.subgridspec(1, n, wspace=wspace)
            pair = np.array([ax.figure.add_subplot(inner[i]) for i in range(n)])
        else:
            pair = np.ravel(np.asarray(ax, dtype=object))
        if len(pair) != n:
            raise ValueError(f"{len(pair)} axes were given, expected {n}: the loss, the accuracy.")
        self._open(pair[0], 0, 0)
        return pair

    def _draw_curve(
        self, axes: Axes, run: pd.DataFrame, name: str, column: str, colour: Any
    ) -> None:
        part, quantity = column.split("_")
        # (n_epochs,) each, an epoch that no run recorded left out
        by_epoch = run.dropna(subset=[column]).groupby("epoch")
        values = by_epoch[column].agg(["mean", "min", "max"]) * QUANTITIES[quantity][1]
        x = by_epoch["x"].mean().to_numpy(dtype=float)
        mean = values["mean"].to_numpy(dtype=float)
        self.lines_[name, column] = axes.plot(x, mean, color=colour, linestyle=PARTS[part][1])[0]
        alone = _without_neighbours(np.isfinite(x) & np.isfinite(mean))
        if alone.any():
            self.lines_[name, column].set(marker="o", markevery=np.flatnonzero(alone).tolist())
        if run.groupby("epoch").size().max() > 1:
            self.ranges_[name, column] = axes.fill_between(
                x, values["min"], values["max"], color=colour, alpha=0.15, linewidth=0
            )

    def _label(self, axes: Axes, quantity: str) -> None:
        from matplotlib.ticker import MaxNLocator

        name = {"loss": self.loss_name, "accuracy": "accuracy (%)"}[quantity]
        axes.set(title=quantity.capitalize(), xlabel=TIMES[self.x], ylabel=name)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=self.x == "epoch", min_n_ticks=1))
        if quantity == "loss":
            axes.set_yscale(self.loss_scale)
        axes.grid(alpha=0.3)

    def _add_legend(self, colours: Mapping[str, Any], own_figure: bool) -> None:
        from matplotlib.lines import Line2D

        drawn = {column.split("_")[0] for _, column in self.lines_}
        parts = [PARTS[part] for part in PARTS if part in drawn]
        names = [*colours, *(label for label, _ in parts)]
        artists = [Line2D([], [], color=colour) for colour in colours.values()]
        artists += [Line2D([], [], color="0.3", linestyle=style) for _, style in parts]
        if own_figure:  # beside the curves there may be no room; below there is
            lines = "\n".join(names).split("\n")
            n_letters = 8 + max(map(len, lines))  # with the line beside them; some 12 an inch
            width = self.figure_.bbox.width / self.figure_.dpi  # inches
            width = min(WIDTH, max(width, n_letters / 12))
            n_columns = int(np.clip(12 * width // n_letters, 1, 5))
            self.legend_ = named_legend(
                self.figure_, names, artists, loc="outside lower center", ncols=n_columns
            )
            height = 3.6 + 0.21 * math.ceil(len(lines) / n_columns)
            self.figure_.set(figwidth=width, figheight=height)
        else:
            self.legend_ = named_legend(self.axes_[-1], names, artists, fontsize="small")
            self.legend_.set_in_layout(False)  # no layout squeezes the axes for it


# -- histories -------------------------------------------------------------------------------------


def _history_of(name: str, estimator: Any) -> list[dict[str, Any]]:
    model = fitted_model(estimator)
    records = epoch_records(model)
    if not records:
        raise TypeError(
            f"{name!r} is {model!r}, which recorded no epochs: expected a fitted estimator with "
            f"history_ or loss_curve_."
        )
    return records


def _runs(name: str, history: pd.DataFrame, x: str) -> pd.DataFrame:
    """The history with a column "x": the epoch, or the runs' mean seconds up to its end."""
    for column in dict.fromkeys(["epoch", x]):
        if column not in history:
            raise ValueError(
                f"The history of {name!r} has the columns {list(history)}, expected {column!r} "
                f"among them."
            )
    history = _with_numbers(name, history, x)
    run = [column for column in ("fold", "repeat") if column in history]
    if history.duplicated([*run, "epoch"]).any():
        raise ValueError(
            f"The history of {name!r} has an epoch twice in one run; tell the runs apart by a "
            f"column fold or repeat."
        )
    history = history.sort_values("epoch", kind="stable")
    if x == "epoch":
        return history.assign(x=history["epoch"])
    # Added up per epoch, not per run: with a slow run that ends early, means of the runs' own
    # sums would fall from one epoch to the next.
    ends = history.groupby("epoch")["seconds"].mean().cumsum()
    return history.assign(x=history["epoch"].map(ends))


def _with_numbers(name: str, history: pd.DataFrame, x: str) -> pd.DataFrame:
    """The history with the columns that are drawn as numbers, if that is what they hold."""
    drawn = ["epoch", x, *(part + end for end, _ in QUANTITIES.values() for part in PARTS)]
    numbers = {}
    for column in (column for column in dict.fromkeys(drawn) if column in history):
        try:
            numbers[column] = pd.to_numeric(history[column])
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"The history of {name!r} has in the column {column!r} what is no number "
                f"({error}), expected numbers, or NaN where an epoch has none."
            ) from error
    return history.assign(**numbers)


def _without_neighbours(is_drawn: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which points of a line have none beside them: no stroke reaches these."""
    before, after = np.pad(is_drawn, (1, 0))[:-1], np.pad(is_drawn, (0, 1))[1:]
    return is_drawn & ~before & ~after


def _columns(history: pd.DataFrame, quantity: str) -> list[str]:
    """Columns of a quantity that hold values, those of training rows first."""
    names = [part + QUANTITIES[quantity][0] for part in PARTS]
    return [name for name in names if name in history and history[name].notna().any()]


# -- classes ---------------------------------------------------------------------------------------


class ClassAccuracyDisplay(Display):
    """Accuracy of each class as bars, and that of all rows as a line.

    Create it with `from_predictions` or `from_estimator`.

    Parameters
    ----------
    accuracies : ndarray of shape (n_classes,)
        Share of the rows of each class that are predicted right.
    classes : ndarray of shape (n_classes,)
        Their labels.
    overall : float
        Share of all rows that are predicted right.
    n_rows : int
        How many rows there are.
    class_names : sequence or mapping of label to str, default=None
        Names of the labels; None shows the labels.

    Attributes
    ----------
    bars_ : matplotlib BarContainer
        The bars, from the top.
    texts_ : list of matplotlib Text
        Their numbers, in percent.
    line_ : matplotlib Line2D
        The accuracy of all rows.
    ax_ : matplotlib Axes
        Axes with the bars.
    figure_ : matplotlib Figure
        Figure with the axes.

    See Also
    --------
    sklearn.metrics.ConfusionMatrixDisplay : What the others are taken for.

    Examples
    --------
    >>> from skcifar.plotting import ClassAccuracyDisplay
    >>> y_true, y_pred = ["cat", "cat", "dog", "dog"], ["cat", "dog", "dog", "dog"]
    >>> display = ClassAccuracyDisplay.from_predictions(y_true, y_pred)
    >>> [text.get_text() for text in display.texts_]
    ['50.0', '100.0']
    """

    bars_: BarContainer
    texts_: list[Text]
    line_: Line2D

    def __init__(
        self,
        *,
        accuracies: NDArray[Any],
        classes: NDArray[Any],
        overall: float,
        n_rows: int,
        class_names: ClassNames = None,
    ) -> None:
        self.accuracies = accuracies
        self.classes = classes
        self.overall = overall
        self.n_rows = n_rows
        self.class_names = class_names

    def plot(self, ax: Axes | None = None, *, sort: bool = False) -> Self:
        """Draw the bars.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.
        sort : bool, default=False
            Whether the best class comes first; else the classes come in their own order.

        Returns
        -------
        display : ClassAccuracyDisplay
            This object.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        """
        names = names_of(self.classes, self.class_names)
        order = np.arange(len(self.classes))
        if sort:
            order = np.argsort(-self.accuracies, kind="stable")
        percent = 100 * self.accuracies[order]
        ax = self._open(ax, WIDTH, 1.2 + 0.28 * len(order))
        self.bars_, self.texts_ = _draw_bars(
            ax,
            [names[label] for label in self.classes[order]],
            percent,
            [f"{value:.1f}" for value in percent],
        )
        self.line_ = ax.axvline(100 * self.overall, color=FEW_COLOURS[1], linestyle="--")
        ax.set(
            xlim=(0, 108),  # the number beside a full bar has room
            xticks=range(0, 101, 20),
            xlabel="accuracy (%)",
            title=f"Accuracy per class; dashed: all {self.n_rows:,} rows, "
            f"{100 * self.overall:.1f}%",
        )
        return self

    @classmethod
    def from_predictions(
        cls,
        y_true: ArrayLike,
        y_pred: ArrayLike,
        *,
        class_names: ClassNames = None,
        sort: bool = False,
        ax: Axes | None = None,
    ) -> Self:
        """Draw the accuracies of predictions.

        Parameters
        ----------
        y_true : array-like of shape (n_samples,)
            Labels.
        y_pred : array-like of shape (n_samples,)
            The labels predicted.
        class_names : sequence or mapping of label to str, default=None
            Names of the labels; None shows the labels.
        sort : bool, default=False
            Whether the best class comes first.
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        display : ClassAccuracyDisplay
            The display, drawn.

        Raises
        ------
        ValueError
            If there are more labels than predictions, or fewer, if either is no column, or if
            `class_names` lacks a label.
        """
        check_consistent_length(y_true, y_pred)
        true = column_or_1d(y_true)
        right = true == column_or_1d(y_pred)
        classes = np.unique(true)
        return cls(
            accuracies=np.array([right[true == label].mean() for label in classes]),
            classes=classes,
            overall=float(right.mean()),
            n_rows=len(true),
            class_names=class_names,
        ).plot(ax, sort=sort)

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: ArrayLike,
        y: ArrayLike,
        **kwargs: Any,
    ) -> Self:
        """Draw the accuracies of a fitted classifier.

        Parameters
        ----------
        estimator : estimator
            A fitted classifier, Pipeline or search.
        X : array-like of shape (n_samples, ...)
            Images, as the estimator takes them.
        y : array-like of shape (n_samples,)
            Their labels.
        **kwargs : dict
            Of `from_predictions`: `class_names`, `sort` and `ax`.

        Returns
        -------
        display : ClassAccuracyDisplay
            The display, drawn.

        Raises
        ------
        ValueError
            As in `from_predictions`.
        """
        cls._pyplot()
        return cls.from_predictions(y, estimator.predict(X), **kwargs)


class ClassCountsDisplay(Display):
    """How many rows each class has, as bars.

    Create it with `from_labels`.

    Parameters
    ----------
    counts : ndarray of shape (n_classes,)
        Rows of each class.
    classes : ndarray of shape (n_classes,)
        Their labels.
    class_names : sequence or mapping of label to str, default=None
        Names of the labels; None shows the labels.

    Attributes
    ----------
    bars_ : matplotlib BarContainer
        The bars, from the top.
    texts_ : list of matplotlib Text
        Their numbers.
    ax_ : matplotlib Axes
        Axes with the bars.
    figure_ : matplotlib Figure
        Figure with the axes.

    Examples
    --------
    >>> from skcifar.plotting import ClassCountsDisplay
    >>> display = ClassCountsDisplay.from_labels(["cat", "dog", "cat"])
    >>> [text.get_text() for text in display.texts_]
    ['2', '1']
    """

    bars_: BarContainer
    texts_: list[Text]

    def __init__(
        self, *, counts: NDArray[Any], classes: NDArray[Any], class_names: ClassNames = None
    ) -> None:
        self.counts = counts
        self.classes = classes
        self.class_names = class_names

    def plot(self, ax: Axes | None = None) -> Self:
        """Draw the bars.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        display : ClassCountsDisplay
            This object.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        """
        names = names_of(self.classes, self.class_names)
        ax = self._open(ax, WIDTH, 1.2 + 0.28 * len(self.classes))
        self.bars_, self.texts_ = _draw_bars(
            ax,
            [names[label] for label in self.classes],
            self.counts,
            [f"{count:,}" for count in self.counts],
        )
        ax.set(
            xlim=(0, 1.12 * max(self.counts)),
            xlabel="rows",
            title=f"{sum(self.counts):,} rows of {len(self.classes)} classes",
        )
        return self

    @classmethod
    def from_labels(
        cls, y: ArrayLike, *, class_names: ClassNames = None, ax: Axes | None = None
    ) -> Self:
        """Count labels and draw the counts.

        Parameters
        ----------
        y : array-like of shape (n_samples,)
            Labels.
        class_names : sequence or mapping of label to str, default=None
            Names of the labels; None shows the labels.
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        display : ClassCountsDisplay
            The display, drawn.

        Raises
        ------
        ValueError
            If `class_names` lacks a label.
        """
        classes, counts = np.unique(np.asarray(y), return_counts=True)
        return cls(counts=counts, classes=classes, class_names=class_names).plot(ax)


def _draw_bars(
    ax: Axes, names: Sequence[str], values: NDArray[Any], texts: Sequence[str]
) -> tuple[BarContainer, list[Text]]:
    bars = ax.barh(range(len(names)), values, height=0.75, color=FEW_COLOURS[0])
    ax.set_yticks(range(len(names)), names, parse_math=False)
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    # a number on white, also where a line crosses it
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    return bars, list(ax.bar_label(bars, texts, padding=3, bbox=box, zorder=3))
