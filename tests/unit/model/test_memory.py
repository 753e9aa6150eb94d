"""Memory of scoring, and scoring with less: windows, the same bits, a warning, a refusal in time."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sweep.config.compose import expand
from sweep.core.batches import Picture, Plan, Sample
from sweep.core.errors import SweepError
from sweep.core.groups import Part, ShapedGroup, parts_of
from sweep.core.machine import Gpu, Hardware
from sweep.plan.model import Model
from sweep.plan.trials import SweepPlan, plan_sweep
from tests.models import overrides_of, place_at
from workers.data.batches import make_plan
from workers.model import memory
from workers.model.memory import Workload, capture_bytes, fixed_bytes, needed_bytes, windows
from workers.service import scorer
from workers.service.scorer import Scorer
from workers.task import Task


def workload(tasks: Iterable[Task], plan: Plan, model_bytes: int) -> memory.Workload:
    """Of tasks in their smallest size, on a model with 512 tokens."""
    inputs = frozenset().union(*(task.inputs for task in tasks))
    dtype = next(iter(tasks)).model.dtype
    return memory.workload(plan, 1, n_inputs=len(inputs), dtype=dtype, model_bytes=model_bytes, vocabulary=512)


def group(layer: int, n_inputs: int, n_outputs: int, tower: str = "language_model") -> ShapedGroup:
    name = f"model.{tower}.layers.{layer}.mlp.down_proj"
    return ShapedGroup(
        name=name,
        modules=(name,),
        weight_elements=n_inputs * n_outputs,
        n_inputs=n_inputs,
        n_outputs=n_outputs,
    )


def work(**changes: Any) -> Workload:
    given: dict[str, Any] = {
        "n_tokens": 1000,
        "n_patches": 0,
        "batch_tokens": 100,
        "batch_patches": 0,
        "itemsize": 2,
        "model_bytes": 0,
        "vocabulary": 1,
        "n_inputs": 1,
    }
    return Workload(**(given | changes))


def test_x_and_g_of_every_token_are_counted_and_the_graph_of_one_batch() -> None:
    assert capture_bytes([group(0, 30, 20)], work()) == 50 * 2 * (1000 + 1.7 * 100)
    pictures = work(n_patches=4000, batch_patches=800)
    assert capture_bytes([group(0, 30, 20, "visual")], pictures) == 50 * 2 * (4000 + 1.7 * 800)


def test_pictures_of_1000_tokens_are_4000_patches_of_qwen3_vl_in_windows_and_least_memory() -> None:
    """Three chats of 1,050 tokens, each a batch: two of them would be over 2,048 tokens."""
    picture = Picture(content="a", shape=(4000, 1536), n_rows=4000, tensors={})
    chats = [Sample(token_ids=np.arange(1050), pictures=(picture,)) for _ in range(3)]
    plan = make_plan(chats, packed=True)
    drawn = memory.workload(plan, 1, n_inputs=1, dtype="bfloat16", model_bytes=10**9, vocabulary=1000, draws=8)
    assert drawn.n_gradients == 8
    found = memory.workload(plan, 1, n_inputs=1, dtype="bfloat16", model_bytes=10**9, vocabulary=1000)
    assert (found.n_tokens, found.n_patches, found.batch_tokens, found.batch_patches) == (3150, 12000, 1050, 4000)
    tower, layer = group(0, 1024, 4096, "visual"), group(0, 2560, 9728)
    tower_bytes = 2 * (1024 + 4096) * (12000 + 1.7 * 4000)  # x and g of all patches, and a graph of one batch
    layer_bytes = 2 * (2560 + 9728) * (3150 + 1.7 * 1050)
    assert capture_bytes([tower], found) == tower_bytes == 192_512_000
    assert capture_bytes([layer], found) == pytest.approx(layer_bytes, abs=1)
    # The model, 512 rows of logits, the tower's products (more than the layer's), and the reserve.
    operands = 2 * 12000 * (1024 * 2 + 4096 * 3)
    assert operands > 2 * 3150 * (2560 * 2 + 9728 * 3)
    fixed = 10**9 + 512 * 1000 * 14 + operands + 1.5e9
    assert fixed_bytes([tower, layer], found) == fixed
    assert needed_bytes([[tower], [layer]], found) == fixed + tower_bytes
    parts = parts_of([tower, layer])
    together = memory.part_windows(parts, found, fixed + tower_bytes + layer_bytes + 1)
    assert [[part.name for part in window] for window in together] == [[part.name for part in parts]]
    assert len(memory.part_windows(parts, found, fixed + tower_bytes + layer_bytes - 1)) == 2


def test_a_4b_model_on_7100_captions_tokens_fits_16_gb_only_in_windows() -> None:
    sizes = {"qkv": (2560, 6144), "o": (4096, 2560), "gate_up": (2560, 19456), "down": (9728, 2560)}
    flat = [group(layer, *size) for layer in range(36) for size in sizes.values()]
    parts = [flat[start : start + len(sizes)] for start in range(0, len(flat), len(sizes))]
    load = work(n_tokens=7100, batch_tokens=2048, model_bytes=8_900_000_000, vocabulary=151936, n_inputs=12)
    assert 26e9 < sum(capture_bytes(part, load) for part in parts) < 40e9  # 26 GB of x and g, measured, and the graph
    assert needed_bytes(parts, load) < 16e9 < fixed_bytes(flat, load) + sum(capture_bytes(part, load) for part in parts)


def test_windows_leave_room_for_the_hidden_states_at_which_they_begin() -> None:
    """Eight layers of 200 bytes a token; a state has 60 (30 inputs in bf16), and one gradient is as large."""
    layers, load = [group(layer, 30, 70) for layer in range(8)], work(batch_tokens=0)
    fixed = fixed_bytes(layers, load)
    parts = parts_of(layers)
    assert capture_bytes(layers[:1], load) == 200_000
    assert [len(window) for window in memory.part_windows(parts, load, fixed + 8 * 200_000)] == [8]  # none is kept
    # Two windows of four layers and three states are 980 bytes a token; three windows are 840: three layers and four.
    assert [len(window) for window in memory.part_windows(parts, load, fixed + 980_000)] == [4, 4]
    assert [len(window) for window in memory.part_windows(parts, load, fixed + 979_000)] == [3, 3, 2]
    assert [len(window) for window in memory.part_windows(parts, load, fixed + 200_000)] == [1] * 8


@pytest.mark.parametrize(
    ("sizes", "room", "expected"),
    [([1, 1, 1, 1], 2, [[0, 1], [2, 3]]), ([1, 5, 1], 2, [[0], [1], [2]]), ([1, 1], 9, [[0, 1]]), ([3], -1, [[0]])],
)
def test_windows_hold_as_many_parts_as_there_is_room_for(
    sizes: list[int], room: float, expected: list[list[int]]
) -> None:
    assert windows(range(len(sizes)), sizes, room) == expected


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return place_at(tmp_path_factory.mktemp("memory"), n_captions=16, num_hidden_layers=4)


def plan(place: Path, *overrides: str) -> SweepPlan:
    own = overrides_of(place)
    return plan_sweep(expand([*own, "quant_pair=wint8_aint8,wint4_afp16", *overrides], multirun=True).points, "cpu")


def scored(place: Path, store: Path, memory_gb: float | None = None) -> tuple[dict[str, bytes], list[str]]:
    """The bytes of every cell, and the warnings on the way."""
    wanted = plan(place)
    tasks = list(wanted.tasks.values())
    worker = Scorer(str(store), "cpu", memory_gb=memory_gb)
    warnings = [
        progress.warning
        for progress in worker.score(tasks, wanted.plans[tasks[0].plan_id])
        if progress.warning is not None
    ]
    return {path.parent.name: path.read_bytes() for path in store.glob("scores/*/*.parquet")}, warnings


def test_draws_take_a_gradient_each_of_x_one() -> None:
    group = ShapedGroup(name="m.layers.0.a", modules=("m.layers.0.a",), weight_elements=6, n_inputs=2, n_outputs=3)
    load = Workload(
        n_tokens=100,
        n_patches=0,
        batch_tokens=100,
        batch_patches=0,
        itemsize=4,
        model_bytes=0,
        vocabulary=1,
        n_inputs=0,
    )
    one, eight = (capture_bytes([group], replace(load, n_gradients=n)) for n in (1, 8))
    assert eight - one == 7 * 3 * 100 * 4
    parts = [Part(f"m.layers.{n}", (group,)) for n in range(8)]
    room = fixed_bytes([group], load) + 4 * eight + 12 * 100 * 2 * 4
    # Two windows start at a hidden state each, and end at eight gradients or at one: 10 states, or 3.
    assert len(memory.part_windows(parts, replace(load, n_gradients=8), room)) == 2
    assert len(memory.part_windows(parts, replace(load, n_gradients=8), room - 3 * 100 * 2 * 4)) == 3


def test_windows_give_the_same_bits(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = scored(place, tmp_path / "whole")
    seen: list[int] = []
    real = scorer.captures

    def counted(model: Any, segments: Any, chosen: Any, draws: Any) -> Any:
        seen.append(len(chosen))
        return real(model, segments, chosen, draws)

    monkeypatch.setattr(scorer, "captures", counted)
    wanted = plan(place)
    task = next(iter(wanted.tasks.values()))
    load = workload(wanted.tasks.values(), wanted.plans[task.plan_id], 2_000_000)
    two_layers = (fixed_bytes(task.groups, load) + 2.2 * capture_bytes(task.groups[:4], load)) / 1e9
    windowed, warnings = scored(place, tmp_path / "windowed", memory_gb=two_layers)
    assert seen
    assert all(n > 1 for n in seen)
    assert windowed == whole
    assert not warnings


def test_running_out_of_memory_halves_the_window_with_a_warning(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = scored(place, tmp_path / "whole")
    real, failures = scorer.capture, iter([True, False])

    def capture(*arguments: Any) -> Any:
        if next(failures, False):
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 1.74 GiB. GPU 0 has a total capacity of 79.18 GiB"
            )
        return real(*arguments)

    monkeypatch.setattr(scorer, "capture", capture)
    halved, warnings = scored(place, tmp_path / "halved")
    assert halved == whole
    assert warnings == ["Out of GPU memory: 1.74 GiB more were needed. Going on with a window of 1/2 of the room."]


def test_a_budget_too_small_for_one_layer_is_refused_before_anything_runs(place: Path) -> None:
    with pytest.raises(
        SweepError, match=r"0\.0001 GB are too little for one decoder layer at a time.*Type sensitivity\.memory_gb="
    ):
        plan(place, "sensitivity.memory_gb=0.0001")


def test_the_plan_says_whose_captures_need_windows(place: Path) -> None:
    roomy = plan(place, "sensitivity.memory_gb=1")
    task = next(iter(roomy.tasks.values()))
    load = workload([task], roomy.plans[task.plan_id], 4 * Model(place / "model").structure.parameters)
    layers = [task.groups[start : start + 4] for start in range(0, len(task.groups), 4)]
    between = (memory.whole_bytes(task.groups, load) + memory.needed_bytes(layers, load)) / 2
    narrow = plan(place, f"sensitivity.memory_gb={between / 1e9:.6f}")
    assert (roomy.windowed, narrow.windowed) == (frozenset(), {task.plan_id})


def test_the_smallest_gpu_decides_about_windows_and_the_largest_about_what_is_possible(place: Path) -> None:
    def planned(*sizes_gb: float, share: float = 1.0) -> SweepPlan:
        nodes = [Hardware(host="n", gpus=(Gpu("GPU", gb, (9, 0)),)) for gb in sizes_gb]
        own = [*overrides_of(place), "quant_pair=wint8_aint8", f"cluster.gpus_per_worker={share}"]
        return plan_sweep(expand(own, multirun=True).points, "cuda", nodes)

    (task,), (plan,) = planned().tasks.values(), planned().plans.values()
    load = workload([task], plan, 2 * Model(place / "model").structure.parameters)
    layers = [task.groups[start : start + 4] for start in range(0, len(task.groups), 4)]
    whole, least = memory.whole_bytes(task.groups, load) / 1e9, memory.needed_bytes(layers, load) / 1e9
    roomy, narrow, tiny = whole * 1.1, (whole + least) / 2, least * 0.9
    assert [len(planned(*sizes).windowed) for sizes in ([], [roomy], [roomy, narrow], [tiny, roomy])] == [0, 0, 1, 1]
    with pytest.raises(SweepError, match=r"None of the 2 nodes can run it\. One decoder layer at a time needs"):
        planned(tiny, tiny)
    assert task.needs.gpu_gb == pytest.approx(least)
    assert len(planned(2 * narrow, share=0.5).windowed) == 1
    with pytest.raises(SweepError, match="One decoder layer at a time"):
        planned(2 * tiny, share=0.5)
