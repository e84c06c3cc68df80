"""Pieces of the report page: columns of tables, charts, images, numbers as text."""

from __future__ import annotations

import base64
import io
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from skcifar._report_files import checked, is_elsewhere, read_csv, read_gallery

FEW_CURVES = 7  # have colours of their own: as many as report.css names
MAX_CURVES = 12  # models or candidates whose learning curves are drawn
MAX_LINES = 200  # candidates in parallel coordinates
MAX_POINTS = 400  # of a curve: more than a screen tells apart
MAX_VALUES = 30  # of a parameter in the heat map
MAX_PICTURE_BYTES, MAX_PICTURE_PIXELS = 10_000_000, 40_000_000
MAX_WRONG, MAX_RIGHT = 12, 4  # images of a model in the gallery
THUMBNAIL = 96  # pixels, the longer side of a gallery image
MISSING = "–"
OF_RUN = ["date", "seed", "device", "machine", "versions"]  # a record may be of several runs
INSTALL = "the report page needs {}: pip install 'skcifar[report]'"

Block = dict[str, Any]  # what one piece of the template shows; "is" names the piece


# -- tables ----------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A column of a table: what is read, and what it is sorted by."""

    title: str
    texts: list[str]
    keys: list[Any]  # numbers or text; None where there is nothing
    numeric: bool
    details: list[str] | None = None  # small print below the texts


def text_column(title: str, values: pd.Series) -> Column:
    texts = [value if isinstance(value, str) and value else MISSING for value in values]
    return Column(title, texts, [None if text == MISSING else text for text in texts], False)


def setting_column(title: str, values: pd.Series) -> Column:
    """Sort a parameter as numbers if all its values are some; write it as in the file."""
    numbers = pd.to_numeric(values, errors="coerce")
    column = text_column(title, values)
    if numbers[values != ""].notna().all():  # a candidate may be without the parameter
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


def difference_columns(table: pd.DataFrame, path: Path) -> list[Column]:
    """Show the differences of a comparison with their intervals."""
    names = ["difference", "difference_low", "difference_high"]
    if not set(names) <= set(table):
        return []
    values = checked(table, path, numbers=names)[names]
    texts = [
        MISSING
        if math.isnan(middle)
        else "best"
        if middle == 0
        else f"{written(middle, '+.4f')} [{written(low, '+.4f')}, {written(high, '+.4f')}]"
        for middle, low, high in values.itertuples(index=False)
    ]
    return [Column("difference", texts, json_numbers(values["difference"]), True)]


def chance_columns(table: pd.DataFrame, path: Path) -> list[Column]:
    """Show the differences of a sweep, and mark those within chance."""
    if "difference" not in table:
        return []
    values = checked(table, path, numbers=["difference"])["difference"]
    like_best = table.get("like_best", pd.Series("", table.index)) == "True"
    texts = [
        "best"
        if value == 0
        else ("~ " if like and not math.isnan(value) else "") + written(value, "+.4f")
        for value, like in zip(values, like_best, strict=True)
    ]
    return [Column("difference", texts, json_numbers(values), True)]


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
    epochs: pd.DataFrame,
    path: Path,
    key: str,
    labels: Mapping[str, str],
    notes: Sequence[str],
    which: str = "best",
) -> list[Block]:
    """Means over folds and repeats at each epoch, for those of `labels` that have any."""
    epochs = checked(epochs, path, numbers=["epoch"])
    epochs = epochs[np.isfinite(epochs["epoch"])]
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
    at = _thinned(means)
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
    parts = {curve["part"] for curves in quantities.values() for curve in curves}
    told = [
        "Means over the folds still training, shaded from lowest to highest. " * spread,
        "Training is solid, validation dashed. " * ({"train", "valid"} <= parts),
        f"Brighter is {'better' if which == 'best' else 'first'}. " * (len(drawn) > FEW_CURVES),
    ]
    left_out = left_out_note(len(recorded), len(drawn), "curves", which)
    few = f"{len(at):,} of {len(recorded_at):,} epochs are drawn." * (len(at) < len(recorded_at))
    return [
        {
            "is": "chart",
            "chart": "curves",
            "heading": "Learning curves",
            "caption": f"{''.join(told)}Point at an epoch, or use the arrow keys, to read the "
            "values; the buttons hide and show a curve.",
            "note": " ".join(filter(None, [*notes, left_out, few])),
            "data": {
                "labels": [labels[name] for name in drawn],
                "epochs": at,
                "quantities": [{"name": name, "curves": quantities[name]} for name in order],
            },
        }
    ]


def _thinned(means: pd.DataFrame) -> list[float]:
    """At most MAX_POINTS epochs of each curve, its first and its last included."""
    kept: set[float] = set()
    for _, ours in means.groupby(level=0):
        # validation may come once in many epochs
        for measured in [ours, *(ours[ours[column].notna()] for column in ours)]:
            epochs = measured.index.get_level_values(1)
            places = np.linspace(0, len(epochs) - 1, min(len(epochs), MAX_POINTS))
            kept.update(epochs[places.round().astype(int)])
    return sorted(kept)


def confusion_chart(
    matrices: Mapping[str, NDArray[Any]], classes: Mapping[str, Sequence[str]], where: str = ""
) -> list[Block]:
    """Draw matrices by label, each with its own classes."""
    if not matrices:
        return []
    return [
        {
            "is": "chart",
            "chart": "confusion",
            "heading": "Confusion matrix",
            "caption": f"Images of each class (row) by the class predicted (column){where}.",
            "data": [
                {"label": name, "classes": list(classes[name]), "counts": counts.tolist()}
                for name, counts in matrices.items()
            ],
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
    few = [axis for axis in axes if len(axis["values"]) <= MAX_VALUES]
    many = [axis["title"] for axis in axes if axis not in few]
    rounds = drawn["round"].nunique() if "round" in drawn else 1
    notes = [
        "Scores are of each candidate's last round, so that of those given up early they are of "
        "a shorter training. " * (rounds > 1),
        f"Parameters of more than {MAX_VALUES} values are left out: {', '.join(many)}." * any(many),
    ]
    heat_map = {
        "is": "chart",
        "chart": "heatMap",
        "heading": "Two parameters",
        "caption": "The best score of the ranked candidates with both values; brighter is better.",
        "data": {"axes": few, "scores": scores},
        "note": "".join(notes),
    }
    coordinates = {
        "is": "chart",
        "chart": "parallel",
        "heading": "All parameters",
        "caption": "A line is a candidate with a rank and a score, from the parameters that vary "
        "to the score; brighter is better, and lies above the others. Point at one, or step "
        "through them with the arrow keys.",
        "data": parallel,
        "note": left_out_note(len(drawn), len(lines), "candidates"),
    }
    return [*([heat_map] if len(few) > 1 else []), coordinates]


def _axis(title: str, values: pd.Series) -> Block:
    """Give the values of a parameter in order, and the place of each candidate's among them."""
    places = {value: place for place, value in enumerate(in_order(values.unique()))}
    at = [places[value] for value in values]
    return {"title": title, "values": [value or MISSING for value in places], "at": at}


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


def facts_of_runs(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Give what is of a record, and what is of each row's run: once, where all rows agree."""
    runs = {
        row["name"]: dict(fact_list({name: row[name] for name in OF_RUN if name in row}))
        for row in record["rows"]
    }
    told = {name for name in OF_RUN if any(name in row for row in record["rows"])}
    facts = fact_list({k: value for k, value in record["provenance"].items() if k not in told})
    for name in dict.fromkeys(name for run in runs.values() for name in run):
        found = {row: run.get(name, MISSING) for row, run in runs.items()}
        if len(set(found.values())) == 1:
            facts.append((name, next(iter(found.values()))))
        else:
            facts += [(f"{row}: {name}", value) for row, value in found.items()]
    return facts


def left_out_note(n_all: int, n_shown: int, what: str, which: str = "best") -> str | None:
    if n_all == n_shown:
        return None
    return f"The {which} {n_shown:,} of {n_all:,} {what}; {n_all - n_shown:,} are left out."


def part_title(part: str) -> str:
    return {"test": "official test split", "left out": "rows that the folds leave out"}.get(
        part, part
    )


def in_order(values: Iterable[str]) -> list[str]:
    """As numbers if all are some, else as text; what is missing comes last."""
    values = list(values)
    missing = [value for value in values if value == ""]
    values = [value for value in values if value != ""]
    numbers = pd.to_numeric(pd.Series(values, dtype=object), errors="coerce")
    if numbers.notna().all():
        places = np.argsort(numbers.to_numpy(float), kind="stable")
        return [*(values[place] for place in places), *missing]
    return [*sorted(values), *missing]


def json_numbers(values: Iterable[Any]) -> list[float | None]:
    """Numbers for JSON, which knows no NaN and no infinity, to six digits."""
    return [float(f"{v:.6g}") if math.isfinite(v) else None for v in values]


def figure_digits(name: str, value: float) -> str:
    """Give the format of a figure that a system has: a share, a count, or of any size."""
    if "accuracy" in name:
        return ".4f"
    return ",.0f" if abs(value) < 1e9 and value == round(value) else ".4g"


def written(value: float, digits: str) -> str:
    return (
        MISSING if math.isnan(value) else f"{value:{digits}}".replace("-", "−").replace("inf", "∞")
    )


# -- images ----------------------------------------------------------------------------------------


def gallery(path: Path, predictions: pd.DataFrame) -> list[Block]:
    if not path.is_file():
        return []
    part, images = read_gallery(path)
    # of a model without probabilities the first come first, as in the file of images
    shown = predictions[
        (predictions["part"] == part) & predictions["row"].isin(images)
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
        f"{part_title(part)}. Of a model without probabilities, the first. "
        f"Images are shrunk to {THUMBNAIL} pixels, if they are larger."
    )
    return [{"is": "gallery", "caption": caption, "models": models}] if models else []


def _cards(chosen: pd.DataFrame, images: Mapping[int, NDArray[np.uint8]]) -> list[Block]:
    return [
        {
            **{name: row[name] for name in ["actual", "predicted"]},
            "row": int(row["row"]),
            "source": _data_uri(_png(images[int(row["row"])]), "image/png"),
            "confidence": "" if math.isnan(row["confidence"]) else f"{row['confidence']:.1%}",
        }
        for row in chosen.to_dict("records")
    ]


def _png(pixels: NDArray[np.uint8]) -> bytes:
    image = _pillow().fromarray(pixels)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def picture_list(folder: Path, captions: Mapping[str, str]) -> list[Block]:
    """Embed the pictures of a folder that `captions` names, and tell which cannot be."""
    pictures, refused = [], []
    for name, caption in captions.items():
        # A record names files beside it and no others.
        path = folder / Path(name).name
        try:
            if path.is_file():
                pictures.append({"name": path.name, "caption": caption, **_picture(path)})
        except ImportError:
            raise
        except Exception as error:  # Pillow raises its own, OSError, SyntaxError and ValueError
            refused.append(f"{path.name:.60} ({error!s:.200})")
    told = f"Pictures that cannot be shown: {'; '.join(refused)}." if refused else ""
    return [{"is": "pictures", "pictures": pictures, "note": told}] if pictures or told else []


def _picture(path: Path) -> Block:
    if is_elsewhere(path):
        raise ValueError("a link out of the folder")
    if path.stat().st_size > MAX_PICTURE_BYTES:
        raise ValueError(f"more than {MAX_PICTURE_BYTES:,} bytes")
    content = path.read_bytes()
    pillow = _pillow()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pillow.DecompressionBombWarning)  # the limit here is lower
        with pillow.open(io.BytesIO(content), formats=["PNG", "JPEG"]) as image:
            (width, height), kind = image.size, pillow.MIME[image.format]
            if width * height > MAX_PICTURE_PIXELS:
                raise ValueError(f"more than {MAX_PICTURE_PIXELS:,} pixels")
            image.verify()
    return {"source": _data_uri(content, kind), "width": width, "height": height}


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _pillow() -> Any:
    try:
        from PIL import Image
    except Exception as error:
        raise ImportError(INSTALL.format("Pillow")) from error
    return Image
