"""What the commands have written, read and checked: tables, records, images.

Each error names the file, what is expected and what was found.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

SCHEMA = "skcifar reproduction 1"
RECORD_NAME = re.compile(r"\d{3}-[\w.-]+\.json")  # 002-cnn.json, 002-cnn.quick.json


def read_csv(path: Path) -> pd.DataFrame:
    """All cells as text: a class may be called 1, NA or nan."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header, *rows = [cells for cells in csv.reader(file) if cells]
    except (ValueError, csv.Error) as error:
        found = f"one that cannot be read ({error})" if path.stat().st_size else "an empty file"
        raise unexpected(path, "a CSV file with a header", found) from error
    if len(set(header)) < len(header):
        raise unexpected(path, "columns of different names", ", ".join(header))
    # pandas would fill up a line that was cut off
    for number, cells in enumerate(rows, 1):
        if len(cells) != len(header):
            expected = f"{len(header)} cells in each row, as in the header"
            raise unexpected(path, expected, f"{len(cells)} in row {number} of {len(rows)}")
    return pd.DataFrame(rows, columns=header, dtype=object)


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise unexpected(path, "a JSON file", f"one that cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise unexpected(path, "a JSON object", type(content).__name__)
    return content


def checked(
    table: pd.DataFrame,
    path: Path,
    *,
    text: Sequence[str] = (),
    numbers: Sequence[str] = (),
) -> pd.DataFrame:
    """Give the table with the columns of `numbers` as such, once all columns are there."""
    missing = [name for name in [*text, *numbers] if name not in table]
    if missing:
        raise unexpected(path, f"the columns {', '.join(missing)}", listed(table))
    table = table.copy()
    for name in numbers:
        cells = table[name]
        table[name] = pd.to_numeric(cells.replace("", np.nan), errors="coerce")
        wrong = table[name].isna() & ~cells.isin(["", "nan", "NaN"]) & cells.notna()
        if wrong.any():
            raise unexpected(path, f"numbers in the column {name}", repr(cells[wrong].iloc[0]))
    return table


def listed(table: pd.DataFrame) -> str:
    return f"the columns {', '.join(map(str, table))}"


def read_gallery(path: Path) -> tuple[str, dict[float, NDArray[np.uint8]]]:
    expected = "arrays part (text), rows (k,) and images (k, H, W) or (k, H, W, 3) of uint8"
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # zipfile, numpy and zlib have their own each
        raise unexpected(path, expected, f"a file that cannot be read ({error})") from error
    found = ", ".join(f"{name} {a.shape} of {a.dtype}" for name, a in arrays.items()) or "none"
    if not {"part", "rows", "images"} <= set(arrays):
        raise unexpected(path, expected, found)
    rows, images = arrays["rows"], arrays["images"]
    whole = images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 3)
    if not whole or images.dtype != np.uint8 or rows.shape != images.shape[:1]:
        raise unexpected(path, expected, found)
    return str(arrays["part"]), dict(zip(rows.tolist(), images, strict=True))


def is_record(path: Path) -> bool:
    if path.suffix != ".json" or path.name == "provenance.json":
        return False
    return bool(RECORD_NAME.fullmatch(path.name)) or b'"skcifar reproduction' in path.read_bytes()


def read_record(path: Path) -> dict[str, Any]:
    record = {**read_json(path), "file": path}
    if record.get("schema") != SCHEMA:
        raise unexpected(path, f"the schema {SCHEMA!r}", repr(record.get("schema")))
    record["provenance"] = record.get("provenance") or {}
    record["pictures"] = record.get("pictures") or []
    kinds = {"id": str, "title": str, "rows": list, "provenance": dict, "pictures": list}
    _check_fields(path, record, kinds)
    for row in record["rows"]:
        if not isinstance(row, dict):
            raise unexpected(path, "rows to be objects", repr(row)[:60])
        _check_fields(path, row, {"name": str, "figures": dict})
        for name, kind in {"reported_figures": dict, "curve": list, "classes": dict}.items():
            row[name] = row.get(name) or kind()
            _check_fields(path, row, {name: kind})
        for name in ["figures", "reported_figures", "classes"]:
            row[name] = {key: _a_number(value, path, key) for key, value in row[name].items()}
        row["seconds"] = _a_number(row.get("seconds"), path, "seconds")
    minutes = _a_number(record.get("reported_minutes"), path, "reported_minutes")
    return {**record, "reported_minutes": minutes}


def _check_fields(path: Path, fields: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    for name, kind in kinds.items():
        if not isinstance(fields.get(name), kind):
            raise unexpected(path, f"{name} to be of type {kind.__name__}", repr(fields.get(name)))


def _a_number(value: Any, path: Path, name: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise unexpected(path, f"{name} to be a number", repr(value)[:60])
    return float(value)


def confusion_counts(confusion: Any, path: Path) -> NDArray[np.int64]:
    whole = isinstance(confusion, list) and all(
        isinstance(row, list)
        and len(row) == len(confusion)
        and all(type(count) is int for count in row)
        for row in confusion
    )
    if not whole:
        raise unexpected(path, "confusion to be square, of whole numbers", repr(confusion)[:60])
    return np.array(confusion, dtype=np.int64)


def unexpected(path: Path, expected: str, found: str) -> ValueError:
    return ValueError(f"{path}: expected {expected}, found {found}")
