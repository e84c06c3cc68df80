"""One page from the files that the commands write: tables, curves, mistakes, provenance.

The page is a single HTML file that asks nothing of the network. Whatever a file says reaches it
as escaped text or as a JSON block that the page's script reads and writes back as text.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from skcifar._fitted import short_names
from skcifar._report_files import (
    RECORD_NAME,
    checked,
    confusion_counts,
    has_study,
    is_record,
    listed,
    read_csv,
    read_json,
    read_record,
    unexpected,
)
from skcifar._report_pieces import (
    INSTALL,
    MISSING,
    Block,
    Column,
    chance_columns,
    class_table,
    confusion_chart,
    curve_chart,
    difference_columns,
    fact_list,
    facts_of_runs,
    failure_list,
    figure_digits,
    fold_columns,
    gallery,
    in_order,
    json_numbers,
    learning_curves,
    left_out_note,
    number_columns,
    part_title,
    picture_list,
    setting_column,
    spread_column,
    sweep_maps,
    text_column,
    written,
)

__all__ = ["write_report"]

MAX_ROWS = 1000  # of the table of candidates
NOTHING = "There is no row in the table yet."


def write_report(
    folder: str | os.PathLike[str], output: str | os.PathLike[str] | None = None
) -> Path:
    """Write one HTML page about all results in a folder.

    Comparisons (``python -m skcifar compare --output``), sweeps and reproductions are found in
    the folder and in the folders below it, and become a section each: tables to sort, learning
    curves, confusion matrices, images of confident mistakes, maps of a sweep's parameters, and
    what is known of the data, the machine and the versions. The page needs no network, and no
    other file.

    Parameters
    ----------
    folder : str or path
        A folder of results, or one that holds some at any depth. Of the files that a command
        writes only its table, or one record of a reproduction, has to be there.
    output : str or path, default=None
        The page to write; None is ``report.html`` in `folder`.

    Returns
    -------
    path : pathlib.Path
        The page.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, or there are no results in it.
    ValueError
        If a file is not what the commands write: names the file, what is expected and what was
        found.
    ImportError
        If jinja2, or Pillow where there are images, is not installed.

    Notes
    -----
    Scores are drawn as they are in the files. A curve is the mean over folds (and repeats) of a
    setting's last network. Of a large sweep the best candidates are drawn; the page says how
    many it leaves out. Colours are those of Okabe and Ito [1]_ and viridis.

    References
    ----------
    .. [1] M. Okabe, K. Ito, "Color Universal Design: How to make figures and presentations that
       are friendly to colorblind people", 2002.

    Examples
    --------
    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from sklearn.dummy import DummyClassifier
    >>> from skcifar.datasets import load_digits
    >>> from skcifar.model_selection import compare
    >>> from skcifar.report import write_report
    >>> table = compare({"dummy": DummyClassifier()}, *load_digits(return_X_y=True), cv=2)
    >>> with TemporaryDirectory() as folder:
    ...     table.to_csv(Path(folder, "table.csv"), index=False)
    ...     write_report(folder).name
    'report.html'
    """
    folder = Path(folder)
    output = folder / "report.html" if output is None else Path(output)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    sections = list(_sections(folder))
    if not sections:
        raise FileNotFoundError(
            f"no results in {folder} or below it: looked for table.csv, which compare and sweep "
            "write, and for the JSON records of reproduce"
        )
    page = _render(sections, folder.resolve().name)
    # a folder's name may be of bytes that are no text
    output.write_text(page, encoding="utf-8", errors="replace")
    return output


def _render(sections: Sequence[Block], name: str) -> str:
    try:
        import jinja2
    except Exception as error:  # a broken installation may raise anything
        raise ImportError(INSTALL.format("jinja2")) from error
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_resource),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    script = _resource("report.js")
    # The browser runs the script with this digest, and no other.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.jinja").render(
        name=name, sections=sections, style=_resource("report.css"), script=script, digest=digest
    )


def _resource(name: str) -> str:
    return resources.files("skcifar").joinpath(name).read_text(encoding="utf-8")


def _sections(folder: Path) -> Iterator[Block]:
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        here = Path(path)
        # Of the folder that was asked for, what goes by a name of ours is taken at its word;
        # below it there may be files of anyone's.
        named = here == folder
        found = [_study(here)] if has_study(here) or (named and "table.csv" in files) else []
        records = [
            read_record(here / file)
            for file in sorted(files)
            if is_record(here / file) or (named and RECORD_NAME.fullmatch(file))
        ]
        found += [_reproduction(records)] if records else []
        for section in found:
            inside = here.relative_to(folder).as_posix()
            yield {"where": folder.resolve().name if inside == "." else inside, **section}


def _study(folder: Path) -> Block:
    """Describe a folder with a table.csv."""
    table = read_csv(folder / "table.csv")
    for column, describe in [("cv_mean", _comparison), ("score_mean", _sweep)]:
        if column in table:
            provenance = read_json(folder / "provenance.json")
            title = provenance.get("title") or folder.resolve().name
            section = {"title": title, "provenance": fact_list(provenance)}
            if table.empty:
                kind = "Comparison" if describe is _comparison else "Sweep"
                return section | {"kind": kind, "blocks": [{"is": "text", "text": NOTHING}]}
            return section | describe(folder, table, provenance)
    raise unexpected(
        folder / "table.csv",
        "the column cv_mean, which compare writes, or score_mean, which sweep writes",
        listed(table),
    )


# -- comparisons -----------------------------------------------------------------------------------


def _comparison(folder: Path, table: pd.DataFrame, provenance: Mapping[str, Any]) -> Block:
    path = folder / "table.csv"
    table = checked(table, path, text=["model"], numbers=["cv_mean", "cv_std"])
    table = table.sort_values("cv_mean", ascending=False, kind="stable")
    models = dict.fromkeys(table["model"])
    blocks = [
        _leaderboard(table, path),
        *failure_list(table, table["model"]),
        *learning_curves(folder / "histories.csv", "model", {name: name for name in models}, []),
        *_mistakes(folder, provenance),
    ]
    return {"kind": "Comparison", "blocks": blocks}


def _leaderboard(table: pd.DataFrame, path: Path) -> Block:
    seconds = {"fit_seconds": ("fit, s", ".2f"), "predict_seconds": ("predict, s", ".3f")}
    columns = [
        text_column("model", table["model"]),
        spread_column("accuracy", table["cv_mean"], table["cv_std"]),
        *difference_columns(table, path),
        *number_columns(
            table, path, {"train_score": ("train", ".4f"), "test_score": ("test", ".4f")}
        ),
        *number_columns(table, path, {**seconds, "epochs": ("epochs", ".0f")}),
        *fold_columns(table, path, r"split(\d+)_score"),
        *([text_column("settings", table["parameters"])] if "parameters" in table else []),
    ]
    return {
        "is": "table",
        "heading": "Leaderboard",
        "caption": "Accuracy on the rows that each fold leaves out: mean ± standard deviation. "
        "Difference from the best model with its 95% interval, corrected for the rows "
        "that folds share.",
        "columns": columns,
        "sorted": "accuracy",
    }


def _mistakes(folder: Path, provenance: Mapping[str, Any]) -> list[Block]:
    """Confusion matrices, accuracies of classes and the gallery, of predictions.csv."""
    path = folder / "predictions.csv"
    if not path.is_file():
        return []
    names = ["model", "part", "actual", "predicted"]
    predictions = checked(read_csv(path), path, text=names, numbers=["row", "confidence"])
    if predictions.empty:
        return []
    known = _known_classes(provenance)
    classes = [*known, *in_order({*predictions["actual"], *predictions["predicted"]} - set(known))]
    parts = predictions["part"].nunique()
    matrices = {}
    for (model, part), rows in predictions.groupby(["model", "part"], sort=False):
        actual, predicted = (
            pd.Categorical(rows[name], classes).codes.astype(np.int64)
            for name in ["actual", "predicted"]
        )
        counts = np.bincount(actual * len(classes) + predicted, minlength=len(classes) ** 2)
        label = str(model) if parts == 1 else f"{model}, {part_title(str(part))}"
        matrices[label] = counts.reshape(len(classes), -1)  # actual, predicted
    where = " and ".join(part_title(part) for part in predictions["part"].unique())
    return [
        *confusion_chart(matrices, dict.fromkeys(matrices, classes), f"; {where}"),
        *class_table({name: _diagonal(counts) for name, counts in matrices.items()}, classes),
        *gallery(folder / "gallery.npz", predictions),
    ]


def _known_classes(provenance: Mapping[str, Any]) -> list[str]:
    names = _data(provenance).get("class_names")
    return list(dict.fromkeys(map(str, names))) if isinstance(names, list) else []


def _data(provenance: Mapping[str, Any]) -> dict[str, Any]:
    data = provenance.get("data")
    return data if isinstance(data, dict) else {}


def _diagonal(counts: NDArray[Any]) -> NDArray[np.float64]:
    totals = counts.sum(axis=1)
    return np.where(totals > 0, np.diag(counts) / np.maximum(totals, 1), np.nan)


# -- sweeps ----------------------------------------------------------------------------------------


def _sweep(folder: Path, table: pd.DataFrame, provenance: Mapping[str, Any]) -> Block:
    path = folder / "table.csv"
    names = provenance.get("parameters") or _between([*map(str, table)], "rank", "round")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        expected = "parameters to be a list of columns of table.csv"
        raise unexpected(folder / "provenance.json", expected, repr(names)[:60])
    table = checked(table, path, text=["candidate", *names], numbers=["rank", "score_mean"])
    if "score_std" not in table:
        table["score_std"] = ""
    table = checked(table, path, numbers=["score_std"]).sort_values("rank", kind="stable")
    short = short_names(names)
    ranked = table[np.isfinite(table["rank"])]
    drawn = ranked[ranked["score_mean"].notna()]
    labels = {
        row["candidate"]: f"{row['rank']:.0f}: " + ", ".join(row[name] or MISSING for name in names)
        for row in drawn.to_dict("records")
    }
    key = ["Named by their rank: " + ", ".join(short.values()) + "."]
    blocks = [
        _candidates(table, path, short),
        *failure_list(table, table[names].agg(", ".join, axis=1) if names else table["candidate"]),
        *sweep_maps(drawn, short),
        *learning_curves(folder / "epochs.csv", "candidate", labels, key),
    ]
    return {"kind": "Sweep", "blocks": blocks}


def _between(columns: Sequence[str], first: str, last: str) -> list[str]:
    """Name the parameters of an older table: its columns from rank to round."""
    if first not in columns or last not in columns:
        return []
    return list(columns[columns.index(first) + 1 : columns.index(last)])


def _candidates(table: pd.DataFrame, path: Path, short: Mapping[str, str]) -> Block:
    shown = table.head(MAX_ROWS)
    rounds = {"round": ("round", ".0f")} if table.get("round", pd.Series()).nunique() > 1 else {}
    folds = fold_columns(shown, path, r"split(\d+)_test_score")
    columns = [
        *number_columns(shown, path, {"rank": ("rank", ".0f")}),
        *(setting_column(title, shown[name]) for name, title in short.items()),
        *number_columns(shown, path, rounds),
        spread_column("score", shown["score_mean"], shown["score_std"]),
        *chance_columns(shown, path),
        *number_columns(shown, path, {"seed_std": ("± seeds", ".4f")}),
        *number_columns(
            shown, path, {c: (c.replace("_", " "), ".4f") for c in ["train_loss", "valid_loss"]}
        ),
        *number_columns(shown, path, {"epochs": ("epochs", ".0f")}),
        *number_columns(
            shown, path, {"fit_seconds": ("fit, s", ".2f"), "score_seconds": ("score, s", ".3f")}
        ),
        *(folds if len(folds) > 1 else []),  # one fold's score is the mean
    ]
    caption = "Score on the rows left out of training: mean ± standard deviation over folds."
    if any(text.startswith("~") for column in columns for text in column.texts):
        caption += " ~ is within chance of the best (corrected resampled t-test, 5%)."
    return {
        "is": "table",
        "heading": "Candidates",
        "caption": caption,
        "columns": columns,
        "sorted": "rank",
        "note": left_out_note(len(table), len(shown), "candidates"),
    }


# -- reproductions ---------------------------------------------------------------------------------


def _reproduction(records: Sequence[dict[str, Any]]) -> Block:
    lines = [
        _Line(record, row, name)
        for record in records
        for row in record["rows"]
        for name in dict.fromkeys([*row["figures"], *row["reported_figures"]]) or [""]
    ]
    summary = {
        "is": "table",
        "heading": "Systems",
        "caption": "The figure that a report gives, beside the one measured here.",
        "columns": _system_columns(lines),
        "wrapped": True,
    }
    systems = [_system(record) for record in records]
    n_systems = len({record["id"] for record in records})  # scaled down and full are one
    return {
        "kind": "Reproduction",
        "title": f"{n_systems} system{'s' * (n_systems != 1)} of the reports",
        "blocks": [summary, *systems],
        "provenance": [],
    }


class _Line(NamedTuple):
    """One figure of one row of a record."""

    record: Mapping[str, Any]
    row: Mapping[str, Any]
    name: str

    @property
    def ours(self) -> float:
        return self.row["figures"].get(self.name, math.nan)

    @property
    def reported(self) -> float:
        return self.row["reported_figures"].get(self.name, math.nan)

    @property
    def data(self) -> str:
        data = _data(self.record["provenance"])
        return ", ".join(str(data[key]) for key in ["name", "variant"] if data.get(key)) or MISSING


def _system_columns(lines: Sequence[_Line]) -> list[Column]:
    def text(title: str, values: Iterable[str]) -> Column:
        return text_column(title, pd.Series(values, dtype=object))

    def figure(title: str, values: Sequence[float], sign: str = "") -> Column:
        named = zip([line.name for line in lines], values, strict=True)
        texts = [written(value, sign + figure_digits(name, value)) for name, value in named]
        return Column(title, texts, json_numbers(values), True)

    def number(title: str, values: Sequence[float], digits: str) -> Column:
        texts = [written(value, digits) for value in values]
        return Column(title, texts, json_numbers(values), True)

    runs = ["scaled down" if line.row.get("scaled") else "full" for line in lines]
    titles = [line.record["title"] for line in lines]
    return [
        text("system", [line.record["id"] for line in lines])._replace(details=titles),
        text("row", [line.row["name"] for line in lines]),
        text("figure", [line.name or MISSING for line in lines]),
        figure("report", [line.reported for line in lines]),
        figure("ours", [line.ours for line in lines]),
        figure("difference", [line.ours - line.reported for line in lines], "+"),
        *([text("run", runs)] if len(set(runs)) > 1 else []),
        number("report, min", [line.record["reported_minutes"] for line in lines], "g"),
        number("ours, s", [line.row["seconds"] for line in lines], ".1f"),
        text("data", [line.data for line in lines]),
    ]


def _system(record: Mapping[str, Any]) -> Block:
    path, rows = record["file"], record["rows"]
    facts = [("report", str(record.get("reported") or MISSING))]
    for row in rows:
        parts = [
            str(row[key]) for key in ["estimator", "protocol", "scaled", "note"] if row.get(key)
        ]
        facts.append((row["name"], "; ".join(parts) or MISSING))
    classes = list(dict.fromkeys(name for row in rows for name in row["classes"]))
    accuracies = {
        row["name"]: np.array([row["classes"].get(name, np.nan) for name in classes])
        for row in rows
        if row["classes"]
    }
    captions = dict.fromkeys(map(str, record["pictures"]), record["title"])
    captions |= {str(name): row["name"] for row in rows for name in row["pictures"]}
    blocks = [
        *_curves(rows, path),
        *_confusion(record),
        *(class_table(accuracies, classes) if accuracies else []),
        *picture_list(path.parent, captions),
    ]
    return {
        "is": "system",
        "id": record["id"],
        "title": record["title"],
        "quick": any(row.get("scaled") for row in rows),
        "facts": facts,
        "note": record.get("note") or "",
        "blocks": blocks,
        "provenance": facts_of_runs(record),
    }


def _curves(rows: Sequence[Mapping[str, Any]], path: Path) -> list[Block]:
    """Draw the curves of rows, and of the models that a row may have several of."""
    epochs = pd.DataFrame([{**each, "row": row["name"]} for row in rows for each in row["curve"]])
    if epochs.empty:
        return []
    if "model" in epochs:
        several = epochs["model"].notna()
        epochs.loc[several, "row"] += ": " + epochs["model"][several].astype(str)
        epochs = epochs.drop(columns="model")
    labels = {name: name for name in epochs["row"]}
    return curve_chart(epochs, path, "row", labels, [], "first")


def _confusion(record: Mapping[str, Any]) -> list[Block]:
    known = _known_classes(record["provenance"])
    matrices, classes = {}, {}
    for row in record["rows"]:
        if row.get("confusion"):
            counts = confusion_counts(row["confusion"], record["file"])
            numbers = [str(index) for index in range(len(counts))]
            choice = [known, [*row["classes"]], numbers]
            matrices[row["name"]] = counts
            classes[row["name"]] = next(names for names in choice if len(names) == len(counts))
    return confusion_chart(matrices, classes)
