"""Orthogonalised steps, against singular values and a loop over matrices."""

import numpy as np
import pytest
import torch
from torch import nn

from skcifar import CNNClassifier
from skcifar._muon import Muon, orthogonalised
from skcifar._optimization import Lookahead, make_optimizer

TORCH = torch.Generator().manual_seed(0)


def test__orthogonalised__keeps_singular_vectors_and_brings_values_near_one():
    for shape in ((2, 5, 40), (3, 40, 5), (1, 7, 7)):
        matrices = torch.randn(*shape, generator=TORCH, dtype=torch.float64)
        u, before, v = torch.linalg.svd(matrices, full_matrices=False)
        result = orthogonalised(matrices, rounds=5)
        after = u.mT @ result @ v.mT  # diagonal, if the vectors are kept
        np.testing.assert_allclose(
            after, torch.diag_embed(after.diagonal(dim1=1, dim2=2)), atol=1e-9
        )
        values = after.diagonal(dim1=1, dim2=2)[before > 0.1 * before.max()]
        assert 0.65 < values.min() <= values.max() < 1.25


def test__orthogonalised__is_each_matrix_by_itself():
    matrices = torch.randn(4, 6, 9, generator=TORCH)
    alone = torch.cat([orthogonalised(matrix[None]) for matrix in matrices])
    torch.testing.assert_close(orthogonalised(matrices), alone)


def slow_steps(filters, head, gradients, rate, momentum, decay):
    """Jordan's update for each filter, and Nesterov's for the head, step by step."""
    values = [f.clone() for f in (*filters, head)]
    buffers = [torch.zeros_like(v) for v in values]
    for step in gradients:
        for i, gradient in enumerate(step):
            is_filter = i < len(filters)
            m = momentum if is_filter else 0.85
            if not is_filter:
                gradient = gradient + decay * values[i]
            buffers[i] = m * buffers[i] + gradient
            move = gradient + m * buffers[i]
            if is_filter:
                matrix = orthogonalised(move.reshape(1, len(move), -1))[0]
                values[i] = values[i] * len(move) ** 0.5 / values[i].norm()
                move = matrix.reshape(move.shape)
            values[i] = values[i] - rate * (1 if is_filter else 2) * move
    return values


def test__muon__is_the_update_written_out():
    filters = [torch.randn(*s, generator=TORCH, dtype=torch.float64) for s in 2 * [(4, 3, 2, 2)]]
    filters.append(torch.randn(9, 2, 1, 1, generator=TORCH, dtype=torch.float64))
    head = torch.randn(5, 7, generator=TORCH, dtype=torch.float64)
    gradients = [
        [torch.randn(p.shape, generator=TORCH, dtype=torch.float64) for p in (*filters, head)]
        for _ in range(3)
    ]
    expected = slow_steps(filters, head, gradients, rate=0.1, momentum=0.6, decay=0.01)
    own = [nn.Parameter(p.clone()) for p in filters]
    # as convolutions lie in memory
    own[0].data = own[0].data.to(memory_format=torch.channels_last)
    own_head = nn.Parameter(head.clone())
    idle = nn.Parameter(torch.ones(2, 2, 2, 2))
    optimizer = Muon(
        [
            {"params": [*own, idle], "lr": 0.1, "orthogonal": True, "momentum": 0.6},
            {
                "params": [own_head],
                "lr": torch.tensor(0.2, dtype=torch.float64),
                "orthogonal": False,
                "momentum": 0.85,
                "weight_decay": 0.01,
            },
        ]
    )
    for step in gradients:
        for parameter, gradient in zip((*own, own_head), step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    for parameter, value in zip((*own, own_head), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value)
    assert torch.equal(idle, torch.ones(2, 2, 2, 2))


def test__groups__are_filters_weights_and_biases_at_rates_of_their_own():
    estimator = CNNClassifier(architecture="airbench94", random_state=0)
    module = nn.ModuleDict({"encoder": nn.Conv2d(3, 4, 3), "head": nn.Linear(4, 2)})
    X = torch.zeros(100, 3072, dtype=torch.uint8)
    recipe = estimator._recipe(module, X, incremental=False)
    groups = make_optimizer(module, recipe).param_groups
    found = {
        tuple(p.ndim for p in group["params"]): (
            group["lr"],
            group["momentum"],
            group["orthogonal"],
        )
        for group in groups
    }
    assert found == {
        (4,): (0.24, 0.6, True),
        (2,): (pytest.approx(0.24 * 6.9), 0.85, False),
        (1, 1): (pytest.approx(0.24 * 6.9 * 64), 0.85, False),
    }
    assert [group["weight_decay"] for group in groups] == [0.0, 2.4e-3, 0.0]


def test__lookahead__follows_as_in_a_loop_and_ends_at_the_slow_weights():
    module = nn.BatchNorm1d(2)
    lookahead = Lookahead(module, n_steps=10)
    weight, slow = np.ones(2), np.ones(2)
    for step in range(1, 11):
        module.weight.data += step
        weight = weight + step
        lookahead.after_step(step)
        if step % 5 == 0:
            share = 0.95**5 * (step / 10) ** 3
            slow = share * slow + (1 - share) * weight
            weight = slow
        np.testing.assert_allclose(module.weight.detach(), weight, rtol=1e-6)
    module.weight.data += 3
    module.running_mean += 1
    lookahead.finish()
    np.testing.assert_allclose(module.weight.detach(), slow, rtol=1e-6)
    assert torch.equal(module.running_mean, torch.zeros(2))
    assert module.num_batches_tracked == 0  # no number to average


def test__filter_that_begins_at_zero__does_not_become_nan():
    filters = nn.Parameter(torch.zeros(4, 3, 2, 2))
    optimizer = Muon([{"params": [filters], "lr": 0.1, "orthogonal": True, "momentum": 0.6}])
    filters.grad = torch.randn(4, 3, 2, 2, generator=TORCH)
    optimizer.step()
    assert filters.isfinite().all() and filters.abs().sum() > 0


def test__muon__leaves_the_rest_at_the_rate_that_sgd_takes():
    y = np.arange(200) % 2
    X = np.random.default_rng(0).integers(0, 256, (200, 12, 12), dtype=np.uint8)
    for parameters in ({}, {"batch_norm": False}, {"architecture": "lenet5"}):
        rates = [
            CNNClassifier(solver=solver, **parameters)._prepare(X, y, going_on=False)[0].recipe
            for solver in ("sgd", "muon")
        ]
        beside = rates[1].learning_rate_init * rates[1].rate_factor_beside_muon
        assert beside == pytest.approx(rates[0].learning_rate_init)
