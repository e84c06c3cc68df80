"""Steps recorded once and played again: a CUDA graph in place of a hundred launches.

A step of a small network takes a GPU less time than the processor takes to ask for it. Recorded as
a CUDA graph, forward pass, gradients and update are asked for at once. Not measured on a GPU.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from skcifar._device import indexed

# Takes positions of rows, an int64 tensor on the device. It reads and writes tensors that stay
# where they are, never waits for the device, and does the same for as many rows.
Step = Callable[[Tensor], None]

# Before a step is recorded it is taken as it is so many times: libraries choose their kernels and
# the optimizer makes its moments, neither of which may happen while recording.
_WARM_UP_STEPS = 3


def records_steps(device: torch.device) -> bool:
    """Whether steps are recorded on a device; SKCIFAR_CUDA_GRAPHS=0 in the environment says no."""
    return device.type == "cuda" and os.environ.get("SKCIFAR_CUDA_GRAPHS", "1") != "0"


class RecordedSteps:
    """Takes steps, from the fourth of a number of rows on by playing the recorded one.

    Parameters
    ----------
    device : torch.device
    generators : iterable of torch.Generator
        That the step draws from on the device.
    """

    def __init__(self, device: torch.device, generators: Iterable[torch.Generator]) -> None:
        self.generators = [g for g in generators if g.device.type == device.type]
        self.stream = _stream(device) if device.type == "cuda" else None
        self.n_taken: Counter[int] = Counter()
        self.positions: dict[int, Tensor] = {}
        self.recordings: dict[int, Callable[[], None]] = {}
        self.may_record = True
        self.is_recording = False

    def run(
        self,
        batches: Iterable[Tensor],
        begin: Callable[[], None],
        step: Step,
        end: Callable[[], None],
    ) -> None:
        """Take a step for each of the batches' positions, between the host's `begin` and `end`."""
        if self.stream is None:
            self._run(batches, begin, step, end)
            return
        # recording wants a stream of its own, which gradients remember
        outside = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(outside)
        try:
            with torch.cuda.stream(self.stream):
                self._run(batches, begin, step, end)
        finally:
            outside.wait_stream(self.stream)

    def forget(self) -> None:
        """Record anew: the step does something else from now on."""
        self.n_taken.clear()
        self.recordings.clear()
        self.positions.clear()

    def _run(
        self,
        batches: Iterable[Tensor],
        begin: Callable[[], None],
        step: Step,
        end: Callable[[], None],
    ) -> None:
        for positions in batches:
            begin()
            n_rows = len(positions)
            self.n_taken[n_rows] += 1
            if self.may_record and self.n_taken[n_rows] > _WARM_UP_STEPS:
                self._play(step, positions)
            else:
                step(positions)
            end()

    def _play(self, step: Step, positions: Tensor) -> None:
        n_rows = len(positions)
        if n_rows not in self.recordings:
            self.positions[n_rows] = positions.clone()
            try:
                self.recordings[n_rows] = self._record(step, self.positions[n_rows])
            except RuntimeError as error:
                self.may_record = False
                warnings.warn(
                    f"The training step could not be recorded as a CUDA graph ({error}); it is "
                    "taken operation by operation, which is slower for small networks. "
                    "SKCIFAR_CUDA_GRAPHS=0 in the environment asks for that.",
                    UserWarning,
                    stacklevel=2,
                )
                step(positions)
                return
        self.positions[n_rows].copy_(positions)
        self.recordings[n_rows]()

    def _record(self, step: Step, positions: Tensor) -> Callable[[], None]:
        """What plays the step, which recording does not take."""
        graph = torch.cuda.CUDAGraph()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            # later torches do this by themselves
            register: Any = getattr(graph, "register_generator_state", None)
            for generator in self.generators if register is not None else ():
                register(generator)
        self.is_recording = True
        try:
            with (
                _recording_lock,
                torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"),
            ):
                step(positions)
        finally:
            self.is_recording = False
        return graph.replay


# What is recorded in a process is one step at a time.
_recording_lock = threading.Lock()
_streams = threading.local()


def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all fits of a thread, since libraries keep memory for each that they have met."""
    device = indexed(device)
    of_device = vars(_streams)
    if str(device) not in of_device:
        of_device[str(device)] = torch.cuda.Stream(device)
    return of_device[str(device)]
