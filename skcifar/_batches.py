"""Rows with their targets, and the batches of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Samples:
    """Rows with targets, on the device they are trained on.

    Attributes
    ----------
    rows : tensor of shape (n_samples, n_features)
        Any dtype; often the caller's own memory, never written to.
    targets : int64 tensor of shape (n_samples,)
    weight : tensor of shape (n_samples,) or None
    index : int64 tensor of shape (n_used,) or None
        The rows to use; None is all of them.
    """

    rows: Tensor
    targets: Tensor
    weight: Tensor | None = None
    index: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows if self.index is None else self.index)

    @property
    def X(self) -> Tensor:  # where skorch's scoring callbacks look
        return self.rows if self.index is None else self.rows[self.index]

    @property
    def y(self) -> Tensor:
        return self.targets if self.index is None else self.targets[self.index]

    def used_weight(self) -> Tensor | None:
        if self.weight is None or self.index is None:
            return self.weight
        return self.weight[self.index]

    def total_weight(self) -> float:
        weight = self.used_weight()
        return float(len(self)) if weight is None else float(weight.sum())


class Batches:
    """Batches of near-equal size: 129 rows in batches of 128 are 64 and 65, never 128 and 1.

    Yields (rows, targets, weight or None, weight_sum); rows as stored. With `order` each pass
    draws a new order of the rows, or as many batches as those would be from a job's `sampler`.

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
    ) -> None:
        self.samples = samples
        self.batch_size = batch_size
        self.order = order
        self.sampler = sampler
        n_batches = -(-len(samples) // min(batch_size, len(samples)))
        bounds = [len(samples) * i // n_batches for i in range(n_batches + 1)]
        self.sizes = [stop - start for start, stop in pairwise(bounds)]

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None, float]]:
        samples = self.samples
        rows, targets, weight = samples.rows, samples.targets, samples.weight
        index, sizes = self.epoch()
        stop = 0
        for size, weight_sum in zip(sizes, self._weight_sums(index, sizes), strict=True):
            start, stop = stop, stop + size
            if index is None:
                part = self.picked = slice(start, stop)
                batch = rows[part], targets[part], None if weight is None else weight[part]
            else:
                # index_select is several times faster than rows[index] for wide uint8 rows
                picked = self.picked = index[start:stop]
                batch = (
                    rows.index_select(0, picked),
                    targets.index_select(0, picked),
                    None if weight is None else weight.index_select(0, picked),
                )
            yield *batch, weight_sum

    def epoch(self) -> tuple[Tensor | None, list[int]]:
        """Rows of one pass in their order, None for all as they lie; and the batches' sizes."""
        samples, index, sizes = self.samples, self.samples.index, self.sizes
        if self.order is None:
            return index, sizes
        if self.sampler is not None:
            parts = self.sampler(samples.y, self.batch_size, len(self), generator=self.order)
            order, sizes = torch.cat(parts), [len(part) for part in parts]
        elif len(self) > 1:
            order = torch.randperm(len(samples), generator=self.order).to(samples.rows.device)
        else:  # one batch is read in place
            return index, sizes
        return (order if index is None else index[order]), sizes

    def _weight_sums(self, index: Tensor | None, sizes: list[int]) -> list[float]:
        if self.samples.weight is None:
            return [float(size) for size in sizes]
        weight = self.samples.weight if index is None else self.samples.weight[index]
        # one read-back an epoch, not one a step
        return torch.stack([part.sum() for part in weight.split(sizes)]).tolist()
