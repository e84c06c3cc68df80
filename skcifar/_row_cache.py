"""Computed rows kept on disk, so that a row is computed once: by any call, thread or process.

One SQLite file a folder. Its locks hold between processes, a transaction that does not end leaves
no trace, and the pages of deleted rows are used again: what a folder of small files, or one
growing file, would have to be taught.
"""

from __future__ import annotations

import os
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from hashlib import blake2b
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

Rows = NDArray[Any]
Positions = NDArray[np.int64]

_FILE_NAME = "rows.sqlite"
_KEY_BYTES = 16
_CHECKSUM_BYTES = 8
# The largest there is: 2 kB rows fill a page but for 1%, where SQLite's own 4 kB would leave half
# of each empty.
_PAGE_BYTES = 65_536
# What an entry takes beside its value: key, checksum and header in the table, key in the index.
_ENTRY_BYTES = 2 * _KEY_BYTES + _CHECKSUM_BYTES + 40
_KEYS_A_QUERY = 500  # builds of SQLite before 3.32 stop at 999
# Seconds to wait for another process in which it gets nothing done.
_LOCK_TIMEOUT = 600.0

_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR}
_FORBIDDEN = {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY}


class RowCache:
    """Rows computed from rows, in one file of a folder that any number of processes may share.

    Nothing is opened between two calls, so that the object can be pickled, forked and used by
    threads at once.

    Parameters
    ----------
    folder : str or path-like
        Made when first needed.
    cache_size : int
        Bytes, at most and to a page, that the file uses; beyond it the rows stored first leave
        first. A file that was larger once keeps its length and fills it again. 0 stores nothing.
    """

    def __init__(self, folder: str | os.PathLike[str], cache_size: int) -> None:
        self.folder = os.path.abspath(folder)
        self.cache_size = cache_size

    def compute(
        self,
        rows: Rows,
        namespace: bytes,
        function: Callable[[Positions], Rows],
        n_columns: int,
        dtype: npt.DTypeLike,
        batch_size: int = 256,
    ) -> Rows:
        """Return function's result for every row, computing those that are not stored.

        Parameters
        ----------
        rows : ndarray of shape (n, ...)
            Told apart by the bytes of their values, and by dtype: -0.0 is not 0.0.
        namespace : bytes
            Whatever else the results depend on: weights, shape of the images, layer.
        function : callable
            Takes positions in `rows`, at most `batch_size` of them and of distinct rows, and
            returns their results, (n_positions, n_columns). May be called while other processes
            wait for the batch, and once for each distinct row.
        n_columns, dtype : int, dtype
            Of the results.
        batch_size : int
            Rows of a transaction: what an interruption loses, and what two processes over the
            same rows take turns at.

        Returns
        -------
        results : ndarray of shape (n, n_columns)

        Raises
        ------
        OSError
            If the folder cannot be made or written to.

        Warns
        -----
        UserWarning
            If the file is damaged (it is begun anew), locked or on a full disk (the rest is
            computed without it). The results are right in any case.
        """
        work = _Work(rows, namespace, function, n_columns, np.dtype(dtype))
        entries_bytes = min(batch_size, len(work.pending)) * work.entry_bytes
        if 0 < entries_bytes <= self.cache_size - 3 * _PAGE_BYTES:  # three are never empty
            self._exchange(work, batch_size)
        while work.pending:  # where no cache could take part
            work.compute(work.next_batch(batch_size))
        work.fill_in_duplicates()
        return work.results

    def _exchange(self, work: _Work, batch_size: int) -> None:
        """Do all of `work` with the file: or what can be, after a warning."""
        path = os.path.join(self.folder, _FILE_NAME)
        for _ in range(3):  # the first may find a damaged file, the next one that another removed
            self._make_folder()
            try:
                with closing(_open(path)) as connection:
                    _look_up(connection, list(work.pending), work)
                    while work.pending:
                        self._exchange_batch(connection, work, work.next_batch(batch_size))
                return
            except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
                if error is work.error:
                    raise
                reason = f"SQLite: {error}"
                # Undecodable is a message that quotes a damaged page.
                code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
                if code == sqlite3.SQLITE_READONLY and os.access(path, os.W_OK):
                    code = sqlite3.SQLITE_CORRUPT  # its header claims a format of the future
                if code == sqlite3.SQLITE_READONLY_DBMOVED:
                    continue  # removed by another process, or with its folder: begin a new one
                if code & 0xFF in _FORBIDDEN:
                    raise self._unusable(reason) from error
                if code & 0xFF not in _DAMAGED:
                    break
                self._discard(path, reason)
        warnings.warn(
            f"The stored rows in {path} cannot be used now ({reason}): the other rows of this "
            f"call, {len(work.pending)}, are computed without them.",
            UserWarning,
            stacklevel=3,
        )

    def _make_folder(self) -> None:
        try:
            os.makedirs(self.folder, exist_ok=True)
        except OSError as error:
            raise self._unusable(str(error)) from error

    def _exchange_batch(
        self, connection: sqlite3.Connection, work: _Work, keys: list[bytes]
    ) -> None:
        """Read or compute, and store, a batch while no other process computes."""

        def find() -> list[bytes]:
            _look_up(connection, keys, work)
            return [key for key in keys if key in work.pending]

        with _transaction(connection, lambda: not find()) as begun:
            missing = find() if begun else []
            if missing:
                entries = work.compute(missing)
                self._make_room(connection, len(entries) * work.entry_bytes)
                connection.executemany("INSERT OR REPLACE INTO entry VALUES (?, ?, ?)", entries)
                # What was made room for is an estimate: entries share pages with others.
                self._make_room(connection, 0)

    def _make_room(self, connection: sqlite3.Connection, wanted: int) -> None:
        """Delete the oldest entries until `wanted` bytes fit."""
        while True:
            (pages,) = connection.execute("PRAGMA page_count").fetchone()
            (free,) = connection.execute("PRAGMA freelist_count").fetchone()
            (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
            excess = (pages - free) * page_bytes + wanted - self.cache_size
            if excess <= 0:
                return
            excess = max(excess, page_bytes)  # less than a page's entries frees nothing
            (mean,) = connection.execute(
                "SELECT avg(length(value)) FROM (SELECT value FROM entry ORDER BY rowid LIMIT 100)"
            ).fetchone()
            if mean is None:
                return  # no entry is left
            oldest = 1 + int(excess / (mean + _ENTRY_BYTES))
            connection.execute(
                "DELETE FROM entry WHERE rowid IN (SELECT rowid FROM entry ORDER BY rowid LIMIT ?)",
                (oldest,),
            )

    def _discard(self, path: str, reason: str) -> None:
        try:
            # The journal last: alone it is discarded, beside a new file it might be applied.
            for leftover in (path, f"{path}-journal"):
                if os.path.exists(leftover):
                    os.remove(leftover)
        except OSError as error:
            raise self._unusable(str(error)) from error
        warnings.warn(
            f"The stored rows in {path} are damaged ({reason}): the file was removed and is "
            f"begun anew, and its rows are computed again.",
            UserWarning,
            stacklevel=4,
        )

    def _unusable(self, reason: str) -> OSError:
        return OSError(
            f"Computed rows cannot be kept in memory={self.folder!r} ({reason}): expected a "
            f"folder that can be made and written to. Choose another one, or memory=None."
        )


class _Work:
    """The rows of one call: the results so far, and the distinct rows that have none yet."""

    def __init__(
        self,
        rows: Rows,
        namespace: bytes,
        function: Callable[[Positions], Rows],
        n_columns: int,
        dtype: np.dtype[Any],
    ) -> None:
        if rows.dtype.hasobject or dtype.hasobject:
            raise TypeError(
                f"Rows of {rows.dtype} and results of {dtype} were given, expected numbers: "
                f"objects cannot be told apart by their bytes. Convert them to a numeric dtype."
            )
        self.function = function
        self.error: Exception | None = None  # the function's own, which is no fault of the file
        self.results = np.empty((len(rows), n_columns), dtype)
        self.stored_dtype = dtype.newbyteorder("<")
        self.entry_bytes = n_columns * dtype.itemsize + _ENTRY_BYTES
        # Of each row, the first position that holds the same: (n,).
        self.source = np.empty(len(rows), np.int64)
        self.pending: dict[bytes, int] = {}
        identity = (namespace, rows.dtype.str, n_columns, self.stored_dtype.str)
        seed = blake2b(repr(identity).encode(), digest_size=_KEY_BYTES)
        for position, row in enumerate(rows):
            key = seed.copy()
            key.update(row.tobytes())
            self.source[position] = self.pending.setdefault(key.digest(), position)

    def next_batch(self, batch_size: int) -> list[bytes]:
        return list(islice(self.pending, batch_size))

    def take(self, key: bytes, value: Any, checksum: Any) -> None:
        """Take over a stored result, unless it is not what was stored."""
        n_bytes = self.results.shape[1] * self.results.itemsize
        whole = isinstance(value, bytes) and len(value) == n_bytes
        if whole and key in self.pending and checksum == _checksum(key, value):
            self.results[self.pending.pop(key)] = np.frombuffer(value, self.stored_dtype)

    def compute(self, keys: list[bytes]) -> list[tuple[bytes, bytes, bytes]]:
        """Compute pending rows; return them as entries: key, value, checksum."""
        positions = np.array([self.pending[key] for key in keys], np.int64)
        try:
            computed = np.asarray(self.function(positions))
        except Exception as error:
            self.error = error
            raise
        expected = (len(keys), self.results.shape[1])
        if computed.shape != expected:
            raise ValueError(
                f"The function returned an array of shape {computed.shape} for {len(keys)} rows, "
                f"expected {expected}: return one row of results a position."
            )
        self.results[positions] = computed
        entries = []
        for key in keys:
            value = self.results[self.pending.pop(key)].astype(self.stored_dtype).tobytes()
            entries.append((key, value, _checksum(key, value)))
        return entries

    def fill_in_duplicates(self) -> None:
        # One by one: all together would be gathered first, in memory of their own.
        for position in np.flatnonzero(self.source != np.arange(len(self.source))):
            self.results[position] = self.results[self.source[position]]


def _checksum(key: bytes, value: bytes) -> bytes:
    return blake2b(value, key=key, digest_size=_CHECKSUM_BYTES).digest()


def _open(path: str) -> sqlite3.Connection:
    """Open the file, and lay it out if it is new."""
    connection = sqlite3.connect(path, timeout=_LOCK_TIMEOUT, isolation_level=None)
    try:
        connection.text_factory = bytes  # a damaged value may have become text, in no encoding
        # Only a crash of the machine can now lose what was committed. The checksums would tell,
        # and a commit of 256 rows does not wait for the disk.
        connection.execute("PRAGMA synchronous = OFF")
        if not _is_laid_out(connection):
            connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
            with _transaction(connection, lambda: _is_laid_out(connection)) as begun:
                if begun:
                    connection.execute(
                        "CREATE TABLE IF NOT EXISTS entry "
                        "(key BLOB NOT NULL UNIQUE, value BLOB NOT NULL, checksum BLOB NOT NULL)"
                    )
    except BaseException:
        connection.close()
        raise
    return connection


def _is_laid_out(connection: sqlite3.Connection) -> bool:
    query = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'entry'"
    return connection.execute(query).fetchone() is not None


@contextmanager
def _transaction(connection: sqlite3.Connection, is_needless: Callable[[], bool]) -> Iterator[bool]:
    """Run a block as the only writer: False if it is needless, by what was written meanwhile.

    Whoever waits is not served in turn, so a process that goes from batch to batch may keep
    others waiting till its end. They wait as long as it gets on, follow in what it has stored,
    and give up after `_LOCK_TIMEOUT` seconds in which nothing is.
    """
    last_version, deadline = None, 0.0
    while (busy := _try_to_begin(connection)) is not None:
        if is_needless():
            yield False
            return
        version = connection.execute("PRAGMA data_version").fetchone()  # other writers' commits
        if version != last_version:
            last_version, deadline = version, time.monotonic() + _LOCK_TIMEOUT
        elif time.monotonic() > deadline:
            raise busy
    try:
        yield True
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _try_to_begin(connection: sqlite3.Connection) -> sqlite3.OperationalError | None:
    # In short waits, between which Ctrl-C is heard.
    connection.execute("PRAGMA busy_timeout = 200")
    try:
        connection.execute("BEGIN IMMEDIATE")
        return None
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
            raise
        return error
    finally:
        connection.execute(f"PRAGMA busy_timeout = {round(1000 * _LOCK_TIMEOUT)}")


def _look_up(connection: sqlite3.Connection, keys: Sequence[bytes], work: _Work) -> None:
    """Take over the stored results of `keys`."""
    for start in range(0, len(keys), _KEYS_A_QUERY):
        some = keys[start : start + _KEYS_A_QUERY]
        marks = ",".join("?" * len(some))
        query = f"SELECT key, value, checksum FROM entry WHERE key IN ({marks})"
        for entry in connection.execute(query, some):
            work.take(*entry)
