"""Rows with their targets, and the batches of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from skcifar._stored_rows import Rows, StoredRows


@dataclass(frozen=True, eq=False)
class Samples:
    """Rows with targets.

    Attributes
    ----------
    rows : tensor or StoredRows of shape (n_samples, n_features)
        Any dtype; often the caller's own memory, never written to. A tensor is on the device of
        the training, as all the others are.
    targets : int64 tensor of shape (n_samples,)
    weight : tensor of shape (n_samples,) or None
    index : int64 tensor of shape (n_used,) or None
        The rows to use; None is all of them.
    """

    rows: Rows
    targets: Tensor
    weight: Tensor | None = None
    index: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows if self.index is None else self.index)

    @property
    def X(self) -> Rows:  # where skorch's scoring callbacks look
        if self.index is None:
            return self.rows
        rows = self.rows
        return rows.at(self.index) if isinstance(rows, StoredRows) else rows[self.index]

    @property
    def y(self) -> Tensor:
        return self.targets if self.index is None else self.targets[self.index]

    @property
    def is_stored(self) -> bool:
        """Whether the rows are read while they are trained on."""
        return isinstance(self.rows, StoredRows)

    def used_weight(self) -> Tensor | None:
        if self.weight is None or self.index is None:
            return self.weight
        return self.weight[self.index]

    def total_weight(self) -> float:
        weight = self.used_weight()
        return float(len(self)) if weight is None else float(weight.sum())


class Batches:
    """Batches of near-equal size: 129 rows in batches of 128 are 64 and 65, never 128 and 1.

    Yields (rows, targets, weight or None, weight_sum); rows in their own dtype. With `order` each
    pass draws a new order of the rows, or as many batches as those would be from a job's `sampler`.

    With `in_pieces` the caller reads a batch piece by piece: then one of stored rows that is larger
    than a window comes unread.

    Attributes
    ----------
    picked : slice or int64 tensor
        The rows of the batch that was yielded last, among all that there are.
    """

    picked: slice | Tensor = slice(0)

    def __init__(
        self,
        samples: Samples,
        batch_size: int,
        order: torch.Generator | None = None,
        sampler: Callable[..., list[Tensor]] | None = None,
        *,
        in_pieces: bool = False,
    ) -> None:
        self.samples = samples
        self.batch_size = batch_size
        self.order = order
        self.sampler = sampler
        self.in_pieces = in_pieces
        n_batches = -(-len(samples) // min(batch_size, len(samples)))
        bounds = [len(samples) * i // n_batches for i in range(n_batches + 1)]
        self.sizes = [stop - start for start, stop in pairwise(bounds)]

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[tuple[Any, Tensor, Tensor | None, float]]:
        targets, weight = self.samples.targets, self.samples.weight
        index, sizes = self.epoch()
        rows = self._stored_rows(index, sizes) if self.samples.is_stored else None
        stop = 0
        for size, weight_sum in zip(sizes, self._weight_sums(index, sizes), strict=True):
            start, stop = stop, stop + size
            if index is None:
                part = self.picked = slice(start, stop)
                batch = self.samples.rows[part] if rows is None else next(rows)
                of_batch = targets[part], None if weight is None else weight[part]
            else:
                picked = self.picked = index[start:stop]
                # index_select is several times faster than rows[index] for wide uint8 rows
                batch = self.samples.rows.index_select(0, picked) if rows is None else next(rows)
                of_batch = (
                    targets.index_select(0, picked),
                    None if weight is None else weight.index_select(0, picked),
                )
            yield batch, *of_batch, weight_sum

    def _stored_rows(self, index: Tensor | None, sizes: list[int]) -> Iterator[Any]:
        """The rows of each batch, read in windows of whole batches."""
        rows = self.samples.rows
        assert isinstance(rows, StoredRows)
        if self.in_pieces and max(sizes) > rows.window_rows:
            places = torch.arange(len(rows)) if index is None else index
            yield from map(rows.at, places.split(sizes))
            return
        windows = _windows(sizes, rows.window_rows)
        bounds = [0, *accumulate(sum(window) for window in windows)]
        parts: list[slice | Tensor] = [slice(*pair) for pair in pairwise(bounds)]
        if index is not None:
            index = index.cpu()  # one read-back an epoch
            parts = [index[part] for part in parts]
        read = rows.windows(parts, self.samples.targets.device)
        try:
            for window, (stored, rank) in zip(windows, read, strict=True):
                if rank is None:
                    yield from stored.split(window)
                else:
                    for places in rank.split(window):
                        yield stored.index_select(0, places)
        finally:
            read.close()  # the thread ends with the epoch, whoever ends it

    def epoch(self) -> tuple[Tensor | None, list[int]]:
        """Rows of one pass in their order, None for all as they lie; and the batches' sizes."""
        samples, index, sizes = self.samples, self.samples.index, self.sizes
        if self.order is None:
            return index, sizes
        if self.sampler is not None:
            parts = self.sampler(samples.y, self.batch_size, len(self), generator=self.order)
            order, sizes = torch.cat(parts), [len(part) for part in parts]
        elif len(self) > 1:
            order = self._drawn_order().to(samples.targets.device)
        else:  # one batch is read in place
            return index, sizes
        return (order if index is None else index[order]), sizes

    def _drawn_order(self) -> Tensor:
        rows, generator = self.samples.rows, self.order
        assert generator is not None
        if isinstance(rows, StoredRows):
            sizes = [sum(window) for window in _windows(self.sizes, rows.window_rows)]
            return rows.shuffled(sizes, generator)
        return torch.randperm(len(self.samples), generator=generator)

    def _weight_sums(self, index: Tensor | None, sizes: list[int]) -> list[float]:
        if self.samples.weight is None:
            return [float(size) for size in sizes]
        weight = self.samples.weight if index is None else self.samples.weight[index]
        # one read-back an epoch, not one a step
        return torch.stack([part.sum() for part in weight.split(sizes)]).tolist()


def _windows(sizes: list[int], most: int) -> list[list[int]]:
    """Batches that follow each other, in windows of at most so many rows, or of one batch."""
    windows: list[list[int]] = []
    n_rows = most + 1
    for size in sizes:
        n_rows += size
        if n_rows > most:
            windows.append([])
            n_rows = size
        windows[-1].append(size)
    return windows
