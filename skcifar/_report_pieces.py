"""Pieces of the report page: columns of tables, charts, images, numbers as text."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from skcifar._report_files import checked, read_csv, read_gallery, unexpected

MAX_CURVES = 12  # models or candidates whose learning curves are drawn
MAX_LINES = 200  # candidates in parallel coordinates
MAX_POINTS = 400  # of a curve: more than a screen tells apart
MAX_WRONG, MAX_RIGHT = 12, 4  # images of a model in the gallery
THUMBNAIL = 96  # pixels, the longer side of a gallery image
MISSING = "–"
INSTALL = "the report page needs {}: pip install 'skcifar[report]'"

Block = dict[str, Any]  # what one piece of the template shows; "is" names the piece


# -- tables ----------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A column of a table: what is read, and what it is sorted by."""

    title: str
    texts: list[str]
    keys: list[Any]  # numbers or text; None where there is nothing
    numeric: bool


def text_column(title: str, values: pd.Series) -> Column:
    texts = [value if isinstance(value, str) and value else MISSING for value in values]
    return Column(title, texts, [None if text == MISSING else text for text in texts], False)


def setting_column(title: str, values: pd.Series) -> Column:
    """Sort a parameter as numbers if all its values are some; write it as in the file."""
    numbers = pd.to_numeric(values, errors="coerce")
    column = text_column(title, values)
    if numbers.notna().all():
        return column._replace(keys=json_numbers(numbers), numeric=True)
    return column


def number_column(title: str, values: pd.Series, digits: str) -> Column:
    return Column(title, [written(value, digits) for value in values], json_numbers(values), True)


def number_columns(
    table: pd.DataFrame, path: Path, columns: Mapping[str, tuple[str, str]]
) -> list[Column]:
    """Those of `columns`, names to titles and formats, that the table has and that hold figures."""
    table = checked(table, path, numbers=[name for name in columns if name in table])
    return [
        number_column(title, table[name], digits)
        for name, (title, digits) in columns.items()
        if name in table and table[name].notna().any()
    ]


def fold_columns(table: pd.DataFrame, path: Path, pattern: str) -> list[Column]:
    found = [re.fullmatch(pattern, name) for name in map(str, table)]
    titles = {match[0]: (f"fold {match[1]}", ".4f") for match in found if match}
    return number_columns(table, path, titles)


def spread_column(title: str, means: pd.Series, spreads: pd.Series) -> Column:
    texts = [
        written(mean, ".4f") + ("" if math.isnan(spread) else f" ± {spread:.4f}")
        for mean, spread in zip(means, spreads, strict=True)
    ]
    return Column(title, texts, json_numbers(means), True)


def class_table(
    accuracies: Mapping[str, NDArray[np.float64]], classes: Sequence[str]
) -> list[Block]:
    columns = [
        Column("class", list(classes), list(classes), False),
        *(number_column(name, pd.Series(values), ".4f") for name, values in accuracies.items()),
    ]
    caption = "Share of the images of a class that are recognised."
    return [{"is": "table", "heading": "Class by class", "caption": caption, "columns": columns}]


def failure_list(table: pd.DataFrame, names: pd.Series) -> list[Block]:
    empty = pd.Series("", table.index)
    rows = zip(names, table.get("error", empty), table.get("traceback", empty), strict=True)
    failed = [{"name": n, "error": error, "traceback": trace} for n, error, trace in rows if error]
    return [{"is": "failures", "failures": failed}] if failed else []


# -- charts ----------------------------------------------------------------------------------------


def learning_curves(
    path: Path, key: str, labels: Mapping[str, str], notes: Sequence[str]
) -> list[Block]:
    if not path.is_file():
        return []
    epochs = checked(read_csv(path), path, text=[key], numbers=["epoch"])
    if "fit" in epochs:
        # a network before the last (an embedding, say) has a loss of another kind
        epochs = checked(epochs, path, text=["fold", "repeat"], numbers=["fit"])
        fits = epochs.groupby([key, "fold", "repeat"])["fit"].transform("max")
        if (epochs["fit"] != fits).any():
            notes = [*notes, "Of networks trained one after the other, the last."]
        epochs = epochs[epochs["fit"] == fits]
    return curve_chart(epochs, path, key, labels, notes)


def curve_chart(
    epochs: pd.DataFrame, path: Path, key: str, labels: Mapping[str, str], notes: Sequence[str]
) -> list[Block]:
    """Means over folds and repeats at each epoch, for those of `labels` that have any."""
    epochs = checked(epochs, path, numbers=["epoch"]).dropna(subset="epoch")
    present = set(epochs[key])
    recorded = [name for name in labels if name in present]
    drawn = recorded[:MAX_CURVES]
    epochs = epochs[epochs[key].isin(drawn)]
    measured = epochs.drop(columns=[key, "epoch", "fold", "repeat", "fit"], errors="ignore")
    measured = measured.apply(pd.to_numeric, errors="coerce").dropna(axis=1, how="all")
    if {"valid_score", "valid_accuracy"} <= set(measured) and measured["valid_score"].equals(
        measured["valid_accuracy"]
    ):
        measured = measured.drop(columns="valid_score")
    if measured.empty:
        return []
    groups = measured.groupby([epochs[key], epochs["epoch"]])
    means, lows, highs = groups.mean(), groups.min(), groups.max()
    recorded_at = sorted(epochs["epoch"].unique().tolist())
    at = _thinned(recorded_at)
    quantities: dict[str, list[Block]] = {}
    for column in measured:
        part, _, quantity = str(column).partition("_")
        part, quantity = (part, quantity) if part in ("train", "valid") else ("", str(column))
        for index, name in enumerate(drawn):
            ours = means[column].loc[name].reindex(at)
            if ours.notna().any():
                low, high = (each[column].loc[name].reindex(at) for each in (lows, highs))
                curve = {"label": index, "part": part, "mean": json_numbers(ours)}
                if not low.equals(high):
                    curve |= {"low": json_numbers(low), "high": json_numbers(high)}
                quantities.setdefault(quantity, []).append(curve)
    order = sorted(quantities, key=lambda name: {"loss": 0, "accuracy": 1}.get(name, 2))
    spread = any("low" in curve for curves in quantities.values() for curve in curves)
    folds = "Means over the folds still training, shaded from lowest to highest. " if spread else ""
    left_out = left_out_note(len(recorded), len(drawn), "curves")
    few = f"{len(at):,} of {len(recorded_at):,} epochs are drawn." * (len(at) < len(recorded_at))
    return [
        {
            "is": "chart",
            "chart": "curves",
            "heading": "Learning curves",
            "caption": f"{folds}Point at an epoch, or use the arrow keys, to read the values; the "
            "buttons hide and show a curve.",
            "note": " ".join(filter(None, [*notes, left_out, few])),
            "data": {
                "labels": [labels[name] for name in drawn],
                "epochs": at,
                "quantities": [{"name": name, "curves": quantities[name]} for name in order],
            },
        }
    ]


def _thinned(epochs: Sequence[float]) -> list[float]:
    """At most MAX_POINTS of them, the first and the last included."""
    last = len(epochs) - 1
    places = np.unique(np.linspace(0, last, min(len(epochs), MAX_POINTS)).round().astype(int))
    return [epochs[place] for place in places]


def confusion_chart(
    matrices: Mapping[str, NDArray[Any]], classes: Sequence[str], where: str = ""
) -> list[Block]:
    if not matrices:
        return []
    options = [{"label": name, "counts": m.tolist()} for name, m in matrices.items()]
    return [
        {
            "is": "chart",
            "chart": "confusion",
            "heading": "Confusion matrix",
            "caption": f"Images of each class (row) by the class predicted (column){where}.",
            "data": {"classes": list(classes), "options": options},
        }
    ]


def sweep_maps(drawn: pd.DataFrame, short: Mapping[str, str]) -> list[Block]:
    """Give the heat map of two parameters, and parallel coordinates of all."""
    varied = {name: title for name, title in short.items() if drawn[name].nunique() > 1}
    if not varied:
        return []
    axes = [_axis(title, drawn[name]) for name, title in varied.items()]
    scores = json_numbers(drawn["score_mean"])
    lines = drawn.head(MAX_LINES)
    parallel = {
        "axes": [{**axis, "at": axis["at"][: len(lines)]} for axis in axes],
        "scores": scores[: len(lines)],
        "ranks": [int(rank) for rank in lines["rank"]],
    }
    chart = {"is": "chart", "note": None}
    heat_map = {
        **chart,
        "chart": "heatMap",
        "heading": "Two parameters",
        "caption": "The best score of the ranked candidates with both values.",
        "data": {"axes": axes, "scores": scores},
    }
    coordinates = {
        **chart,
        "chart": "parallel",
        "heading": "All parameters",
        "caption": "A line is a candidate with a rank and a score, from the parameters that vary "
        "to the score. Point at one, or step through them with the arrow keys.",
        "data": parallel,
        "note": left_out_note(len(drawn), len(lines), "candidates"),
    }
    return [*([heat_map] if len(axes) > 1 else []), coordinates]


def _axis(title: str, values: pd.Series) -> Block:
    """Give the values of a parameter in order, and the place of each candidate's among them."""
    places = {value: place for place, value in enumerate(in_order(values.unique()))}
    return {"title": title, "values": list(places), "at": [places[value] for value in values]}


# -- text ------------------------------------------------------------------------------------------


def fact_list(provenance: Any, before: str = "") -> list[tuple[str, str]]:
    """Names and values, those of nested objects behind the name of the object."""
    facts = []
    for name, value in provenance.items() if isinstance(provenance, dict) else ():
        if isinstance(value, dict):
            facts += fact_list(value, f"{before}{name}: ")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            facts.append((f"{before}{name}".replace("_", " "), MISSING if value is None else text))
    return facts


def left_out_note(n_all: int, n_shown: int, what: str) -> str | None:
    if n_all == n_shown:
        return None
    return f"The best {n_shown:,} of {n_all:,} {what}; {n_all - n_shown:,} are left out."


def part_title(part: str) -> str:
    return {"test": "official test split", "left out": "rows that the folds leave out"}.get(
        part, part
    )


def in_order(values: Iterable[str]) -> list[str]:
    """As numbers if all are some, else as text."""
    values = list(values)
    numbers = pd.to_numeric(pd.Series(values, dtype=object), errors="coerce")
    if numbers.notna().all():
        return [values[place] for place in np.argsort(numbers.to_numpy(float), kind="stable")]
    return sorted(values)


def json_numbers(values: Iterable[Any]) -> list[float | None]:
    """Numbers for JSON, which knows no NaN and no infinity, to six digits."""
    return [float(f"{v:.6g}") if math.isfinite(v) else None for v in values]


def written(value: float, digits: str) -> str:
    return (
        MISSING if math.isnan(value) else f"{value:{digits}}".replace("-", "−").replace("inf", "∞")
    )


# -- images ----------------------------------------------------------------------------------------


def gallery(path: Path, predictions: pd.DataFrame) -> list[Block]:
    if not path.is_file():
        return []
    part, images = read_gallery(path)
    shown = predictions[
        (predictions["part"] == part)
        & predictions["row"].isin(images)
        & predictions["confidence"].notna()
    ].sort_values("confidence", ascending=False, kind="stable")
    models = []
    for model, rows in shown.groupby("model", sort=False):
        right = rows["actual"] == rows["predicted"]
        kinds = {"wrong": rows[~right].head(MAX_WRONG), "right": rows[right].head(MAX_RIGHT)}
        models.append(
            {"label": model, **{kind: _cards(chosen, images) for kind, chosen in kinds.items()}}
        )
    caption = (
        f"A model's most confident predictions, at most {MAX_WRONG} wrong and {MAX_RIGHT} right; "
        f"{part_title(part)}. Images are shrunk to {THUMBNAIL} pixels, if they are larger."
    )
    return [{"is": "gallery", "caption": caption, "models": models}] if models else []


def _cards(chosen: pd.DataFrame, images: Mapping[float, NDArray[np.uint8]]) -> list[Block]:
    return [
        {
            **{name: row[name] for name in ["actual", "predicted"]},
            "row": int(row["row"]),
            "source": _data_uri(_png(images[row["row"]]), "image/png"),
            "confidence": f"{100 * row['confidence']:.1f}%",
        }
        for row in chosen.to_dict("records")
    ]


def _png(pixels: NDArray[np.uint8]) -> bytes:
    image = _pillow().fromarray(pixels)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def picture_list(folder: Path, names: Sequence[str]) -> list[Block]:
    pictures = []
    for name in names:
        # A record names files beside it and no others.
        path = folder / Path(str(name)).name
        if path.is_file():
            pictures.append({"name": path.name, **_picture(path)})
    return [{"is": "pictures", "pictures": pictures}] if pictures else []


def _picture(path: Path) -> Block:
    content = path.read_bytes()
    pillow = _pillow()
    try:
        with pillow.open(io.BytesIO(content), formats=["PNG", "JPEG"]) as image:
            image.verify()
            (width, height), kind = image.size, pillow.MIME[image.format]
    except Exception as error:  # Pillow raises its own, OSError, SyntaxError and ValueError
        raise unexpected(path, "a PNG or JPEG picture", str(error)) from error
    return {"source": _data_uri(content, kind), "width": width, "height": height}


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _pillow() -> Any:
    try:
        from PIL import Image
    except Exception as error:
        raise ImportError(INSTALL.format("Pillow")) from error
    return Image
