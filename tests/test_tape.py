"""What is recorded of steps does what the steps do."""

import threading

import pytest
import torch

from skcifar import _tape
from skcifar._tape import Tapes, records_operations

OFTEN = 3 * _tape._RECORDED_TIME


@pytest.fixture
def n_recorded(monkeypatch):
    """How many functions were recorded, and how many could not be, in any thread."""
    counts = {"recorded": 0, "refused": 0}
    original = _tape._Recorder.function_of

    def function_of(self, tensors):
        function = original(self, tensors)
        counts["refused" if function is None else "recorded"] += 1
        return function

    monkeypatch.setattr(_tape._Recorder, "function_of", function_of)
    return counts


def in_a_list(x):
    torch._foreach_add_([x], 0.0)
    return x.view(2, 1)


class Descent:
    """Steps of two layers with all kinds of arguments: views, lists, numbers, `out`, in place."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.weight = torch.rand(4, 6, generator=generator, dtype=torch.float64)
        self.bias = torch.zeros(4, 1, dtype=torch.float64)
        self.momentum = torch.zeros_like(self.weight)
        self.n_steps = 0

    def step(self, rows, norm, rate):
        self.n_steps += 1
        h = torch.addmm(self.bias, self.weight, rows.t()).relu_()
        d = torch.softmax(torch.cat([h, h.flip(0)]), 0).view(2, 4, -1).sum(0).sub_(0.5)
        gradient = torch.mm(d, rows.to(torch.float64))
        torch.linalg.vector_norm(self.weight, dim=1, out=norm)
        torch.add(gradient, self.momentum, alpha=0.9, out=self.momentum)
        self.weight.addcmul_(self.momentum, rate, value=-1)
        self.bias.sub_(d.sum(1, True), alpha=0.1)
        self.weight[1:3].mul_(0.99)

    def run(self, tapes, sizes):
        """The norms of the weights in each step."""
        generator = torch.Generator().manual_seed(2)
        norms = torch.zeros(len(sizes), 4, dtype=torch.float64)
        for norm, size in zip(norms, sizes, strict=True):
            rows = torch.rand(size, 6, generator=generator, dtype=torch.float64)
            rate = torch.rand(4, 1, generator=generator, dtype=torch.float64) / 10
            given = rows, norm, rate

            def step(given=given):
                self.step(*given)

            if tapes is None:
                step()
            else:
                tapes.run(step, [size, *given])
        return norms


def test__recorded_steps__do_what_the_steps_do(n_recorded):
    sizes = [5, 7] * OFTEN
    plain, taped = Descent(), Descent()
    expected, found = plain.run(None, sizes), taped.run(Tapes(), sizes)
    assert torch.equal(found, expected)
    for name in ("weight", "bias", "momentum"):
        assert torch.equal(getattr(taped, name), getattr(plain, name))
    assert plain.n_steps == len(sizes)
    assert taped.n_steps == 2 * _tape._RECORDED_TIME  # Python had no part in the others
    assert n_recorded == {"recorded": 2, "refused": 0}


def test__recorded_steps__run_in_threads_beside_each_other():
    expected = Descent().run(None, [5] * OFTEN)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(Descent().run(Tapes(), [5] * OFTEN)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 4
    assert all(torch.equal(norms, expected) for norms in found)


@pytest.mark.parametrize("operation", [lambda x: x.split(1), torch.unbind, in_a_list])
def test__what_cannot_be_recorded__is_done_by_python_each_time(operation, n_recorded):
    tapes, value = Tapes(), torch.zeros(2)
    for _ in range(OFTEN):
        tapes.run(lambda: operation(value)[1].add_(1), [])
    assert value.tolist() == [0, OFTEN]
    assert n_recorded == {"recorded": 0, "refused": 1}


@pytest.mark.parametrize(
    "name", ["Graph", "_create_function_from_graph", "_set_graph_executor_optimize"]
)
def test__without_torch_s_graphs__steps_are_done_by_python(name, monkeypatch, n_recorded):
    monkeypatch.delattr(torch._C, name)
    assert torch.equal(Descent().run(Tapes(), [5] * OFTEN), Descent().run(None, [5] * OFTEN))
    assert n_recorded == {"recorded": 0, "refused": 1}


def test__other_numbers__are_another_step():
    tapes, value = Tapes(), torch.zeros(())
    for i in range(4 * OFTEN):
        tapes.run(lambda n=i % 3: value.add_(n), [i % 3])
    assert value == 4 * OFTEN  # 0, 1 and 2 in turn
    assert len(tapes.recorded) == 3


def test__ever_new_numbers__are_not_recorded_without_end():
    tapes, value = Tapes(), torch.zeros(())
    for number in range(20):
        for _ in range(OFTEN):
            tapes.run(lambda n=number: value.add_(n), [number])
    assert value == OFTEN * sum(range(20))
    assert len(tapes.recorded) == _tape._MOST_RECORDED


def test__devices__only_the_cpu_has_tapes(monkeypatch):
    assert records_operations(torch.device("cpu"))
    assert not records_operations(torch.device("meta"))
    monkeypatch.setenv("SKCIFAR_TAPES", "0")
    assert not records_operations(torch.device("cpu"))
