"""Rows that stay where they are stored, such as a file larger than memory, and are read in parts.

A pass over shuffled rows reads windows of many blocks: a block is what lies together, so that it
is read at the speed of the disk; which blocks meet in a window is drawn anew in each pass, and so
is the order of the window's rows. A thread reads a window while the one before is trained on.

Windows of a mapped file, read on a CPU, are no copies: the thread has the system read ahead. With
copies softmax regression trains at 0.79 times the speed of rows in memory on two cores that are
busy, a perceptron of 200 units at 0.81.
"""

from __future__ import annotations

import contextlib
import copy
import math
import mmap
import os
import weakref
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, pairwise
from typing import Any

import numpy as np
import scipy.sparse
import torch
from sklearn import get_config
from torch import Tensor

from skcifar._device import as_tensor
from skcifar._memory import free_memory

# A memory-mapped file of fewer bytes is read in place, in a wholly random order: the system keeps
# it in memory.
_LEAST_STORED_BYTES = 2**30

# Two windows are in memory at a time. A window of CIFAR-10 is 43,690 images out of 171 blocks.
_WINDOW_BYTES = 2**27
_BLOCK_BYTES = 3 * 2**18

# Rows that are read although they are not wanted, rather than begin another read.
_GAP = 8

# Share of a device's free memory that rows may take; others stay in the host's and are streamed.
_MOST_OF_DEVICE = 0.5


class StoredRows:
    """Rows of an array that is read in slices; to training and prediction like a tensor of them.

    Parameters
    ----------
    source : array of shape (n_rows, ...)
        Anything of numbers with `shape` and `dtype` that gives an array for a slice of its rows.
    positions : int64 array of shape (n_used,), optional
        The rows to use; by default all.

    Attributes
    ----------
    shape : (n_used, n_features)
        Of what lies in the source as images, each is one row.
    dtype : torch.dtype
    device : torch.device
        Where parts are that are read: the CPU.
    """

    ndim = 2
    device = torch.device("cpu")

    def __init__(self, source: Any, positions: np.ndarray | None = None) -> None:
        # of rows that a GPU cannot hold: any is read as quickly as the next
        self._is_in_memory = isinstance(source, Tensor)
        self.source = source.numpy() if isinstance(source, Tensor) else source
        self.positions = positions
        n_rows = source.shape[0] if positions is None else len(positions)
        self.shape = torch.Size((n_rows, math.prod(source.shape[1:])))
        self.dtype = as_tensor(np.empty(0, self.source.dtype)).dtype
        # of the source's rows, which have been found finite; None where there is nothing to find
        self._checked: np.ndarray | None = None
        if self.dtype.is_floating_point and not get_config()["assume_finite"]:
            self._checked = np.zeros(source.shape[0], dtype=bool)
        self._file = _MappedFile.of(self.source)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self._row_bytes

    @property
    def _row_bytes(self) -> int:
        return max(1, self.shape[1] * self.dtype.itemsize)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def at(self, positions: Tensor) -> StoredRows:
        """Some of the rows, not read as yet."""
        rows = copy.copy(self)
        rows.positions = self._of_source(positions.cpu().numpy())
        rows.shape = torch.Size((len(positions), self.shape[1]))
        return rows

    def reshape(self, *shape: int) -> StoredRows:
        """The rows as images (-1, ...), if they do not lie as images anyway."""
        if len(self.source.shape) > 2:
            return self
        rows = copy.copy(self)
        rows.source = self.source.reshape(shape)
        return rows

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self[:].numpy(), dtype)

    def __getitem__(self, key: slice | Tensor | np.ndarray) -> Tensor:
        """Rows as a tensor; those of a slice may be the file's own memory, to be read only.

        Other keys are positions or a mask, (n_used,).
        """
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step == 1 and self.positions is None:
                return self._found_finite(self._read(start, max(start, stop)), slice(start, stop))
            key = np.arange(start, stop, step)
        key = np.atleast_1d(np.asarray(key.cpu() if isinstance(key, Tensor) else key))
        if key.dtype == bool:
            key = np.flatnonzero(key)
        sources, rank = _sorted(self._of_source(key))
        rows = torch.empty(len(sources), self.shape[1], dtype=self.dtype)
        self._read_into(rows, sources)
        return rows.index_select(0, rank)

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        return self[index]

    def aminmax(self) -> tuple[Tensor, Tensor]:
        ends = [torch.stack(self[part].aminmax()) for part in self.in_turn()]
        least, greatest = torch.stack(ends).unbind(1)
        return least.min(), greatest.max()

    def in_turn(self) -> Iterator[slice]:
        """Parts of all rows that each fit into memory."""
        for start in range(0, len(self), self.window_rows):
            yield slice(start, min(start + self.window_rows, len(self)))

    # -- a pass ------------------------------------------------------------------------------------

    @property
    def window_rows(self) -> int:
        return max(1, _WINDOW_BYTES // self._row_bytes)

    @property
    def block_rows(self) -> int:
        return max(1, _BLOCK_BYTES // self._row_bytes)

    def shuffled(self, windows: Sequence[int], generator: torch.Generator) -> Tensor:
        """A new order of as many rows as windows of these sizes have, from whole blocks each.

        That of a single window, or of rows in memory, is what `torch.randperm` draws.
        """
        n_rows = sum(windows)
        if len(windows) == 1 or self._is_in_memory:
            return torch.randperm(n_rows, generator=generator)
        starts = torch.randperm(-(-n_rows // self.block_rows), generator=generator)
        order = (starts[:, None] * self.block_rows + torch.arange(self.block_rows)).flatten()
        order = order[order < n_rows]
        parts = order.split(list(windows))
        return torch.cat([p[torch.randperm(len(p), generator=generator)] for p in parts])

    def windows(
        self, parts: Sequence[slice | Tensor], device: torch.device
    ) -> Generator[tuple[Tensor, Tensor | None]]:
        """Read each part's rows onto a device, while those of the part before are used.

        Yields rows in the order they are stored in, valid until the next are asked for, which may
        be more than the part's; and where each of the part's is among them, or None for rows that
        are in order.
        """
        slots: list[Any]
        if self._file is not None and device.type == "cpu" and self._are_finite(parts):
            slots = [self._file]
        else:
            most = max((_length(part) for part in parts), default=0)
            slots = [_Slot(most, self, device) for _ in range(min(2, len(parts)))]
        with ThreadPoolExecutor(1, "skcifar-rows") as pool:
            reads = (
                (slot, pool.submit(slot.fill, self, part))
                for slot, part in zip(cycle(slots), parts, strict=False)
            )
            ahead = next(reads, None)
            while ahead is not None:
                (slot, read), ahead = ahead, next(reads, None)
                yield slot.taken(read.result())
                slot.release()

    # -- reading -----------------------------------------------------------------------------------

    def _of_source(self, positions: np.ndarray) -> np.ndarray:
        return positions if self.positions is None else self.positions[positions]

    def sources(self, part: slice | Tensor) -> slice | np.ndarray:
        """Where the rows of a part are in the source."""
        if isinstance(part, Tensor):
            return self._of_source(part.numpy())
        return part if self.positions is None else self.positions[part]

    def part_into(self, out: Tensor, part: slice | Tensor) -> tuple[int, Tensor | None]:
        """Read a part of the rows into `out`, as they are stored; how many, and their places."""
        picked = self.sources(part)
        if isinstance(picked, slice):
            sources, rank = np.arange(picked.start, picked.stop), None
        elif self._is_in_memory:
            rows = self.source.reshape(len(self.source), -1)
            np.take(rows, picked, axis=0, out=out[: len(picked)].numpy(), mode="clip")
            return len(picked), None
        else:
            sources, rank = _sorted(picked)
        self._read_into(out, sources)
        return len(sources), rank

    def _read_into(self, out: Tensor, sources: np.ndarray) -> None:
        """Read the rows at ascending positions of the source."""
        steps = np.diff(sources)
        for start, stop in runs(sources, self.block_rows):
            first, last = int(sources[start]), int(sources[stop - 1])
            block, to = self._read(first, last + 1).numpy(), out[start:stop].numpy()
            # copies that leave Python's lock to the training, and torch's threads as well
            if (steps[start : stop - 1] == 1).all():
                np.copyto(to, block)
            else:
                np.take(block, sources[start:stop] - first, axis=0, out=to, mode="clip")
            self._found_finite(out[start:stop], sources[start:stop])

    def _read(self, start: int, stop: int) -> Tensor:
        """Rows of the source that lie together."""
        block = np.asarray(self.source[start:stop])
        return as_tensor(block.reshape(stop - start, self.shape[1]))

    def _found_finite(self, rows: Tensor, sources: slice | np.ndarray) -> Tensor:
        """Rows from these places of the source; each is looked at the first time."""
        if self._checked is None or self._checked[sources].all():
            return rows
        finite = np.isfinite(rows.numpy()).all(1)
        if not finite.all():
            at = np.arange(len(self._checked))[sources][~finite]
            raise ValueError(
                f"Input X contains NaN or infinity, first in row {at[0]}; expected finite numbers. "
                "Replace them, or leave such rows out."
            )
        self._checked[sources] = True
        return rows

    def _are_finite(self, parts: Sequence[slice | Tensor]) -> bool:
        checked = self._checked
        return checked is None or all(checked[self.sources(part)].all() for part in parts)


class _Slot:
    """Memory of a window, on a device, and pinned on the host if that is not the CPU."""

    def __init__(self, n_rows: int, like: StoredRows, device: torch.device) -> None:
        shape, dtype = (n_rows, like.shape[1]), like.dtype
        self.on_cuda = device.type == "cuda"
        self.host = torch.empty(shape, dtype=dtype, pin_memory=self.on_cuda)
        self.rows = self.host
        if device.type != "cpu":
            self.rows = torch.empty_like(self.host, device=device)
        if self.on_cuda:
            self.stream = torch.cuda.Stream(device)
            self.copied, self.used = torch.cuda.Event(), torch.cuda.Event()
            self.used.record(torch.cuda.current_stream(device))  # by whom the memory was others'
            self.rows.record_stream(self.stream)  # not given to others while a copy is under way

    def fill(self, rows: StoredRows, part: slice | Tensor) -> tuple[int, Tensor | None]:
        """In the reading thread: the next part, on its way to the device."""
        if self.on_cuda:
            self.copied.synchronize()
        n_rows, rank = rows.part_into(self.host, part)
        if self.on_cuda:
            with torch.cuda.stream(self.stream):
                self.stream.wait_event(self.used)
                self.rows[:n_rows].copy_(self.host[:n_rows], non_blocking=True)
                self.copied.record(self.stream)
        elif self.rows is not self.host:
            self.rows[:n_rows].copy_(self.host[:n_rows])
        return n_rows, rank

    def taken(self, read: tuple[int, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        n_rows, rank = read
        if self.on_cuda:
            torch.cuda.current_stream(self.rows.device).wait_event(self.copied)
        rank = None if rank is None else rank.to(self.rows.device)
        return self.rows[:n_rows], rank

    def release(self) -> None:
        if self.on_cuda:
            self.used.record(torch.cuda.current_stream(self.rows.device))


class _MappedFile:
    """The rows of a memory-mapped file, in place; `fill` has the system read what is not yet.

    In the manner of a `_Slot`.
    """

    def __init__(self, source: np.memmap, rows: Tensor) -> None:
        self.rows = rows  # all of the source, not read
        self.row_bytes = source.nbytes // len(source)
        self.descriptor = os.open(source.filename, os.O_RDONLY)  # type: ignore[arg-type]
        weakref.finalize(self, os.close, self.descriptor)
        # of the file, where the source begins: a view keeps the offset of the whole
        mapped = np.frombuffer(source._mmap, np.uint8).ctypes.data  # type: ignore[attr-defined]
        in_file = source.offset - source.offset % mmap.ALLOCATIONGRANULARITY
        self.begin = in_file + source.ctypes.data - mapped

    @classmethod
    def of(cls, source: Any) -> _MappedFile | None:
        """None for what is no mapped file, wants another form, or cannot be read ahead here."""
        if not isinstance(source, np.memmap) or not hasattr(os, "posix_fadvise"):
            return None
        if not source.flags.c_contiguous or not len(source) or not _is_mapped(source):
            return None
        if as_tensor(source[:1]).data_ptr() != source.ctypes.data or source.filename is None:
            return None  # torch has another type for these numbers
        try:
            return cls(source, as_tensor(source.reshape(len(source), -1)))
        except OSError:  # a file that was removed, and is there as long as it is mapped
            return None

    def fill(self, rows: StoredRows, part: slice | Tensor) -> slice | Tensor:
        picked = rows.sources(part)
        if isinstance(picked, slice):
            self._read_ahead(picked.start, picked.stop)
            return picked
        ascending = np.sort(picked)
        for start, stop in runs(ascending, rows.block_rows):
            self._read_ahead(int(ascending[start]), int(ascending[stop - 1]) + 1)
        return torch.from_numpy(picked)

    def _read_ahead(self, start: int, stop: int) -> None:
        begin, length = self.begin + start * self.row_bytes, (stop - start) * self.row_bytes
        with contextlib.suppress(OSError):  # it is advice only
            os.posix_fadvise(self.descriptor, begin, length, os.POSIX_FADV_WILLNEED)

    def taken(self, picked: slice | Tensor) -> tuple[Tensor, Tensor | None]:
        return (self.rows[picked], None) if isinstance(picked, slice) else (self.rows, picked)

    def release(self) -> None:
        pass  # the system takes back what is not used


def runs(ascending: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """Bounds of the parts of ascending positions that are worth one read each, of `most` rows."""
    apart = (np.diff(ascending) > _GAP) | (np.diff(ascending // most) > 0)
    breaks = np.flatnonzero(apart) + 1
    bounds = [0, *breaks.tolist(), len(ascending)]
    return ((start, stop) for start, stop in pairwise(bounds) if start < stop)


def _length(part: slice | Tensor) -> int:
    return part.stop - part.start if isinstance(part, slice) else len(part)


def _sorted(positions: np.ndarray) -> tuple[np.ndarray, Tensor]:
    """Positions in ascending order, and where each was among them: sorted[rank] is as it was."""
    order = np.argsort(positions, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return positions[order], torch.from_numpy(rank)


Rows = Tensor | StoredRows


# -- which rows stay where they are ----------------------------------------------------------------


def is_stored(X: Any) -> bool:
    """Whether X is to be read in parts: a large memory-mapped file, or an array that only slices.

    The latter are those of HDF5, Zarr and the like.
    """
    if isinstance(X, StoredRows):
        return True
    if isinstance(X, np.memmap):
        large = X.nbytes >= _LEAST_STORED_BYTES and X.dtype.kind in "biuf"
        return large and _is_mapped(X) and not _is_joblib_s(X)
    if isinstance(X, (np.ndarray, np.generic, Tensor)) or scipy.sparse.issparse(X):
        return False
    if hasattr(X, "__array_namespace__") or hasattr(X, "__dask_graph__"):
        return False  # what computes is no storage
    dtype, shape = getattr(X, "dtype", None), getattr(X, "shape", None)
    if not isinstance(dtype, np.dtype) or not isinstance(shape, tuple) or len(shape) < 2:
        return False
    return dtype.kind in "biuf" and hasattr(X, "__getitem__")


def _is_mapped(array: np.ndarray) -> bool:
    """Whether an array is a file's memory; copies of a `memmap` are of its type as well."""
    return getattr(array, "_mmap", None) is not None


def _is_joblib_s(X: np.memmap) -> bool:
    """Whether joblib has put an array into a file for a worker: results must not depend on it."""
    return "joblib_memmapping_folder" in str(X.filename)


def on_device(rows: Rows, device: torch.device) -> Rows:
    """Rows on a device, or where they are if they are too many for it."""
    if isinstance(rows, StoredRows) or rows.device.type != "cpu" or device.type == "cpu":
        return rows if isinstance(rows, StoredRows) else rows.to(device)
    if device.type == "cuda" and rows.nbytes > free_memory(device) * _MOST_OF_DEVICE:
        stored = StoredRows(rows)
        stored._checked = None  # they were looked at before
        return stored
    return rows.to(device)
