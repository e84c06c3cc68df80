"""Losses, miners, batches and recall against loops; what they draw, what they build, what they
leave alone."""

import itertools
import math

import pytest
import torch
from scipy.stats import chisquare
from sklearn.neighbors import NearestNeighbors
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from skcifar import _metric_learning
from skcifar._metric_learning import MINING, MetricLoss, balanced_batches, recall_at_1

EVERY_LOSS = [*(("triplet", mining) for mining in MINING), ("supcon", "random")]
NORMS = [1.0, 2.0, 3.0, math.inf]
# Classes of 5, 4, 2 and 1 rows, in no order.
TARGETS = torch.tensor([7, 2, 7, 0, 2, 7, 4, 2, 7, 0, 2, 7])


def batch(n_components=3, seed=0, scale=1.0, targets=TARGETS, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shape = (len(targets), n_components)
    return (scale * torch.randn(shape, generator=generator, dtype=dtype)).requires_grad_()


# -- slow oracles ----------------------------------------------------------------------------------


def norm_of_difference(one, other, p, added=0.0):
    """p-norm; triplet_margin_loss adds 1e-6 to each difference."""
    differences = [abs(x - y + added) for x, y in zip(one.tolist(), other.tolist(), strict=True)]
    return max(differences) if p == math.inf else sum(x**p for x in differences) ** (1 / p)


def slow_triplets(mining, embeddings, targets, p, drawn):
    """Triplets in loops over anchors and partners; `drawn` holds the positive of each anchor."""
    n, labels = len(targets), targets.tolist()
    for a in range(n):
        positives = [i for i in range(n) if labels[i] == labels[a] and i != a]
        negatives = [i for i in range(n) if labels[i] != labels[a]]
        if not positives or not negatives:
            continue

        def distance(i, anchor=a):
            return norm_of_difference(embeddings[anchor], embeddings[i], p)

        if mining == "all":
            yield from itertools.product([a], positives, negatives)
        elif mining == "hard":
            yield a, max(positives, key=distance), min(negatives, key=distance)
        elif mining == "semihard":
            beyond = [i for i in negatives if distance(i) > distance(drawn[a][0])]
            yield (
                a,
                drawn[a][0],
                min(beyond, key=distance) if beyond else max(negatives, key=distance),
            )
        else:
            yield a, *drawn[a]


def slow_triplet_loss(triplets, embeddings, p, margin, mining):
    added = 0.0 if mining == "all" else 1e-6
    losses = []
    for a, i, j in triplets:
        positive = norm_of_difference(embeddings[a], embeddings[i], p, added)
        negative = norm_of_difference(embeddings[a], embeddings[j], p, added)
        losses.append(max(0.0, positive - negative + margin))
    if mining == "all":
        losses = [loss for loss in losses if loss > 0]
    return sum(losses) / len(losses) if losses else 0.0


def slow_contrast(embeddings, targets, temperature):
    rows = [[x / math.hypot(*row) for x in row] for row in embeddings.tolist()]
    labels, n = targets.tolist(), len(targets)
    losses = []
    for a in range(n):
        shares = {
            i: math.exp(sum(x * y for x, y in zip(rows[a], rows[i], strict=True)) / temperature)
            for i in range(n)
            if i != a
        }
        positives = [i for i in shares if labels[i] == labels[a]]
        logs = [-math.log(shares[i] / sum(shares.values())) for i in positives]
        if positives:
            losses.append(sum(logs) / len(logs))
    return sum(losses) / len(losses) if losses else 0.0


def drawn_partners(criterion, embeddings, targets):
    """Positive and negative of each anchor that has both."""
    triplets, exists = criterion._mine(embeddings.detach(), targets)
    return {a: (i, j) for a, i, j in triplets[:, exists].T.tolist()}


# -- losses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mining", MINING)
@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("margin", [0.2, 5.0])
def test__triplet_loss__is_that_of_a_loop(mining, p, margin):
    # Enough rows for torch's products in place of differences, which it takes from 25 on.
    targets = TARGETS.repeat(3)[:-1]
    embeddings = batch(targets=targets)
    drawn = drawn_partners(MetricLoss().eval(), embeddings, targets)
    expected = slow_triplet_loss(
        list(slow_triplets(mining, embeddings, targets, p, drawn)), embeddings, p, margin, mining
    )
    found = MetricLoss(mining=mining, margin=margin, p=p).eval()(embeddings, targets)
    assert found.shape == () and found.dtype == torch.float64
    assert found.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("mining", ["hard", "semihard"])
def test__miners__choose_what_a_loop_chooses(mining):
    embeddings = batch(1, targets=TARGETS.repeat(3))
    targets = TARGETS.repeat(3)
    positives = drawn_partners(MetricLoss().eval(), embeddings, targets)
    expected = slow_triplets(mining, embeddings, targets, 2.0, positives)
    found = drawn_partners(MetricLoss(mining=mining).eval(), embeddings, targets)
    assert found == {a: (i, j) for a, i, j in expected}


def test__semihard__takes_the_farthest_negative_where_none_is_beyond_the_positive():
    embeddings = torch.tensor([[0.0], [10.0], [1.0], [3.0], [2.0]])
    targets = torch.tensor([0, 0, 1, 1, 1])
    found = drawn_partners(MetricLoss(mining="semihard").eval(), embeddings, targets)
    assert found[0] == (1, 3)  # 1, 3 and 2 are all closer than 10
    assert found[1] == (0, 2)  # likewise; 1.0 is 9 away
    assert found[3][1] == 0  # both negatives are beyond; 0.0 is 3 away, 10.0 is 7


def test__hard_positive__is_never_the_anchor_itself():
    embeddings, targets = torch.zeros(6, 2), torch.tensor([0, 0, 0, 1, 1, 1])
    found = drawn_partners(MetricLoss(mining="hard"), embeddings, targets)
    assert all(positive != anchor for anchor, (positive, _) in found.items())


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test__all_triplets__at_exactly_the_margin_do_not_count(order):
    # From 0 the positive is 1 away, negatives 2 (just the margin farther, so loss 0) and 1.5.
    embeddings = torch.tensor([[0.0], [1.0], [2.0], [-1.5]], dtype=torch.float64)[[*order]]
    targets = torch.tensor([0, 0, 1, 2])[[*order]]
    # anchor 0: 1 - 1.5 + 1; anchor 1: 1 - 1 + 1
    assert MetricLoss(mining="all")(embeddings, targets).item() == pytest.approx((0.5 + 1) / 2)


@pytest.mark.parametrize("temperature", [0.1, 2.0])
def test__supervised_contrast__is_that_of_a_loop(temperature):
    embeddings = batch(scale=3.0)
    found = MetricLoss("supcon", temperature=temperature)(embeddings, TARGETS)
    expected = slow_contrast(embeddings, TARGETS, temperature)
    assert found.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("loss", "mining"), EVERY_LOSS)
@pytest.mark.parametrize("p", NORMS)
def test__gradients__are_the_numerical_ones(loss, mining, p):
    targets = TARGETS.repeat(3)
    # evaluation mode, so that each evaluation draws the same triplets
    criterion = MetricLoss(loss, mining, margin=0.7, p=p).eval()
    assert criterion(batch(targets=targets), targets) > 0
    assert torch.autograd.gradcheck(lambda x: criterion(x, targets), (batch(targets=targets),))


@pytest.mark.parametrize("mining", ["random", "semihard", "hard"])
@pytest.mark.parametrize("p", NORMS)
def test__loss_of_gathered_triplets__is_that_of_torch(mining, p):
    embeddings = batch(dtype=torch.float32)
    criterion = MetricLoss(mining=mining, margin=0.5, p=p).eval()
    partners = drawn_partners(criterion, embeddings, TARGETS)
    a, i, j = torch.tensor([(a, *others) for a, others in partners.items()]).T
    expected = F.triplet_margin_loss(embeddings[a], embeddings[i], embeddings[j], margin=0.5, p=p)
    torch.testing.assert_close(criterion(embeddings, TARGETS), expected)


# -- draws -----------------------------------------------------------------------------------------


def test__random_partners__are_uniform_over_all_there_are():
    criterion = MetricLoss(generator=torch.Generator().manual_seed(0))
    embeddings, n_draws = batch(), 4000
    counts = {}
    for _ in range(n_draws):
        drawn = drawn_partners(criterion, embeddings, TARGETS)
        for a, (i, j) in drawn.items():
            counts[a, i] = counts.get((a, i), 0) + 1
            counts[a, j] = counts.get((a, j), 0) + 1
    labels = TARGETS.tolist()
    # the one row of class 4 has no positive, and every other row both
    assert sorted(drawn) == [a for a, label in enumerate(labels) if label != 4]
    p_values = []
    for a in drawn:
        positives = [i for i in range(12) if labels[i] == labels[a] and i != a]
        negatives = [i for i in range(12) if labels[i] != labels[a]]
        for partners in (positives, negatives):
            observed = [counts.pop((a, i), 0) for i in partners]
            assert sum(observed) == n_draws
            if len(partners) > 1:
                p_values.append(chisquare(observed).pvalue)
    assert not counts, "none but positives and negatives were drawn"
    assert min(p_values) > 0.01 / len(p_values)


@pytest.mark.parametrize("mining", ["random", "semihard"])
def test__draws__repeat_with_the_seed_and_move_on_with_each_call(mining):
    def losses(seed):
        generator = torch.Generator().manual_seed(seed)
        criterion = MetricLoss(mining=mining, margin=5.0, generator=generator)
        return [criterion(batch(), TARGETS).item() for _ in range(3)]

    assert losses(0) == losses(0) != losses(1)
    assert len(set(losses(0))) == 3


@pytest.mark.parametrize("mining", ["random", "semihard"])
def test__evaluation__repeats_itself_and_leaves_every_generator_alone(mining):
    generator = torch.Generator().manual_seed(3)
    before, global_before = generator.get_state(), torch.get_rng_state()
    criterion = MetricLoss(mining=mining, margin=5.0, generator=generator).eval()
    assert criterion(batch(), TARGETS).item() == criterion(batch(), TARGETS).item()
    assert torch.equal(generator.get_state(), before)
    criterion.train()(batch(), TARGETS)
    assert not torch.equal(generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), global_before)


# -- edges -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "mining"), EVERY_LOSS)
@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("targets", [[0] * 30, [*range(30)], [0]], ids=["one", "own", "row"])
def test__batch_without_triplets__has_loss_and_gradient_zero(loss, mining, p, targets):
    targets = torch.tensor(targets)
    embeddings = batch(targets=targets, dtype=torch.float32)
    found = MetricLoss(loss, mining, p=p)(embeddings, targets)
    found.backward()
    assert embeddings.grad.isfinite().all()
    if loss == "supcon" and len(set(targets.tolist())) < len(targets):
        return  # one class has positives, and is told apart from no other
    assert found.item() == 0
    assert not embeddings.grad.any()


@pytest.mark.parametrize("mining", ["random", "semihard", "hard"])
@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("n_classes", [1, 30])
def test__batch_without_triplets__is_zero_however_long_its_rows(mining, p, n_classes):
    targets = torch.arange(30) % n_classes
    embeddings = batch(targets=targets, scale=1e30, dtype=torch.float32)
    found = MetricLoss(mining=mining, p=p)(embeddings, targets)
    found.backward()
    assert found.item() == 0 and not embeddings.grad.any()


@pytest.mark.parametrize(("loss", "mining"), EVERY_LOSS)
@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("n_different", [1, 5])
def test__equal_rows__have_a_finite_loss_and_gradient(loss, mining, p, n_different):
    different = batch(targets=TARGETS[:n_different], dtype=torch.float32).detach()
    embeddings = different.repeat(60 // n_different, 1).requires_grad_()
    targets = TARGETS.repeat(5)
    found = MetricLoss(loss, mining, p=p).eval()(embeddings, targets)
    found.backward()
    assert found.isfinite() and found > 0
    assert embeddings.grad.isfinite().all()
    assert embeddings.grad.abs().max() < 10


@pytest.mark.parametrize(("loss", "mining"), EVERY_LOSS)
def test__bfloat16__is_computed_in_float32(loss, mining):
    coarse = batch(dtype=torch.float32).detach().bfloat16()
    criterion = MetricLoss(loss, mining).eval()
    found = criterion(coarse, TARGETS)
    assert found.dtype == torch.float32
    assert torch.equal(found, criterion(coarse.float(), TARGETS))


@pytest.mark.parametrize("mining", ["hard", "semihard", "all"])
def test__rows_close_together_and_far_from_zero__are_told_apart_in_float32(mining):
    targets = TARGETS.repeat(5)
    embeddings = 100 + batch(targets=targets, scale=0.01, dtype=torch.float32).detach()
    criterion = MetricLoss(mining=mining, margin=0.01).eval()
    expected = criterion(embeddings.double(), targets).item()
    assert criterion(embeddings, targets).item() == pytest.approx(expected, rel=2e-4)


def test__unknown_names__are_refused():
    with pytest.raises(ValueError, match=r"loss='contrastive' is not one of .*'supcon'"):
        MetricLoss("contrastive")
    with pytest.raises(ValueError, match=r"mining='easy' is not one of .*'semihard'"):
        MetricLoss(mining="easy")


def test__loss__is_not_row_wise_and_shows_what_it_is():
    assert MetricLoss.row_wise is False
    assert "mining='all', margin=0.5" in repr(MetricLoss(mining="all", margin=0.5))
    assert "temperature=0.2" in repr(MetricLoss("supcon", temperature=0.2))


class Watch(TorchDispatchMode):
    """The size of the largest tensor that passes, and the names of the operators."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.operators = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.operators.add(operator.overloadpacket.__name__)
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


@pytest.mark.parametrize(("loss", "mining"), EVERY_LOSS)
def test__step__builds_no_tensor_above_its_bound_and_reads_nothing_back(loss, mining):
    n, n_components = (1500 if mining == "all" else 500), 16
    targets = torch.arange(n) % 10
    embeddings = batch(n_components, targets=targets, dtype=torch.float32)
    criterion = MetricLoss(loss, mining)
    with Watch() as watch:
        criterion(embeddings, targets).backward()
    assert embeddings.grad.any()
    is_linear = (loss, mining) == ("triplet", "random")
    assert watch.largest <= (3 * n * n_components if is_linear else n * n)
    assert watch.largest >= 3 * n * n_components, "the watch saw the step"
    assert not watch.operators & {"_local_scalar_dense", "nonzero", "masked_select", "equal"}


# -- balanced batches ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "batch_size", "n_per_class", "n_drawn", "n_taken"),
    [
        ([50] * 10, 40, 10, 4, 10),
        ([50] * 10, 100, 10, 10, 10),
        ([7, 23, 50, 11], 25, 5, 4, 6),  # fewer classes than 5: more rows of each
        ([3, 1, 40, 40], 16, 8, 2, 8),  # classes of fewer rows than wanted
        ([5, 6, 7], 4, 8, 2, 8),  # two classes at least
        ([20], 16, 4, 1, 16),
        ([9] * 60, 32, 2, 16, 2),
    ],
)
def test__balanced_batches__have_their_classes_and_rows(
    sizes, batch_size, n_per_class, n_drawn, n_taken
):
    # labels with gaps, rows in no order
    targets = torch.repeat_interleave(torch.arange(len(sizes)) * 3 + 1, torch.tensor(sizes))
    targets = targets[torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))]
    n_batches = 30
    batches = balanced_batches(
        targets, batch_size, n_batches, n_per_class, torch.Generator().manual_seed(0)
    )
    assert len(batches) == n_batches
    used = torch.zeros(len(targets), dtype=torch.int64)
    for rows in batches:
        assert rows.dtype == torch.int64
        assert len(set(rows.tolist())) == len(rows)
        labels, counts = targets[rows].unique(return_counts=True)
        assert len(labels) == n_drawn
        for label, count in zip(labels, counts, strict=True):
            assert count == min(n_taken, (targets == label).sum())
        used[rows] += 1
        for label in labels:
            # none comes again before all of its class have
            of_class = used[targets == label]
            assert of_class.max() - of_class.min() <= 1


def test__classes_and_rows_of_balanced_batches__are_uniform():
    targets = torch.arange(30) % 6  # 5 rows in each of 6 classes
    generator = torch.Generator().manual_seed(0)
    rows, classes = torch.zeros(30), torch.zeros(6)
    for _ in range(1500):
        first, second = balanced_batches(targets, 6, 2, 3, generator)
        rows[first] += 1
        classes[targets[second].unique()] += 1
    assert rows.sum() == 1500 * 6 and classes.sum() == 1500 * 2
    assert min(chisquare(rows).pvalue, chisquare(classes).pvalue) > 0.01


def test__rows_of_a_batch_across_two_orders__come_again_as_likely_as_others():
    # 3 of 5 rows a batch: the second has the 2 left and 1 of the first's 3, drawn uniformly; the
    # third has 3 of the 4 that the second order has left, two of which ended the first.
    generator = torch.Generator().manual_seed(0)
    n_epochs, again, passed_over = 2000, torch.zeros(3), 0
    for _ in range(n_epochs):
        first, second, third = balanced_batches(torch.zeros(5), 3, 3, 3, generator)
        again += torch.isin(first, second)
        left = second[torch.isin(second, first, invert=True)]
        passed_over += int(torch.isin(left, third).sum())
    assert again.sum() == n_epochs
    assert chisquare(again).pvalue > 0.01
    assert passed_over / (2 * n_epochs) == pytest.approx(3 / 4, abs=0.02)


def test__balanced_batches__repeat_with_the_seed_and_draw_from_the_generator_only():
    targets = torch.arange(100) % 7
    before = torch.get_rng_state()

    def draw(seed):
        return torch.cat(balanced_batches(targets, 20, 9, 4, torch.Generator().manual_seed(seed)))

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert balanced_batches(targets, 20, 0, 4, torch.Generator()) == []


# -- recall ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [7, 1024])
def test__recall_at_1__is_that_of_a_loop_and_of_scikit_learn(chunk, monkeypatch):
    monkeypatch.setattr(_metric_learning, "_RECALL_CHUNK", chunk)
    targets = TARGETS.repeat(5)
    embeddings = batch(targets=targets).detach() + torch.nn.functional.one_hot(targets % 3, 3)
    hits = 0
    for a in range(len(targets)):
        others = [i for i in range(len(targets)) if i != a]
        nearest = min(others, key=lambda i: norm_of_difference(embeddings[a], embeddings[i], 2))
        hits += targets[nearest] == targets[a]
    found = recall_at_1(embeddings, targets)
    assert isinstance(found, float)
    assert found == hits / len(targets)
    assert 0.2 < found < 0.9
    # without a query, scikit-learn leaves each row out of its own neighbours
    nearest = NearestNeighbors(n_neighbors=1).fit(embeddings.numpy()).kneighbors()[1][:, 0]
    assert found == (targets[nearest] == targets).double().mean().item()


def test__recall_at_1__tells_rows_apart_that_are_far_from_zero():
    targets = TARGETS.repeat(5)
    embeddings = 100 + batch(targets=targets, scale=0.01, dtype=torch.float32).detach()
    nearest = NearestNeighbors(n_neighbors=1).fit(embeddings.double().numpy()).kneighbors()[1]
    expected = (targets[nearest[:, 0]] == targets).double().mean().item()
    assert recall_at_1(embeddings, targets) == expected
    assert isinstance(recall_at_1(embeddings.bfloat16(), targets), float)


def test__recall_at_1_of_one_row__is_an_error_that_says_so():
    with pytest.raises(ValueError, match="n=1; give at least 2"):
        recall_at_1(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))


def test__balanced_batches_of_small_classes__hold_more_classes():
    targets = torch.arange(100) % 50
    batches = balanced_batches(targets, 64, 2, 8, torch.Generator().manual_seed(0))
    assert [len(batch) for batch in batches] == [64, 64]
    for batch in batches:
        assert targets[batch].unique(return_counts=True)[1].tolist() == [2] * 32
