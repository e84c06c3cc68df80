"""Displays of the results of searches and sweeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from skcifar._display import WIDTH, Display
from skcifar._fitted import short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import LineCollection
    from matplotlib.image import AxesImage
    from matplotlib.text import Text

SCORES = ["mean_test_score", "score_mean"]  # of cv_results_, of a sweep's table
# Values of a number that stand one by one on an axis; of more, the axis is a scale.
MOST_LEVELS = 10
MISSING = "–"  # a grid of several dicts: the candidate's has no such parameter


class SweepHeatMapDisplay(Display):
    """The score of a search or sweep for each pair of values of two parameters.

    Create it with `from_search` or `from_results`.

    Parameters
    ----------
    scores : ndarray of shape (n_rows, n_columns)
        The scores; NaN where there is none.
    row_values, column_values : list of str
        The values of both parameters, in order.
    row_name, column_name : str
        The names of both.
    title : str, default=""
        What stands above: what is shown where a pair has several candidates.
    score_name : str, default="score"
        What the numbers are.

    Attributes
    ----------
    images_ : list of one matplotlib AxesImage
        The cells.
    texts_ : ndarray of matplotlib Text, of shape (n_rows, n_columns)
        Their numbers; None where there is none.
    colorbar_ : matplotlib Colorbar
        The scale.
    ax_ : matplotlib Axes
        Axes with the cells.
    figure_ : matplotlib Figure
        Figure with the axes.

    See Also
    --------
    ParallelCoordinatesDisplay : Any number of parameters.

    Examples
    --------
    >>> from sklearn.model_selection import GridSearchCV
    >>> from skcifar import MLPClassifier
    >>> from skcifar.datasets import load_digits
    >>> from skcifar.plotting import SweepHeatMapDisplay
    >>> grid = {"learning_rate_init": [1e-3, 1e-2], "batch_size": [64, 256]}
    >>> search = GridSearchCV(MLPClassifier(16, max_iter=2, random_state=0), grid, cv=2)
    >>> display = SweepHeatMapDisplay.from_search(search.fit(*load_digits(return_X_y=True)))
    >>> display.row_name, display.row_values, display.column_values
    ('batch_size', ['64', '256'], ['0.001', '0.01'])
    """

    images_: list[AxesImage]
    texts_: NDArray[Any]
    colorbar_: Any

    def __init__(
        self,
        *,
        scores: NDArray[Any],
        row_values: Sequence[str],
        column_values: Sequence[str],
        row_name: str,
        column_name: str,
        title: str = "",
        score_name: str = "score",
    ) -> None:
        self.scores = scores
        self.row_values = row_values
        self.column_values = column_values
        self.row_name = row_name
        self.column_name = column_name
        self.title = title
        self.score_name = score_name

    def plot(self, ax: Axes | None = None, *, values_format: str = ".3f") -> Self:
        """Draw the cells.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.
        values_format : str, default=".3f"
            How the numbers are written.

        Returns
        -------
        display : SweepHeatMapDisplay
            This object.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        """
        n_rows, n_columns = self.scores.shape
        ax = self._open(ax, min(WIDTH, 3 + 0.9 * n_columns), 1.4 + 0.55 * n_rows)
        cells = ax.imshow(self.scores, cmap="viridis", aspect="auto")
        self.images_ = [cells]
        self.texts_ = np.full(self.scores.shape, None, dtype=object)
        low, high = np.nanmin(self.scores), np.nanmax(self.scores)
        shades = (self.scores - low) / (high - low if high > low else 1.0)
        for (row, column), score in np.ndenumerate(self.scores):
            if np.isfinite(score):
                # white on the dark half of viridis, black on the light one
                colour = "white" if shades[row, column] < 0.55 else "black"
                self.texts_[row, column] = ax.text(
                    column, row, f"{score:{values_format}}", ha="center", va="center", color=colour
                )
        ax.set_xticks(range(n_columns), self.column_values, parse_math=False)
        ax.set_yticks(range(n_rows), self.row_values, parse_math=False)
        ax.set(xlabel=self.column_name, ylabel=self.row_name, title=self.title)
        self.colorbar_ = self.figure_.colorbar(cells, ax=ax, label=self.score_name)
        return self

    @classmethod
    def from_search(
        cls,
        search: Any,
        *,
        score: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """Draw the results of a fitted search.

        Parameters
        ----------
        search : GridSearchCV or similar
            With `cv_results_`.
        score : str, default=None
            As in `from_results`; None is the score by which the search chose.
        **kwargs : dict
            Of `from_results`: `parameters`, `others` and `ax`.

        Returns
        -------
        display : SweepHeatMapDisplay
            The display, drawn.

        Raises
        ------
        TypeError
            If it has none.
        ValueError
            As in `from_results`.
        """
        results, score = _results_of(search, score)
        return cls.from_results(results, score=score, **kwargs)

    @classmethod
    def from_results(
        cls,
        results: Mapping[str, Any] | pd.DataFrame,
        *,
        parameters: Sequence[str] | None = None,
        others: str = "best",
        score: str | None = None,
        ax: Axes | None = None,
    ) -> Self:
        """Draw the results of a search, or the table of a sweep.

        Values are sorted, one that a candidate lacks last, and stand at equal distances. Of a
        halving search the last round of each candidate counts.

        Parameters
        ----------
        results : dict or pandas.DataFrame
            `cv_results_`, the ``table.csv`` of a sweep, or a table with a row for each candidate.
        parameters : sequence of two str, default=None
            The parameters of the rows and of the columns; None takes those that vary, if they are
            two.
        others : {"best", "mean"}, default="best"
            Which score a cell shows where the remaining parameters vary.
        score : str, default=None
            Name of the scores; None is ``"mean_test_score"`` or ``"score_mean"``.
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        display : SweepHeatMapDisplay
            The display, drawn.

        Raises
        ------
        ValueError
            If `others` is another, if there are no such columns or no scores in them, or if it is
            not clear which two parameters are meant.
        """
        if others not in ("best", "mean"):
            raise ValueError(f"others={others!r} was given, expected 'best' or 'mean'.")
        table = ResultsTable(results, score, parameters)
        shown = list(parameters) if parameters is not None else table.varying
        if len(shown) != 2:
            raise ValueError(
                f"A heat map shows two parameters, and here are {len(shown)}: {shown}; say "
                f"parameters=(row, column)."
            )
        rows, columns = (Levels(table.frame[name]) for name in shown)
        scores = np.full((len(rows.texts), len(columns.texts)), np.nan)
        for cell in np.ndindex(scores.shape):
            found = table.scores[(rows.codes == cell[0]) & (columns.codes == cell[1])]
            scores[cell] = found.max() if others == "best" else found.mean()
        return cls(
            scores=scores,
            row_values=rows.texts,
            column_values=columns.texts,
            row_name=short_names(shown)[shown[0]],
            column_name=short_names(shown)[shown[1]],
            title=table.score_name + table.over(shown, others),
            score_name=table.score_name,
        ).plot(ax)


class ParallelCoordinatesDisplay(Display):
    """Candidates of a search or sweep as lines through their parameters, to their score.

    The higher the score, the lighter the line; the best are drawn last. Create it with
    `from_search` or `from_results`.

    Parameters
    ----------
    values : pandas.DataFrame
        A row for each candidate, a column for each parameter.
    scores : ndarray of shape (n_candidates,)
        Their scores; a candidate without a finite one is left out.
    score_name : str, default="score"
        What the numbers are.

    Attributes
    ----------
    lines_ : matplotlib LineCollection
        A line for each candidate, from the lowest score to the highest.
    texts_ : list of list of matplotlib Text
        The values written beside each axis, that of the scores being the last.
    colorbar_ : matplotlib Colorbar
        The scale.
    ax_ : matplotlib Axes
        Axes with the lines: parameter i at x = i, its values from 0 to 1.
    figure_ : matplotlib Figure
        Figure with the axes.

    See Also
    --------
    SweepHeatMapDisplay : Two parameters, and the numbers.

    References
    ----------
    .. [1] A. Inselberg, "The plane with parallel coordinates", The Visual Computer 1, 1985.

    Examples
    --------
    >>> import pandas as pd
    >>> from skcifar.plotting import ParallelCoordinatesDisplay
    >>> table = pd.DataFrame({"alpha": [1e-4, 1e-2], "units": [64, 8], "score_mean": [0.9, 0.8]})
    >>> display = ParallelCoordinatesDisplay.from_results(table, parameters=["alpha", "units"])
    >>> [[text.get_text() for text in texts] for texts in display.texts_[:2]]
    [['0.0001', '0.01'], ['8', '64']]
    """

    lines_: LineCollection
    texts_: list[list[Text]]
    colorbar_: Any

    def __init__(
        self, *, values: pd.DataFrame, scores: NDArray[Any], score_name: str = "score"
    ) -> None:
        self.values = values
        self.scores = scores
        self.score_name = score_name

    def plot(self, ax: Axes | None = None) -> Self:
        """Draw the lines.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        display : ParallelCoordinatesDisplay
            This object.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        """
        plt = self._pyplot()
        from matplotlib.collections import LineCollection

        finite = np.flatnonzero(np.isfinite(self.scores))
        order = finite[np.argsort(self.scores[finite], kind="stable")]
        names = [*short_names(list(self.values.columns)).values(), self.score_name]
        columns = [self.values.iloc[order, i] for i in range(self.values.shape[1])]
        scales = [Scale(column) for column in columns]
        scales.append(Scale(pd.Series(self.scores[order]), continuous=True))
        heights = np.column_stack([scale.heights for scale in scales])  # (n_lines, n_axes)
        points = np.stack([np.broadcast_to(np.arange(len(scales)), heights.shape), heights], -1)

        ax = self._open(ax, WIDTH, 4)
        self.lines_ = LineCollection(
            list(points), array=self.scores[order], cmap="viridis", linewidths=1.8, alpha=0.85
        )
        ax.add_collection(self.lines_)
        self.texts_ = [
            [_beside(ax, x, height, text) for height, text in scale.ticks]
            for x, scale in enumerate(scales)
        ]
        ax.vlines(range(len(scales)), 0, 1, color="0.3", linewidth=1, zorder=3)
        ax.set(xlim=(-0.4, len(scales) - 0.7), ylim=(-0.06, 1.06), yticks=[])
        ax.set_xticks(range(len(scales)), names)
        ax.set_title(f"{len(order)} candidates, coloured by their {self.score_name}")
        plt.setp(ax.spines.values(), visible=False)
        self.colorbar_ = self.figure_.colorbar(self.lines_, ax=ax, label=self.score_name)
        return self

    @classmethod
    def from_search(
        cls,
        search: Any,
        *,
        score: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """Draw the results of a fitted search.

        Parameters
        ----------
        search : GridSearchCV or similar
            With `cv_results_`.
        score : str, default=None
            As in `from_results`; None is the score by which the search chose.
        **kwargs : dict
            Of `from_results`: `parameters` and `ax`.

        Returns
        -------
        display : ParallelCoordinatesDisplay
            The display, drawn.

        Raises
        ------
        TypeError
            If it has none.
        ValueError
            As in `from_results`.
        """
        results, score = _results_of(search, score)
        return cls.from_results(results, score=score, **kwargs)

    @classmethod
    def from_results(
        cls,
        results: Mapping[str, Any] | pd.DataFrame,
        *,
        parameters: Sequence[str] | None = None,
        score: str | None = None,
        ax: Axes | None = None,
    ) -> Self:
        """Draw the results of a search, or the table of a sweep.

        Up to ten values of a parameter, or values that are no numbers, are sorted and stand at
        equal distances; more numbers stand on a scale, a logarithmic one if they are positive
        and span a factor of 50.

        Parameters
        ----------
        results : dict or pandas.DataFrame
            `cv_results_`, the ``table.csv`` of a sweep, or a table with a row for each candidate.
        parameters : sequence of str, default=None
            The parameters, from left to right; None takes those that vary.
        score : str, default=None
            Name of the scores; None is ``"mean_test_score"`` or ``"score_mean"``.
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        display : ParallelCoordinatesDisplay
            The display, drawn.

        Raises
        ------
        ValueError
            If there are no such columns, no parameters, or no scores.
        """
        table = ResultsTable(results, score, parameters)
        shown = list(parameters) if parameters is not None else table.varying or table.names
        scores = table.scores.to_numpy(dtype=np.float64)
        return cls(values=table.frame[shown], scores=scores, score_name=table.score_name).plot(ax)


def _beside(ax: Axes, x: int, height: float, text: str) -> Text:
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8}
    style: dict[str, Any] = {"ha": "right", "va": "center", "fontsize": 9, "bbox": box, "zorder": 4}
    return ax.text(x - 0.04, height, text, parse_math=False, **style)


# -- results of searches ---------------------------------------------------------------------------


def _results_of(search: Any, score: str | None) -> tuple[Any, str | None]:
    if not hasattr(search, "cv_results_"):
        raise TypeError(f"{search!r} was given, expected a fitted search, with cv_results_.")
    refit_score = f"mean_test_{search.refit}"
    if score is None and refit_score in search.cv_results_:  # one of several metrics
        score = refit_score
    return search.cv_results_, score


class ResultsTable:
    """Candidates of `cv_results_` or of a sweep's table: their parameters, their scores."""

    def __init__(
        self,
        results: Mapping[str, Any] | pd.DataFrame,
        score: str | None,
        parameters: Sequence[str] | None,
    ) -> None:
        if isinstance(results, pd.DataFrame):
            frame, known = results, results.attrs.get("parameters")
        else:
            frame, known = pd.DataFrame(dict(results)), None
        columns = [str(name) for name in frame.columns]
        prefix = "param_"
        if known is None and any(name.startswith(prefix) for name in columns):
            known = [name[len(prefix) :] for name in columns if name.startswith(prefix)]
            columns = [name.removeprefix(prefix) for name in columns]
        frame = frame.set_axis(columns, axis="columns")
        if known is None and "rank" in columns and "round" in columns:  # a sweep's table.csv
            known = columns[columns.index("rank") + 1 : columns.index("round")]
        asked = [score] if score else SCORES
        found = [name for name in asked if name in columns]
        missing = [name for name in parameters or () if name not in columns]
        if not found or missing or not (known or parameters):
            raise ValueError(
                f"The results have the columns {columns}, expected scores ({' or '.join(asked)}) "
                f"and parameters ({', '.join(missing or parameters or ['param_...'])}); say score= "
                f"and parameters=."
            )
        self.names = list(known or parameters or ())
        rounds = [name for name in ("iter", "round") if name in columns]
        if rounds and known:
            settings = frame[self.names].map(repr).agg(tuple, axis=1)
            latest = frame[rounds[0]].groupby(settings).transform("max")
            frame = frame[frame[rounds[0]] == latest]
        self.frame = frame.reset_index(drop=True)
        self.scores = self.frame[found[0]].astype(float)
        if not np.isfinite(self.scores).any():
            raise ValueError(
                f"None of {len(frame)} candidates has a score; there is nothing to draw."
            )
        self.score_name = "mean score" if found[0] in SCORES else found[0].replace("_", " ")

    @property
    def varying(self) -> list[str]:
        return [name for name in self.names if len(Levels(self.frame[name]).texts) > 1]

    def over(self, shown: Sequence[str], others: str) -> str:
        """What a cell shows where it has several candidates, as part of a title."""
        rest = [name for name in self.varying if name not in shown]
        names = " and ".join(short_names(rest).values())
        if not rest and not self.frame.duplicated(list(shown)).any():
            return ""
        return f", {others} over {names or 'the candidates of a cell'}"


class Levels:
    """The distinct values of a parameter, sorted, and which of them each candidate has."""

    def __init__(self, column: pd.Series) -> None:
        texts = [_text(value) for value in column]
        distinct = dict(zip(texts, column, strict=True))
        missing = [MISSING] if distinct.pop(MISSING, None) is not None else []
        try:
            self.texts = sorted(distinct, key=distinct.__getitem__) + missing
        except TypeError:  # values of different kinds: numbers in order, then all others
            ordered = sorted(distinct, key=lambda text: _order(distinct[text], text))
            self.texts = ordered + missing
        self.codes = np.array([self.texts.index(text) for text in texts])


def _text(value: Any) -> str:
    is_real = isinstance(value, (float, np.floating))
    if is_real and np.isnan(value):
        return MISSING
    return f"{value:.8g}" if is_real else str(value)


def _order(value: Any, text: str) -> tuple[bool, float, str]:
    is_number = isinstance(value, (int, float, np.number))
    return (not is_number, float(value) if is_number else 0.0, text)


class Scale:
    """An axis of parallel coordinates: where on it, from 0 to 1, each candidate is."""

    def __init__(self, column: pd.Series, continuous: bool = False) -> None:
        levels = Levels(column)
        numbers = pd.to_numeric(column, errors="coerce").to_numpy(dtype=float)
        if not continuous and (len(levels.texts) <= MOST_LEVELS or np.isnan(numbers).any()):
            # a single value stands in the middle
            n = len(levels.texts)
            places = np.linspace(0, 1, n) if n > 1 else np.array([0.5])
            self.heights = places[levels.codes]
            self.ticks = list(zip(places, levels.texts, strict=True))
            return
        low, high = numbers.min(), numbers.max()
        is_log = not continuous and low > 0 and high / low >= 50
        if is_log:
            numbers, low, high = np.log(numbers), np.log(low), np.log(high)
        self.heights = (numbers - low) / (high - low) if high > low else np.full(len(numbers), 0.5)
        places = np.linspace(0, 1, 5) if high > low else np.array([0.5])
        values = low + (high - low) * places
        values = np.exp(values) if is_log else values
        self.ticks = [(place, f"{v:.3g}") for place, v in zip(places, values, strict=True)]
