"""Dense products of float32 matrices on the CPU, by the library that is fastest for their size.

torch multiplies through MKL (or what else it was built with), and holds oneDNN, which takes half
the time on some CPUs. Which one it is depends on the CPU and the shapes, so it is measured: for
each of a few classes of shapes, once in a process, when the first product of the class is wanted.
That takes ten or twenty milliseconds. oneDNN is taken where it is clearly faster and right to 1e-6.

The two round differently. Within a process a product of a shape is always made by one of them;
where the race is close, another process may decide otherwise. The environment variable
`SKCIFAR_MATMUL`, read once in a process, decides without a measurement:

auto
    The default, as above.
torch
    torch's own products, for every shape.
onednn
    oneDNN, for every shape, unchecked.

`torch.backends.mkldnn.flags(enabled=False)` turns oneDNN off for as long as it lasts, whatever was
chosen. Products of other types, on other devices or under autocast are torch's own.
"""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Of a (m, k), b (n, k) and perhaps a bias (n,): a times the transpose of b, plus the bias: (m, n).
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Linear(nn.Linear):
    """torch's dense layer with its float32 products in the library chosen for their size."""

    def forward(self, x: Tensor) -> Tensor:
        product = _product_for(x, self.weight)
        if product is None:
            return super().forward(x)
        return _Dense.apply(x, self.weight, self.bias, product)


def matrix_product(a: Tensor, b: Tensor) -> Tensor:
    """a (m, k) times the transpose of b (n, k): (m, n), in the library chosen as for `Linear`."""
    product = _product_for(a, b)
    return torch.mm(a, b.t()) if product is None else product(a, b, None)


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, product: Product) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.product = product
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_rows, of_weight, of_bias, _ = ctx.needs_input_grad
        return (
            ctx.product(gradient, weight.t(), None) if of_rows else None,
            _of_weight(ctx.product, x, gradient) if of_weight else None,
            gradient.sum(0) if of_bias else None,
            None,
        )


def _of_weight(product: Product, x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of a layer's weights (n_out, n_in), from its inputs and that of its outputs."""
    # The first factor is transposed in memory. With 64 inputs and 512 outputs oneDNN takes 0.2 ms
    # for 1024 rows if that is the narrower one, else 0.5 (MKL 0.5); 1.2 and 2.8 (2.0) for 4096.
    if x.shape[1] < gradient.shape[1]:
        return product(x.t(), gradient.t(), None).t()
    return product(gradient.t(), x.t(), None)


def _product_for(a: Tensor, b: Tensor) -> Product | None:
    """What multiplies `a` and the transpose of `b`; None is torch, in its usual ways."""
    if (
        a.dtype != torch.float32
        or a.ndim != 2
        or a.device.type != "cpu"
        or not torch.backends.mkldnn.enabled
        or torch.is_autocast_enabled("cpu")
    ):
        return None
    product = _choice.of_shape(a.shape[0], a.shape[1], b.shape[0])
    return None if product is torch_product else product


# -- the choice ------------------------------------------------------------------------------------

# Classes of shapes begin at these numbers of multiplications; in the first, torch is not disputed.
#
# How many times oneDNN is as fast as torch (MKL) in a step of a layer, forward and back, calls and
# all: median, least and greatest of 144 layers (64, 784 or 3072 inputs, 10 to 512 outputs, batches
# of 1 to 4096) on two cores of an AMD EPYC (Zen 5), torch 2.13:
#
#     multiplications from      2^18          2^20           2^22           2^24           2^26
#     1 thread             .5 (.3-.8)   .9 (.5-1.7)  1.4 (.9-2.2)  1.6 (1.0-2.3)  1.9 (1.4-2.6)
#     2 threads            .5 (.4-1.2)  .8 (.3-1.3)  1.2 (.8-2.2)  1.6 (1.0-2.2)  1.8 (1.3-2.7)
#
# Of a product alone .6, 1.2, 1.7, 1.9 and 2.1 with one thread. What small layers pay for is the
# call of the operator (15 us, MKL's 4) and of Python by autograd (25 us a step).
_CLASSES = (0, 2**22, 2**24)


class Choice:
    """Which library multiplies matrices of a shape: measured once for each class of shapes.

    Parameters
    ----------
    find_others : callable
        Gives the libraries beside torch, by name.
    clock : callable
        Gives seconds.
    """

    def __init__(
        self,
        find_others: Callable[[], dict[str, Product]],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._find_others = find_others
        self._clock = clock
        self._lock = threading.Lock()
        self._taken: dict[int, Product] = {}  # by class

    def of_shape(self, m: int, k: int, n: int) -> Product:
        """What multiplies a matrix (m, k) and the transpose of one (n, k)."""
        n_multiplications = m * k * n
        if not n_multiplications:  # oneDNN has no empty matrices
            return torch_product
        size = bisect(_CLASSES, n_multiplications) - 1
        product = self._taken.get(size)
        if product is None:
            with self._lock:  # who waited here finds what the other has measured
                product = self._taken.get(size)
                if product is None:
                    product = self._taken[size] = self._choose(size)
        return product

    @cached_property
    def _wanted(self) -> str:
        name = os.environ.get("SKCIFAR_MATMUL") or "auto"
        if name not in ("auto", "torch", "onednn"):
            raise ValueError(
                f"The environment variable SKCIFAR_MATMUL is {name!r}, but must be 'auto' (measure "
                "which library is faster), 'torch' or 'onednn'; correct or unset it."
            )
        return name

    def _choose(self, size: int) -> Product:
        if self._wanted == "torch" or (self._wanted == "auto" and not size):
            return torch_product
        others = self._find_others()
        if self._wanted == "auto":
            return self._fastest(list(others.values()), _TRIALS[size]) if others else torch_product
        if self._wanted not in others:
            raise RuntimeError(
                f"SKCIFAR_MATMUL is {self._wanted!r}, a library that torch {torch.__version__} "
                "does not offer here; set it to 'auto' or 'torch'."
            )
        return others[self._wanted]

    @torch.no_grad()
    def _fastest(self, others: list[Product], trial: tuple[int, int, int]) -> Product:
        """torch, or what is right and clearly faster."""
        generator = torch.Generator().manual_seed(0)
        n_rows, n_in, n_out = trial
        x, weight, bias, gradient = (
            torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            for shape in ((n_rows, n_in), (n_out, n_in), (n_out,), (n_rows, n_out))
        )
        exact = _layer(torch_product, *(t.double() for t in (x, weight, bias, gradient)))
        contestants: list[Product] = [torch_product]
        for product in others:
            try:
                results = _layer(product, x, weight, bias, gradient)
            except RuntimeError:  # of an operator that is there, but not for this CPU
                continue
            if all(_is_right(result, to) for result, to in zip(results, exact, strict=True)):
                contestants.append(product)
        if len(contestants) == 1:
            return torch_product
        seconds = [float("inf")] * len(contestants)
        for _ in range(_REPEATS):  # in turn, and the least counts: others may compute beside us
            for i, product in enumerate(contestants):
                start = self._clock()
                _layer(product, x, weight, bias, gradient)
                seconds[i] = min(seconds[i], self._clock() - start)
        fastest = seconds.index(min(seconds))
        return contestants[fastest if seconds[0] >= _CLEARLY * seconds[fastest] else 0]


# A layer for each class: rows, inputs and outputs. In 200 runs, alone and in three processes at a
# time on two cores, oneDNN came to 1.2 to 2.0 times the speed of torch. A run takes 5 to 20 ms.
_TRIALS = ((0, 0, 0), (128, 1024, 64), (256, 1024, 64))
_REPEATS = 5
_CLEARLY = 1.15  # below, chance would decide, and results differ in rounding from run to run
_TOLERANCE = 1e-6  # relative, in the Frobenius norm: oneDNN comes to 2 to 6e-7, MKL to 1 to 3e-7


def _layer(product: Product, x: Tensor, weight: Tensor, bias: Tensor, gradient: Tensor) -> list:
    """The three products of a layer's training step."""
    return [
        product(x, weight, bias),
        product(gradient, weight.t(), None),
        _of_weight(product, x, gradient),
    ]


def _is_right(result: Tensor, exact: Tensor) -> bool:
    error = torch.linalg.vector_norm(result - exact) / torch.linalg.vector_norm(exact)
    return bool(error <= _TOLERANCE)  # not of NaN


# -- libraries -------------------------------------------------------------------------------------


def torch_product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """The product in torch's usual ways."""
    return F.linear(a, b, bias)


def find_onednn() -> dict[str, Product]:
    """oneDNN's product by its name, unless this torch does without it."""
    try:
        operator = torch.ops.mkldnn._linear_pointwise  # private to torch
        probe = torch.zeros(1, 2, dtype=torch.float32, device="cpu")
        operator(probe, probe, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return {}
    return {"onednn": lambda a, b, bias: operator(a, b, bias, "none", [], "")}


_choice = Choice(find_onednn)
