"""What estimators mind in a worker process of a pool: cores and a GPU that other workers use too.

loky and the nannies of Dask start a worker with the threads that are its share, by way of
OMP_NUM_THREADS, so that nothing is left to do. Workers of `multiprocessing.Pool` have all cores.
"""

from __future__ import annotations

import multiprocessing
import os
import warnings

import torch

# What joblib's workers are called as processes: LokyProcess-1, and ForkPoolWorker-1 or
# SpawnPoolWorker-1 of multiprocessing's pools. Dask's are called otherwise.
_OF_LOKY, _OF_POOL = "Loky", "PoolWorker"

_has_warned = False


def keep_to_own_cores() -> None:
    """In a worker of multiprocessing's pools, let torch compute on one thread.

    A forked one cannot do otherwise: it would wait for ever for OpenMP's threads, if its parent
    has had some.
    """
    if _OF_POOL in multiprocessing.current_process().name and torch.get_num_threads() > 1:
        torch.set_num_threads(1)


def warn_if_gpu_is_shared(device: torch.device) -> None:
    """Where joblib's processes train on one GPU, say what to do instead, once in each of them."""
    global _has_warned
    if _has_warned or not shares_gpu(multiprocessing.current_process().name, device):
        return
    _has_warned = True
    warnings.warn(
        f"The processes of n_jobs > 1 all train on {device}: each keeps its own copy of the rows "
        "there, and they wait for one another. Leave n_jobs out and let one process train the fits "
        'together: with joblib.parallel_config(backend="skcifar"), or '
        "skcifar.model_selection.BatchedGridSearchCV. For several GPUs start a Dask worker on each "
        'and use backend="dask".',
        UserWarning,
        stacklevel=2,
    )


def shares_gpu(process: str, device: torch.device) -> bool:
    """Whether a process of that name trains on the GPU that the others of its pool train on.

    All of a pool find the same GPUs and take the same one for "auto" or "cuda", however many there
    are. Those that are given one each say so by SKCIFAR_DEVICE in their environment.
    """
    in_pool = _OF_LOKY in process or _OF_POOL in process
    return in_pool and device.type == "cuda" and not os.environ.get("SKCIFAR_DEVICE")
