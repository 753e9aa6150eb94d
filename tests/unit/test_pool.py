"""Who gets which tasks, without Ray: the pool is a plain class, and every method is awaited as its actor would."""

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from sweep.machine import Gpu, Hardware, Needs
from tests.tasks import GROUP, TASK
from workers.pool import Ended, Lease, Pool, rest_seconds
from workers.task import Task

LAYERS = tuple(replace(GROUP, name=f"{layer}.a", part=str(layer)) for layer in range(10))


def tasks(names: str, **changed: Any) -> list[Task]:
    return [replace(TASK, task_id=name, label=name, **changed) for name in names]


async def pool(some: Sequence[Task], workers: str = "12") -> Pool:
    shared = Pool(max(len(workers), 1), {task.task_id: task for task in some}, {"plan": ["plan-ref"], "other": ["other-ref"]})
    for worker in workers:
        await shared.admit(worker)
    return shared


async def begun(some: Sequence[Task], workers: str = "12") -> Pool:
    """A pool whose first result is there: worker 1 has scored it, and holds the model."""
    shared = await pool([*tasks("!", plan_id="other"), *some], workers)
    lease = await leased(shared, "!")
    await taken(shared, lease)
    await shared.give_back(lease, {"!": None})
    return shared


def names(lease: Lease | Ended) -> str:
    assert isinstance(lease, Lease)
    return "".join(task.task_id for task in lease.tasks)


async def waits(call: Awaitable[object]) -> bool:
    """Whether a call is still waiting when everything else that can run has run; it goes on waiting no longer."""
    pending = asyncio.ensure_future(call)
    for _ in range(20):
        await asyncio.sleep(0)
    is_waiting = not pending.done()
    pending.cancel()
    return is_waiting


async def leased(from_pool: Pool, task_id: str) -> Lease:
    lease = await from_pool.lease(task_id)
    assert isinstance(lease, Lease)
    return lease


async def taken(from_pool: Pool, lease: Lease, n: int = 1000) -> str:
    """The next parts of a lease, up to `n` times asked."""
    parts = ""
    for _ in range(n):
        if not (some := await from_pool.take(lease.number)):
            break
        parts += "".join(part.removeprefix("layers.") for part in some)
    return parts


async def done(from_pool: Pool, lease: Lease) -> None:
    """All of a lease's tasks come to a good end with what was taken."""
    await from_pool.give_back(lease, {task.task_id: None for task in lease.tasks})


def test_the_very_first_task_goes_alone_for_a_first_result() -> None:
    async def story() -> None:
        shared = await pool(tasks("abcde", groups=LAYERS), workers="1")
        lease = await leased(shared, "c")
        assert (names(lease), await taken(shared, lease)) == ("c", "0123456789")
        await done(shared, lease)
        lease = await leased(shared, "b")
        assert (names(lease), await taken(shared, lease)) == ("bade", "0123456789")

    asyncio.run(story())


def test_workers_take_the_layers_of_all_tasks_in_turn() -> None:
    async def story() -> None:
        shared = await begun(tasks("abc", groups=LAYERS))
        one, two = await leased(shared, "b"), await leased(shared, "a")
        assert [(lease.worker, names(lease), lease.plan) for lease in (one, two)] == [("1", "bac", ["plan-ref"]), ("2", "abc", ["plan-ref"])]
        assert (await taken(shared, one, 3), await taken(shared, two, 2), await taken(shared, one)) == ("012", "34", "56789")
        await done(shared, two)
        assert await waits(shared.lease("a"))  # worker 1 is still at five of its layers
        await done(shared, one)
        assert await shared.lease("a") == Ended(dict.fromkeys("!abc"))

    asyncio.run(story())


def test_where_captures_are_not_kept_no_task_goes_alone() -> None:
    async def story() -> None:
        shared = Pool(2, {task.task_id: task for task in tasks("abcd", groups=LAYERS)}, {"plan": []}, frozenset({"plan"}))
        for worker in "12":
            await shared.admit(worker)
            assert names(await shared.lease("a")) == "abcd"

    asyncio.run(story())


def test_a_task_that_is_all_there_is_is_shared_out() -> None:
    async def story() -> None:
        shared = await pool(tasks("a", groups=LAYERS))
        leases = [await leased(shared, "a") for _ in "12"]
        assert [await taken(shared, lease, 5) for lease in leases] == ["01234", "56789"]

    asyncio.run(story())


def test_where_layers_are_few_recipes_are_split_too_those_with_equal_weights_together() -> None:
    fp8, int8 = {"num_bits": (4, 3)}, {"num_bits": 8}

    async def story() -> None:
        mixed = [replace(task, weight_attributes=fp8 if task.task_id in "aceg" else int8) for task in tasks("abcdefgh", groups=LAYERS[:4])]
        shared = await begun(mixed)  # four layers for two workers: recipes in two slices
        one, two = await leased(shared, "c"), await leased(shared, "a")  # a's slice is being scored: help with the other first
        assert [sorted(names(lease)) for lease in (one, two)] == [list("aceg"), list("bdfh")]
        assert await taken(shared, two) == "0123"
        await done(shared, two)
        two = await leased(shared, "a")
        assert (names(two), await taken(shared, two, 1), await taken(shared, one)) == ("aceg", "0", "123")

    asyncio.run(story())


def test_a_task_whose_inputs_need_a_range_for_each_size_counts_for_as_many_products() -> None:
    sizes = {"small": "cell", "medium": "cell", "large": "cell"}

    async def story() -> None:
        dear = tasks("abcd", weight_attributes={"num_bits": 4}, input_attributes={"num_bits": 8}, calibrates_inputs=True, cells=sizes)
        cheap = tasks("efghijklmnopqrstuvwx", weight_attributes={"num_bits": 8}, cells=sizes)
        shared = await begun([replace(task, groups=LAYERS[:4]) for task in [*dear, *cheap]])
        assert names(await shared.lease("a")) == "abcd"  # 4 x 1.58 against 20 x 0.3

    asyncio.run(story())


def test_kl_div_tasks_go_out_one_by_one_and_two_workers_share_the_last() -> None:
    async def story() -> None:
        shared = await begun(tasks("ab", method="kl_div", groups=LAYERS))
        one, two = await leased(shared, "b"), await leased(shared, "b")
        assert (names(one), names(two)) == ("b", "a")
        assert await taken(shared, two) == "0123456789"
        await done(shared, two)
        two = await leased(shared, "a")
        assert (names(two), await taken(shared, one, 3), await taken(shared, two)) == ("b", "012", "3456789")

    asyncio.run(story())


def test_stock_auto_quantize_gets_all_parts_at_once() -> None:
    async def story() -> None:
        shared = await begun(tasks("ab", engine="modelopt", groups=LAYERS))
        one, two = await leased(shared, "a"), await leased(shared, "a")
        assert (names(one), await taken(shared, one, 1), names(two), await taken(shared, two, 1)) == ("a", "0123456789", "b", "0123456789")

    asyncio.run(story())


@pytest.mark.parametrize(
    "other",
    [
        {"plan_id": "other"},
        {"engine": "modelopt"},
        {"model": replace(TASK.model, revision="s")},
        {"model": replace(TASK.model, dtype="bfloat16")},
        {"groups": (replace(GROUP, name="b"),)},
    ],
)
def test_only_tasks_that_share_a_capture_go_out_together(other: dict[str, Any]) -> None:
    mixed = [*tasks("a"), *tasks("b", **other), *tasks("c"), *tasks("d", **other)]

    async def together(task_id: str) -> str:
        return names(await (await begun(mixed, workers="1")).lease(task_id))

    assert asyncio.run(together("a")) == "ac"
    assert asyncio.run(together("d")) == ("d" if other.get("engine") == "modelopt" else "db")


def test_a_worker_that_holds_the_model_is_preferred() -> None:
    async def story() -> None:
        shared = await pool([*tasks("a"), *tasks("b", method="kl_div"), *tasks("c", model=replace(TASK.model, revision="s"))])
        other, one = await leased(shared, "c"), await leased(shared, "a")
        assert (other.worker, names(other), one.worker, names(one)) == ("1", "c", "2", "a")
        for lease in (other, one):
            await taken(shared, lease)
            await done(shared, lease)
        assert (await leased(shared, "b")).worker == "2"

    asyncio.run(story())


def test_a_trial_waits_while_nobody_is_free_and_ends_when_its_task_has_ended_elsewhere() -> None:
    async def story() -> None:
        shared = await begun(tasks("ab"), workers="1")
        lease = await leased(shared, "a")
        assert (names(lease), await taken(shared, lease)) == ("ab", "0")
        assert await waits(shared.lease("b"))
        late = asyncio.ensure_future(shared.lease("b"))
        await asyncio.sleep(0)
        await shared.give_back(lease, {"a": None, "b": "NaN in layer 3"})
        assert await late == Ended({"!": None, "a": None, "b": "NaN in layer 3"})
        assert await shared.lease("a") == Ended({"!": None, "a": None, "b": "NaN in layer 3"})
        assert await shared.failures() == {"b": "NaN in layer 3"}

    asyncio.run(story())


def test_tasks_wait_for_a_worker_to_be_admitted() -> None:
    async def story() -> None:
        shared = await pool(tasks("ab"), workers="")
        late = asyncio.ensure_future(shared.lease("a"))
        assert await waits(shared.lease("b"))
        await shared.admit("1")
        lease = await late
        assert (lease.worker, names(lease)) == ("1", "a")  # type: ignore[union-attr, arg-type]

    asyncio.run(story())


def test_when_a_model_does_not_load_every_task_ends_with_the_reason() -> None:
    async def story() -> None:
        shared = await pool(tasks("ab"), workers="")
        waiting = asyncio.ensure_future(shared.lease("a"))
        await asyncio.sleep(0)
        await shared.give_up("no weights")
        assert await waiting == await shared.lease("b") == Ended({"a": "no weights", "b": "no weights"})

    asyncio.run(story())


def test_what_a_dead_worker_had_waits_again_with_fewer_tasks_at_a_time() -> None:
    async def story() -> None:
        shared = await begun(tasks("abcdefgh", groups=LAYERS), workers="1")
        lease = await leased(shared, "a")
        assert (names(lease), await taken(shared, lease, 3)) == ("abcdefgh", "012")
        await shared.give_back(lease, {"a": None}, death="killed")
        assert await shared.lost() == ["1"]
        assert await shared.lost() == []
        await shared.admit("1")  # it has restarted
        for leaves in ("bc", "de", "fg", "h"):  # one of them may be what kills workers
            lease = await leased(shared, "a")  # its own task has ended: it goes on with what is left
            assert (names(lease), await taken(shared, lease)) == (leaves, "0123456789")
            await done(shared, lease)
        assert await shared.lease("h") == Ended(dict.fromkeys("!abcdefgh"))

    asyncio.run(story())


def test_when_one_of_two_workers_dies_what_the_other_has_taken_is_not_scored_again() -> None:
    async def story() -> None:
        shared = await begun(tasks("a", groups=LAYERS))
        one, two = await leased(shared, "a"), await leased(shared, "a")
        assert (await taken(shared, one, 2), await taken(shared, two, 2)) == ("01", "23")
        await shared.give_back(one, {}, death="killed")
        assert await shared.figures() == {"idle": 0, "busy": 1, "deaths": 1}
        await shared.admit(one.worker)
        assert await taken(shared, two) == ""  # until it is known what kills workers, tasks are scored apart
        await done(shared, two)
        again = await leased(shared, "a")
        assert await taken(shared, again) == "01456789"
        await done(shared, again)
        assert await shared.lease("a") == Ended(dict.fromkeys("!a"))

    asyncio.run(story())


def test_a_task_under_which_alone_three_workers_died_has_failed_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.pool._REST_SECONDS", 0.0)

    async def story() -> None:
        shared = await begun(tasks("abc"), workers="1")
        for leaves in ("abc", "a", "a", "a"):
            lease = await leased(shared, "a")
            assert (names(lease), await taken(shared, lease)) == (leaves, "0")
            await shared.give_back(lease, {}, death="out of memory")
            await shared.admit("1")
        for name in "bc":
            lease = await leased(shared, "a")
            assert (names(lease), await taken(shared, lease)) == (name, "0")
            await done(shared, lease)
        assert await shared.lease("a") == Ended({"!": None, "a": "3 workers died while scoring it: out of memory", "b": None, "c": None})
        assert list(await shared.failures()) == ["a"]

    asyncio.run(story())


def test_a_failure_in_one_layer_ends_the_task_whatever_its_other_layers_give() -> None:
    async def story() -> None:
        shared = await begun(tasks("ab", groups=LAYERS))
        one, two = await leased(shared, "a"), await leased(shared, "a")
        assert (await taken(shared, one, 2), await taken(shared, two, 2)) == ("01", "23")
        await shared.give_back(one, {"a": "NaN in layer 1", "b": None})
        await shared.give_back(two, dict.fromkeys("ab"))
        again = await leased(shared, "b")
        assert (names(again), await taken(shared, again)) == ("b", "456789")
        await done(shared, again)
        assert await shared.lease("b") == Ended({"!": None, "a": "NaN in layer 1", "b": None})

    asyncio.run(story())


def test_every_task_is_scored_once_in_every_layer_however_many_trials_ask() -> None:
    """Trials as the driver runs them: as long as its task has not ended, a trial borrows a worker."""
    scored: list[str] = []

    async def trial(shared: Pool, task_id: str) -> None:
        while isinstance(lease := await shared.lease(task_id), Lease):
            while part := await taken(shared, lease, 1):
                await asyncio.sleep(0.001)
                scored.extend(f"{task.task_id}{part}" for task in lease.tasks)
            await done(shared, lease)

    async def story() -> None:
        shared = await pool(tasks("abcdefghijklmnopqrstuvwxyz", groups=LAYERS), workers="123")
        await asyncio.gather(*(trial(shared, name) for name in "zyxwvutsrqponmlkjihgfedcbaaabb"))

    asyncio.run(asyncio.wait_for(story(), 60))
    assert sorted(scored) == [f"{task}{layer}" for task in "abcdefghijklmnopqrstuvwxyz" for layer in range(10)]


@pytest.mark.parametrize(("n_deaths", "seconds"), [(1, 0.0), (2, 1.0), (3, 2.0), (4, 4.0), (7, 32.0), (8, 60.0), (30, 60.0)])
def test_a_worker_that_goes_on_dying_rests_longer_and_longer(n_deaths: int, seconds: float) -> None:
    assert rest_seconds(n_deaths) == seconds


def test_a_model_that_loads_on_one_worker_only_is_scored_there_and_one_that_loads_nowhere_fails() -> None:
    async def story() -> None:
        shared = await begun(tasks("ab", groups=LAYERS), workers="12")
        lease = await leased(shared, "a")
        parts = await taken(shared, lease, 2)
        await shared.give_back(lease, {}, unfit="no such file")
        again = await leased(shared, "a")
        assert (again.worker != lease.worker, parts in await taken(shared, again)) == (True, True)
        assert await waits(shared.lease("b"))  # the worker that cannot load it is free, and stays so
        await shared.give_back(again, {}, unfit="no such file")
        assert await shared.lease("b") == Ended({"!": None, "a": "no such file", "b": "no such file"})

    asyncio.run(story())


A100 = Hardware(host="n", gpus=(Gpu("A100", 85.9, (8, 0)),))
H100 = Hardware(host="m", gpus=(Gpu("H100", 85.5, (9, 0)),))
NVFP4 = Needs(capability=(8, 9))


async def mixed_pool(some: Sequence[Task], **hardware: Hardware) -> Pool:
    shared = await pool(some, workers="")
    for worker, here in hardware.items():
        await shared.placed(worker, here)
        await shared.admit(worker)
    return shared


def test_of_unlike_gpus_each_scores_what_it_can() -> None:
    async def story() -> None:
        fp4, others = tasks("a", needs=NVFP4, groups=LAYERS), tasks("bc", groups=LAYERS)
        shared = await mixed_pool([*fp4, *others], old=A100, new=H100)
        one, two = await leased(shared, "a"), await leased(shared, "a")
        assert [(lease.worker, names(lease)) for lease in (one, two)] == [("old", "b"), ("new", "a")]
        assert await taken(shared, two) == await taken(shared, one) == "0123456789"
        await done(shared, one)
        one = await leased(shared, "a")
        assert (one.worker, names(one), await taken(shared, one, 3)) == ("old", "c", "012")
        await done(shared, two)
        two = await leased(shared, "a")  # the better one helps
        assert (two.worker, names(two), await taken(shared, two)) == ("new", "c", "3456789")
        await done(shared, one)
        await done(shared, two)
        assert await shared.lease("a") == Ended(dict.fromkeys("bac"))

    asyncio.run(story())


def test_a_task_waits_for_a_gpu_that_can_score_it_and_fails_when_none_is_to_come() -> None:
    async def story(late: str) -> Lease | Ended:
        shared = await mixed_pool([*tasks("a", needs=NVFP4), *tasks("b")], old=A100)
        lease = await leased(shared, "a")
        assert (names(lease), await taken(shared, lease)) == ("b", "0")
        await done(shared, lease)
        assert await waits(shared.lease("a"))
        if late:
            await shared.placed(late, H100)
            await shared.admit(late)
        await shared.settle()
        return await shared.lease("a")

    lease = asyncio.run(story("new"))
    assert isinstance(lease, Lease)
    assert (lease.worker, names(lease)) == ("new", "a")
    lease = asyncio.run(story("old"))  # it has died, and restarted on another node
    assert isinstance(lease, Lease)
    assert (lease.worker, names(lease)) == ("old", "a")
    ended = asyncio.run(story(""))
    assert isinstance(ended, Ended)
    assert "NVFP4 needs a GPU of compute capability 8.9; A100 has 8.0." in str(ended.failures["a"])
    assert ended.failures["b"] is None


def test_before_the_first_worker_is_there_nothing_has_failed() -> None:
    async def story() -> None:
        shared = await mixed_pool(tasks("a", needs=NVFP4))
        await shared.settle()
        assert await shared.failures() == {}

    asyncio.run(story())


def test_a_pool_that_is_stopped_says_why() -> None:
    async def story() -> None:
        shared = await begun(tasks("ab"), workers="1")
        assert await shared.broken() is None
        await shared.stop("No space left on device")
        assert await shared.broken() == "No space left on device"
        assert isinstance(await shared.lease("a"), Ended)

    asyncio.run(story())
