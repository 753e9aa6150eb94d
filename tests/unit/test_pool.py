"""Who gets which tasks, without Ray: the pool is a plain class, and every method is awaited as its actor would."""

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import pytest

from tests.tasks import GROUP, TASK
from workers.pool import Ended, Lease, Pool
from workers.task import Task

T = TypeVar("T")


LAYERS = tuple(replace(GROUP, name=f"{layer}.a", part=str(layer)) for layer in range(10))


def tasks(names: str, **changed: Any) -> list[Task]:
    return [replace(TASK, task_id=name, label=name, **changed) for name in names]


async def pool(some: Sequence[Task], workers: str = "12") -> Pool:
    shared = Pool(len(workers), {task.task_id: task for task in some}, {"plan": ["plan-ref"], "other": ["other-ref"]})
    for worker in workers:
        await shared.admit(worker)
    return shared


async def begun(some: Sequence[Task], workers: str = "12") -> Pool:
    """A pool whose first result is there: worker 1 has scored it, and holds the model."""
    shared = await pool([*tasks("!", plan_id="other"), *some], workers)
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
        shared = await pool(tasks("abcde", groups=LAYERS), workers="1")
        lease = await leased(shared, "c")
        assert (names(lease), lease.parts) == ("c", tuple("0123456789"))
        await shared.give_back(lease, {"c": None})
        assert names(await shared.lease("a")) == "abde"

    asyncio.run(story())


def test_layers_are_shared_out_first_in_large_then_in_small_leases() -> None:
    async def story() -> None:
        shared = await begun(tasks("abc", groups=LAYERS))
        one, two = await leased(shared, "b"), await leased(shared, "a")
        assert (one.worker, names(one), one.parts, one.plan) == ("1", "bac", tuple("0123"), ["plan-ref"])  # 0.8 of half of the ten
        assert (two.worker, names(two), two.parts) == ("2", "abc", tuple("4567"))
        await shared.give_back(two, dict.fromkeys("abc"))
        two = await leased(shared, "a")
        assert (two.worker, names(two), two.parts) == ("2", "abc", ("8",))  # a quarter of the two left, at least one
        await shared.give_back(one, dict.fromkeys("abc"))
        one = await leased(shared, "a")
        assert one.parts == ("9",)
        await shared.give_back(one, dict.fromkeys("abc"))
        assert await waits(shared.lease("a"))  # its layer 8 is still out
        await shared.give_back(two, dict.fromkeys("abc"))
        assert await shared.lease("a") == Ended(dict.fromkeys("!abc"))

    asyncio.run(story())


def test_a_layer_of_more_weights_is_more_work() -> None:
    heavy = tuple(replace(group, weight_elements=36) if group.part == "0" else group for group in LAYERS)  # 36 and nine times 4

    async def story() -> None:
        shared = await begun(tasks("ab", groups=heavy))
        assert (await leased(shared, "a")).parts == ("0",)  # 0.8 of half of 72
        assert (await leased(shared, "b")).parts == tuple("1234567")

    asyncio.run(story())


def test_where_captures_are_not_kept_no_task_goes_alone_and_workers_take_even_shares() -> None:
    async def story() -> None:
        shared = Pool(2, {task.task_id: task for task in tasks("abcd", groups=LAYERS)}, {"plan": []}, frozenset({"plan"}))
        for worker, layers in (("1", "01234"), ("2", "56789")):
            await shared.admit(worker)
            lease = await leased(shared, "a")
            assert (names(lease), lease.parts) == ("abcd", tuple(layers))

    asyncio.run(story())


def test_one_worker_takes_everything_at_once() -> None:
    async def story() -> None:
        lease = await leased(await begun(tasks("abcdefgh", groups=LAYERS), workers="1"), "h")
        assert (names(lease), lease.parts) == ("habcdefg", tuple("0123456789"))

    asyncio.run(story())


def test_a_task_that_is_all_there_is_is_shared_out_at_once() -> None:
    async def story() -> None:
        assert (await leased(await pool(tasks("a", groups=LAYERS)), "a")).parts == tuple("0123")

    asyncio.run(story())


def test_where_layers_are_few_recipes_are_shared_out_too_those_with_equal_weights_together() -> None:
    fp8, int8 = {"num_bits": (4, 3)}, {"num_bits": 8}

    async def story() -> None:
        mixed = [replace(task, weight_attributes=fp8 if task.task_id in "aceg" else int8) for task in tasks("abcdefgh", groups=LAYERS[:4])]
        shared = await begun(mixed)  # four layers for two workers: recipes in two slices
        one = await leased(shared, "c")
        assert (sorted(names(one)), one.parts) == (list("aceg"), tuple("012"))  # 0.8 of half of 8 x 4
        two = await leased(shared, "b")
        assert (sorted(names(two)), two.parts) == (list("bdfh"), tuple("012"))

    asyncio.run(story())


def test_a_task_whose_inputs_need_a_range_for_each_size_counts_for_as_many_products() -> None:
    sizes = {"small": "cell", "medium": "cell", "large": "cell"}

    async def story() -> None:
        dear = tasks("abcd", weight_attributes={"num_bits": 4}, input_attributes={"num_bits": 8}, calibrates_inputs=True, cells=sizes)
        cheap = tasks("efghijklmnopqrstuvwx", weight_attributes={"num_bits": 8}, cells=sizes)
        shared = Pool(2, {task.task_id: replace(task, groups=LAYERS[:4]) for task in [*dear, *cheap]}, {"plan": []}, frozenset({"plan"}))
        await shared.admit("1")
        assert names(await shared.lease("a")) == "abcd"  # 4 x 1.58 against 20 x 0.3

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


def test_what_a_dead_worker_held_waits_again_with_fewer_tasks_at_a_time() -> None:
    async def story() -> None:
        shared = await begun(tasks("abcdefgh", groups=LAYERS), workers="1")
        lease = await leased(shared, "a")
        assert (names(lease), lease.parts) == ("abcdefgh", tuple("0123456789"))
        await shared.give_back(lease, {"a": None}, death="killed")
        for leaves in ("bc", "de", "fg", "h"):  # one of them may be what kills workers
            lease = await leased(shared, "a")  # its own task has ended: it goes on with what is left
            assert (names(lease), lease.parts) == (leaves, tuple("0123456789"))
            await shared.give_back(lease, dict.fromkeys(leaves))
        assert await shared.lease("h") == Ended(dict.fromkeys("!abcdefgh"))

    asyncio.run(story())


def test_layers_of_a_dead_worker_wait_beside_those_that_nobody_had() -> None:
    async def story() -> None:
        shared = await begun(tasks("a", groups=LAYERS))
        one = await leased(shared, "a")
        await shared.give_back(await leased(shared, "a"), {"a": None})
        await shared.give_back(one, {}, death="killed")
        assert (await leased(shared, "a")).parts == ("0", "1")  # a quarter of 0123 and 89, to the nearest layer
        assert (await leased(shared, "a")).parts == ("2",)

    asyncio.run(story())


def test_a_task_under_which_alone_three_workers_died_has_failed_and_the_others_go_on() -> None:
    async def story() -> None:
        shared = await begun(tasks("abc"), workers="1")
        for leaves in ("abc", "a", "a", "a"):
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


def test_a_failure_in_one_layer_ends_the_task_whatever_its_other_layers_give() -> None:
    async def story() -> None:
        shared = await begun(tasks("ab", groups=LAYERS))
        one, two = await leased(shared, "a"), await leased(shared, "a")
        await shared.give_back(one, {"a": "NaN in layer 3", "b": None})
        await shared.give_back(two, dict.fromkeys("ab"))
        while isinstance(lease := await shared.lease("b"), Lease):
            assert names(lease) == "b"
            await shared.give_back(lease, {"b": None})
        assert lease == Ended({"!": None, "a": "NaN in layer 3", "b": None})

    asyncio.run(story())


def test_every_task_is_scored_once_however_many_trials_ask() -> None:
    """Trials as the driver runs them: as long as its task has not ended, a trial borrows a worker."""
    scored: list[str] = []

    async def trial(shared: Pool, task_id: str) -> None:
        while isinstance(lease := await shared.lease(task_id), Lease):
            await asyncio.sleep(0.001)
            scored.extend(f"{task.task_id}{part}" for task in lease.tasks for part in lease.parts)
            await shared.give_back(lease, {task.task_id: None for task in lease.tasks})

    async def story() -> None:
        shared = await pool(tasks("abcdefghijklmnopqrstuvwxyz", groups=LAYERS), workers="123")
        await asyncio.gather(*(trial(shared, name) for name in "zyxwvutsrqponmlkjihgfedcbaaabb"))

    asyncio.run(asyncio.wait_for(story(), 60))
    assert sorted(scored) == [f"{task}{layer}" for task in "abcdefghijklmnopqrstuvwxyz" for layer in range(10)]
