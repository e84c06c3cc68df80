"""Dense products: right in every library, and how one of them is chosen."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from skcifar import _matmul
from skcifar._matmul import Choice, Linear, find_onednn, matrix_product, torch_product

# rows, inputs, outputs of a layer, of every class of sizes
SHAPES = [(1, 1, 1), (1, 64, 10), (7, 3, 300), (33, 784, 32), (200, 784, 288), (128, 65, 512)]
SMALL, MIDDLE, LARGE = (1, 64, 10), (128, 1024, 64), (256, 1024, 64)  # m, k, n
needs_onednn = pytest.mark.skipif(not find_onednn(), reason="this torch has no oneDNN product")


@pytest.fixture(params=["auto", "torch", pytest.param("onednn", marks=needs_onednn)])
def library(request, monkeypatch):
    monkeypatch.setenv("SKCIFAR_MATMUL", request.param)
    monkeypatch.setattr(_matmul, "_choice", Choice(find_onednn))
    return request.param


def relative_error(result, exact):
    return float(torch.linalg.vector_norm(result - exact) / torch.linalg.vector_norm(exact))


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


# -- products ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test__product__is_that_of_float64(library, shape):
    m, k, n = shape
    a, b = drawn(m, k), drawn(n, k)
    assert relative_error(matrix_product(a, b), a.double() @ b.double().T) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test__layer_and_its_gradients__are_those_of_float64(library, shape):
    n_rows, n_in, n_out = shape
    torch.manual_seed(0)
    ours, exact = Linear(n_in, n_out), nn.Linear(n_in, n_out).double()
    exact.load_state_dict(ours.state_dict())
    x, gradient = drawn(n_rows, n_in), drawn(n_rows, n_out)
    inputs = [x.clone().requires_grad_(), x.double().requires_grad_()]
    outputs = [layer(rows) for layer, rows in zip((ours, exact), inputs, strict=True)]
    outputs[0].backward(gradient)
    outputs[1].backward(gradient.double())
    for one, other in [
        outputs,
        [rows.grad for rows in inputs],
        [ours.weight.grad, exact.weight.grad],
        [ours.bias.grad, exact.bias.grad],
    ]:
        assert one.dtype == torch.float32
        assert relative_error(one.detach(), other.detach()) < 1e-6
    assert ours.weight.grad.is_contiguous()


def test__matrices_that_are_not_contiguous__multiply_the_same(library):
    wide = drawn(300, 400)
    a, b = wide[::2, 1::2], wide.T[:64, :200]  # (150, 200), (64, 200)
    assert relative_error(matrix_product(a, b), a.double() @ b.double().T) < 1e-6
    wide = drawn(1500, 1200)
    a, b = wide[::2, 1::2].T, wide.T[:64, ::2]  # (600, 750), (64, 750)
    assert relative_error(matrix_product(a, b), a.double() @ b.double().T) < 1e-6


@pytest.mark.parametrize("shape", [(300, 784, 100), (300, 64, 512)])
def test__gradient_that_is_one_number_in_memory__multiplies_the_same(library, shape):
    n_rows, n_in, n_out = shape
    layer, x = Linear(n_in, n_out), drawn(n_rows, n_in).requires_grad_()
    layer(x).sum().backward()
    expected = x.detach().double().sum(0).expand(n_out, -1)
    assert relative_error(layer.weight.grad, expected) < 1e-6
    expected = layer.weight.detach().double().sum(0).expand(n_rows, -1)
    assert relative_error(x.grad, expected) < 2e-6


def test__no_rows__no_outputs_and_no_gradient(library):
    layer, x = Linear(5, 3), torch.zeros(0, 5, requires_grad=True)
    outputs = layer(x)
    assert outputs.shape == (0, 3)
    outputs.sum().backward()
    assert x.grad.shape == (0, 5)
    assert not layer.weight.grad.any()
    assert matrix_product(torch.zeros(4, 0), torch.zeros(2, 0)).tolist() == [[0, 0]] * 4


def test__gradients_in_float64__are_the_numerical_ones(library):
    torch.manual_seed(0)
    layer = Linear(4, 3).double()
    rows = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (rows,))


def test__frozen_and_missing_parameters__get_no_gradient(library):
    frozen, unbiased = Linear(784, 200), Linear(784, 200, bias=False)
    frozen.weight.requires_grad_(False)
    x = drawn(64, 784)
    (frozen(x) * unbiased(x)).sum().backward()
    assert frozen.weight.grad is None
    expected = unbiased(x).detach().double().sum(0)
    torch.testing.assert_close(frozen.bias.grad.double(), expected, rtol=1e-5, atol=1e-4)
    expected = frozen(x).detach().double().T @ x.double()
    assert relative_error(unbiased.weight.grad, expected) < 1e-6


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # of torch's own switch of oneDNN
def test__onednn_switched_off_in_torch__gives_torchs_own_numbers(library):
    ours, theirs = Linear(784, 200), nn.Linear(784, 200)
    theirs.load_state_dict(ours.state_dict())
    x = drawn(64, 784)
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(ours(x), theirs(x))
        assert torch.equal(matrix_product(x, ours.weight), torch.mm(x, ours.weight.T))


def test__other_types_and_ranks_and_autocast__are_torchs_own(library):
    ours, theirs = Linear(784, 200), nn.Linear(784, 200)
    theirs.load_state_dict(ours.state_dict())
    x = drawn(64, 784)
    assert torch.equal(ours(x[None]), theirs(x[None]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(x), theirs(x))
        assert ours(x).dtype == torch.bfloat16
    assert torch.equal(ours.double()(x.double()), theirs.double()(x.double()))


# -- the choice ----------------------------------------------------------------------------------


class Libraries:
    """Pretended libraries, and a clock that only their products move on."""

    def __init__(self, monkeypatch, **seconds):
        self.time = 0.0
        self.n_products = dict.fromkeys(["torch", *seconds], 0)
        self.n_searches = 0
        self.torch = self.library("torch", seconds.pop("torch", 1.0))
        self.others = {name: self.library(name, cost) for name, cost in seconds.items()}
        monkeypatch.setattr(_matmul, "torch_product", self.torch)
        self.choice = Choice(self.find, lambda: self.time)

    def library(self, name, seconds):
        def product(a, b, bias):
            self.n_products[name] += 1
            self.time += seconds
            return torch_product(a, b, bias)

        return product

    def find(self):
        self.n_searches += 1
        return self.others


@pytest.fixture(autouse=True)
def no_wish(monkeypatch):
    monkeypatch.delenv("SKCIFAR_MATMUL", raising=False)


@pytest.mark.parametrize("shape", [MIDDLE, LARGE])
def test__clearly_faster_library__is_taken(monkeypatch, shape):
    libraries = Libraries(monkeypatch, slow=2.0, fast=0.5, faster=0.25)
    assert libraries.choice.of_shape(*shape) is libraries.others["faster"]


@pytest.mark.parametrize("seconds", [3.0, 1.0, 0.9])
def test__library_that_is_not_clearly_faster__is_not_taken(monkeypatch, seconds):
    libraries = Libraries(monkeypatch, other=seconds)
    assert libraries.choice.of_shape(*LARGE) is libraries.torch


@pytest.mark.parametrize(
    "wrong",
    [
        lambda product: product + 1e-4,
        lambda product: product.bfloat16().float(),
        lambda product: product.index_fill(0, torch.tensor(-1), 0.0),
        lambda product: product * float("nan"),
    ],
)
def test__wrong_library__is_never_taken(monkeypatch, wrong):
    libraries = Libraries(monkeypatch, wrong=0.1, right=0.5)
    product = libraries.others["wrong"]
    libraries.others["wrong"] = lambda a, b, bias: wrong(product(a, b, bias))
    assert libraries.choice.of_shape(*LARGE) is libraries.others["right"]


def test__library_that_is_wrong_in_a_gradient_only__is_not_taken(monkeypatch):
    libraries = Libraries(monkeypatch, wrong=0.1)
    product = libraries.others["wrong"]
    # the outputs alone have a bias
    libraries.others["wrong"] = lambda a, b, bias: (
        product(a, b, bias) * (1 if bias is not None else 1.01)
    )
    assert libraries.choice.of_shape(*LARGE) is libraries.torch


def test__library_that_fails__is_not_taken(monkeypatch):
    libraries = Libraries(monkeypatch, failing=0.1)

    def fail(a, b, bias):
        raise RuntimeError("could not create a primitive")

    libraries.others["failing"] = fail
    assert libraries.choice.of_shape(*LARGE) is libraries.torch


def test__no_other_library__leaves_torch(monkeypatch):
    libraries = Libraries(monkeypatch)
    assert libraries.choice.of_shape(*LARGE) is libraries.torch
    assert libraries.n_products["torch"] == 0


def test__few_multiplications__are_torchs_unmeasured(monkeypatch):
    libraries = Libraries(monkeypatch, fast=0.1)
    assert libraries.choice.of_shape(*SMALL) is libraries.torch
    assert libraries.choice.of_shape(0, 10**6, 10**6) is libraries.torch
    assert libraries.n_products == {"torch": 0, "fast": 0}


def test__class_of_sizes__is_measured_once(monkeypatch):
    libraries = Libraries(monkeypatch, fast=0.1)
    libraries.choice.of_shape(*LARGE)
    first = dict(libraries.n_products)
    m, k, n = LARGE
    for shape in [LARGE, (4 * m, k, n), (m, n, k)]:
        assert libraries.choice.of_shape(*shape) is libraries.others["fast"]
    assert libraries.n_products == first
    libraries.choice.of_shape(*MIDDLE)
    assert libraries.n_products["fast"] == 2 * first["fast"]


def test__threads_that_meet_at_the_first_product__measure_once_and_agree(monkeypatch):
    libraries = Libraries(monkeypatch, fast=0.1)
    libraries.choice.of_shape(*LARGE)
    once = dict(libraries.n_products)
    libraries = Libraries(monkeypatch, fast=0.1)
    n_threads = 8
    barrier = threading.Barrier(n_threads)

    def meet(_):
        barrier.wait()
        return libraries.choice.of_shape(*LARGE)

    with ThreadPoolExecutor(n_threads) as pool:
        found = list(pool.map(meet, range(n_threads)))
    assert set(found) == {libraries.others["fast"]}
    assert libraries.n_searches == 1
    assert libraries.n_products == once


def test__measuring__draws_no_global_random_number_and_records_nothing():
    state = torch.get_rng_state()
    with torch.enable_grad(), torch.device("meta"):
        Choice(find_onednn).of_shape(*MIDDLE)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [SMALL, MIDDLE, LARGE])
def test__environment_variable__decides_unmeasured(monkeypatch, shape):
    for wish in ("torch", "onednn"):
        monkeypatch.setenv("SKCIFAR_MATMUL", wish)
        libraries = Libraries(monkeypatch, onednn=3.0)
        expected = {"torch": libraries.torch, **libraries.others}[wish]
        assert libraries.choice.of_shape(*shape) is expected
        assert libraries.n_products == {"torch": 0, "onednn": 0}


def test__environment_variable__is_read_once(monkeypatch):
    monkeypatch.setenv("SKCIFAR_MATMUL", "torch")
    libraries = Libraries(monkeypatch, onednn=0.1)
    libraries.choice.of_shape(*SMALL)
    monkeypatch.setenv("SKCIFAR_MATMUL", "onednn")
    assert libraries.choice.of_shape(*LARGE) is libraries.torch


def test__unknown_library_in_the_environment__error_names_those_there_are(monkeypatch):
    monkeypatch.setenv("SKCIFAR_MATMUL", "mkl")
    monkeypatch.setattr(_matmul, "_choice", Choice(find_onednn))
    with pytest.raises(ValueError, match=r"SKCIFAR_MATMUL is 'mkl'.*'auto'.*'torch' or 'onednn'"):
        Linear(2, 2)(torch.zeros(1, 2))
    monkeypatch.setenv("SKCIFAR_MATMUL", "")  # as if it were not set
    assert Linear(2, 2)(torch.zeros(1, 2)).shape == (1, 2)


def test__library_that_this_torch_lacks__error_says_what_to_do(monkeypatch):
    monkeypatch.setenv("SKCIFAR_MATMUL", "onednn")
    with pytest.raises(RuntimeError, match=r"SKCIFAR_MATMUL is 'onednn'.*set it to 'auto'"):
        Choice(dict).of_shape(*LARGE)
