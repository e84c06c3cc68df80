"""The journal of a search: the tasks that are finished outlive the process that ran them.

A file of JSON lines. The first says what the search is, each other one holds a finished task, and
each has a checksum of its own. Python writes a float as the shortest text that reads as the same
float, and NaN as NaN, so that what is read is what was written.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, BinaryIO

import joblib
import numpy as np
import pandas as pd
import torch
from scipy.sparse import issparse
from torch import Tensor

_FORMAT = "skcifar search journal, version 1"
_REMEDY = "Give another path, or delete the file to start anew."
_LINE_BEGINS = b'{"checksum": "'


class Journal:
    """An open journal, which no other search can open until it is closed.

    Parameters
    ----------
    path : str or path-like
        Made if it is not there, in a folder that is.
    identity : mapping
        What the search is, in plain values: a file of one with another identity is an error.
    notes : mapping
        What is written down beside it when the journal is made.

    Attributes
    ----------
    notes : dict
        As written when the journal was made.
    records : list of dict
        The tasks finished earlier.

    Raises
    ------
    ValueError
        If the file is no journal, is damaged, or is that of another search.
    RuntimeError
        If another search has it open.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        identity: Mapping[str, Any],
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        self.notes = dict(notes or {})
        self.records: list[dict[str, Any]] = []
        self._file: BinaryIO = open(self.path, "a+b", buffering=0)
        try:
            _lock(self._file, self.path)
            self._read(as_plain(dict(identity), "identity"))
        except BaseException:
            self._file.close()
            raise

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a finished task, safely on disk when this returns.

        Raises
        ------
        TypeError
            If JSON would not give the record back as it is; the message names the value.
        """
        line = _line(as_plain(dict(record), "record"))
        size = self._file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())
        except BaseException:
            self._file.truncate(size)  # a full disk must not leave half a line before the next one
            raise

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, identity: dict[str, Any]) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if not whole and not _may_begin_a_line(content):
            raise ValueError(f"{self.path} is not the journal of a search. Give another path.")
        if not whole:
            self._file.truncate(0)
            self.append({"format": _FORMAT, "identity": identity, "notes": self.notes})
            return
        header, *self.records = self._parsed(whole)
        if header.get("format") != _FORMAT:
            raise ValueError(
                f"{self.path} is not a journal that this version of skcifar reads. {_REMEDY}"
            )
        differing = list(differences(header["identity"], identity))
        if differing:
            more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
            raise ValueError(
                f"{self.path} is the journal of another search; what differs: "
                f"{'; '.join(differing[:5])}{more}. {_REMEDY}"
            )
        self.notes = header["notes"]
        # A process killed while it wrote leaves the beginning of a line. Only now: what is not
        # this search's journal is left as it is.
        self._file.truncate(len(whole))

    def _parsed(self, content: bytes) -> Iterator[dict[str, Any]]:
        for number, text in enumerate(content.split(b"\n")[:-1], start=1):
            try:
                line = json.loads(text)
                record = line["record"]
                intact = line["checksum"] == _checksum(record)
            except (ValueError, LookupError, TypeError):
                intact = False
            if not intact:
                if number == 1 and not text.startswith(_LINE_BEGINS):
                    raise ValueError(
                        f"{self.path} is not the journal of a search. Give another path."
                    )
                raise ValueError(
                    f"{self.path}, line {number}: damaged, its checksum does not fit. Delete that "
                    "line to have its task run again, or the file to start anew."
                )
            yield record


def as_plain(value: Any, name: str) -> Any:
    """A value as JSON gives it back, exactly; `name` is what an error calls it."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool | int | float):
        # subclasses are written as what they are based on
        return next(kind(value) for kind in (bool, int, float) if isinstance(value, kind))
    if isinstance(value, list):
        return [as_plain(item, f"{name}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: as_plain(item, f"{name}[{key!r}]") for key, item in value.items()}
    raise TypeError(
        f"{name} = {value!r} of type {type(value).__name__} cannot be written to a journal, which "
        "holds numbers, strings, lists and dicts with string keys. Let scorers return floats, or "
        "search with journal=None."
    )


def _line(record: Any) -> bytes:
    return json.dumps({"checksum": _checksum(record), "record": record}).encode() + b"\n"


def _checksum(record: Any) -> str:
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()[:16]


def _may_begin_a_line(content: bytes) -> bool:
    length = min(len(content), len(_LINE_BEGINS))
    return content[:length] == _LINE_BEGINS[:length]


def _lock(file: BinaryIO, path: Path) -> None:
    """Keep others out until the file is closed, or its process has ended."""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(2**40)  # far behind what is written: the lock is one for reading, too
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise RuntimeError(
            f"{path} is in use by another search that is running. Wait for it, or give another "
            "path."
        ) from error


# -- what a search is ------------------------------------------------------------------------------


def differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """What differs between two descriptions, a line each, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            inner = f"{name}.{key}" if name else key
            yield from differences(before.get(key), now.get(key), inner)
    elif json.dumps(before) != json.dumps(now):  # NaN equals NaN there
        yield f"{name} (was {_shortened(before)}, is {_shortened(now)})"


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:45] + " … " + text[-12:]


def describe(value: Any, name: str) -> Any:
    """Plain values that say what a parameter is, the same in every process.

    Raises
    ------
    ValueError
        If no description can be relied on; the message names the parameter.
    """
    if value is None or isinstance(value, bool | int | float | str | np.generic):
        return as_plain(value, name)
    if isinstance(value, np.ndarray | Tensor | pd.DataFrame | pd.Series) or issparse(value):
        return {"array": digest(value)}
    if isinstance(value, list | tuple):
        return [describe(item, f"{name}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict):
        items = [[describe(k, name), describe(v, f"{name}[{k!r}]")] for k, v in value.items()]
        if all(isinstance(key, str) for key, _ in items):
            return dict(items)
        return {"items": sorted(items, key=json.dumps)}
    if isinstance(value, set | frozenset):
        return sorted((describe(item, name) for item in value), key=json.dumps)
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, FunctionType):
        return _describe_function(value, name)
    if isinstance(value, partial):
        return {"partial": describe([value.func, value.args, value.keywords], name)}
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if callable(value) and kind.startswith("sklearn.metrics."):  # what make_scorer gives
        return {"class": kind, "scorer": describe(vars(value), name)}
    if hasattr(value, "get_params"):
        parameters = value.get_params(deep=False)
        return {"class": kind} | {k: describe(v, f"{name}.{k}") for k, v in parameters.items()}
    try:
        return {"class": kind, "hash": joblib.hash(value)}
    except Exception as error:
        raise ValueError(
            f"{name} = {value!r} cannot be told from others of its kind in a later run, as a "
            f"journal has to ({error}). Define it in a module, or search with journal=None."
        ) from error


def _describe_function(function: FunctionType, name: str) -> dict[str, Any]:
    """By what it does: its name alone would not tell two lambdas from each other."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return {
        "function": f"{function.__module__}.{function.__qualname__}",
        "code": hashlib.sha256(repr(_code(function.__code__)).encode()).hexdigest(),
        "defaults": describe([function.__defaults__, function.__kwdefaults__], name),
        "closure": describe(cells, name),
    }


def _code(code: CodeType) -> list[Any]:
    return [code.co_code, code.co_names, [_constant(value) for value in code.co_consts]]


def _constant(value: Any) -> Any:
    if isinstance(value, CodeType):
        return _code(value)
    # the order within a set is another in every process
    return sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)


def digest(data: Any) -> str:
    """SHA-256 of an array, table, sparse matrix or sequence: shape, dtype and values."""
    sha = hashlib.sha256()
    for part in _parts(data):
        sha.update(part)
    return sha.hexdigest()


def _parts(data: Any) -> Iterator[Any]:
    """What makes up the data, as bytes or contiguous memory."""
    if isinstance(data, pd.DataFrame | pd.Series):
        columns = data if isinstance(data, pd.DataFrame) else data.to_frame()
        yield repr([(str(name), str(dtype)) for name, dtype in columns.dtypes.items()]).encode()
        yield from _parts(pd.util.hash_pandas_object(columns, index=False).to_numpy())
        return
    if issparse(data):
        rows = data.tocsr()
        for part in (rows.indptr, rows.indices, rows.data):
            yield from _parts(part)
        data = np.asarray(rows.shape)
    if isinstance(data, Tensor):
        data = data.detach().cpu()
        data = (data.float() if data.dtype == torch.bfloat16 else data).numpy()
    array = np.asarray(data)
    yield f"{array.dtype.str} {array.shape}".encode()
    if array.dtype == object:
        array = pd.util.hash_array(array.ravel())
    yield np.ascontiguousarray(array).view(np.uint8).data
