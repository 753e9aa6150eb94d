"""Which worker is assigned which tasks and layers, and what becomes of tasks whose workers die."""

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from sweep.core.machine import Gpu, Hardware, Needs
from sweep.run.task_queue import Assignment, Loss, TaskQueue
from tests.formats import format_of
from tests.tasks import GROUP, TASK
from workers.task import Task

LAYERS = tuple(replace(GROUP, name=f"{layer}.a") for layer in range(10))
KILLED = Loss(reason="killed")


def tasks(names: str, **changed: Any) -> list[Task]:
    return [replace(TASK, task_id=name, label=name, **changed) for name in names]


def queue(some: Sequence[Task], workers: str = "12") -> TaskQueue:
    shared = TaskQueue(len(workers), some)
    for worker in workers:
        shared.add_worker(worker)
    return shared


def begun(some: Sequence[Task], workers: str = "12") -> TaskQueue:
    """A queue whose first result is there: worker 1 has scored it."""
    shared = queue([*tasks("!", plan_id="other"), *some], workers)
    first = assigned(shared, "1")
    assert names(first) == "!"
    taken(shared, first)
    done(shared, first)
    return shared


def assigned(shared: TaskQueue, worker: str, holds: str | None = "r") -> Assignment:
    assignment = shared.assign(worker, holds)
    assert assignment is not None
    return assignment


def names(assignment: Assignment) -> str:
    return "".join(task.task_id for task in assignment.tasks)


def taken(shared: TaskQueue, assignment: Assignment, n: int = 1000) -> str:
    """The next parts of an assignment, up to `n` times asked."""
    parts = ""
    for _ in range(n):
        if not (some := shared.take(assignment.number)):
            break
        parts += "".join(some).removeprefix("layers.")
    return parts


def done(shared: TaskQueue, assignment: Assignment) -> None:
    """All of an assignment's tasks come to a good end with what was taken."""
    shared.finish(assignment, {task.task_id: None for task in assignment.tasks})


def ended(shared: TaskQueue, names: str) -> str:
    return "".join(name for name in names if shared.has_ended(name))


class Waiting:
    """A worker that waits for something to score, in a thread of its own."""

    def __init__(self, shared: TaskQueue, worker: str) -> None:
        self.found: list[Assignment | None] = []
        self._thread = threading.Thread(target=lambda: self.found.append(shared.assign(worker, "r")), daemon=True)
        self._thread.start()
        time.sleep(0.05)
        assert self._thread.is_alive(), self.found

    def result(self) -> Assignment | None:
        self._thread.join(20)
        return self.found[0]


def test_the_very_first_task_goes_alone_for_a_first_result() -> None:
    shared = queue(tasks("abcde", groups=LAYERS), workers="1")
    first = assigned(shared, "1")
    assert (names(first), taken(shared, first)) == ("a", "0123456789")
    done(shared, first)
    rest = assigned(shared, "1")
    assert (names(rest), taken(shared, rest)) == ("bcde", "0123456789")
    done(shared, rest)
    assert (shared.assign("1", "r"), shared.is_over) == (None, True)


def test_workers_take_the_layers_of_all_tasks_in_turn() -> None:
    shared = begun(tasks("abc", groups=LAYERS))
    one, two = assigned(shared, "1"), assigned(shared, "2")
    assert [(each.worker, names(each)) for each in (one, two)] == [("1", "abc"), ("2", "abc")]
    assert (taken(shared, one, 3), taken(shared, two, 2), taken(shared, one)) == ("012", "34", "56789")
    done(shared, two)
    waiting = Waiting(shared, "2")  # worker 1 is still at some of its layers, and may die
    assert (ended(shared, "abc"), shared.n_busy) == ("", 1)
    done(shared, one)
    assert (waiting.result(), ended(shared, "abc")) == (None, "abc")


def test_where_captures_are_not_kept_no_task_goes_alone() -> None:
    shared = TaskQueue(2, tasks("abcd", groups=LAYERS), frozenset({"plan"}))
    assert [names(assigned(shared, worker)) for worker in "12"] == ["abcd", "abcd"]


def test_a_task_that_is_all_there_is_is_shared_out() -> None:
    shared = queue(tasks("a", groups=LAYERS))
    assert [taken(shared, assigned(shared, worker), 5) for worker in "12"] == ["01234", "56789"]


def test_where_layers_are_few_recipes_are_split_too_those_with_equal_weights_together() -> None:
    fp8, int8 = format_of({"num_bits": (4, 3)}, None), format_of({"num_bits": 8}, None)
    mixed = [
        replace(task, format=fp8 if task.task_id in "aceg" else int8) for task in tasks("abcdefgh", groups=LAYERS[:4])
    ]
    shared = begun(mixed)  # four layers for two workers: recipes in two slices
    one, two = assigned(shared, "1"), assigned(shared, "2")  # a's slice is being scored: help with the other first
    assert [names(each) for each in (one, two)] == ["aceg", "bdfh"]
    assert taken(shared, two) == "0123"
    done(shared, two)
    two = assigned(shared, "2")
    assert (names(two), taken(shared, two, 1), taken(shared, one)) == ("aceg", "0", "123")


def test_a_task_whose_inputs_need_a_range_for_each_size_counts_for_as_many_products() -> None:
    sizes = {"small": "cell", "medium": "cell", "large": "cell"}
    dear = tasks("abcd", format=format_of({"num_bits": 4}, {"num_bits": 8}), cells=sizes)
    cheap = tasks("efghijklmnopqrstuvwx", format=format_of({"num_bits": 8}, None), cells=sizes)
    shared = begun([replace(task, groups=LAYERS[:4]) for task in [*dear, *cheap]])
    assert names(assigned(shared, "1")) == "abcd"  # 4 x 1.58 against 20 x 0.3


def test_kl_div_tasks_go_out_one_by_one_and_two_workers_share_the_last() -> None:
    shared = begun(tasks("ab", method="kl_div", groups=LAYERS))
    one, two = assigned(shared, "1"), assigned(shared, "2")
    assert (names(one), names(two)) == ("a", "b")
    assert taken(shared, two) == "0123456789"
    done(shared, two)
    two = assigned(shared, "2")
    assert (names(two), taken(shared, one, 3), taken(shared, two)) == ("a", "012", "3456789")


def test_stock_auto_quantize_gets_all_parts_at_once() -> None:
    shared = begun(tasks("ab", engine="modelopt", groups=LAYERS))
    one, two = assigned(shared, "1"), assigned(shared, "2")
    assert (names(one), taken(shared, one, 1), names(two), taken(shared, two, 1)) == (
        "a",
        "0123456789",
        "b",
        "0123456789",
    )


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
    shared = begun([*tasks("a"), *tasks("b", **other), *tasks("c"), *tasks("d", **other)], workers="1")
    together = [assigned(shared, "1") for _ in range(2)]
    assert [names(each) for each in together] == ["ac", "b" if other.get("engine") == "modelopt" else "bd"]


def test_a_worker_goes_on_with_the_model_that_it_holds() -> None:
    shared = begun([*tasks("a"), *tasks("b", method="kl_div", model=replace(TASK.model, revision="s"))])
    assert names(assigned(shared, "1", holds="s")) == "b"


def test_a_worker_that_can_do_nothing_waits_until_there_is_something_or_all_have_ended() -> None:
    shared = begun(tasks("ab", groups=LAYERS))
    one = assigned(shared, "1")
    assert (names(one), taken(shared, one)) == ("ab", "0123456789")
    waiting = Waiting(shared, "2")
    shared.finish(one, {"a": None, "b": "NaN in layer 3"})
    assert (waiting.result(), ended(shared, "ab"), shared.failures()) == (None, "ab", {"b": "NaN in layer 3"})


def test_what_is_given_up_ends_with_the_reason() -> None:
    shared = begun(tasks("ab", groups=LAYERS))
    one = assigned(shared, "1")
    taken(shared, one)
    waiting = Waiting(shared, "2")
    shared.give_up("no weights")
    assert (waiting.result(), shared.failures(), shared.broken) == (None, {"a": "no weights", "b": "no weights"}, None)


def test_a_queue_that_is_stopped_says_why() -> None:
    shared = begun(tasks("ab"), workers="1")
    assert shared.broken is None
    shared.stop("No space left on device")
    assert (shared.broken, shared.assign("1", "r")) == ("No space left on device", None)


def test_what_a_dead_worker_had_waits_again_with_fewer_tasks_at_a_time() -> None:
    shared = begun(tasks("abcdefgh", groups=LAYERS), workers="1")
    lost = assigned(shared, "1")
    assert (names(lost), taken(shared, lost, 3)) == ("abcdefgh", "012")
    shared.finish(lost, {"a": None}, KILLED)
    for leaves in ("bc", "de", "fg", "h"):  # one of them may be what kills workers
        again = assigned(shared, "1")
        assert (names(again), taken(shared, again)) == (leaves, "0123456789")
        done(shared, again)
    assert (shared.assign("1", "r"), ended(shared, "abcdefgh"), shared.failures()) == (None, "abcdefgh", {})


def test_when_one_of_two_workers_dies_what_the_other_has_taken_is_not_scored_again() -> None:
    shared = begun(tasks("a", groups=LAYERS))
    one, two = assigned(shared, "1"), assigned(shared, "2")
    assert (taken(shared, one, 2), taken(shared, two, 2)) == ("01", "23")
    shared.finish(one, {}, KILLED)
    assert taken(shared, two) == ""  # until it is known what kills workers, tasks are scored apart
    done(shared, two)
    again = assigned(shared, "1")
    assert taken(shared, again) == "01456789"
    done(shared, again)
    assert (ended(shared, "a"), shared.failures()) == ("a", {})


def test_a_task_under_which_alone_three_workers_died_has_failed_and_the_others_go_on() -> None:
    shared = begun(tasks("abc"), workers="1")
    for leaves in ("abc", "a", "a", "a"):
        lost = assigned(shared, "1")
        assert (names(lost), taken(shared, lost)) == (leaves, "0")
        shared.finish(lost, {}, Loss(reason="segmentation fault"))
    for name in "bc":
        other = assigned(shared, "1")
        assert (names(other), taken(shared, other)) == (name, "0")
        done(shared, other)
    assert shared.failures() == {"a": "3 workers died while scoring it: segmentation fault"}


def test_no_task_fails_because_its_machine_was_short_of_memory() -> None:
    shared = begun(tasks("a"), workers="1")
    for _ in range(10):
        lost = assigned(shared, "1")
        taken(shared, lost)
        shared.finish(lost, {}, Loss(reason="short of memory", is_blameless=True))
    last = assigned(shared, "1")
    assert taken(shared, last) == "0"
    done(shared, last)
    assert (ended(shared, "a"), shared.failures()) == ("a", {})


def test_a_failure_in_one_layer_ends_the_task_whatever_its_other_layers_give() -> None:
    shared = begun(tasks("ab", groups=LAYERS))
    one, two = assigned(shared, "1"), assigned(shared, "2")
    assert (taken(shared, one, 2), taken(shared, two, 2)) == ("01", "23")
    shared.finish(one, {"a": "NaN in layer 1", "b": None})
    done(shared, two)
    again = assigned(shared, "1")
    assert (names(again), taken(shared, again)) == ("b", "456789")
    done(shared, again)
    assert (ended(shared, "ab"), shared.failures()) == ("ab", {"a": "NaN in layer 1"})


def test_every_task_is_scored_once_in_every_layer_however_many_workers_ask_at_once() -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    shared, scored = queue(tasks(letters, groups=LAYERS), workers="1234"), list[str]()

    def work(worker: str) -> None:
        while (assignment := shared.assign(worker, "r")) is not None:
            while part := taken(shared, assignment, 1):
                time.sleep(0.001)
                scored.extend(f"{task.task_id}{part}" for task in assignment.tasks)
            done(shared, assignment)

    threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in "1234"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(scored) == [f"{task}{layer}" for task in letters for layer in range(10)]
    assert (ended(shared, letters), shared.n_busy) == (letters, 0)


def test_a_model_that_loads_on_one_worker_only_is_scored_there_and_one_that_loads_nowhere_fails() -> None:
    shared = begun(tasks("ab", groups=LAYERS))
    one = assigned(shared, "1")
    parts = taken(shared, one, 2)
    shared.finish(one, {}, Loss(reason="no such file", is_unfit=True))
    waiting = Waiting(shared, "1")  # it cannot load the model: free, it stays so
    two = assigned(shared, "2")
    assert parts in taken(shared, two)
    shared.finish(two, {}, Loss(reason="no such file", is_unfit=True))
    assert (waiting.result(), shared.failures()) == (None, {"a": "no such file", "b": "no such file"})


def test_when_the_only_worker_that_can_load_a_model_is_gone_its_tasks_have_failed() -> None:
    shared = begun(tasks("a", groups=LAYERS))
    shared.finish(assigned(shared, "1"), {}, Loss(reason="no such file", is_unfit=True))
    waiting = Waiting(shared, "1")
    shared.remove_worker("2")
    assert (waiting.result(), shared.failures()) == (None, {"a": "no such file"})


def mixed(some: Sequence[Task], **hardware: Hardware) -> TaskQueue:
    """A queue of workers on unlike machines."""
    shared = TaskQueue(len(hardware), some)
    for worker in hardware:
        shared.add_worker(worker)
    for worker, here in hardware.items():
        shared.place(worker, here)
    return shared


A100 = Hardware(host="n", gpus=(Gpu("A100", 85.9, (8, 0)),))
H100 = Hardware(host="m", gpus=(Gpu("H100", 85.5, (9, 0)),))
NVFP4 = Needs(capability=(8, 9))


def test_of_unlike_gpus_each_scores_what_it_can() -> None:
    shared = mixed([*tasks("a", needs=NVFP4, groups=LAYERS), *tasks("bc", groups=LAYERS)], old=A100, new=H100)
    one, two = assigned(shared, "old"), assigned(shared, "new")
    assert [names(each) for each in (one, two)] == ["b", "a"]
    assert taken(shared, two) == taken(shared, one) == "0123456789"
    done(shared, one)
    one = assigned(shared, "old")
    assert (names(one), taken(shared, one, 3)) == ("c", "012")
    done(shared, two)
    two = assigned(shared, "new")  # the better one helps
    assert (names(two), taken(shared, two)) == ("c", "3456789")
    done(shared, one)
    done(shared, two)
    assert (ended(shared, "abc"), shared.failures()) == ("abc", {})


@pytest.mark.parametrize(
    "late", ["new", "old"]
)  # another worker, or the same one, which has died and is on another node now
def test_a_task_waits_for_a_gpu_that_can_score_it(late: str) -> None:
    shared = TaskQueue(2, [*tasks("a", needs=NVFP4), *tasks("b")])
    shared.add_worker("old")
    shared.add_worker("new")
    shared.place("old", A100)
    first = assigned(shared, "old")
    assert (names(first), taken(shared, first)) == ("b", "0")
    done(shared, first)
    shared.place(late, H100)
    assert names(assigned(shared, late)) == "a"


def test_a_task_that_no_gpu_can_score_has_failed_and_says_why() -> None:
    shared = mixed([*tasks("a", needs=NVFP4), *tasks("b")], old=A100, older=A100)
    assert "NVFP4 needs a GPU of compute capability 8.9; A100 has 8.0." in shared.failures()["a"]
    assert names(assigned(shared, "old")) == "b"
