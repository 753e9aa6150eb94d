"""A run whose workers do not get ready, die or arrive late, without a Ray cluster."""

import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from sweep.core.errors import MemoryShort, SweepError, Unfit, WorkerLost
from sweep.core.machine import Workers
from sweep.run import worker_pool
from sweep.run.task_queue import TaskQueue
from sweep.run.worker_pool import WorkerPool, WorkerSpec, rest_seconds
from tests.tasks import GROUP, TASK
from workers.task import Progress

LAYERS = tuple(replace(GROUP, name=f"layers.{layer}.a") for layer in range(4))
OOM = OutOfMemoryError(
    "1 worker(s) were killed due to the node running low on memory. "
    "Memory on the node (IP: h, ID: n) was 22.43GB used / 23.54GB limit (0.953)\n"
    "OOM kill reason: Memory usage 1B exceeded threshold of 2B (95.0% of 3B limit)"
)
KILLED = "its machine is short of memory (22.43GB used of 23.54GB, Ray kills above 95.0 %)"


class Stream:
    """A worker's stream of progress: it takes every layer, and meets an error when it has scored some."""

    def __init__(self, tasks: Any, asks: "Asks", n_scored: int, error: Exception | None) -> None:
        self._tasks, self._asks, self._n_scored, self._error, self._n = tasks, asks, n_scored, error, 0

    def __next__(self) -> Any:
        self._n += 1
        if self._error is not None and self._n > self._n_scored:
            self._asks.is_over = True
            return self._error
        if self._error is None and self._asks.is_over:
            raise StopIteration
        return [Progress(task_id=task.task_id, done=self._n, found=0) for task in self._tasks]


class Asks:
    """A worker's side of asking for parts."""

    is_over = False

    def __call__(self, names: tuple[str, ...] | None) -> bool:
        self.is_over = self.is_over or names == ()
        return not self.is_over


class Method:
    def __init__(self, call: Callable[..., Any]) -> None:
        self.remote = call

    def options(self, **_: Any) -> "Method":
        return self


class FakeWorker:
    """A worker's process that goes through what its name is to go through, one event a life; then all is well."""

    def __init__(self, name: str, event: Any) -> None:
        asks: defaultdict[int, Asks] = defaultdict(Asks)  # by assignment
        n_scored, error = event if isinstance(event, tuple) else (0, None)
        self.load = Method(lambda first, mark: event if isinstance(event, Exception) else None)
        self.score = Method(lambda tasks, plan, number: Stream(tasks, asks[number], n_scored, error))
        self.next_parts = Method(lambda number, names: asks[number](names))
        self.info = Method(lambda: {"pid": name})


class Events:
    def __init__(self, on_ready: Callable[[], None] = lambda: None) -> None:
        self.said: list[str] = []
        self.n_ready = 0
        self._on_ready = on_ready

    def ready(self) -> None:
        self._on_ready()
        self.n_ready += 1

    def warn(self, text: str) -> None:
        self.said.append(text)

    def progress(self, progress: Progress) -> None:
        """Nothing to show."""


@pytest.fixture
def halvings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Note the halvings of memory that each life of a worker starts with.

    Ray's object references are replaced by the objects.
    """

    def get(reference: Any) -> Any:
        if isinstance(reference, Exception):
            raise reference
        return reference

    def wait(references: list[Any], num_returns: int, timeout: float | None = None) -> tuple[list[Any], list[Any]]:
        first = references[-num_returns:]  # what was asked for last, before more is streamed
        return first, references[:-num_returns]

    monkeypatch.setattr(worker_pool.ray, "get", get)
    monkeypatch.setattr(worker_pool.ray, "wait", wait)
    monkeypatch.setattr(worker_pool.ray, "kill", lambda actor: None)
    monkeypatch.setattr(worker_pool, "_REST_SECONDS", 0.0)
    monkeypatch.setattr(worker_pool, "_LOOK_SECONDS", 0.001)
    return []


def pooled(
    events: Events, halvings: list[tuple[str, int]], lives: dict[str, list[Any]], *, elastic: bool = False
) -> tuple[WorkerPool, TaskQueue]:
    """A pool of a worker for each of the given lists of lives, with a queue of two tasks."""
    workers = Workers(device="cpu", count=1 if elastic else len(lives), gpus_each=1.0, elastic=elastic)
    some = [replace(TASK, task_id=name, groups=LAYERS) for name in "ab"]
    queue = TaskQueue(workers.count, some)
    spec = WorkerSpec(store_uri="", memory_gb=None, first=some[0], mark=None, extensions=frozenset())
    pool = WorkerPool(workers, spec, queue, {"plan": None}, events)

    def actor(member: Any) -> FakeWorker:
        halvings.append((member.name, member.n_halvings))
        told = lives[member.name.removeprefix("sweep-worker-")]
        return FakeWorker(member.name, told.pop(0) if told else None)

    pool._actor = actor  # type: ignore[method-assign]
    return pool, queue


def run(events: Events, halvings: list[tuple[str, int]], **lives: list[Any]) -> TaskQueue:
    """Have the pool score everything. Raises what it fails with."""
    pool, queue = pooled(events, halvings, {name.removeprefix("w"): told for name, told in lives.items()})
    with pool:
        for thread in pool._threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in pool._threads)
        pool.check()
    return queue


def load_error(error: SweepError) -> RayTaskError:
    return RayTaskError("load", "traceback", error)


def test_everything_is_scored_and_people_are_told_once_that_a_worker_is_ready(halvings: list[tuple[str, int]]) -> None:
    events = Events()
    queue = run(events, halvings, w0=[], w1=[])
    assert (queue.is_over, queue.failures(), events.n_ready, events.said) == (True, {}, 1, [])


def test_a_model_that_does_not_load_ends_the_run_with_its_own_message(halvings: list[tuple[str, int]]) -> None:
    with pytest.raises(SweepError, match=r"^no weights$"):
        run(Events(lambda: pytest.fail("it is not ready")), halvings, w0=[load_error(SweepError("no weights"))])


def test_a_full_disk_when_trials_are_recorded_ends_the_run_instead_of_leaving_it_waiting(
    halvings: list[tuple[str, int]],
) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        run(Events(full), halvings, w0=[])


def test_workers_of_nodes_that_join_help(halvings: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    second = threading.Event()
    monkeypatch.setattr(worker_pool.cluster, "room", lambda workers: 2)
    pool, queue = pooled(Events(), halvings, {"0": [], "1": []}, elastic=True)
    start = pool._actor

    def start_in_order(member: Any) -> FakeWorker:  # the first one scores nothing before the second has joined
        started = start(member)
        second.wait(20) if member.name.endswith("0") else second.set()
        return started

    pool._actor = start_in_order  # type: ignore[method-assign]
    with pool:
        for index in (0, 2):  # the thread between them looks for nodes
            pool._threads[index].join(20)
        pool.check()
    assert (queue.is_over, [name for name, _ in halvings]) == (True, ["sweep-worker-0", "sweep-worker-1"])


@pytest.mark.parametrize("death", [RayActorError(), (2, RayActorError())])
def test_a_worker_that_dies_is_started_again_and_goes_on(death: Any, halvings: list[tuple[str, int]]) -> None:
    queue = run(Events(), halvings, w0=[death])
    assert (queue.is_over, queue.failures(), len(halvings)) == (True, {}, 2)


def test_one_worker_that_cannot_work_is_left_out_and_named(halvings: list[tuple[str, int]]) -> None:
    events = Events()
    queue = run(events, halvings, w0=[load_error(Unfit("no room"))], w1=[])
    assert (events.said, queue.failures()) == (["no room Going on without sweep-worker-0."], {})


def test_when_no_worker_is_left_the_run_ends_with_the_last_ones_reason(halvings: list[tuple[str, int]]) -> None:
    with pytest.raises(SweepError, match="sweep-worker-0 has died for good"):
        run(Events(), halvings, w0=[RayActorError() for _ in range(30)])
    assert len(halvings) == 21


def test_a_worker_that_cannot_go_on_is_named_and_its_tasks_wait_for_another(halvings: list[tuple[str, int]]) -> None:
    events = Events()
    lost = RayTaskError("score", "traceback", WorkerLost("CUDA error: launch failure"))
    queue = run(events, halvings, w0=[(1, lost)])
    assert (events.said, queue.failures(), len(halvings)) == (
        ["sweep-worker-0 starts anew: CUDA error: launch failure."],
        {},
        2,
    )


def test_an_error_of_a_recipe_fails_its_tasks_and_the_worker_goes_on(halvings: list[tuple[str, int]]) -> None:
    queue = run(Events(), halvings, w0=[(1, RayTaskError("score", "traceback", ValueError("shapes do not fit")))])
    assert (queue.failures(), len(halvings)) == ({"a": "shapes do not fit", "b": "shapes do not fit"}, 1)


def test_a_worker_that_was_killed_for_want_of_memory_comes_back_with_less_and_no_task_is_to_blame(
    halvings: list[tuple[str, int]],
) -> None:
    events = Events()
    queue = run(events, halvings, w0=[OOM, (2, OOM), (2, OOM), (2, OOM), (2, OOM)])
    assert (queue.failures(), [n for _, n in halvings]) == ({}, [0, 1, 2, 3, 4, 5])
    assert (
        events.said[0] == f"sweep-worker-0 was killed: {KILLED}. It starts again with 1/2 of its memory for captures."
    )


def test_then_there_are_fewer_workers_and_at_last_one_message_says_what_is_short(
    halvings: list[tuple[str, int]],
) -> None:
    events = Events()
    with pytest.raises(
        MemoryShort,
        match=r"^sweep-worker-\d was killed 3 times: its machine is short of memory \(22.43GB used of 23.54GB",
    ):
        run(events, halvings, w0=[OOM] * 3, w1=[OOM] * 3)
    assert len(halvings) == 6


@pytest.mark.parametrize(
    ("n_deaths", "seconds"), [(1, 0.0), (2, 1.0), (3, 2.0), (4, 4.0), (7, 32.0), (8, 60.0), (30, 60.0)]
)
def test_a_worker_that_goes_on_dying_rests_longer_and_longer(n_deaths: int, seconds: float) -> None:
    assert rest_seconds(n_deaths) == seconds
