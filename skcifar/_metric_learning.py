"""Metric learning: triplet and contrastive losses, balanced batches and recall; knows only torch.

No function here reads a number back from the device, except where a float or batches are returned.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["MetricLoss", "balanced_batches", "recall_at_1"]

LOSSES = ("triplet", "supcon")
MINING = ("random", "semihard", "hard", "all")

# Rows compared with all others at a time: 200 MB of float32 distances at 50,000 rows.
_RECALL_CHUNK = 1024


class MetricLoss(nn.Module):
    """Mean loss of a batch of embeddings, small where classes lie together and apart.

    With ``loss="triplet"`` it is the mean of ``max(0, d(a, p) - d(a, n) + margin)`` [1]_ over
    triplets of an anchor, another row of its class and a row of another class, d being the
    p-norm of the difference. An anchor without either partner in the batch is left out; a batch
    without any triplet has loss 0 and gradient 0.

    With ``loss="supcon"`` it is the supervised contrastive loss [3]_ (its L_out) of the
    embeddings scaled to unit length, the mean over the anchors with a positive; `mining`,
    `margin` and `p` have no effect.

    Parameters
    ----------
    loss : {"triplet", "supcon"}, default="triplet"
        The loss.
    mining : {"random", "semihard", "hard", "all"}, default="random"
        Which triplets of a batch of n rows count.

        - "random": one for each anchor, both partners drawn uniformly. O(n log n) time, O(n)
          memory.
        - "semihard": one for each anchor: a positive drawn uniformly and the closest of the
          negatives that are farther away than it [1]_, or the farthest negative of all where
          none is. O(n²).
        - "hard": one for each anchor: its farthest positive and its closest negative [2]_.
          O(n²).
        - "all": every triplet that violates the margin, none weighing more than another [2]_.
          O(n² log n) time, O(n²) memory.
    margin : float, default=1.0
        How much farther than a positive a negative is to be. Positive.
    p : float, default=2.0
        Norm of the distance. On the CPU 1, 2 and infinity are quick; another power takes tens of
        times as long with the mining that computes all distances.
    temperature : float, default=0.1
        Divides the cosines of ``loss="supcon"``.
    generator : torch.Generator, default=None
        What triplets are drawn from in training mode, on the device of the targets; None is
        torch's global one. In evaluation mode the draws are the same in each call, so that the
        losses of two epochs can be compared, and `generator` is not touched.

    Attributes
    ----------
    row_wise : bool
        False: the loss of a row depends on the other rows of its batch.

    Notes
    -----
    Drawn and mined triplets are measured as in `torch.nn.functional.triplet_margin_loss`, which
    adds 1e-6 to each difference, so that the gradient at two equal rows is finite. "all" adds
    nothing; there the distance of two equal rows has gradient 0.

    The meta device has no generator, so that drawn triplets work there in training mode only.

    References
    ----------
    .. [1] Schroff, Kalenichenko and Philbin, "FaceNet: A unified embedding for face recognition
           and clustering", CVPR (2015).
    .. [2] Hermans, Beyer and Leibe, "In defense of the triplet loss for person
           re-identification", arXiv:1703.07737 (2017).
    .. [3] Khosla et al., "Supervised contrastive learning", NeurIPS 33 (2020).

    Examples
    --------
    >>> import torch
    >>> from skcifar._metric_learning import MetricLoss
    >>> embeddings = torch.tensor([[0.0], [1.0], [1.5], [3.5]])
    >>> targets = torch.tensor([0, 0, 1, 1])
    >>> round(MetricLoss(mining="hard")(embeddings, targets).item(), 4)
    1.25
    """

    row_wise = False

    def __init__(
        self,
        loss: str = "triplet",
        mining: str = "random",
        *,
        margin: float = 1.0,
        p: float = 2.0,
        temperature: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"loss={loss!r} is not one of {LOSSES}.")
        if mining not in MINING:
            raise ValueError(f"mining={mining!r} is not one of {MINING}.")
        self.loss = loss
        self.mining = mining
        self.margin = margin
        self.p = p
        self.temperature = temperature
        self.generator = generator

    def forward(
        self,
        embeddings: Tensor,
        targets: Tensor,
        weight: Tensor | None = None,
        weight_sum: float | None = None,
    ) -> Tensor:
        """Compute the loss of a batch.

        Parameters
        ----------
        embeddings : Tensor of shape (n, n_components)
            In bfloat16 they are made float32; other types stay.
        targets : Tensor of shape (n,), int64
            Class of each row.
        weight : None
            Rows have no weights: a triplet belongs to three of them.
        weight_sum : float, optional
            Ignored; here for the sake of losses that are sums over rows.

        Returns
        -------
        Tensor of shape ()
            The mean loss.
        """
        if embeddings.dtype == torch.bfloat16:
            embeddings = embeddings.float()
        if self.loss == "supcon":
            return _supervised_contrast(embeddings, targets, self.temperature)
        if self.mining == "all":
            return _mean_of_violating_triplets(embeddings, targets, self.margin, self.p)
        triplets, exists = self._mine(embeddings.detach(), targets)
        # one gather, whose gradient is one scatter
        anchors, positives, negatives = embeddings.index_select(0, triplets.flatten()).chunk(3)
        losses = F.triplet_margin_loss(
            anchors, positives, negatives, margin=self.margin, p=self.p, reduction="none"
        )
        return _mean_where(exists, losses)

    def _mine(self, embeddings: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of one anchor, positive and negative each, (3, n), and which exist, (n,).

        Where there is no positive or no negative the anchor stands in for both: its distance to
        itself and its gradient are finite however long the row, and `_mean_where` has them times 0.
        """
        values, anchor = targets.sort(stable=True)
        first = torch.searchsorted(values, values)  # where the anchor's class begins
        size = torch.searchsorted(values, values, right=True) - first
        exists = (size > 1) & (size < len(targets))
        if self.mining == "hard":
            positive, negative = _hardest(embeddings, targets, anchor, self.p)
        else:
            drawn = _draw_places(first, size, self._source(targets.device))
            positive, negative = anchor[torch.where(exists, drawn, 0)]
            if self.mining == "semihard":
                negative = _semihard(embeddings, targets, anchor, positive, self.p)
        positive = torch.where(exists, positive, anchor)
        negative = torch.where(exists, negative, anchor)
        return torch.stack([anchor, positive, negative]), exists

    def _source(self, device: torch.device) -> torch.Generator | None:
        if self.training:
            return self.generator
        return torch.Generator(device).manual_seed(0)

    def extra_repr(self) -> str:
        if self.loss == "supcon":
            return f"loss={self.loss!r}, temperature={self.temperature}"
        return f"mining={self.mining!r}, margin={self.margin}, p={self.p}"


def _mean_where(exists: Tensor, losses: Tensor) -> Tensor:
    """Mean of the losses (n,) that exist, 0 if none does; the others are finite."""
    return (losses * exists).sum() / exists.sum().clamp(min=1)


# -- triplets --------------------------------------------------------------------------------------


def _draw_places(first: Tensor, size: Tensor, generator: torch.Generator | None) -> Tensor:
    """Places of a positive and of a negative of each anchor, (2, n), among rows sorted by class.

    `first` and `size`, (n,), are those of the class that each place belongs to. A place means
    nothing where the class has one row or is the only one.
    """
    n = len(first)
    # Below 1 by at least 2^-24: its product with a count rounds to less than the count.
    share = torch.rand(2, n, generator=generator, dtype=torch.float32, device=first.device)
    positive = first + (share[0] * (size - 1)).long()
    positive += positive >= torch.arange(n, device=first.device)  # skips the anchor
    negative = (share[1] * (n - size)).long()
    negative += size * (negative >= first)  # skips its class
    return torch.stack([positive, negative])


@torch.no_grad()
def _hardest(
    embeddings: Tensor, targets: Tensor, anchor: Tensor, p: float
) -> tuple[Tensor, Tensor]:
    """Farthest positive and closest negative of each anchor, (n,) each."""
    distances = _distances(embeddings, p, anchor)  # (n anchors, n)
    same = targets[anchor][:, None] == targets
    negative = distances.masked_fill(same, torch.inf).argmin(1)
    distances.masked_fill_(~same, -torch.inf).scatter_(1, anchor[:, None], -torch.inf)
    return distances.argmax(1), negative


@torch.no_grad()
def _semihard(
    embeddings: Tensor, targets: Tensor, anchor: Tensor, positive: Tensor, p: float
) -> Tensor:
    """The closest negative farther away than the positive; the farthest one if none is, (n,)."""
    distances = _distances(embeddings, p, anchor)  # (n anchors, n)
    same = targets[anchor][:, None] == targets
    closer = distances <= distances.gather(1, positive[:, None])
    beyond = distances.masked_fill(same | closer, torch.inf)
    farthest = distances.masked_fill_(same, -torch.inf).argmax(1)
    nearest_beyond, index = beyond.min(1)
    return torch.where(nearest_beyond == torch.inf, farthest, index)


def _distances(embeddings: Tensor, p: float, rows: Tensor | None = None) -> Tensor:
    """p-norms of the differences of `rows`, all by default, and all rows, (len(rows), n).

    torch computes Euclidean ones from products, whose rounding grows with the length of the
    rows; taking off the mean, which changes no distance, keeps embeddings apart that have all but
    collapsed to one point.
    """
    centred = embeddings - embeddings.detach().mean(0)
    return torch.cdist(centred if rows is None else centred[rows], centred, p=p)


def _mean_of_violating_triplets(
    embeddings: Tensor, targets: Tensor, margin: float, p: float
) -> Tensor:
    """Mean of d(a, p) - d(a, n) + margin over all triplets in which it is positive; 0 if none.

    The triplets that violate the margin change with the embeddings in jumps only, so that the
    mean is the margin plus a sum of distances, each times how often it occurs, with its sign.
    """
    distances = _distances(embeddings, p)
    counts = _occurrences(distances.detach(), targets, margin)
    # Each violating triplet holds one positive distance: they are counted once.
    n_triplets = counts.clamp(min=0).sum()
    share = counts / n_triplets.clamp(min=1).to(distances.dtype)
    is_any = (n_triplets > 0).to(distances.dtype)
    return (share * distances).sum() + margin * is_any


@torch.no_grad()
def _occurrences(distances: Tensor, targets: Tensor, margin: float) -> Tensor:
    """How often each distance occurs in violating triplets, negatives counted below 0, (n, n).

    In a row sorted by distance, the positives' lengthened by the margin, a triplet violates it
    where the negative comes first. Both counts of a row come from one running sum, so that n³
    triplets are neither built nor looped over.
    """
    n = len(targets)
    positive = targets[:, None] == targets
    positive.fill_diagonal_(False)
    # A hair less than the margin: a negative at exactly the margin comes after, violating nothing.
    reach = (distances + margin).nextafter(distances.new_tensor(-torch.inf))
    # The anchor itself counts as a negative out of reach, which occurs in no triplet.
    order = torch.where(positive, reach, distances).fill_diagonal_(torch.inf).argsort(1)
    positive = positive.gather(1, order)
    n_positives = positive.cumsum(1, dtype=torch.int32)  # up to each place
    places = torch.arange(1, n + 1, dtype=torch.int32, device=distances.device)
    negatives_before = places - n_positives
    positives_after = n_positives[:, -1:] - n_positives
    counts = torch.where(positive, negatives_before, -positives_after)
    return torch.empty_like(counts).scatter_(1, order, counts)


# -- supervised contrast ---------------------------------------------------------------------------


def _supervised_contrast(embeddings: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Minus the mean log share that a positive has among all others, over anchors with one."""
    directions = F.normalize(embeddings)
    logits = directions @ directions.T / temperature  # (n, n)
    others = ~torch.eye(len(targets), dtype=torch.bool, device=targets.device)
    positive = (targets[:, None] == targets) & others
    n_positives = positive.sum(1)
    # the lowest number rather than -inf, which is what a batch of one row would sum to
    lowest = torch.finfo(logits.dtype).min
    log_sum = logits.masked_fill(~others, lowest).logsumexp(1)
    mean_logit = logits.masked_fill(~positive, 0.0).sum(1) / n_positives.clamp(min=1)
    return _mean_where(n_positives > 0, log_sum - mean_logit)


# -- batches and scores ----------------------------------------------------------------------------


def balanced_batches(
    targets: Tensor,
    batch_size: int,
    n_batches: int,
    n_per_class: int,
    generator: torch.Generator,
) -> list[Tensor]:
    """Draw the batches of an epoch, each with a few classes and as many rows of each.

    A batch [1]_ has ``max(2, batch_size // n_per_class)`` classes, drawn without replacement
    among those present, and `n_per_class` rows of each. Where fewer classes are present it has
    all of them, with ``batch_size // n_classes`` rows of each; where all classes are smaller than
    `n_per_class`, it has more of them. A class of fewer rows gives all that it has. No row comes
    twice in a batch, and none comes again before all of its class have.

    Parameters
    ----------
    targets : Tensor of shape (n,), int64
        Class of each row.
    batch_size : int
        About how many rows a batch has.
    n_batches : int
        Number of batches.
    n_per_class : int
        Rows of each class in a batch.
    generator : torch.Generator
        What is drawn from, on the CPU.

    Returns
    -------
    list of Tensor, int64
        Positions in `targets` of the rows of each batch, class after class, on its device.

    References
    ----------
    .. [1] Hermans, Beyer and Leibe, "In defense of the triplet loss for person
           re-identification", arXiv:1703.07737 (2017).

    Examples
    --------
    >>> import torch
    >>> from skcifar._metric_learning import balanced_batches
    >>> targets = torch.arange(60) % 6
    >>> batches = balanced_batches(targets, 8, 7, 4, torch.Generator().manual_seed(0))
    >>> [targets[batch].unique(return_counts=True)[1].tolist() for batch in batches[:2]]
    [[4, 4], [4, 4]]
    """
    values, by_class = targets.cpu().sort(stable=True)
    sizes = torch.unique_consecutive(values, return_counts=True)[1].tolist()
    n_per_class = min(n_per_class, max(sizes))
    n_classes = max(2, batch_size // n_per_class)
    if len(sizes) < n_classes:
        n_classes, n_per_class = len(sizes), batch_size // len(sizes)
    share = torch.rand(n_batches, len(sizes), generator=generator, dtype=torch.float32)
    drawn = share.argsort(1)[:, :n_classes].flatten()
    # Each batch has a slot for each of its classes; those of one class in the epoch's order.
    n_slots = drawn.bincount(minlength=len(sizes)).tolist()
    slots_by_class = drawn.argsort(stable=True).split(n_slots)
    batches = torch.full((len(drawn), n_per_class), -1)
    for rows, slots in zip(by_class.split(sizes), slots_by_class, strict=True):
        n_taken = min(n_per_class, len(rows))
        batches[slots, :n_taken] = rows[_draw_in_turn(len(rows), len(slots), n_taken, generator)]
    batches = batches.view(n_batches, n_classes * n_per_class)
    is_row = batches >= 0
    return list(batches[is_row].to(targets.device).split(is_row.sum(1).tolist()))


def _draw_in_turn(n: int, n_turns: int, n_taken: int, generator: torch.Generator) -> Tensor:
    """`n_taken` of `n` in each turn, (n_turns, n_taken): one random order after another.

    A turn that begins in one order and ends in the next must not meet a row again: it ends with
    rows drawn among those that it did not begin with, and the rest of the order follows.
    """
    n_orders = -(-n_turns * n_taken // n)
    orders = [torch.randperm(n, generator=generator) for _ in range(n_orders)]
    for i in range(1, n_orders):
        n_begun = i * n % n_taken
        if n_begun:
            fresh = torch.isin(orders[i], orders[i - 1][n - n_begun :], invert=True)
            completes = fresh & (fresh.cumsum(0) <= n_taken - n_begun)
            rest = orders[i][~completes]
            # shuffled anew, or rows passed over would tend to come soon
            rest = rest[torch.randperm(len(rest), generator=generator)]
            orders[i] = torch.cat([orders[i][completes], rest])
    flat = torch.cat(orders) if orders else torch.empty(0, dtype=torch.int64)
    return flat[: n_turns * n_taken].view(n_turns, n_taken)


@torch.no_grad()
def recall_at_1(embeddings: Tensor, targets: Tensor) -> float:
    """Compute the share of rows whose nearest other row is of the same class.

    Parameters
    ----------
    embeddings : Tensor of shape (n, n_components)
        Compared by Euclidean distance, on their device; bfloat16 as float32.
    targets : Tensor of shape (n,), int64
        Class of each row.

    Returns
    -------
    float
        Recall at 1, from 0 to 1.

    Raises
    ------
    ValueError
        There are fewer than two rows.

    Examples
    --------
    >>> import torch
    >>> from skcifar._metric_learning import recall_at_1
    >>> recall_at_1(torch.tensor([[0.0], [1.0], [3.0], [5.5]]), torch.tensor([0, 0, 1, 1]))
    0.75
    """
    n = len(targets)
    if n < 2:
        raise ValueError(f"Recall at 1 compares a row with the others, but n={n}; give at least 2.")
    if embeddings.dtype == torch.bfloat16:
        embeddings = embeddings.float()
    n_right = torch.zeros((), dtype=torch.int64, device=embeddings.device)
    for begin in range(0, n, _RECALL_CHUNK):
        rows = torch.arange(begin, min(begin + _RECALL_CHUNK, n), device=embeddings.device)
        distances = _distances(embeddings, 2.0, rows)  # (n_rows, n)
        distances.diagonal(begin).fill_(torch.inf)
        n_right += (targets[distances.argmin(1)] == targets[rows]).sum()
    return int(n_right) / n
