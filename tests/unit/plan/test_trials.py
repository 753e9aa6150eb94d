"""From a grid to cells: what shares a score, what has one of its own, what is skipped and what is refused."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from sweep.config.compose import expand
from sweep.core import machine
from sweep.core.errors import SweepError
from sweep.core.machine import Gpu, Hardware
from sweep.core.sizes import SIZES
from sweep.plan import trials
from sweep.plan.trials import PlannedTrial, SweepPlan, plan_sweep, versions
from sweep.run.session import row_of
from tests.models import EXPERTS, overrides_of, place_at, save_checkpoint, write_captions


def plan(*overrides: str, device: Any = "cpu") -> SweepPlan:
    return plan_sweep(expand(overrides, multirun=True).points, device)


def by_name(*overrides: str, device: Any = "cpu") -> dict[str, PlannedTrial]:
    return {trial.name: trial for trial in plan(*overrides, device=device).trials}


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_captions(tmp_path_factory.mktemp("captions") / "captions.txt", 140)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("qwen3") / "model", "qwen3")


@pytest.fixture(scope="module")
def own(checkpoint: Path, captions: Path) -> list[str]:
    """Overrides that name a random checkpoint and its captions."""
    return [
        "model=hf_causal_lm",
        f"model.path={checkpoint}",
        "dataset=coco2017_captions",
        f"dataset.captions_path={captions}",
    ]


def test_a_weight_only_pair_has_one_cell_under_all_activation_granularities() -> None:
    trials = by_name(
        "quant_pair=wint8_afp16,wint8_aint8",
        "quant_granularity=default,a_per_tensor_static,a_per_token_dynamic,w_group64",
    )
    cells = {name.rsplit("/", 1)[0]: trial.cell_id for name, trial in trials.items()}
    assert (
        cells["wint8_afp16/default"]
        == cells["wint8_afp16/a_per_tensor_static"]
        == cells["wint8_afp16/a_per_token_dynamic"]
    )
    assert cells["wint8_aint8/default"] == cells["wint8_aint8/a_per_tensor_static"]  # what the preset says already
    assert len(set(cells.values())) == 2 + 3
    assert len({trial.trial_id for trial in trials.values()}) == 8  # each is a trial of its own, with its own folder


def test_algorithm_and_scales_are_part_of_a_trials_name_and_id() -> None:
    """Ranges of a channel are the same under both scales, so they share a cell; the trials stay two."""
    axes = (
        "quant_granularity=recipe_match_channel_token",
        "sensitivity.quant_algorithm=max,mse",
        "sensitivity.scales=private,fused",
    )
    trials = plan("quant_pair=wint8_aint8", *axes).trials
    assert [trial.name for trial in trials] == [
        f"wint8_aint8/recipe_match_channel_token/{rest}"
        for rest in ("small", "fused/small", "mse/small", "mse/fused/small")
    ]
    assert len({trial.trial_id for trial in trials}) == 4
    assert len({trial.cell_id for trial in trials}) == 2


def test_formats_whose_scales_runtimes_round_have_a_score_version_and_cells_of_their_own() -> None:
    """All others keep the cells that stores have: the ids are those of the version before."""
    pairs = "quant_pair=wint8_afp16,wint4_afp8,wint4_aint8,wint8_aint8,wfp8_afp16,wfp8_afp8"
    scales = {
        each: by_name(pairs, "quant_granularity=a_per_token_dynamic", f"sensitivity.scales={each}")
        for each in ("private", "fused")
    }
    private, fused = ({name.split("/")[0]: trial for name, trial in found.items()} for found in scales.values())
    assert {trial.score_version for trial in private.values()} == {"1"}
    rounded = {name for name, trial in fused.items() if trial.score_version == "1+bf16_scales.1"}
    assert rounded == {"wint8_afp16", "wint4_afp8", "wint4_aint8"}
    assert {name for name, trial in fused.items() if trial.cell_id != private[name].cell_id} == {
        *rounded,
        "wfp8_afp16",  # scales of whole tensors, which are shared
        "wfp8_afp8",
    }
    assert versions(fused["wint8_afp16"].score_version)["score"] == "1+bf16_scales.1"


def test_the_kernels_of_kl_div_are_part_of_its_cells_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(method: str) -> PlannedTrial:
        return by_name("quant_pair=wint8_aint8", f"sensitivity.method={method}")["wint8_aint8/default/small"]

    before = {method: of(method) for method in ("gradient", "fisher", "kl_div")}
    assert before["kl_div"].score_version == "1+kl_div.1"
    monkeypatch.setattr(trials, "KL_VERSION", 2)
    assert [method for method, trial in before.items() if of(method).cell_id != trial.cell_id] == ["kl_div"]


def test_draws_and_the_way_they_are_drawn_are_part_of_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that go without saying are the ones typed."""

    def drawn(*overrides: str) -> PlannedTrial:
        return by_name("quant_pair=wint8_aint8", "sensitivity.method=fisher", *overrides)["wint8_aint8/default/small"]

    usual, eight, two = drawn(), drawn("sensitivity.draws=8"), drawn("sensitivity.draws=2")
    assert (usual.cell_id, usual.trial_id) == (eight.cell_id, eight.trial_id)
    assert len({usual.cell_id, two.cell_id}) == len({usual.trial_id, two.trial_id}) == 2
    assert usual.score_version == "1+fisher.1"
    monkeypatch.setattr(trials, "DRAWING_VERSION", 2)
    assert drawn().cell_id != usual.cell_id
    found = plan("quant_pair=wint8_aint8", "sensitivity.method=gradient,fisher")
    one, other = found.tasks.values()
    assert (one.draws, other.draws) == (None, 8)
    assert not one.shares_capture_with(other)
    (fewer,) = plan("quant_pair=wint8_aint8", "sensitivity.method=fisher", "sensitivity.draws=2").tasks.values()
    assert not fewer.shares_capture_with(other)


def test_equal_cells_are_one_task_with_every_size_asked_for() -> None:
    found = plan("quant_pair=wint8_afp16", "quant_granularity=default,a_per_token_dynamic", "dataset.size=large,small")
    (task,) = found.tasks.values()
    assert list(task.cells) == ["small", "large"]
    assert {trial.cell_id for trial in found.trials} == set(task.cells.values())
    assert task.n_steps == 2 * len(task.groups) == 2 * 16
    assert set(found.plans) == {task.plan_id}


def test_the_cells_of_the_whole_grid_are_as_many_as_recipes_differ() -> None:
    trials = plan("grid=origin").trials
    valid = [trial for trial in trials if trial.cell_id is not None]
    assert (len(trials), len(valid)) == (144 * 3, 128 * 3)
    assert len({trial.cell_id for trial in valid}) == 90 * 3
    assert all((trial.cell_id is None) == (trial.task_id is None) == (trial.reason is not None) for trial in trials)


SAME_CELL = {
    "store": ["store.uri=/nowhere/else"],
    "workers": ["cluster.workers=7", "cluster.retry_failed=true"],
    "reports": ["output_layout=publish"],
    "model's name": ["model.name=another"],
    "data set's name": ["dataset.name=another"],
    "more pairs": ["quant_pair=wfp8_afp8,wint4_aint8,wint8_aint8"],
    "more granularities": ["quant_granularity=default,w_per_tensor"],
    "a larger size": ["dataset.size=small,medium"],
    "captions left uncut": ["dataset.max_tokens=500"],
    "dtype spelt out": ["model.dtype=float32"],
    "no draws": ["sensitivity.draws=null"],
}
OTHER_CELL = {
    "pair": ["quant_pair=wint8_afp8"],
    "granularity": ["quant_granularity=w_per_tensor"],
    "size": ["dataset.size=medium"],
    "coverage": ["sensitivity.coverage=all_layers"],
    "lm_head": ["sensitivity.lm_head=true"],
    "dtype": ["model.dtype=bfloat16"],
    "engine": ["sensitivity.engine=modelopt"],
    "method": ["sensitivity.method=fisher"],
    "cut captions": ["dataset.max_tokens=3"],
    "data set": ["dataset=wordnet_glosses", "dataset.captions_path=null"],
}


def cell(overrides: list[str], device: Any = "cpu") -> str | None:
    """The cell of wint8_aint8/default/small, or of whatever the overrides ask for instead."""
    trials = by_name(*overrides, device=device)
    return trials.get("wint8_aint8/default/small", next(iter(trials.values()))).cell_id


@pytest.mark.parametrize("change", SAME_CELL)
def test_a_cell_does_not_know_where_by_whom_or_beside_what_it_is_scored(change: str, own: list[str]) -> None:
    assert cell([*own, *SAME_CELL[change]]) == cell(own)


@pytest.mark.parametrize("change", OTHER_CELL)
def test_a_cell_is_another_with_whatever_changes_its_scores(change: str, own: list[str]) -> None:
    assert cell([*own, *OTHER_CELL[change]]) != cell(own)


def test_a_gpu_computes_in_bf16_unless_told_otherwise(own: list[str]) -> None:
    assert cell(own, device="cuda") == cell([*own, "model.dtype=bfloat16"]) != cell(own)
    assert cell([*own, "model.dtype=float32"], device="cuda") == cell(own)


def one_weight(checkpoint: Path, captions: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] += 1.0
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})


def config(checkpoint: Path, captions: Path) -> None:
    path = checkpoint / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))


def first_two_captions_swapped(checkpoint: Path, captions: Path) -> None:
    first, second, *rest = captions.read_text().splitlines()
    captions.write_text("\n".join([second, first, *rest]))


def a_caption_after_the_size(checkpoint: Path, captions: Path) -> None:
    captions.write_text(captions.read_text() + "w1 w2 w3\n")


def a_copy_elsewhere(checkpoint: Path, captions: Path) -> None:
    checkpoint.rename(checkpoint.with_name("moved"))


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (one_weight, False),
        (config, False),
        (first_two_captions_swapped, False),
        (a_caption_after_the_size, True),
        (a_copy_elsewhere, True),
    ],
)
def test_a_cell_follows_the_content_of_its_files(
    change: Callable[[Path, Path], None], same: bool, checkpoint: Path, captions: Path, tmp_path: Path
) -> None:
    def own_cell(model: Path) -> str | None:
        data = ["dataset=coco2017_captions", f"dataset.captions_path={tmp_path / 'captions.txt'}"]
        return cell(["model=hf_causal_lm", f"model.path={model}", "model.name=mine", *data])

    shutil.copytree(checkpoint, tmp_path / "model")
    shutil.copy(captions, tmp_path / "captions.txt")
    before = own_cell(tmp_path / "model")
    change(tmp_path / "model", tmp_path / "captions.txt")
    assert (own_cell(next(path for path in tmp_path.iterdir() if path.is_dir())) == before) == same


@pytest.mark.parametrize("constant", ["SCORE_VERSION", "modelopt"])
def test_a_cell_is_another_under_other_arithmetic(
    constant: str, own: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = cell(own)
    if constant == "SCORE_VERSION":
        monkeypatch.setattr(trials, "SCORE_VERSION", trials.SCORE_VERSION + 1)
    else:
        stock = trials.version
        monkeypatch.setattr(
            trials, "version", lambda name: stock(name) + ".post1" if name == "nvidia-modelopt" else stock(name)
        )
    assert cell(own) != before


def test_only_cells_with_rounded_scales_are_others_under_another_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    points = ("quant_pair=wint8_afp16,wfp8_afp16", "sensitivity.scales=private,fused")
    before = [trial.cell_id for trial in plan(*points).trials]
    monkeypatch.setattr(trials, "ROUNDED_SCALES_VERSION", trials.ROUNDED_SCALES_VERSION + 1)
    after = [trial.cell_id for trial in plan(*points).trials]
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False, True, True]


def test_an_invalid_point_of_a_grid_is_skipped_with_its_reason() -> None:
    trials = by_name("quant_pair=wfp4_afp16,wint4_afp16", "quant_granularity=default,w_per_tensor")
    skipped = {name: trial.reason for name, trial in trials.items() if trial.reason}
    assert list(skipped) == ["wfp4_afp16/w_per_tensor/small"]
    assert "FP4 weights need blocks" in str(skipped["wfp4_afp16/w_per_tensor/small"])


@pytest.mark.parametrize("granularities", ["w_per_tensor", "w_per_tensor,w_per_out_channel"])
def test_nothing_but_invalid_points_is_refused_with_the_reasons(granularities: str) -> None:
    with pytest.raises(
        SweepError, match=r"Nothing can be scored.\nwfp4_afp16/w_per_tensor/small: FP4 weights need blocks"
    ) as error:
        plan("quant_pair=wfp4_afp16", f"quant_granularity={granularities}")
    assert str(error.value).count("\n") == len(granularities.split(","))


def test_blocks_that_do_not_divide_a_layers_outputs_are_refused_by_layer(tmp_path: Path, captions: Path) -> None:
    odd = save_checkpoint(
        tmp_path / "odd", "llama", intermediate_size=384, num_key_value_heads=2
    )  # 2 heads of 32: 64 outputs
    model = [
        "model=hf_causal_lm",
        f"model.path={odd}",
        "dataset=coco2017_captions",
        f"dataset.captions_path={captions}",
    ]
    with pytest.raises(
        SweepError,
        match=r"Blocks of 128 rows do not divide the 64 outputs of model\.layers\.0\.self_attn\.k_proj "
        r"\(4 such layers\)",
    ):
        plan(*model, "quant_pair=wfp8_afp8", "quant_granularity=w_block128x128_a_group128")


def test_the_bundled_model_takes_every_format_that_is_served() -> None:
    trials = by_name("quant_pair=wfp8_afp8,wfp4_afp4,wfp4_afp8", "quant_granularity=mx,w_mx,w_block128x128_a_group128")
    skipped = {name for name, trial in trials.items() if trial.cell_id is None}
    assert skipped == {"wfp4_afp4/w_block128x128_a_group128/small", "wfp4_afp8/w_block128x128_a_group128/small"}


def test_a_score_does_not_depend_on_the_target(own: list[str]) -> None:
    def identities(target: str) -> list[tuple[str, str | None]]:
        return [(trial.trial_id, trial.cell_id) for trial in plan(*own, f"target={target}").trials]

    assert identities("vllm_sm90") == identities("trtllm_sm100")


def test_ranges_a_token_and_rank_are_cells_of_their_own_and_all_else_is_shared(own: list[str]) -> None:
    granularities = "quant_granularity=default,a_per_tensor_static,a_per_token_dynamic"
    alone, split = (
        plan(*own, "quant_pair=wint8_afp16,wint8_aint8", granularities, *tp) for tp in ([], ["target.tp=2"])
    )
    others = {
        one.name: other.tp
        for one, other in zip(alone.trials, split.trials, strict=True)
        if (one.trial_id, one.cell_id, one.task_id) != (other.trial_id, other.cell_id, other.task_id)
    }
    assert others == {"wint8_aint8/a_per_token_dynamic/small": 2}
    assert {one.tp for one in alone.trials} == {1}
    typed = ["quant_pair=wint8_aint8", "quant_granularity=a_per_token_dynamic", "target.tp=1"]
    assert plan(*own, *typed).trials == tuple(one for one in alone.trials if one.name in others)


def test_ranks_that_cannot_share_inputs_are_refused_where_a_score_depends_on_them(own: list[str]) -> None:
    typed = [*own, "quant_pair=wint8_aint8", "target.tp=3"]
    assert plan(*typed, "quant_granularity=default").trials[0].cell_id is not None
    with pytest.raises(SweepError, match=r"target\.tp=3: 3 do not divide the 128 inputs of .*o_proj"):
        plan(*typed, "quant_granularity=a_per_token_dynamic")


def test_stock_modelopt_does_not_score_ranges_a_token_and_rank(own: list[str]) -> None:
    typed = [*own, "quant_pair=wint8_aint8", "quant_granularity=a_per_token_dynamic", "sensitivity.engine=modelopt"]
    assert plan(*typed).trials[0].cell_id is not None
    with pytest.raises(SweepError, match=r"sensitivity\.engine=modelopt has one range.*Type target\.tp=1, or"):
        plan(*typed, "target.tp=2")


def test_groups_that_do_not_divide_a_layers_inputs_are_refused_by_layer(tmp_path: Path, captions: Path) -> None:
    odd = save_checkpoint(tmp_path / "odd", "qwen3", hidden_size=96, intermediate_size=160)
    own = ["model=hf_causal_lm", f"model.path={odd}", "dataset=coco2017_captions", f"dataset.captions_path={captions}"]
    with pytest.raises(SweepError) as error:
        plan(*own, "quant_pair=wint8_aint8", "quant_granularity=w_group64")
    # 96 inputs: q, k, v, gate, up of both layers; 160: down; o has 4 heads of 32
    assert "Groups of 64 do not divide the 96 inputs of model.layers.0.self_attn.q_proj (12 such layers)" in str(
        error.value
    )
    assert "Sizes that divide every layer: 16, 32." in str(error.value)
    assert [bool(trial.reason) for trial in plan(*own, "quant_granularity=default,w_group64").trials] == [False, True]


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, captions: Path) -> None:
    small = save_checkpoint(tmp_path / "small", "qwen3", vocab_size=300)
    with pytest.raises(
        SweepError,
        match=r"gives token \d+, but the model has 300 tokens: .* Copy the model's own tokenizer files there",
    ):
        plan(
            "model=hf_causal_lm",
            f"model.path={small}",
            "dataset=coco2017_captions",
            f"dataset.captions_path={captions}",
        )


def test_the_sizes_of_a_grid_come_from_one_capture_plan() -> None:
    found = plan("dataset.size=small,medium,large")
    (largest,) = found.plans.values()
    assert [largest.n_predictions(size) for size in SIZES] == [
        plan(f"dataset.size={size}").plans.popitem()[1].n_predictions(size) for size in SIZES
    ]
    assert [trial.dataset_revision for trial in found.trials] == [largest.digest(size) for size in SIZES]


def test_pending_is_what_lacks_cells_each_with_only_those() -> None:
    found = plan("quant_pair=wint8_afp16,wint4_afp16", "dataset.size=small,medium")
    cells = {trial.name: str(trial.cell_id) for trial in found.trials}
    assert found.pending([]) == found.tasks
    assert found.pending(cells.values()) == {}
    left = found.pending(
        [
            cells["wint8_afp16/default/small"],
            cells["wint4_afp16/default/small"],
            cells["wint4_afp16/default/medium"],
            "another grid's",
        ]
    )
    assert [(task.label, task.cells) for task in left.values()] == [
        ("wint8_afp16/default", {"medium": cells["wint8_afp16/default/medium"]})
    ]


A100 = Hardware(host="a", gpus=(Gpu("A100", 85.9, (8, 0)),), has_nvcc=True)
H100 = Hardware(host="h", gpus=(Gpu("H100", 85.5, (9, 0)),))
SILENT = Hardware(host="s", unknown="no answer")
NVFP4, MX, BOTH, INT8 = "wfp4_afp16/default", "wfp4_afp16/w_mx", "wfp4_afp4/w_mx", "wint8_aint8/default"


@pytest.mark.parametrize(
    ("nodes", "runs"),
    [
        ([A100], {MX, INT8}),
        ([H100], {NVFP4, INT8}),
        ([A100, H100], {NVFP4, MX, INT8}),
        ([replace(H100, has_nvcc=True)], {NVFP4, MX, BOTH, INT8}),
        ([A100, SILENT], {NVFP4, MX, BOTH, INT8}),
        ([], {NVFP4, MX, BOTH, INT8}),
    ],
)
@pytest.mark.parametrize("here", [A100, H100])
def test_formats_that_run_are_those_of_the_nodes_not_of_the_drivers_machine(
    here: Hardware,
    nodes: list[Hardware],
    runs: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "has_compiler", lambda: here.has_nvcc)
    monkeypatch.setattr(machine, "_gpus", lambda: here.gpus)
    grid = ["quant_pair=wfp4_afp16,wfp4_afp4,wint8_aint8", "quant_granularity=default,w_mx"]
    points = expand(grid, multirun=True).points
    trials = {trial.name.removesuffix("/small"): trial for trial in plan_sweep(points, "cuda", nodes).trials}
    assert {name for name in (NVFP4, MX, BOTH, INT8) if trials[name].cell_id is not None} == runs


def test_what_no_node_can_run_is_skipped_with_the_reason_of_one() -> None:
    points = expand(["quant_pair=wfp4_afp16", "quant_granularity=default,w_mx"], multirun=True).points
    for nodes, reason in (
        ([A100], "NVFP4 needs a GPU of compute capability 8.9; A100 has 8.0. Type cluster.device=cpu."),
        ([A100, A100], "None of the 2 nodes can run it. NVFP4 needs a GPU of compute capability 8.9; A100 has 8.0."),
        ([H100], "ModelOpt builds its extension for MX formats with nvcc, which h lacks. Install"),
    ):
        (skipped,) = (trial.reason for trial in plan_sweep(points, "cuda", nodes).trials if trial.reason)
        assert skipped.startswith(reason)


def test_ranges_from_more_samples_are_a_trial_and_a_cell_of_their_own(own: list[str]) -> None:
    """Of formats that find ranges in the data; of others they change nothing, and the trial keeps its id."""
    axes = ["quant_pair=wint8_aint8,wint4_afp16", "quant_granularity=w_group64", "dataset.size=small"]
    usual, wider = (plan(*own, *axes, *more).trials for more in ([], ["calibration.n_samples=64"]))
    assert [trial.calibration for trial in (*usual, *wider)] == [None, None, 64, None]
    assert usual[0].cell_id != wider[0].cell_id
    assert usual[0].trial_id != wider[0].trial_id
    assert (usual[1].cell_id, usual[1].trial_id) == (wider[1].cell_id, wider[1].trial_id)
    same = plan(*own, *axes, "calibration.n_samples=16").trials  # those that are scored
    assert [trial.cell_id for trial in same] == [trial.cell_id for trial in usual]
    assert row_of(wider[0], "done", None, "r").variant == ["calibration64"]
    with pytest.raises(SweepError, match=r"calibration\.n_samples=8 are fewer than dataset\.size=small"):
        plan(*own, *axes, "calibration.n_samples=8")


def own_model(place: Path, kind: str, **text: Any) -> list[str]:
    return overrides_of(place_at(place, kind, n_captions=16, **text))


def test_the_share_that_trials_cover_follows_their_options(tmp_path: Path) -> None:
    """Linears 294,912, embeddings and lm_head 65,536 each, norms 768; see tests/unit/model/test_kinds.py."""
    own = own_model(tmp_path, "qwen3")
    found = plan(*own, "dataset.size=small", "sensitivity.lm_head=false,true").coverages
    assert [(label, each.covered, each.parameters) for label, each in found] == [
        ("model, lm_only", 294_912, 426_752),
        ("model, lm_only", 294_912 + 65_536, 426_752),
    ]
    assert [each.warning for _, each in found] == [None, None]


def test_the_vision_tower_is_covered_where_it_is_asked_for() -> None:
    found = dict(plan("sensitivity.coverage=lm_only,all_layers", "dataset.size=small").coverages)
    only, both = found["qwen3_vl_tiny, lm_only"], found["qwen3_vl_tiny, all_layers"]
    assert (only.covered, both.covered) == (1_966_080, 1_966_080 + 1_572_864)
    assert "all_layers" in only.text
    assert "all_layers" not in both.text


def test_experts_are_not_covered_and_the_rest_is_planned(tmp_path: Path) -> None:
    ((_, found),) = plan(*own_model(tmp_path, "qwen3_moe", **EXPERTS), "dataset.size=small").coverages
    assert (found.covered, found.parameters) == (98_304, 329_472)
    assert found.warning == "not looked at: experts, 29.8 % of all weights (they are not scored yet)"


@pytest.mark.parametrize("overrides", [(), ("sensitivity.lm_head=true",), ("sensitivity.coverage=all_layers",)])
def test_a_model_of_conv1d_is_refused_by_that_name(overrides: tuple[str, ...], tmp_path: Path) -> None:
    own = own_model(tmp_path, "gpt2")
    with pytest.raises(SweepError, match=r"its linears are transformers' Conv1D \(66\.3 % of its weights\)") as refused:
        plan(*own, *overrides)
    assert "all_layers" not in str(refused.value)


@pytest.mark.parametrize(
    ("elements", "advice"),
    [
        ({"lm_head": 0}, "Choose another model: model.path=DIR."),
        ({"lm_head": 5}, "sensitivity.lm_head=true covers its lm_head."),
        (
            {"lm_head": 0, "experts": 7},
            "Its experts are not scored yet. Choose another model: model.path=DIR.",
        ),
        ({"lm_head": 0, "vision_linears": 3}, "sensitivity.coverage=all_layers covers its vision tower."),
    ],
)
def test_a_model_of_which_nothing_is_covered_gets_advice_that_helps(elements: dict[str, int], advice: str) -> None:
    assert trials._other_choice(elements) == advice
