"""What a sweep found: the table of its candidates, as text, as files and as a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from skcifar._command_line import TABLE_WIDTH, replacing, write_learning_curves
from skcifar._fitted import short_names
from skcifar.plotting import LearningCurvesDisplay

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALL_CURVES = 10  # candidates, at most, that are all drawn
FEW_CURVES = 5
# After the candidate's parameters, in the table's order: titles and how a figure is written.
# A column that is empty for all candidates is not shown.
COLUMNS: dict[str, tuple[str, str]] = {
    "train_loss": ("train loss", ".4f"),
    "valid_loss": ("valid loss", ".4f"),
    "epochs": ("epochs", ".0f"),
    "fit_seconds": ("fit s", ".2f"),
}
WITHIN_CHANCE = "~ within chance of the best (corrected resampled t-test, 5%)"


def results_table(search: Any, errors: Mapping[int, str]) -> pd.DataFrame:
    """Give a row for each candidate of each round, best first.

    Parameters
    ----------
    search : fitted search
        One of the batched searches.
    errors : mapping of int to str
        Of row numbers of ``cv_results_`` whose fits failed.

    Returns
    -------
    table : pandas.DataFrame
        Indexed by rows of ``cv_results_``. ``rank`` is missing for what a later round of halving
        has again, ``difference`` where another round's score is the best. Losses and epochs are
        those that the last network of each fit ended with, means over all fits. ``attrs`` has
        "parameters", the names of their columns.
    """
    results = search.cv_results_
    scores = [f"split{i}_test_score" for i in range(search.n_splits_)]
    table = _parameters(search, results["params"])
    table["round"] = results.get("iter", 0)
    table["score_mean"] = results["mean_test_score"]
    table["score_std"] = results["std_test_score"] if len(scores) > 1 else np.nan
    table["difference"] = np.nan  # here in the order of columns
    table["like_best"] = results["indistinguishable_from_best"] & (len(scores) > 1)
    table["seed_std"] = results["seed_std_test_score"]
    table[scores] = pd.DataFrame({name: results[name] for name in scores})
    table = table.join(_last_epochs(search.epoch_results_))
    table["fit_seconds"] = results["mean_fit_time"]
    table["score_seconds"] = results["mean_score_time"]
    table["error"] = pd.Series(dict(errors), dtype=object)
    return _ranked(table, list(search.param_grid))


def partial_table(search: Any, n_splits: int, errors: Mapping[int, str]) -> pd.DataFrame:
    """Give a row for each candidate with a finished fit, from a search's `partial_results_`."""
    by_candidate = search.partial_results_.groupby("candidate")
    table = _parameters(search, by_candidate["params"].first())
    settings = _settings(table, list(search.param_grid))
    table["round"] = settings.groupby(settings).cumcount()
    table["score_mean"] = by_candidate["test_score"].mean()
    table["score_std"] = by_candidate["test_score"].std(ddof=0) if n_splits > 1 else np.nan
    table["like_best"] = False
    table["fits"] = [f"{n} of {n_splits}" for n in by_candidate.size()]
    table["fit_seconds"] = by_candidate["fit_time"].mean()
    table["error"] = pd.Series(dict(errors), dtype=object)
    return _ranked(table, list(search.param_grid))


def _parameters(search: Any, params: Any) -> pd.DataFrame:
    """A column for each parameter of the grid, values as they are; a row for each candidate."""
    params = pd.Series(params)
    columns = {name: [each[name] for each in params] for name in search.param_grid}
    return pd.DataFrame(columns, index=params.index, dtype=object)


def _settings(table: pd.DataFrame, names: list[str]) -> pd.Series:
    """What tells the candidates of one round apart."""
    return table[names].map(repr).agg(", ".join, axis=1)


def _last_epochs(epochs: pd.DataFrame) -> pd.DataFrame:
    """Losses and number of epochs with which the fits of each candidate ended."""
    last = epochs.groupby(["candidate", "fold", "repeat"]).tail(1)
    last = last.rename(columns={"epoch": "epochs"}).set_index("candidate")
    return last.reindex(columns=list(COLUMNS)[:3]).groupby("candidate").mean()


def _ranked(table: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Sort: what was not given up comes first, then the higher score; failures come last."""
    superseded = table["round"] < table.groupby(_settings(table, names))["round"].transform("max")
    order = pd.DataFrame(
        {
            "superseded": superseded,
            "failed": table["score_mean"].isna(),
            "round": -table["round"],
            "score": -table["score_mean"],
        }
    ).sort_values(["superseded", "failed", "round", "score"], kind="stable")
    table, superseded = table.loc[order.index], superseded.loc[order.index]
    best = table.iloc[0]
    comparable = (table["round"] == best["round"]) & ~superseded
    table["difference"] = (table["score_mean"] - best["score_mean"]).where(comparable)
    table["like_best"] = table["like_best"] & comparable
    rank = pd.Series(np.arange(1, len(table) + 1), table.index, dtype="Int64")
    table.insert(0, "rank", rank.mask(superseded))
    table.attrs["parameters"] = names
    return table


# -- as text ---------------------------------------------------------------------------------------


def format_table(table: pd.DataFrame, top: int) -> str:
    """Lay out the best `top` candidates and as many of those that failed, errors below them."""
    table = table[table["rank"].notna()]
    failed = table["score_mean"].isna()
    shown = pd.concat([table[~failed].head(top), table[failed].head(top)])
    cells = {"rank": shown["rank"].astype(str).where(shown["score_mean"].notna(), "-")}
    for name, title in short_names(table.attrs["parameters"]).items():
        cells[title] = shown[name].map(str)
    cells["accuracy"] = _scores(shown)
    if shown["difference"].count() > 1:
        cells["difference"] = _differences(shown)
    if "fits" in shown:
        cells["fits"] = shown["fits"]
    for name, (title, digits) in COLUMNS.items():
        if name in shown and shown[name].notna().any():
            cells[title] = _numbers(shown[name], digits)
    left = {*short_names(table.attrs["parameters"]).values(), "accuracy"}
    text = _aligned(cells, left, list(shown["error"]))
    if (cells.get("difference", pd.Series(dtype=str)).str.startswith("~")).any():
        text += f"\n{WITHIN_CHANCE}"
    hidden = failed.sum() - shown["score_mean"].isna().sum()
    return text + (f"\n{hidden} more failed" if hidden else "")


def _scores(table: pd.DataFrame) -> pd.Series:
    means, spreads = _numbers(table["score_mean"], ".4f"), _numbers(table["score_std"], ".4f")
    return means.where(spreads == "-", means + " ± " + spreads)


def _differences(table: pd.DataFrame) -> pd.Series:
    text = _numbers(table["difference"], "+.4f")
    text = text.where(~table["like_best"], "~ " + text)
    text.iloc[0] = "best"
    return text


def _numbers(column: pd.Series, digits: str) -> pd.Series:
    return column.map(lambda number: "-" if pd.isna(number) else f"{number:{digits}}")


def _aligned(cells: Mapping[str, pd.Series], left: set[str], errors: list[Any]) -> str:
    columns = [[title, *column] for title, column in cells.items()]
    for column in columns:
        width = max(map(len, column))
        ranged = str.ljust if column[0] in left else str.rjust
        column[:] = [ranged(cell, width) for cell in column]
    lines = []
    for line, error in zip(zip(*columns, strict=True), [None, *errors], strict=True):
        lines.append("  ".join(line).rstrip())
        if isinstance(error, str):
            lines.append("  " + textwrap.shorten(f"failed: {error}", TABLE_WIDTH - 2))
    return "\n".join(lines)


# -- as files --------------------------------------------------------------------------------------


def write_results(
    table: pd.DataFrame,
    epochs: pd.DataFrame,
    folder: Path,
    title: str,
    tell: Callable[[str], None],
) -> None:
    with replacing(folder / "table.csv") as path:
        table.to_csv(path, index_label="candidate")
    with replacing(folder / "epochs.csv") as path:
        epochs.to_csv(path, index=False)
    tell(f"wrote table.csv and epochs.csv to {folder}")
    why_none = "no candidate recorded its epochs" if epochs.empty else None
    draw = partial(draw_learning_curves, table, epochs, title)
    write_learning_curves(folder, draw, tell, why_none=why_none)


def draw_learning_curves(table: pd.DataFrame, epochs: pd.DataFrame, title: str) -> Figure:
    """Draw what the best candidates recorded, each named by its parameters."""
    trained = table[table["rank"].notna() & table.index.isin(epochs["candidate"])]
    drawn = trained if len(trained) <= ALL_CURVES else trained.head(FEW_CURVES)
    # a network before the last (an embedding, say) has a loss of another kind
    fits = epochs.groupby(["candidate", "fold", "repeat"])["fit"].transform("max")
    recorded = dict(iter(epochs[epochs["fit"] == fits].groupby("candidate")))
    names = _names(drawn)
    display = LearningCurvesDisplay.from_histories(
        {name: recorded[candidate] for candidate, name in names.items()}, loss_scale="log"
    )
    figure: Any = display.figure_  # of its own
    subtitle = f"mean over folds, shaded from lowest to highest; {len(drawn)} of {len(trained)}"
    # a folder's name is no formula, whatever it holds
    text = f"{textwrap.fill(title, 90)}\n{subtitle} candidates"
    figure.suptitle(text, parse_math=False)
    return figure


def _names(table: pd.DataFrame) -> dict[Any, str]:
    """The parameters of each candidate in lines, after its number where others have the same."""
    titles = short_names(table.attrs["parameters"])
    settings = {
        candidate: textwrap.fill(", ".join(f"{titles[name]}={row[name]}" for name in titles), 80)
        for candidate, row in table.to_dict("index").items()
    }
    texts = list(settings.values())
    return {
        candidate: text if texts.count(text) == 1 else f"{candidate}: {text}"
        for candidate, text in settings.items()
    }
