"""Operations on tensors that are recorded once and then run without Python.

Between two operations a thread needs Python's interpreter, for which threads that train beside each
other wait, and sleep. What was recorded runs in one go, by torch's own interpreter of graphs (that
of TorchScript): the same operations, on the same memory. Where torch has none, Python goes on.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# A step is recorded when it is taken for so many times: by then libraries are chosen and moments
# are made. It takes 1 ms.
_RECORDED_TIME = 3

# Recordings that are kept: rates that change in every epoch would make one for each.
_MOST_RECORDED = 8


def records_operations(device: torch.device) -> bool:
    """Whether steps are recorded on a device; SKCIFAR_TAPES=0 in the environment says no."""
    return device.type == "cpu" and os.environ.get("SKCIFAR_TAPES", "1") != "0"


class Tapes:
    """Takes steps, those that come again and again by playing what was recorded of one."""

    def __init__(self) -> None:
        self.n_taken: Counter[Hashable] = Counter()
        self.recorded: dict[Hashable, Callable[..., None]] = {}

    def run(self, step: Callable[[], None], given: Sequence[Tensor | float]) -> None:
        """Take a step, which is to do the same with other tensors in the place of those given.

        Parameters
        ----------
        step : callable
            Reads and writes what is given, and tensors that stay where they are from step to step.
            It must not ask for the values of tensors, nor draw random numbers.
        given : sequence of tensors and numbers
            Two steps with the same numbers do the same operations.
        """
        kind = tuple(None if isinstance(value, Tensor) else value for value in given)
        tensors = [value for value in given if isinstance(value, Tensor)]
        if kind in self.recorded:
            self.recorded[kind](*tensors)
            return
        self.n_taken[kind] += 1
        if self.n_taken[kind] != _RECORDED_TIME or len(self.recorded) == _MOST_RECORDED:
            step()
            return
        with _Recorder() as recorder:
            step()
        function = recorder.function_of(tensors)
        if function is not None:
            self.recorded[kind] = function


class _Recorder(TorchDispatchMode):
    """Notes all operations on tensors that it sees done."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch imports its compiler, which takes a second

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Sequence[Any], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        self.operations.append((operator, args, kwargs, result))
        return result

    def function_of(self, tensors: list[Tensor]) -> Callable[..., None] | None:
        """What does the operations with others for `tensors`; None if torch cannot, or no longer.

        Graphs of operations, and what runs them, are private to torch.
        """
        try:
            transcript = _Transcript(tensors)
            for operation in self.operations:
                transcript.add(*operation)
            transcript.graph.registerOutput(transcript.graph.insertConstant(None))
            function = torch._C._create_function_from_graph("step", transcript.graph)
            is_optimising = torch._C._get_graph_executor_optimize  # in this thread
            optimise = torch._C._set_graph_executor_optimize
        except (AttributeError, NotImplementedError, RuntimeError, TypeError):
            return None
        others = transcript.inputs[len(tensors) :]

        def play(*given: Tensor) -> None:
            before = is_optimising()
            optimise(False)  # or products may be made of others, that round differently
            try:
                function(*given, *others)
            finally:
                optimise(before)

        return play


class _Transcript:
    """A graph of operations, in torch's own terms.

    Attributes
    ----------
    graph : torch.Graph
    inputs : list of tensors
        Of the graph: those that it began with, and all that operations used and did not make.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.graph: Any = torch._C.Graph()
        self.inputs: list[Tensor] = []
        self._values: dict[int, Any] = {}  # of tensors that are kept, by their identity
        for tensor in tensors:
            if id(tensor) in self._values:
                raise NotImplementedError("a tensor that was given twice")
            self._value_of(tensor)

    def add(self, operator: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        schema = operator._schema
        operands = []
        for i, argument in enumerate(schema.arguments):
            alias = argument.alias_info
            if alias is not None and alias.is_write and "List" in str(argument.type):
                raise NotImplementedError("torch drops what changes the tensors of a list")
            if i < len(args):
                operand = args[i]
            else:
                operand = kwargs.get(argument.name, argument.default_value)
            operands.append(self._operand(operand, argument.type))
        node = self.graph.insertNode(self.graph.create(schema.name, operands, len(schema.returns)))
        if node.schema() == "(no schema)":
            raise NotImplementedError(schema.name)
        results = result if isinstance(result, tuple) else (result,)
        for value, tensor in zip(node.outputs(), results, strict=len(schema.returns) > 0):
            if not isinstance(tensor, Tensor):
                raise NotImplementedError(f"{schema.name} gives more than tensors")
            # what was changed in place is what it was before
            self._values.setdefault(id(tensor), value)

    def _operand(self, operand: Any, kind: Any) -> Any:
        if isinstance(operand, Tensor):
            return self._value_of(operand)
        is_list = isinstance(operand, (list, tuple))
        if is_list and (not operand or isinstance(operand[0], Tensor)):
            tensors = [self._value_of(tensor) for tensor in operand]
            node = self.graph.insertNode(self.graph.create("prim::ListConstruct", tensors, 1))
            node.output().setType(kind)
            return node.output()
        return self.graph.insertConstant(list(operand) if is_list else operand)

    def _value_of(self, tensor: Tensor) -> Any:
        if id(tensor) not in self._values:
            value = self.graph.addInput()
            value.setType(torch._C.TensorType.get())
            self._values[id(tensor)] = value
            self.inputs.append(tensor)
        return self._values[id(tensor)]
