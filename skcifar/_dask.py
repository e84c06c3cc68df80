"""Searches on a Dask cluster: its workers are sent groups of tasks, a group at a time.

What a group is, and how it runs, is `skcifar._groups`'; that a worker's groups are run again by
another when it dies, the scheduler sees to.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.utils import check_random_state

from skcifar._backend import Backend
from skcifar._device import resolve_device
from skcifar._groups import IN_GROUP, Needs, Packed, Report, Unwanted, cut, measure, pack, run_group
from skcifar._memory import free_memory
from skcifar._study import SearchStudy
from skcifar._tasks import Call, Task, Work

# Groups that a worker is given, at least, one after the other; on other devices than these one.
# With a worker goes the group that it had, and at the end all wait for the slowest's last one. On
# CPUs smaller groups cost little: 27 perceptrons on MNIST-10k take two workers as long in two
# groups as in nine. A GPU takes a step of many small networks in about the time of a few.
_GROUPS_A_WORKER = {"cpu": 4}

# Share of the smallest worker's free memory that a group may take.
_MEMORY_SHARE = 0.5

# Fits that are looked at for how much memory one takes, at most.
_MOST_MEASURED = 16

# Times that a group is sent whose data went with a worker.
_MOST_TRIES = 4

_SECONDS_FOR_A_WORKER = 60
_SECONDS_BETWEEN_LOOKS = 0.5  # at the connection

_NO_CLIENT = """\
backend='dask' found no client of a Dask cluster in this process. Three lines start one here:

    from dask.distributed import Client, LocalCluster
    cluster = LocalCluster(n_workers=2, threads_per_worker=1)
    client = Client(cluster)

or Client("scheduler-address:8786") connects to one that is there."""


def backend_of(study: SearchStudy) -> contextlib.AbstractContextManager[Backend]:
    """The backend that a search asks for, while it lasts."""
    if study.search.backend == "dask" and not IN_GROUP.get():
        return DaskBackend(study)
    return contextlib.nullcontext(Backend(study))


class DaskBackend(Backend):
    """Has the tasks of a search run by the workers of the current client's cluster.

    Other calls that are made meanwhile run here: those of the refit of the best candidate.

    Raises
    ------
    ImportError
        Without distributed.
    RuntimeError
        Without a client, without workers, with workers on which skcifar is missing or another; if
        the connection to the scheduler is lost; if a group is lost again and again.
    """

    study: SearchStudy

    def __init__(self, study: SearchStudy, **params: Any) -> None:
        super().__init__(study, **params)
        self._stack = contextlib.ExitStack()
        self._cluster: _Cluster | None = None
        self._shown: dict[Any, Any] = {}  # warnings of workers, each once

    def __enter__(self) -> DaskBackend:
        self._cluster = _Cluster(self._stack.enter_context(_current_client()))
        return self

    def __exit__(self, *error: Any) -> None:
        assert self._cluster is not None
        self._cluster.data.release()
        self._stack.close()

    @contextlib.contextmanager
    def retrieval_context(self) -> Iterator[None]:
        if self._cluster is None or self.study.current is None:
            with super().retrieval_context():
                yield
            return
        works, self._works = self._works, []
        call = Call(None, next(self._calls))
        call.add(works)
        self._run(self._cluster, call)
        yield

    def _run(self, cluster: _Cluster, call: Call) -> None:
        works = {work.task: work for work in call.works if not self._is_known(work)}
        seeds = check_random_state(None)
        seed = _drawn(copy.deepcopy(seeds))  # taken from NumPy's generator once it is used
        n_back, gave_seed = 0, False
        try:
            groups = cluster.groups_of(self.study, list(works.values()), seed)
            with contextlib.closing(cluster.results(run_on_worker, groups)) as reports:
                for report in reports:
                    n_back += len(report.values)
                    gave_seed |= report.gave_seed
                    self._take(report, works)
        except _Lost as error:
            raise RuntimeError(
                f"{error} {n_back} of {len(works)} fits had come back. {self._remedy()}"
            ) from error.__cause__
        finally:
            if gave_seed:
                _drawn(seeds)

    def _is_known(self, work: Work) -> bool:
        if (value := self.study.known(work.task)) is None:
            return False
        work.value = value
        _finish(work)
        return True

    def _take(self, report: Report, works: Mapping[Task, Work]) -> None:
        for task, value in report.values.items():
            self.study.came_back(task, value, report.fits[task])
            works[task].value = value
            _finish(works[task])
        for text, category, filename, line in report.warnings:
            warnings.warn_explicit(text, category, filename, line, registry=self._shown)
        if report.failed is not None:
            task, error = report.failed
            works[task].error = error
            _finish(works[task])
            raise error

    def _remedy(self) -> str:
        search = self.study.search
        if search.journal is None:
            return (
                "Their scores are in partial_results_; with journal=FILE, a search that is started "
                "again goes on from there."
            )
        return (
            f"They are in the journal {search.journal}: the same call goes on from there once "
            "there is a cluster, or with backend='skcifar' here."
        )


def _drawn(generator: np.random.RandomState) -> int:
    """The common seed of a call, as `Coordinator.seed` draws it."""
    return int(generator.randint(np.iinfo(np.int32).max))


def _finish(work: Work) -> None:
    callback = work.callback
    work.finish()
    if callback is not None:
        callback(work)


# -- the cluster -----------------------------------------------------------------------------------


class _Lost(Exception):
    """The cluster does not give what is waited for; says why, in a sentence."""


@contextlib.contextmanager
def _current_client() -> Iterator[Any]:
    try:
        import distributed
    except ImportError as error:
        raise ImportError(
            "backend='dask' needs dask and distributed: pip install 'skcifar[dask]'"
        ) from error
    try:
        distributed.get_worker()
    except ValueError:
        pass
    else:  # a task of a cluster lets others have its thread while it waits for them
        with distributed.worker_client() as client:
            yield client
        return
    try:
        client = distributed.get_client()
    except ValueError as error:
        raise RuntimeError(_NO_CLIENT) from error
    yield client


class _Cluster:
    """The workers of a client's cluster, and the data of a search on them."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.name = f"the Dask cluster at {client.scheduler.address}"
        self.data = _Data(client)
        self.needs: Needs | None = None

    # -- groups

    def groups_of(self, study: SearchStudy, works: list[Work], seed: int) -> list[Packed]:
        """Tasks of one fold together: their fits see the same batches."""
        if not works:
            return []
        places = {work.task: study.place(work.task)[1] for work in works}
        lanes = {task: (place.repeat, place.fold) for task, place in places.items()}
        works = sorted(works, key=lambda w: (lanes[w.task], places[w.task].candidate))
        with self._telling_of_loss():
            self._wait_for_a_worker()
        if self.needs is None:
            first = [w for w in works if lanes[w.task] == lanes[works[0].task]]
            some = first[:: -(-len(first) // _MOST_MEASURED)]
            [self.needs] = self.results(measure_on_worker, [pack(study, some, seed)])
        with self._telling_of_loss():
            workers = self._workers()  # with the data in their memory
        n_groups = sum(_GROUPS_A_WORKER.get(worker.device, 1) for worker in workers)
        room = _MEMORY_SHARE * min(worker.free for worker in workers)
        groups = cut([lanes[work.task] for work in works], n_groups, self.needs, room)
        return [pack(study, [works[i] for i in group], seed) for group in groups]

    def _wait_for_a_worker(self) -> None:
        from distributed import TimeoutError

        try:
            # a cluster that adapts starts workers when something is to be done
            self.client.submit(_be_there, pure=False).result(timeout=_SECONDS_FOR_A_WORKER)
        except TimeoutError as error:
            self.check_connection()
            raise RuntimeError(
                f"There is no worker in {self.name} that takes a task within "
                f"{_SECONDS_FOR_A_WORKER} seconds. Start some, wait for slow ones with "
                "client.wait_for_workers(1), and give more memory to those that Dask has paused."
            ) from error
        except Exception as error:
            self.check_connection()
            raise RuntimeError(
                f"skcifar does not run in {self.name} ({type(error).__name__}: {error}). Install "
                "the same version where its workers and its scheduler are."
            ) from error

    def _workers(self) -> list[_Worker]:
        found = list(self.client.run(_worker, on_error="return").values())
        workers = [worker for worker in found if isinstance(worker, _Worker)]
        if not workers:
            raise _Lost(f"No worker of {self.name} answers.")
        own = sys.modules["skcifar"].__version__
        if others := {worker.version for worker in workers} - {own}:
            raise RuntimeError(
                f"There are workers with skcifar {', '.join(sorted(others))} in {self.name}, while "
                f"this process has {own}. Install the same version everywhere."
            )
        return workers

    # -- from groups to results

    def results(
        self, function: Callable[[bytes, list[Any]], Any], groups: Iterable[Packed]
    ) -> Generator[Any, None, None]:
        """What a function of workers makes of groups, in the order in which they end.

        Those that are left when nobody asks on are cancelled.
        """
        pending: dict[Any, Packed] = {}
        unsent = list(groups)
        n_sent: Counter[Task] = Counter()  # of each group, by its first task
        some_ended = threading.Event()
        try:
            while unsent or pending:
                for packed in unsent:
                    n_sent[packed.tasks[0]] += 1
                    if n_sent[packed.tasks[0]] > _MOST_TRIES:
                        raise _Lost(
                            f"A group of {len(packed.tasks)} fits, or its data, was lost "
                            f"{_MOST_TRIES} times in {self.name}: workers end, most often for lack "
                            "of memory."
                        )
                    future = self._sent(function, packed)
                    future.add_done_callback(lambda _: some_ended.set())
                    pending[future] = packed
                some_ended.wait(_SECONDS_BETWEEN_LOOKS)
                some_ended.clear()
                unsent = []
                for future in [f for f in pending if f.status in ("finished", "error")]:
                    packed = pending.pop(future)
                    if (result := self._result(future, packed)) is None:
                        unsent.append(packed)
                    else:
                        yield result
                unsent += self._lost(pending)
        finally:
            self._cancel(list(pending))

    def _sent(self, function: Callable[[bytes, list[Any]], Any], packed: Packed) -> Any:
        with self._telling_of_loss():
            data = self.data.futures(packed.data)
            key = f"skcifar-{function.__name__}-{uuid.uuid4().hex}"
            return self.client.submit(function, packed.payload, data, key=key, pure=False)

    def _result(self, future: Any, packed: Packed) -> Any:
        """What came of a group; None if it went with its worker before it was here."""
        from distributed import KilledWorker

        try:
            if future.status != "error":
                return future.result(timeout=_SECONDS_FOR_A_WORKER)
            error = future.exception(timeout=_SECONDS_FOR_A_WORKER)
        except (OSError, TimeoutError, CancelledError):
            self.check_connection()
            return None
        if isinstance(error, KilledWorker):
            raise _Lost(
                f"A group of {len(packed.tasks)} fits was given up, most often for lack of "
                f"memory, by {self.name}: {error}"
            ) from error
        if isinstance(error, Unwanted):
            return None
        raise error

    def _lost(self, pending: dict[Any, Packed]) -> list[Packed]:
        """Groups that will not come back, taken out of those that may."""
        gone = self.data.forget_lost()
        lost = [
            future
            for future, packed in pending.items()
            if future.status in ("cancelled", "lost") or gone & {id(v) for v in packed.data}
        ]
        self.check_connection()
        self._cancel(lost)
        return [pending.pop(future) for future in lost]

    def _cancel(self, futures: list[Any]) -> None:
        if not futures or not self.is_connected:
            return
        with contextlib.suppress(Exception):  # what is raised already matters more
            self.client.cancel(futures, force=True)

    # -- whether it is there

    @property
    def is_connected(self) -> bool:
        sender = self.client.scheduler_comm
        return self.client.status == "running" and sender is not None and not sender.closed()

    def check_connection(self) -> None:
        if not self.is_connected:
            raise _Lost(f"The connection to {self.name} is lost.")

    @contextlib.contextmanager
    def _telling_of_loss(self) -> Iterator[None]:
        try:
            yield
        except (OSError, TimeoutError, CancelledError) as error:
            self.check_connection()
            reason = f"{type(error).__name__}: {error}"
            raise _Lost(f"There is no answer from {self.name} ({reason}).") from error


class _Data:
    """Arrays on the workers, sent once, for as long as this lasts or until they are lost."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self._sent: dict[int, tuple[Any, Any]] = {}  # by address, which is the value's own so long

    def futures(self, values: Sequence[Any]) -> list[Any]:
        new = {id(value): value for value in values if id(value) not in self._sent}
        if new:
            sent = self.client.scatter(list(new.values()), broadcast=True, hash=False)
            for value, future in zip(new.values(), sent, strict=True):
                self._sent[id(value)] = value, future
        return [self._sent[id(value)][1] for value in values]

    def release(self) -> None:
        self._sent.clear()

    def forget_lost(self) -> set[int]:
        """Those that are with no worker any more."""
        lost = {key for key, (_, future) in self._sent.items() if future.status != "finished"}
        for key in lost:
            del self._sent[key]
        return lost


# -- on workers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Worker:
    """What a worker says of itself: skcifar's version, its kind of device, bytes that are free."""

    version: str
    device: str
    free: int


def _worker(dask_worker: Any) -> _Worker:
    device = resolve_device("auto")
    free = free_memory(device)
    if limit := dask_worker.memory_manager.memory_limit:  # beyond it, Dask ends the worker
        free = min(free, max(limit - dask_worker.monitor.get_process_memory(), 0))
    return _Worker(sys.modules["skcifar"].__version__, device.type, free)


def _be_there() -> None:
    pass


def measure_on_worker(payload: bytes, data: list[Any]) -> Needs:
    return measure(payload, data)


def run_on_worker(payload: bytes, data: list[Any]) -> Report:
    from distributed import get_worker

    worker = get_worker()
    key = worker.get_current_task()

    def is_wanted() -> bool:
        task = worker.state.tasks.get(key)
        return task is not None and task.state != "cancelled"

    return run_group(payload, data, is_wanted, worker.state.nthreads)
