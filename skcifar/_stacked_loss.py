"""The losses of many networks at once, and what they are to say of their rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from skcifar._batches import Samples
from skcifar._jobs import TrainingJob

_SAMPLED = 16  # rows that are compared before all are


@dataclass
class Targets:
    """What the networks are to say of the rows of one pass, in its order.

    The first dimension is 1 where all networks are told the same.

    Attributes
    ----------
    codes : int64 tensor of shape (n_models or 1, n_rows)
    wanted : tensor of shape (n_models or 1, n_outputs, n_rows)
        What the outputs are drawn to.
    weights : tensor of shape (n_models or 1, n_rows) or None
    """

    codes: Tensor
    wanted: Tensor
    weights: Tensor | None

    def in_order(self, index: Tensor | None) -> Targets:
        if index is None:
            return self
        weights = None if self.weights is None else self.weights.index_select(1, index)
        return Targets(
            self.codes.index_select(1, index), self.wanted.index_select(2, index), weights
        )

    def shares(self, sizes: list[int]) -> Tensor | None:
        """Weights over the sum of their batch, (n_models or 1, n_rows)."""
        if self.weights is None:
            return None
        sums = self.weight_sums(sizes).repeat_interleave(torch.tensor(sizes), 0)
        return self.weights / sums.T.to(self.weights)

    def weight_sums(self, sizes: list[int]) -> Tensor:
        """Of each batch and network, (n_batches, n_models or 1), float64 on the CPU."""
        if self.weights is None:
            return torch.tensor(sizes, dtype=torch.float64)[:, None]
        sums = [part.sum(1) for part in self.weights.split(sizes, 1)]
        return torch.stack(sums).double().cpu()


class Loss:
    """`ClassificationLoss` of every network at once, and its gradient."""

    def __init__(
        self, jobs: list[TrainingJob], train: Samples, n_outputs: int, bounds: list[slice]
    ) -> None:
        criteria = [job.criterion for job in jobs]
        self.kind = criteria[0].loss
        self.n_outputs = n_outputs
        self.bounds = bounds  # of the towers' networks
        self.dtype = jobs[0].precision.weights
        smoothing = [float(criterion.label_smoothing) for criterion in criteria]  # type: ignore[arg-type]
        alike = all(same(job.train.targets, train.targets) for job in jobs)
        codes = torch.stack([job.train.targets for job in (jobs[:1] if alike else jobs)])
        if len(set(smoothing)) > 1 and alike:
            codes = codes.expand(len(jobs), -1)
        same_weights = all(same(job.train.weight, train.weight) for job in jobs)
        weights = None
        if not same_weights:
            ones = torch.ones(len(train.rows), dtype=self.dtype, device=train.rows.device)
            own = [ones if job.train.weight is None else job.train.weight for job in jobs]
            weights = torch.stack(own)
        elif train.weight is not None:
            weights = train.weight[None]
        self.all_targets = Targets(codes, self._wanted(codes, smoothing[: len(codes)]), weights)

    def _wanted(self, codes: Tensor, smoothing: list[float]) -> Tensor:
        binary = self.n_outputs == 1
        shares = torch.tensor(smoothing, dtype=self.dtype, device=codes.device)[:, None, None]
        if binary and self.kind == "squared_error":
            return (1 - shares) * (2 * codes[:, None].to(self.dtype) - 1)
        if binary:
            return codes[:, None].to(self.dtype) * (1 - shares) + shares / 2
        classes = torch.arange(self.n_outputs, device=codes.device)[:, None]
        one_hot = (codes[:, None] == classes).to(self.dtype)
        return (1 - shares) * one_hot + shares / self.n_outputs

    def targets(self, index: Tensor | None) -> Targets:
        return self.all_targets.in_order(index)

    def validation_targets(self, samples: Samples) -> Targets:
        codes = samples.y[None]
        weight = samples.used_weight()
        wanted = self._wanted(codes, [0.0])
        return Targets(codes, wanted, None if weight is None else weight[None])

    def of_towers(self, values: Tensor | None) -> list[Tensor]:
        """Each tower's part of what all networks or each have."""
        if values is None:
            return []
        if len(values) == 1:
            return [values] * len(self.bounds)
        return [values[bounds] for bounds in self.bounds]

    def gradient(self, logits: Tensor, wanted: Tensor, shares: Tensor | float) -> Tensor:
        """Of the mean loss of a batch; `shares` are its rows' weights over their sum."""
        if logits.dtype != self.dtype:
            logits = logits.to(self.dtype)
        if self.kind == "squared_error":
            d = (logits - wanted).div_(self.n_outputs)
        elif self.n_outputs == 1:
            d = torch.sigmoid(logits).sub_(wanted)
        else:
            d = torch.softmax(logits, 1).sub_(wanted)
        return d.mul_(shares)

    def losses(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """Of every network and row, (n_models, n_rows)."""
        if self.kind == "squared_error":
            return (logits - wanted).square_().mean(1).div_(2)
        if self.n_outputs == 1:
            return F.binary_cross_entropy_with_logits(
                logits, wanted.expand_as(logits), reduction="none"
            )[:, 0]
        return torch.log_softmax(logits, 1).mul_(wanted).sum(1).neg_()

    def figures(self, logits: list[Tensor], targets: Targets) -> tuple[Tensor, Tensor]:
        """Weighted mean loss and accuracy of each network, (n_models,), on the CPU."""
        means = []
        own = (self.of_towers(values) for values in (targets.wanted, targets.codes))
        all_weights = self.of_towers(targets.weights)
        for i, (outputs, wanted, codes) in enumerate(zip(logits, *own, strict=True)):
            losses, right = self.losses(outputs, wanted), self._right(outputs, codes)
            both = torch.stack([losses.double(), right.double()])  # (2, n_models, n_rows)
            if not all_weights:
                means.append(both.mean(2))
            else:
                weights = all_weights[i].double()
                means.append((both * weights).sum(2) / weights.sum(1))
        loss, accuracy = torch.cat(means, 1).cpu()
        return loss, accuracy

    def _right(self, outputs: Tensor, codes: Tensor) -> Tensor:
        """Whether the predicted class is that of the code, (n_models, n_rows).

        As argmax(1), which takes ten times as long where the classes are not the last dimension.
        """
        if self.n_outputs == 1:
            return (outputs[:, 0] > 0).long() == codes
        highest = outputs.amax(1, keepdim=True)
        codes = codes[:, None].expand(highest.shape)
        right = outputs.gather(1, codes) == highest
        is_highest = outputs == highest
        if is_highest.sum() > highest.numel():  # of equal outputs the first counts
            classes = torch.arange(self.n_outputs, device=codes.device)[:, None]
            right &= ~(is_highest & (classes < codes)).any(1, keepdim=True)
        return right[:, 0]


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are equal or both missing; at once, where they are one."""
    if a is None or b is None:
        return a is b
    if a.shape != b.shape:
        return False
    if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True
    # Folds may differ in one half only. A few of their rows tell so at once, where 82 MB of them
    # take 6 ms to compare, 18 times in a study of 9 candidates.
    step = len(a) // _SAMPLED + 1
    return torch.equal(a[::step], b[::step]) and torch.equal(a, b)
