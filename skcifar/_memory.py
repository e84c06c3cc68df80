"""Memory: what is free, what was too much, and what steps and studies keep for the next ones."""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a computation failed because its tensors did not fit into the device's memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "DefaultCPUAllocator" in str(error)  # a plain RuntimeError on the CPU


def free_memory(device: torch.device) -> int:
    """Bytes of a device's memory that are free; a guess where the system does not tell."""
    if device.type == "cuda":
        # what torch has in reserve is free as well
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        # files that the system keeps in memory count as used: half of it all is never too much
        return max(page * os.sysconf("SC_AVPHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES") // 2)
    except (AttributeError, ValueError, OSError):  # not every system tells
        return 4 * 2**30


# -- the C library's -------------------------------------------------------------------------------

# Of glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4

_SETTING = "MALLOC_{}_"  # in the environment
_SETTINGS = [
    _SETTING.format(name) for name in ("TRIM_THRESHOLD", "TOP_PAD", "MMAP_THRESHOLD", "MMAP_MAX")
]

# Bytes by which a process may have grown after a fit or a study without giving them back: the next
# one's rows lie there, which takes 10 ms for 94 MB in place of 100 to 200. Folds of 10,000 images
# in float32 are 369 MB: a study of 27 softmax regressions on them takes 1.2 s, and 1.8 with 2**28.
_MOST_IDLE = 2**29

_keeping_lock = threading.Lock()
_n_keeping = 0
_resident_before = 0


@contextmanager
def memory_kept(device: torch.device) -> Iterator[None]:
    """Let the memory that a step frees be the next step's, on a CPU as it is on a GPU.

    The C library gives blocks of more than 32 MB back to the system as soon as they are free, and
    the pages of new ones are cleared when they are first touched: of a CNN's activations, in every
    step. Kept until the end of the block, the default CNN trains 1.3 times as fast on an AMD Zen 5,
    architecture="airbench94" in batches of 2,000 1.7 times (2.4 s a step in place of 4.2), and in a
    worker of Dask, which trims from 64 KB on, the default CNN 1.7 to 2.4 times.

    Afterwards malloc gives memory back once 512 MB lie free at the heap's end, and takes blocks of
    more than 32 MB that no free part of the heap holds from the system, unless the environment has
    settings of malloc's own: it goes back to these. With another C library than glibc, with glibc's
    tunables of malloc, or with SKCIFAR_KEEP_MEMORY=0 in the environment, this does nothing; in
    other threads than the main one glibc keeps blocks of up to 64 MB only.
    """
    libc = _glibc() if device.type == "cpu" else None
    if libc is None:
        yield
        return
    try:
        _begin_to_keep(libc)
        yield
    finally:
        _end_to_keep(libc)


def _begin_to_keep(libc: Any) -> None:
    global _n_keeping, _resident_before
    with _keeping_lock:
        _n_keeping += 1
        if _n_keeping == 1:
            _resident_before = _resident()
            libc.mallopt(_M_MMAP_MAX, 0)  # all from the heap, ...
            libc.mallopt(_M_TRIM_THRESHOLD, -1)  # ... whose end is not given back
            libc.mallopt(_M_TOP_PAD, 2**26)


def _end_to_keep(libc: Any) -> None:
    global _n_keeping
    with _keeping_lock:
        _n_keeping = max(0, _n_keeping - 1)
        if _n_keeping == 0:
            _settle(libc)
            most_idle = _setting("TRIM_THRESHOLD", _MOST_IDLE)  # -1 is all there is
            if most_idle >= 0 and _resident() > _resident_before + most_idle:
                libc.malloc_trim(0)


def _settle(libc: Any) -> None:
    """Settings between two blocks; glibc does not tell what they were before the first."""
    libc.mallopt(_M_MMAP_MAX, _setting("MMAP_MAX", 2**16))
    # What glibc's own adjustment comes to in a process that has freed large blocks; with settings
    # in the environment it makes none.
    adjusts = not any(name in os.environ for name in _SETTINGS)
    libc.mallopt(_M_MMAP_THRESHOLD, _setting("MMAP_THRESHOLD", 2**25 if adjusts else 2**17))
    libc.mallopt(_M_TRIM_THRESHOLD, _setting("TRIM_THRESHOLD", _MOST_IDLE))
    libc.mallopt(_M_TOP_PAD, _setting("TOP_PAD", 2**17))


def _setting(name: str, otherwise: int) -> int:
    """A setting of malloc's in the environment; Dask, for one, has a trim threshold in workers."""
    try:
        return min(int(os.environ.get(_SETTING.format(name), ""), 0), 2**31 - 1)
    except ValueError:
        return otherwise


def _begin_anew_in_child() -> None:
    """In a forked process no block is open and nobody holds the lock."""
    global _n_keeping, _keeping_lock
    _keeping_lock = threading.Lock()
    if _n_keeping:
        _n_keeping = 0
        _settle(_glibc())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew_in_child)


def _resident() -> int:
    """Bytes of the process's memory that are in the machine's, files aside."""
    pages = Path("/proc/self/statm").read_text().split()
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")


@cache
def _glibc() -> Any:
    """The C library, if it is glibc on a system that tells of a process's memory."""
    if os.environ.get("SKCIFAR_KEEP_MEMORY", "1") == "0" or platform.libc_ver()[0] != "glibc":
        return None
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    return ctypes.CDLL(None) if Path("/proc/self/statm").exists() else None
