"""Who gets which tasks, without Ray: the pool is a plain class, and every method is awaited as its actor would."""

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import pytest

from tests.tasks import GROUP, TASK
from workers.actor import Ended, Lease, Pool
from workers.task import Task

T = TypeVar("T")


def tasks(names: str, **changed: Any) -> list[Task]:
    return [replace(TASK, task_id=name, label=name, **changed) for name in names]


async def pool(some: Sequence[Task], workers: str = "12") -> Pool:
    shared = Pool(len(workers), {task.task_id: task for task in some}, {"plan": ["plan-ref"], "other": ["other-ref"]})
    for worker in workers:
        await shared.admit(worker)
    return shared


async def begun(some: Sequence[Task], workers: str = "12") -> Pool:
    """A pool whose first result is there: worker 1 has scored it, and holds the model."""
    shared = await pool([*tasks("!"), *some], workers)
    await shared.give_back(await leased(shared, "!"), {"!": None})
    return shared


def names(lease: Lease | None) -> str:
    assert lease is not None
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
    assert lease is not None
    return lease


def test_the_very_first_task_goes_alone_for_a_first_result() -> None:
    async def story() -> None:
        shared = await pool(tasks("abcde"))
        assert names(await shared.lease("c")) == "c"
        assert names(await shared.lease("a")) == "abd"

    asyncio.run(story())


def test_first_bundles_are_even_shares_of_everything_and_later_ones_of_what_is_left() -> None:

    async def story() -> None:
        shared = await begun(tasks("abcdefghi"), workers="123")
        first = await leased(shared, "b")
        assert (first.worker, names(first), first.plan) == ("1", "bac", ["plan-ref"])  # a third of 9, its own task first
        second = await leased(shared, "a")  # already in the first bundle: this trial helps with what is left
        assert (second.worker, names(second)) == ("2", "def")
        await shared.give_back(second, dict.fromkeys(names(second)))
        again = await leased(shared, "a")
        assert names(again) == "g"  # a third of the 3 left, since worker 2 has had its first bundle
        await shared.give_back(first, dict.fromkeys(names(first)))
        assert names(await shared.lease("h")) == "h"

    asyncio.run(story())


def test_where_captures_are_not_kept_no_task_goes_alone_and_workers_take_even_shares() -> None:
    async def story() -> None:
        shared = Pool(2, {task.task_id: task for task in tasks("abcdefgh")}, {"plan": []}, frozenset({"plan"}))
        await shared.admit("1")
        assert names(await shared.lease("a")) == "abcd"
        await shared.admit("2")
        assert names(await shared.lease("e")) == "efgh"

    asyncio.run(story())


def test_one_worker_takes_everything_at_once() -> None:
    async def story() -> None:
        assert names(await (await begun(tasks("abcdefgh"), workers="1")).lease("h")) == "habcdefg"

    asyncio.run(story())


def test_tasks_with_equal_weights_go_out_together() -> None:
    fp8, int8 = {"num_bits": (4, 3)}, {"num_bits": 8}

    async def story() -> None:
        mixed = [replace(task, weight_attributes=fp8 if task.task_id in "aceg" else int8) for task in tasks("abcdefgh")]
        shared = await begun(mixed)
        assert sorted(names(await shared.lease("c"))) == list("aceg")
        assert sorted(names(await shared.lease("b"))) == list("bdfh")

    asyncio.run(story())


def test_a_task_whose_inputs_need_a_range_for_each_size_counts_for_as_many_products() -> None:
    sizes = {"small": "cell", "medium": "cell", "large": "cell"}

    async def story() -> None:
        dear = tasks("abcd", input_attributes={"num_bits": 8}, calibrates_inputs=True, cells=sizes)
        cheap = tasks("efghijklmnopqrst", cells=sizes)
        shared = await begun([*dear, *cheap])
        assert names(await shared.lease("a")) == "abcd"  # 4 x 1.58: half of 11.1, to the nearest task
        assert names(await shared.lease("e")) == "efghijklmnopqrst"  # 16 x 0.3

    asyncio.run(story())


def test_kl_div_tasks_go_out_one_by_one() -> None:
    async def story() -> None:
        assert names(await (await begun(tasks("abcd", method="kl_div"))).lease("b")) == "b"

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

    async def bundle(task_id: str) -> str:
        return names(await (await begun(mixed, workers="1")).lease(task_id))

    assert asyncio.run(bundle("a")) == "ac"
    assert asyncio.run(bundle("d")) == ("d" if other.get("engine") == "modelopt" else "db")


def test_a_worker_that_holds_the_model_is_preferred() -> None:
    async def story() -> None:
        shared = await pool([*tasks("ab"), *tasks("cd", model=replace(TASK.model, revision="s"))])
        one, other = await leased(shared, "c"), await leased(shared, "a")
        assert (one.worker, names(one), other.worker, names(other)) == ("1", "c", "2", "a")
        await shared.give_back(one, {"c": None})
        await shared.give_back(other, {"a": None})
        assert [((await leased(shared, name)).worker) for name in "bd"] == ["2", "1"]

    asyncio.run(story())


def test_a_trial_waits_while_nobody_is_free_and_ends_when_its_task_has_ended_elsewhere() -> None:
    async def story() -> None:
        shared = await begun(tasks("ab"), workers="1")
        lease = await leased(shared, "a")
        assert names(lease) == "ab"
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


def test_what_a_dead_worker_did_not_end_waits_again_one_task_at_a_time() -> None:
    async def story() -> None:
        shared = await begun(tasks("abc"), workers="1")
        lease = await leased(shared, "a")
        assert names(lease) == "abc"
        await shared.give_back(lease, {"a": None}, death="killed")
        again = await leased(shared, "a")  # its own task has ended: it goes on with what is left
        assert names(again) == "b"  # b or c may be what kills workers
        await shared.give_back(again, {"b": None})
        assert names(await shared.lease("c")) == "c"

    asyncio.run(story())


def test_a_task_under_which_three_workers_died_has_failed_and_the_others_go_on() -> None:
    async def story() -> None:
        shared = await begun(tasks("abc"), workers="1")
        for leaves in ("abc", "a", "a"):
            lease = await leased(shared, "a")
            assert names(lease) == leaves
            await shared.give_back(lease, {}, death="out of memory")
        for name in "bc":
            lease = await leased(shared, "a")
            assert names(lease) == name
            await shared.give_back(lease, {name: None})
        assert await shared.lease("a") == Ended({"!": None, "a": "3 workers died while scoring it: out of memory", "b": None, "c": None})
        assert list(await shared.failures()) == ["a"]

    asyncio.run(story())


def test_every_task_is_scored_once_however_many_trials_ask() -> None:
    """Trials as the driver runs them: as long as its task has not ended, a trial borrows a worker."""
    scored: list[str] = []

    async def trial(shared: Pool, task_id: str) -> None:
        while isinstance(lease := await shared.lease(task_id), Lease):
            await asyncio.sleep(0.001)
            scored.extend(task.task_id for task in lease.tasks)
            await shared.give_back(lease, {task.task_id: None for task in lease.tasks})

    async def story() -> None:
        shared = await pool(tasks("abcdefghijklmnopqrstuvwxyz"), workers="123")
        await asyncio.gather(*(trial(shared, name) for name in "zyxwvutsrqponmlkjihgfedcbaaabb"))

    asyncio.run(asyncio.wait_for(story(), 60))
    assert sorted(scored) == list("abcdefghijklmnopqrstuvwxyz")
