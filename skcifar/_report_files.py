"""What the commands have written, read and checked: tables, records, images.

Each error names the file, what is expected and what was found.
"""

from __future__ import annotations

import csv
import json
import math
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

SCHEMA = "skcifar reproduction 1"
RECORD_NAME = re.compile(r"\d{3}-[\w.-]+\.json")  # 002-cnn.json, 002-cnn.quick.json
MAX_DEPTH = 20  # of objects within objects
MAX_COUNT = 2**53  # of images in a cell: above it the page's script rounds
MAX_GALLERY_BYTES = 2**29  # unpacked: a few hundred kB pack as much as one likes


def has_study(folder: Path) -> bool:
    """Tell whether there is a table with columns of ours, or one beside a provenance."""
    path = folder / "table.csv"
    if not path.is_file():
        return False
    with path.open("rb") as file:
        header = file.readline(2**16)
    ours = b"cv_mean" in header or b"score_mean" in header
    return ours or (folder / "provenance.json").is_file()


def is_record(path: Path) -> bool:
    """Tell whether a file has the mark of a record."""
    if path.suffix != ".json" or path.name == "provenance.json" or not path.is_file():
        return False
    with path.open("rb") as file:
        return b'"skcifar reproduction' in file.read(2**16)


def read_csv(path: Path) -> pd.DataFrame:
    """All cells as text: a class may be called 1, NA or nan."""
    _check_here(path)
    try:
        with _cells_of_any_length(), path.open(encoding="utf-8-sig", newline="") as file:
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


@contextmanager
def _cells_of_any_length() -> Iterator[None]:
    """Read long tracebacks too; the limit is one of the process."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a C long, of 32 bits on Windows
    try:
        yield
    finally:
        csv.field_size_limit(before)


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    _check_here(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise unexpected(path, "a JSON file", f"one that cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise unexpected(path, "a JSON object", type(content).__name__)
    depth = 0
    level: list[Any] = [content]
    while level:
        depth += 1
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [child for each in inner for child in each if isinstance(child, dict | list)]
    if depth > MAX_DEPTH:
        raise unexpected(path, f"objects nested at most {MAX_DEPTH} deep", f"{depth}")
    return content


def is_elsewhere(path: Path) -> bool:
    """Tell links out of a folder: what lies elsewhere is not for a page that is passed on."""
    return path.resolve().parent != path.parent.resolve()


def _check_here(path: Path) -> None:
    if is_elsewhere(path):
        raise unexpected(path, "a file of the folder itself", f"a link to {path.resolve()}")


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


def read_gallery(path: Path) -> tuple[str, dict[int, NDArray[np.uint8]]]:
    _check_here(path)
    arrays, found = {}, "none"
    try:
        with zipfile.ZipFile(path) as file:
            headers = {name: _header(file, name) for name in ["part", "rows", "images"]}
            found = ", ".join(f"{name} {s} of {dtype}" for name, (s, dtype) in headers.items())
            if _fit_together(headers):
                arrays = {name: _array(file, name) for name in headers}
    except Exception as error:  # zipfile, numpy and zlib have their own each
        found = f"a file that cannot be read ({error})"
    if not arrays:
        expected = (
            "arrays part (text), rows (k,) and images (k, H, W) or (k, H, W, 3) of uint8, of at "
            f"most {MAX_GALLERY_BYTES:,} bytes"
        )
        raise unexpected(path, expected, found)
    rows = arrays["rows"].tolist()
    return str(arrays["part"]), dict(zip(rows, arrays["images"], strict=True))


def _header(file: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of an array, before anything else is read of it."""
    with file.open(f"{name}.npy") as stream:
        one = np.lib.format.read_magic(stream) == (1, 0)
        read = getattr(np.lib.format, f"read_array_header_{1 if one else 2}_0")
        shape, _, dtype = read(stream)
    return shape, dtype


def _fit_together(headers: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> bool:
    part, rows, images = headers["part"], headers["rows"], headers["images"]
    shape = images[0]
    of_images = len(shape) == 3 or (len(shape) == 4 and shape[-1] == 3)
    whole = of_images and min(shape[1:]) > 0 and rows[0] == shape[:1] and part[0] == ()
    size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in headers.values())
    kinds = images[1] == np.uint8 and rows[1].kind in "iu" and part[1].kind == "U"
    return whole and kinds and size <= MAX_GALLERY_BYTES


def _array(file: zipfile.ZipFile, name: str) -> NDArray[Any]:
    with file.open(f"{name}.npy") as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def read_record(path: Path) -> dict[str, Any]:
    record = {**read_json(path), "file": path}
    if record.get("schema") != SCHEMA:
        raise unexpected(path, f"the schema {SCHEMA!r}", repr(record.get("schema")))
    record["provenance"] = record.get("provenance") or {}
    record["pictures"] = record.get("pictures") or []
    kinds = {"id": str, "title": str, "rows": list, "provenance": dict, "pictures": list}
    _check_fields(path, record, kinds)
    for row in record["rows"]:
        _check_row(path, row)
    names = [row["name"] for row in record["rows"]]
    if len(set(names)) < len(names):
        raise unexpected(path, "rows of different names", repr(names))
    minutes = _a_number(record.get("reported_minutes"), path, "reported_minutes")
    return {**record, "reported_minutes": minutes}


def _check_row(path: Path, row: Any) -> None:
    """Fill in what a row leaves out, and turn its numbers into floats."""
    if not isinstance(row, dict):
        raise unexpected(path, "rows to be objects", repr(row)[:60])
    _check_fields(path, row, {"name": str, "figures": dict})
    optional = {"reported_figures": dict, "curve": list, "classes": dict, "pictures": list}
    for name, kind in optional.items():
        row[name] = row.get(name) or kind()
    _check_fields(path, row, optional)
    for name in ["figures", "reported_figures", "classes"]:
        row[name] = _numbers(row[name], path)
    for index, epoch in enumerate(row["curve"]):
        if not isinstance(epoch, dict):
            raise unexpected(path, "curve to be of objects", repr(epoch)[:60])
        texts = {key: value for key, value in epoch.items() if isinstance(value, str)}
        numbers = {key: value for key, value in epoch.items() if key not in texts}
        row["curve"][index] = {**texts, **_numbers(numbers, path)}
    row["seconds"] = _a_number(row.get("seconds"), path, "seconds")


def _check_fields(path: Path, fields: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    for name, kind in kinds.items():
        if not isinstance(fields.get(name), kind):
            found = repr(fields.get(name))[:60]
            raise unexpected(path, f"{name} to be of type {kind.__name__}", found)


def _numbers(values: Mapping[str, Any], path: Path) -> dict[str, float]:
    return {name: _a_number(value, path, name) for name, value in values.items()}


def _a_number(value: Any, path: Path, name: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise unexpected(path, f"{name} to be a number", repr(value)[:60])
    try:
        return float(value)
    except OverflowError as error:
        raise unexpected(path, f"{name} to be a number", repr(f"{str(value)[:20]}…")) from error


def confusion_counts(confusion: Any, path: Path) -> NDArray[np.int64]:
    whole = isinstance(confusion, list) and all(
        isinstance(row, list)
        and len(row) == len(confusion)
        and all(type(count) is int and 0 <= count <= MAX_COUNT for count in row)
        for row in confusion
    )
    if not whole:
        raise unexpected(path, "confusion to be square, of whole numbers", repr(confusion)[:60])
    return np.array(confusion, dtype=np.int64)


def unexpected(path: Path, expected: str, found: str) -> ValueError:
    return ValueError(f"{path}: expected {expected}, found {found}")
