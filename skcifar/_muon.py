"""Muon: steps of convolutions whose singular values are all about one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Of the polynomial a x + b x^3 + c x^5, which takes singular values in (0, 1] to about one in a few
# rounds: those of Jordan's, chosen for the steepest slope at 0.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ROUNDS = 3


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for filters, Nesterov's SGD for everything else.

    A filter, (n_out, ...), is taken for a matrix of n_out rows. Its momentum is replaced by the
    nearest matrix with orthogonal rows or columns, about, and the filter itself is kept at the
    norm that n_out rows of length 1 have, so that a rate means the same for all layers.

    torch.optim.Muon takes matrices only and does them one by one.

    Parameters
    ----------
    groups : list of dict
        Of parameters, with "lr", "orthogonal" (bool), "momentum" and "weight_decay"; the last is
        part of the gradient, and unused for what is orthogonal.

    References
    ----------
    .. [1] Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    .. [2] Bernstein and Newhouse, "Old optimizer, new norm: an anthology", 2024.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradients = [p.grad for p in parameters]
            if not group["orthogonal"] and group["weight_decay"]:
                decay = group["weight_decay"]
                gradients = list(torch._foreach_add(gradients, parameters, alpha=decay))
            steps = self._accelerated(parameters, gradients, group["momentum"])
            if group["orthogonal"]:
                steps = _orthogonalised(steps)
                for parameter in parameters:
                    # one that begins at 0 stays there for now, rather than become NaN
                    parameter.mul_(len(parameter) ** 0.5 / parameter.norm().clamp_min(1e-12))
            # a product, as the rate may be a tensor
            torch._foreach_sub_(parameters, torch._foreach_mul(steps, group["lr"]))

    def _accelerated(
        self, parameters: list[Tensor], gradients: list[Tensor], momentum: float
    ) -> list[Tensor]:
        """Nesterov's momentum: the gradients as they will be, if they go on."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, gradients)
        return list(torch._foreach_add(gradients, buffers, alpha=momentum))


def _orthogonalised(steps: list[Tensor]) -> list[Tensor]:
    """The steps as matrices with singular values of about one; those of one shape at once."""
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    matrices = [step.flatten(1) for step in steps]
    for i, matrix in enumerate(matrices):
        alike[matrix.shape[0], matrix.shape[1]].append(i)
    results = list(steps)
    for places in alike.values():
        orthogonal = orthogonalised(torch.stack([matrices[i] for i in places]))
        for i, matrix in zip(places, orthogonal, strict=True):
            results[i] = matrix.view(steps[i].shape)
    return results


def orthogonalised(matrices: Tensor, rounds: int = _ROUNDS) -> Tensor:
    """Matrices (n, rows, columns) with the same singular vectors and singular values near one.

    By rounds of the Newton-Schulz iteration, which are a few products each; three leave the values
    of usual gradients within 0.3 to 1.3. On a GPU they are computed in bfloat16.
    """
    a, b, c = _COEFFICIENTS
    dtype = torch.bfloat16 if matrices.is_cuda else matrices.dtype
    x = matrices.to(dtype)
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(rounds):
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if is_tall else x).to(matrices.dtype)
