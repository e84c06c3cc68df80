"""Losses, learning rates and clipping, against loops and formulas written out."""

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from skcifar import MLPClassifier
from skcifar._optimization import (
    ClassificationLoss,
    LearningRates,
    Recipe,
    make_optimizer,
    probabilities,
)

TORCH = torch.Generator().manual_seed(0)


def slow_loss(logits, targets, weight, smoothing, loss):
    """Weighted mean in a loop over rows and outputs."""
    total = 0.0
    for row, target, w in zip(logits.tolist(), targets.tolist(), weight.tolist(), strict=True):
        if loss == "squared_error":
            if len(row) == 1:
                wanted = [(1 - smoothing) * (2.0 * target - 1)]
            else:
                share = smoothing / len(row)
                wanted = [(1 - smoothing) * (k == target) + share for k in range(len(row))]
            total += w * sum((z - t) ** 2 for z, t in zip(row, wanted, strict=True)) / len(row) / 2
            continue
        row = [0.0, *row] if len(row) == 1 else row
        log_sum = math.log(sum(math.exp(z) for z in row))
        for k, z in enumerate(row):
            share = (1 - smoothing) * (k == target) + smoothing / len(row)
            total -= w * share * (z - log_sum)
    return total / sum(weight.tolist())


@pytest.mark.parametrize("n_outputs", [1, 4])
@pytest.mark.parametrize(
    ("loss", "smoothing"),
    [(loss, smoothing) for loss in ("cross_entropy", "squared_error") for smoothing in (0.0, 0.3)],
)
def test__loss__is_that_of_a_loop(n_outputs, loss, smoothing):
    logits = torch.randn(9, n_outputs, generator=TORCH, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(max(2, n_outputs), (9,), generator=TORCH)
    weight = torch.rand(9, generator=TORCH, dtype=torch.float64)
    criterion = ClassificationLoss(loss, smoothing)
    for given, used in ((weight, weight), (None, torch.ones(9))):
        expected = slow_loss(logits, targets, used, smoothing, loss)
        assert criterion(logits, targets, given).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda z: criterion(z, targets, weight), (logits,))
    plain = slow_loss(logits, targets, weight, 0.0, loss)
    assert criterion.eval()(logits, targets, weight).item() == pytest.approx(plain, rel=1e-12)


def test__probabilities__sum_to_one_in_float64():
    for n_outputs in (1, 3):
        found = probabilities(torch.randn(5, n_outputs, generator=TORCH))
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found.sum(1), 1)


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    return X[:100].astype(np.uint8), y[:100]


def rates(digits, **parameters):
    """Learning rate at the end of each epoch of one step."""
    X, y = digits
    model = MLPClassifier(
        (4,), batch_size="full", learning_rate_init=0.1, tol=0.0, random_state=0, **parameters
    )
    return [row["learning_rate"] for row in model.fit(X, y).history_]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test__schedules__follow_their_formulas(digits):
    assert rates(digits, learning_rate="constant", max_iter=3) == [0.1] * 3
    decayed = rates(digits, learning_rate="exponential", learning_rate_decay=0.5, max_iter=4)
    assert decayed == pytest.approx([0.1, 0.05, 0.025, 0.0125])
    stepped = rates(
        digits, learning_rate="step", learning_rate_step=2, learning_rate_decay=0.1, max_iter=5
    )
    assert stepped == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001])
    seen = 100 * np.arange(3) + 1
    falling = rates(digits, learning_rate="invscaling", power_t=0.5, max_iter=3)
    assert falling == pytest.approx([0.1, *(0.1 / seen[1:] ** 0.5)])


@pytest.mark.parametrize("end", [0.0, 0.2])
def test__schedules_of_fixed_length__rise_and_fall_over_all_steps(digits, end):
    parameters = {"learning_rate_warmup": 0.25, "learning_rate_end": end, "max_iter": 19}
    share = np.arange(1, 20) / 20
    left = (1 - share) / 0.75
    for name, fall in (("one_cycle", left), ("cosine", (1 - np.cos(np.pi * left)) / 2)):
        expected = np.where(share < 0.25, share / 0.25, end + (1 - end) * fall)
        np.testing.assert_allclose(rates(digits, learning_rate=name, **parameters), 0.1 * expected)
    assert rates(digits, **parameters) == rates(digits, learning_rate="one_cycle", **parameters)


@pytest.mark.parametrize("clip", [{"clip_grad_norm": 1e-3}, {"clip_grad_value": 1e-5}])
def test__clipping__bounds_a_step_of_plain_descent(digits, clip):
    X, y = digits
    model = MLPClassifier(
        (4,),
        solver="sgd",
        momentum=0.0,
        alpha=1.0,
        learning_rate_init=1.0,
        batch_size="full",
        precision="float64",
        random_state=0,
        **clip,
    )
    before = model._prepare(X, y, None, going_on=False)[0].module
    model.partial_fit(X, y, classes=np.arange(10))
    moved = torch.cat(
        [
            (new - old).detach().flatten()
            for new, old in zip(model.module_.parameters(), before.parameters(), strict=True)
        ]
    )
    if "clip_grad_norm" in clip:
        assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-2)
    else:
        assert float(moved.abs().max()) == pytest.approx(1e-5, rel=1e-6)


def test__weight_decay_of_adamw__shrinks_weights_beside_the_gradient(digits):
    X, y = digits
    settings = {"solver": "adamw", "alpha": 0.0, "batch_size": "full", "precision": "float64"}
    models = [
        MLPClassifier((4,), weight_decay=decay, learning_rate_init=1e-2, random_state=0, **settings)
        for decay in (0.0, 0.5)
    ]
    start = models[0]._prepare(X, y, None, going_on=False)[0].module.head.weight.detach().clone()
    plain, decayed = (
        model.partial_fit(X, y, classes=np.arange(10)).module_.head.weight for model in models
    )
    torch.testing.assert_close(decayed - plain, -1e-2 * 0.5 * start)


def recipe(**parameters):
    """Plain descent, but for what is given."""
    defaults = MLPClassifier(learning_rate="constant", solver="sgd", momentum=0.0).get_params()
    names = Recipe.__dataclass_fields__
    chosen = {name: value for name, value in defaults.items() if name in names}
    chosen |= {"alpha_over_data": False, "batch_size": 1}
    return Recipe(**chosen | parameters)


def two_part_network():
    return torch.nn.ModuleDict({"encoder": torch.nn.Linear(3, 2), "head": torch.nn.Linear(2, 1)})


@pytest.mark.parametrize("factor", [0.1, 1.0])
def test__rate_factors__make_groups_whose_order_does_not_depend_on_the_factor(factor):
    network = two_part_network()
    optimizer = make_optimizer(
        network, recipe(learning_rate_init=0.5, rate_factors=(("encoder.", factor),))
    )
    LearningRates(recipe(learning_rate_init=0.5), optimizer, n_rows=1, n_steps=1)._set(0.2)
    found = [
        ([id(p) for p in g["params"]], g["lr"], g["penalised"]) for g in optimizer.param_groups
    ]
    assert found == [
        ([id(network["head"].weight)], 0.2, True),
        ([id(network["head"].bias)], 0.2, False),
        ([id(network["encoder"].weight)], pytest.approx(0.2 * factor), True),
        ([id(network["encoder"].bias)], pytest.approx(0.2 * factor), False),
    ]


def test__state_of_other_parameters__is_not_taken_up():
    network = two_part_network()
    optimizer = make_optimizer(network, recipe(solver="adam"))
    sum(p.sum() for p in network.parameters()).backward()
    optimizer.step()
    rates = LearningRates(recipe(solver="adam"), optimizer, n_rows=1, n_steps=1)
    state = {"optimizer": optimizer.state_dict()["state"], "rates": rates.state()}

    same = make_optimizer(network, recipe(solver="adam"))
    LearningRates(recipe(solver="adam"), same, n_rows=1, n_steps=1, state=state)
    assert len(same.state) == 4
    assert same.state[network["head"].weight]["exp_avg"].shape == (1, 2)

    other = make_optimizer(torch.nn.Linear(5, 4), recipe(solver="adam"))
    LearningRates(recipe(solver="adam"), other, n_rows=1, n_steps=1, state=state)
    assert not other.state


def test__state_in_another_memory_format__is_laid_out_as_the_parameters_are():
    convolution = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(convolution, recipe(momentum=0.9))
    convolution(torch.ones(1, 3, 4, 4)).square().sum().backward()
    optimizer.step()
    rates = LearningRates(recipe(), optimizer, n_rows=1, n_steps=1)
    kept = {
        i: {key: value.contiguous() for key, value in values.items()}
        for i, values in optimizer.state_dict()["state"].items()
    }
    again = make_optimizer(convolution, recipe(momentum=0.9))
    state = {"optimizer": kept, "rates": rates.state()}
    LearningRates(recipe(), again, n_rows=1, n_steps=1, state=state)
    buffer = again.state[convolution.weight]["momentum_buffer"]
    assert buffer.stride() == convolution.weight.stride()
    torch.testing.assert_close(buffer, optimizer.state[convolution.weight]["momentum_buffer"])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
def test__sgd__moves_as_torch_s_does_whatever_is_trained_when(momentum, nesterov):
    ours, theirs = two_part_network().double(), two_part_network().double()
    theirs.load_state_dict(ours.state_dict())
    wanted = recipe(
        momentum=momentum, nesterovs_momentum=nesterov, weight_decay=0.1, learning_rate_init=0.01
    )
    optimizer = make_optimizer(ours, wanted)
    weights = [theirs["head"].weight, theirs["encoder"].weight]
    biases = [theirs["head"].bias, theirs["encoder"].bias]
    reference = torch.optim.SGD(
        [{"params": weights, "weight_decay": 0.1}, {"params": biases}],
        lr=0.01,
        momentum=momentum,
        nesterov=nesterov and momentum > 0,
        foreach=False,
        fused=False,
    )
    for step in range(6):
        rows = torch.rand(5, 3, dtype=torch.float64, generator=TORCH)
        for network, steps in ((ours, optimizer), (theirs, reference)):
            network["encoder"].requires_grad_(step not in (0, 3))  # its momentum begins later
            steps.zero_grad()
            network["head"](network["encoder"](rows)).square().sum().backward()
            steps.step()
    for parameter, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-12, atol=1e-12)
    found = {k for state in optimizer.state_dict()["state"].values() for k in state}
    assert found == ({"momentum_buffer"} if momentum else set())
