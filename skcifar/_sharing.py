"""What tasks share: rows that they pick from one array, and steps of Pipelines, fitted once."""

from __future__ import annotations

import copy
import inspect
import random
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import joblib
import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.pipeline import Pipeline
from sklearn.utils import check_random_state

from skcifar._base import TorchEstimator
from skcifar._jobs import compute
from skcifar._memory import free_memory
from skcifar._tasks import Ended, Work, current_work

# Arrays from this size on are shared between tasks.
_LARGE = 1_000_000

# -- what a task is about --------------------------------------------------------------------------


def arguments_of(item: Any) -> Mapping[str, Any]:
    """Arguments of a task by name, if a function of scikit-learn's model selection does it.

    These functions pick rows before they hand them on, and are given an estimator of their own.
    """
    try:
        func, args, kwargs = item
        if func.__module__.startswith("sklearn.model_selection."):
            return inspect.signature(func).bind(*args, **kwargs).arguments
    except (AttributeError, TypeError, ValueError):
        pass
    return {}


def may_train(func: Any) -> bool:
    """Whether a task may fit an estimator of ours, as far as its arguments tell."""
    items = getattr(func, "items", None)
    if not isinstance(items, list):
        return True
    for item in items:
        arguments = arguments_of(item)
        if not isinstance(arguments.get("estimator"), BaseEstimator):
            return True
        candidates = [arguments["estimator"], *(arguments.get("parameters") or {}).values()]
        if any(_holds_ours(value) for value in candidates):
            return True
    return False


def _holds_ours(estimator: Any) -> bool:
    if not isinstance(estimator, BaseEstimator):
        return False
    values = estimator.get_params().values()
    return any(isinstance(value, TorchEstimator) for value in (estimator, *values))


# -- rows ------------------------------------------------------------------------------------------


class Facts:
    """What has been computed of arrays that tasks share, for as long as these exist."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[weakref.ref, dict[tuple, Any]]] = {}

    def remember(self, array: np.ndarray) -> None:
        """Begin to, of an array that nobody may write to any more."""
        array.flags.writeable = False
        address = array.__array_interface__["data"][0]
        self._of[address] = weakref.ref(array, lambda _: self._of.pop(address, None)), {}

    def of(self, address: int) -> dict[tuple, Any] | None:
        known = self._of.get(address)
        return None if known is None or known[0]() is None else known[1]


class SharedRows:
    """Rows that several tasks pick from one array, where they pick the same, as one array.

    27 tasks on 29 MiB in 3 folds hold 90 MiB so, and 0.8 GiB with a copy for each.
    """

    def __init__(self) -> None:
        self._arrays: dict[int, tuple[np.ndarray, weakref.WeakValueDictionary]] = {}
        self.facts = Facts()

    def share(self, item: tuple, arguments: Mapping[str, Any]) -> tuple:
        """The task with an X that shares its rows."""
        func, args, kwargs = item
        X = arguments.get("X")
        if type(X) is not np.ndarray or X.nbytes < _LARGE or X.dtype.hasobject:
            return item
        _, picked = self._arrays.setdefault(id(X), (X, weakref.WeakValueDictionary()))
        rows = X.view(_Rows)
        rows.picked, rows.facts = picked, self.facts
        args = tuple(rows if value is X else value for value in args)
        return func, args, {k: rows if value is X else value for k, value in kwargs.items()}


class _Rows(np.ndarray):
    """A view of an array for code that does nothing but pick rows of it, which are plain arrays."""

    picked: weakref.WeakValueDictionary
    facts: Facts

    def __getitem__(self, key: Any) -> Any:
        array = np.asarray(self)
        # scikit-learn's indexing asks for X[rows, ...]
        rows = key[0] if isinstance(key, tuple) and len(key) == 2 and key[1] is ... else key
        content = _key(rows) if hasattr(self, "picked") else None
        if content is None:
            return array[key]
        if (shared := self.picked.get(content)) is None:
            # as scikit-learn picks them, to train on and to score; in the thread that has memory
            # at hand: 90 MiB take 0.14 s there, and 0.25 in those of tasks
            shared = compute(lambda: array[rows])
            self.facts.remember(shared)
            self.picked[content] = shared
        return shared

    def take(self, indices: Any, axis: Any = None, out: Any = None, mode: Any = "raise") -> Any:
        if axis == 0 and out is None and mode == "raise":
            return self[indices]
        return np.asarray(self).take(indices, axis, out, mode)


def _key(rows: Any) -> tuple | None:
    """What arrays of equal positions have in common; None of anything else."""
    if isinstance(rows, np.ndarray) and rows.ndim == 1 and rows.dtype.kind in "iu":
        return rows.dtype.str, rows.tobytes()
    return None


# -- steps -----------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Source:
    """An input of first steps."""

    fingerprint: tuple
    array: np.ndarray


@dataclass(eq=False)
class _Step:
    """A step that is fitted, or being fitted."""

    waiting: list[Work] = field(default_factory=list)
    is_over: bool = False
    repeats: bool = False  # whether another fit comes to the same
    output: Any = None
    transformer: Any = None
    n_bytes: int = 0


class Steps:
    """The steps before the last one of Pipelines, each fitted once for the same input.

    A Pipeline that ends in an estimator of ours gets a `_Memory` for as long as its task lasts:
    `memory` is what scikit-learn has its steps fitted by.
    """

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._steps: OrderedDict[tuple, _Step] = OrderedDict()
        self._outputs: dict[int, _Step] = {}
        self._budget = free_memory(torch.device("cpu")) // 4

    def attach(self, work: Work, pipeline: Pipeline) -> None:
        if pipeline.memory is None and _ends_in_ours(pipeline):
            pipeline.memory = _Memory(self, pipeline)
            work.pipelines.append(pipeline)

    def release(self, work: Work, value: Any) -> None:
        """Make the task's pipelines what they would be, before its value is handed out."""
        results = value if isinstance(value, list) else []
        returned = {id(v) for r in results if isinstance(r, dict) for v in r.values()}
        for pipeline in work.pipelines:
            if isinstance(pipeline.memory, _Memory):
                pipeline.memory = None
            if id(pipeline) in returned:  # one transformer is in several until now
                *steps, last = pipeline.steps
                pipeline.steps = [(name, copy.deepcopy(step)) for name, step in steps] + [last]

    def fit_transform(
        self, pipeline: Pipeline, func: Callable, ignore: Iterable[str], *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """What `func` gives: the rows that a transformer makes of X, and the transformer."""
        transformer, X, *others = args
        work = current_work()
        if work is None or not _may_be_shared(pipeline, transformer):
            return func(transformer, self._own(X), *others, **kwargs)
        settings = {name: value for name, value in kwargs.items() if name not in ignore}
        facts = (type(transformer), transformer, others, settings)
        try:
            # tasks may have seeds of their own
            seed = work.seed_of(0) if _holds_ours(transformer) else 0
            key = (joblib.hash(facts), self._source(X), seed)
        except Exception:  # something that cannot be pickled, so cannot be compared
            return func(transformer, self._own(X), *others, **kwargs)
        while (step := self._steps.get(key)) is not None and not step.is_over:
            step.waiting.append(work)
            work.hand_on()
        if step is None:
            step = self._steps[key] = _Step()
            result = self._fit(key, step, work, partial(func, **kwargs), args)
            return self._handed_out(step, pipeline) if step.repeats else result
        if not step.repeats:
            return func(transformer, self._own(X), *others, **kwargs)
        self._steps.move_to_end(key)
        context = kwargs.get("callback_ctx")
        if context is not None:  # to scikit-learn's callbacks, the step has begun and ended
            y = others[0] if others else None
            context.call_on_fit_task_begin(estimator=pipeline, X=X, y=y)
            context.call_on_fit_task_end(estimator=pipeline, X=step.output, y=y)
        return self._handed_out(step, pipeline)

    def _fit(
        self, key: tuple, step: _Step, work: Work, func: Callable, args: tuple
    ) -> tuple[Any, Any]:
        transformer, X, *others = args
        source, own = key[1], self._own(X)
        before = _sample(own), _global_random_states(), work.n_replaced
        try:
            output, fitted = func(transformer, own, *others)
        except BaseException as error:
            if not (isinstance(error, Ended) and work.coordinator.plan):
                del self._steps[key]
                work.coordinator.ready.extend(step.waiting)
            raise
        draws = _global_random_states() != before[1] and not isinstance(fitted, TorchEstimator)
        step.is_over = True
        step.repeats = _sample(own) == before[0] and not draws and work.n_replaced == before[2]
        work.coordinator.ready.extend(step.waiting)
        step.waiting = []
        if step.repeats:
            if isinstance(output, np.ndarray):
                if isinstance(own, np.ndarray) and np.may_share_memory(output, own):
                    output = output.copy()
                self._facts.remember(output)
            step.output, step.transformer = output, fitted
            step.n_bytes = _size(output) + (_size(X) if isinstance(source, _Source) else 0)
            self._outputs[id(output)] = step
            self._make_room()
        return output, fitted

    def _handed_out(self, step: _Step, pipeline: Pipeline) -> tuple[Any, Any]:
        # An estimator of ours never writes to its input, and jobs are seen to be on the same rows
        # by these being the same; others get a copy.
        output = step.output if _ends_in_ours(pipeline) else self._own(step.output)
        return output, step.transformer

    def _own(self, X: Any) -> Any:
        """X, or a copy if other tasks have it too."""
        return X.copy() if id(X) in self._outputs else X

    def _source(self, X: Any) -> Any:
        """What stands for the content of X in a key."""
        if id(X) in self._outputs:
            return self._outputs[id(X)]
        if not isinstance(X, np.ndarray) or X.dtype.hasobject:
            return joblib.hash(X)
        source = _Source((X.shape, X.dtype.str, _sample(X)), X)
        for _, known, _ in self._steps:
            if (
                isinstance(known, _Source)
                and known.fingerprint == source.fingerprint
                and _same_bytes(known.array, X)
            ):
                return known
        return source

    def _make_room(self) -> None:
        total = sum(step.n_bytes for step in self._steps.values())
        for key, step in list(self._steps.items()):
            if total <= self._budget:
                break
            # of others, an array alone is sure not to be written to
            if step.repeats and isinstance(step.output, np.ndarray):
                total -= step.n_bytes
                del self._outputs[id(step.output)], self._steps[key]


class _Memory:
    """The `memory` of a Pipeline: scikit-learn asks for `cache(func)`, and calls that."""

    def __init__(self, steps: Steps, pipeline: Pipeline) -> None:
        self.steps = steps
        self.pipeline = pipeline

    def cache(self, func: Callable, ignore: Iterable[str] = (), **_: Any) -> Callable:
        return partial(self.steps.fit_transform, self.pipeline, func, tuple(ignore))

    def __deepcopy__(self, memo: dict) -> _Memory:
        return self


def _ends_in_ours(pipeline: Pipeline) -> bool:
    return isinstance(pipeline._final_estimator, TorchEstimator)


def _may_be_shared(pipeline: Pipeline, transformer: Any) -> bool:
    """Whether nothing says that a fit of the step is one of a kind, or changes its input."""
    if not isinstance(transformer, BaseEstimator) or hasattr(transformer, "_skl_callbacks"):
        return False
    for name, value in pipeline.get_params().items():
        if name.rpartition("__")[2].startswith("copy") and value is False:
            return False
    if type(transformer).__module__.startswith(("sklearn.", "skcifar.")):
        return True  # these draw from NumPy's global generator, which is seen
    names = ("random_state", "seed", "random_seed", "rng")
    return not any(
        name.rpartition("__")[2] in names and not isinstance(value, int)
        for name, value in transformer.get_params().items()
    )


def _global_random_states() -> tuple:
    drawn = check_random_state(None).get_state(legacy=False)
    key = drawn["state"].pop("key").tobytes()
    return key, drawn, random.getstate(), torch.get_rng_state().numpy().tobytes()


def _sample(X: Any) -> Any:
    """Some thousand of an array's bytes."""
    if not isinstance(X, np.ndarray) or X.dtype.hasobject:
        return None
    step = X.size // 1000 + 1
    return X.flat[:: step + 1 - step % 2].tobytes()


def _same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    if a is b:
        return True
    if not (a.flags.c_contiguous and b.flags.c_contiguous):
        return a.tobytes() == b.tobytes()
    return np.array_equal(a.view(np.uint8), b.view(np.uint8))


def _size(X: Any) -> int:
    """Bytes of an array, or about those of a data frame or sparse matrix."""
    if isinstance(X, np.ndarray):
        return X.nbytes
    return int(np.prod(np.shape(X))) * 8
