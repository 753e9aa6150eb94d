"""The published tree: whole folders, touched only when they change, never overwritten unasked."""

import errno
import hashlib
import json
import os
import signal
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from sweep.core.errors import StoreFailed, SweepError
from sweep.report.files import FILES, folder_of
from sweep.report.publish import check_ahead, publish
from sweep.store.files import Files
from sweep.store.records import SCORES_SCHEMA, FinishedTrial, TrialRow
from tests.foreign import seen

FOLDER = "tiny/layer-analysis/weight-int4-act-int8/default/lm_only-glosses-small-gradient"


def finished(
    granularity: str = "default",
    *,
    score: float = 4.0,
    created: int = 1,
    config: dict[str, Any] | None = None,
    **trial: Any,
) -> FinishedTrial:
    """A trial with one scored group of two modules and one never called."""
    pair = {"name": "wint4_aint8", "weight": "int4", "activation": "int8"}
    composed = {
        "model": {"name": "tiny"},
        "quant_pair": pair,
        "quant_granularity": {"name": granularity},
        "store": {"uri": "/secret"},
    } | (config or {})
    row = TrialRow(
        trial_id=f"t-{granularity}",
        cell_id=f"cell-{granularity}-{score}",
        model="tiny",
        model_revision="a" * 64,
        dataset="glosses",
        dataset_revision="b" * 64,
        size="small",
        coverage="lm_only",
        method="gradient",
        engine="layerwise",
        quant_pair="wint4_aint8",
        quant_granularity=granularity,
        algorithm="max",
        scales="private",
        dtype="float32",
        state="done",
        reason=None,
        config=json.dumps(composed),
        versions='{"modelopt": "0.47.0"}',
        created_at=datetime(2026, 1, created, tzinfo=UTC),
        run_id="r",
    )
    common = {
        "cell_id": row.cell_id,
        "n_predictions": 10,
        "n_samples": 2,
        "weight_elements": 1600,
        "effective_bits": 4.0,
    }
    rows: list[dict[str, Any]] = [
        {
            **common,
            "group": "m.q_proj",
            "modules": ["m.q_proj", "m.k_proj"],
            "score": score,
            "sensitivity": score / 10,
            "predicted_kl": score / 20,
        }
        | {"sample_scores": [score / 4, score * 3 / 4]},
        {**common, "group": "m.o_proj", "modules": ["m.o_proj"]},
    ]
    return FinishedTrial(trial=replace(row, **trial), scores=pa.Table.from_pylist(rows, schema=SCORES_SCHEMA))


def tree(root: Path) -> dict[str, tuple[bytes, int]]:
    """Every file under root with its bytes and modification time."""
    return {
        str(path.relative_to(root)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def contents(root: Path) -> dict[str, bytes]:
    return {name: data for name, (data, _) in tree(root).items()}


GRID = [finished("default"), finished("w_group64", score=2.0)]


def test_every_folder_has_its_files_and_every_level_an_index(tmp_path: Path) -> None:
    result = publish(GRID, tmp_path)
    assert result.written[0] == str(tmp_path / FOLDER)
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == sorted(FILES)
    pages = [
        "tiny/layer-analysis",
        "tiny/layer-analysis/weight-int4-act-int8",
        "tiny/layer-analysis/weight-int4-act-int8/default",
    ]
    assert all((tmp_path / page / "README.md").is_file() for page in pages)
    assert not list(tmp_path.rglob(".*"))


def test_the_manifest_sums_every_other_file(tmp_path: Path) -> None:
    publish(GRID, tmp_path)
    manifest = json.loads((tmp_path / FOLDER / "quant-manifest.json").read_text())
    assert sorted(manifest["files"]) == sorted(set(FILES) - {"quant-manifest.json"})
    for name, known in manifest["files"].items():
        data = (tmp_path / FOLDER / name).read_bytes()
        assert known == {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    assert (manifest["cell_id"], manifest["model_revision"]) == ("cell-default-4.0", "a" * 64)
    assert manifest["served_as"]["vllm_sm90"] == {
        "status": "none",
        "runs_as": None,
        "reader_name": None,
    }  # wint4_aint8 with static inputs
    assert len(manifest["served_as"]) == 5


def test_published_scores_and_config_read_with_stock_tools(tmp_path: Path) -> None:
    publish(GRID, tmp_path)
    scores = pq.read_table(tmp_path / FOLDER / "scores.parquet")
    kept = [name for name in SCORES_SCHEMA.names if not name.startswith(("sample_", "projections"))]
    assert scores.column_names == kept
    assert "score_image" in scores.column_names
    assert scores["score"].to_pylist() == [4.0, None]
    assert list(yaml.safe_load((tmp_path / FOLDER / "composed-config.yaml").read_text())) == [
        "model",
        "quant_pair",
        "quant_granularity",
    ]


def test_whole_number_keys_of_the_config_are_numbers_again(tmp_path: Path) -> None:
    blocks = {"*weight_quantizer": {"block_sizes": {"-1": 64, "type": "dynamic"}}}
    publish([finished(config={"quant_granularity": {"quant_cfg_overrides": blocks}})], tmp_path)
    config = yaml.safe_load((tmp_path / FOLDER / "composed-config.yaml").read_text())
    found = config["quant_granularity"]["quant_cfg_overrides"]["*weight_quantizer"]["block_sizes"]
    assert found == {-1: 64, "type": "dynamic"}


def test_the_state_loads_without_pickled_code_and_has_modelopts_layout(tmp_path: Path) -> None:
    publish(GRID, tmp_path)
    state = torch.load(tmp_path / FOLDER / "autoquant-state.pt", weights_only=True)
    assert list(state["candidate_stats"]) == [
        "m.q_proj.quant_recipe"
    ]  # the group never called has no score to search with
    stats = state["candidate_stats"]["m.q_proj.quant_recipe"]
    assert stats["formats"] == ["wint4_aint8.default", "NONE"]
    assert stats["scores"] == [4.0, 0.0]
    assert stats["costs"] == [400.0, 1600.0]  # 1600 weights at 4 of 16 bits


def test_publishing_twice_touches_nothing(tmp_path: Path) -> None:
    publish(GRID, tmp_path)
    before = tree(tmp_path)
    result = publish(GRID, tmp_path)
    assert tree(tmp_path) == before
    assert (result.written, result.pages, len(result.unchanged)) == ((), (), 2)


def test_two_roots_get_equal_bytes(tmp_path: Path) -> None:
    publish(GRID, tmp_path / "a")
    publish(reversed(GRID), tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_later_run_adds_and_the_index_lists_earlier_ones(tmp_path: Path) -> None:
    publish(GRID[:1], tmp_path)
    publish(GRID[1:], tmp_path)
    publish(GRID, tmp_path / "at-once")
    page = "tiny/layer-analysis/README.md"
    assert (tmp_path / page).read_text() == (tmp_path / "at-once" / page).read_text()


def test_a_damaged_or_missing_file_is_put_right(tmp_path: Path) -> None:
    publish(GRID, tmp_path)
    before = contents(tmp_path)
    (tmp_path / FOLDER / "per-layer-sensitivity.md").write_text("edited")
    (tmp_path / FOLDER.replace("default", "w_group64") / "autoquant-state.pt").unlink()  # as in a fresh clone
    assert len(publish(GRID, tmp_path).written) == 2
    assert contents(tmp_path) == before


def test_other_content_is_refused_and_all_of_it_listed(tmp_path: Path) -> None:
    publish(GRID, tmp_path)
    before = tree(tmp_path)
    other = [
        finished("default", score=5.0, model_revision="c" * 64),
        finished("w_group64", score=6.0, dataset_revision="d" * 64),
        finished("new"),
    ]
    with pytest.raises(SweepError) as refusal:
        publish(other, tmp_path)
    assert tree(tmp_path) == before
    for part in (
        "model_revision aaa",
        "ccc",
        "dataset_revision bbb",
        "ddd",
        "output_layout.overwrite=true",
        "--overwrite",
    ):
        assert part in str(refusal.value)
    assert len(publish(other, tmp_path, overwrite=True).written) == 3
    publish(other, tmp_path / "fresh")
    assert contents(tmp_path / "fresh" / "tiny") == contents(tmp_path / "tiny")


def test_settings_that_are_no_part_of_the_name_are_named_in_the_refusal(tmp_path: Path) -> None:
    publish([finished()], tmp_path)
    with pytest.raises(SweepError, match=r"sensitivity\.lm_head None there, True here"):
        publish([finished(score=5.0, config={"sensitivity": {"lm_head": True}})], tmp_path)


def test_two_trials_for_one_folder_are_refused_and_with_overwrite_the_later_wins(tmp_path: Path) -> None:
    rivals = [finished(score=1.0, created=2, engine="modelopt"), finished(score=2.0, created=1)]
    with pytest.raises(SweepError, match="engine modelopt there, layerwise here"):
        publish(rivals, tmp_path)
    assert not list(tmp_path.iterdir())
    publish(rivals, tmp_path, overwrite=True)
    assert pq.read_table(tmp_path / FOLDER / "scores.parquet")["score"][0].as_py() == 1.0


def test_algorithm_and_scales_have_folders_of_their_own_where_they_are_not_the_usual_ones() -> None:
    names = [
        folder_of(finished(algorithm=algorithm, scales=scales).trial)[-1]
        for algorithm in ("max", "awq_lite")
        for scales in ("private", "fused")
    ]
    usual = "lm_only-glosses-small-gradient"
    assert names == [usual, f"{usual}-fused", f"{usual}-awq_lite", f"{usual}-awq_lite-fused"]


def test_files_of_others_are_not_deleted(tmp_path: Path) -> None:
    publish([finished()], tmp_path)
    notes = tmp_path / FOLDER / "notes.txt"
    notes.write_text("mine")
    assert publish([finished()], tmp_path).written == ()
    with pytest.raises(SweepError, match=r"notes\.txt"):
        publish([finished(versions='{"modelopt": "0.48.0"}')], tmp_path)
    page = tmp_path / "tiny/layer-analysis/README.md"
    notes.unlink()
    page.write_text("# My own page\n")
    with pytest.raises(SweepError, match="written by someone else"):
        publish([finished("w_group64")], tmp_path)
    assert page.read_text() == "# My own page\n"


BESIDE = ["../.old-mine/scores.parquet", "../.new-mine/notes.txt"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "nested/thesis.txt", "link", *BESIDE])
def test_files_of_others_are_never_replaced(tmp_path: Path, name: str, overwrite: bool) -> None:
    """Beside the reports or in hidden directories called as ours are, told to overwrite or not."""
    publish([finished()], tmp_path)
    path = tmp_path / FOLDER / name
    path.parent.mkdir(exist_ok=True)
    path.symlink_to("nothing") if name == "link" else path.write_text("mine")
    if ".old-mine" in name:
        (path.parent / "notes.txt").write_text("mine")
    before = seen(tmp_path)
    if name.startswith("../"):
        publish([finished("w_group64")], tmp_path, overwrite=overwrite)
    else:
        with pytest.raises(SweepError, match=r"holds files of someone else: [\w.]+\n(.*\n)?.*move them away"):
            publish([finished(score=9.0)], tmp_path, overwrite=overwrite)
        assert seen(tmp_path) == before
    others = {found: what for found, what in before.items() if "mine" in found or found.endswith(name)}
    assert others
    assert others.items() <= seen(tmp_path).items()


@pytest.mark.parametrize("prefix", [".new-", ".old-"])
def test_a_directory_of_others_where_a_folder_is_made_is_in_the_way(tmp_path: Path, prefix: str) -> None:
    publish([finished()], tmp_path)
    folder = tmp_path / FOLDER
    beside = folder.with_name(prefix + folder.name)
    beside.mkdir()
    (beside / "thesis.txt").write_text("mine")
    before = seen(tmp_path)
    with pytest.raises(SweepError, match="was made by someone else"):
        publish([finished(score=9.0)], tmp_path, overwrite=True)
    assert seen(tmp_path) == before


def test_a_page_of_others_is_not_replaced_when_told_to_overwrite(tmp_path: Path) -> None:
    publish([finished()], tmp_path)
    page = tmp_path / "tiny/layer-analysis/README.md"
    page.write_text("# My own page\n")
    with pytest.raises(SweepError, match="written by someone else"):
        publish([finished(score=9.0)], tmp_path, overwrite=True)
    assert page.read_text() == "# My own page\n"


def test_index_pages_follow_folders_that_were_taken_away(tmp_path: Path) -> None:
    publish(GRID, tmp_path)
    gone = tmp_path / "tiny/layer-analysis/weight-int4-act-int8/w_group64"
    for path in (gone / "lm_only-glosses-small-gradient").iterdir():
        path.unlink()
    publish(GRID[:1], tmp_path)
    assert not (gone / "README.md").exists()
    assert "w_group64" not in (tmp_path / "tiny/layer-analysis/README.md").read_text()


@pytest.mark.parametrize("call", range(6))
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_at_any_rename_is_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, when: str
) -> None:
    publish(GRID, tmp_path)
    newer = [finished("default", score=8.0), finished("w_group64", score=9.0), finished("new")]
    publish(newer, tmp_path / "whole")
    calls, rename = iter(range(100)), os.rename

    def crash(source: Path, target: Path) -> None:
        doomed = next(calls) == call
        if doomed and when == "before":
            raise KeyboardInterrupt
        rename(source, target)
        if doomed:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sweep.report.publish.os.rename", crash)
        if call < 5:  # two replaced folders of two renames, one new folder of one
            with pytest.raises(KeyboardInterrupt):
                publish(newer, tmp_path, overwrite=True)
        else:
            publish(newer, tmp_path, overwrite=True)
    for folder in tmp_path.glob("tiny/*/*/*/lm_only*"):
        manifest = json.loads((folder / "quant-manifest.json").read_text())  # what is visible is whole
        assert all(
            hashlib.sha256((folder / name).read_bytes()).hexdigest() == known["sha256"]
            for name, known in manifest["files"].items()
        )
    publish(newer, tmp_path, overwrite=True)
    assert contents(tmp_path / "tiny") == contents(tmp_path / "whole" / "tiny")
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize(
    "manifest",
    ["[]", '"x"', '{"layout_version": "1"}', '{"layout_version": 1, "summary": null, "cell_id": "c"}', "[" * 100_000],
)
def test_a_manifest_that_is_none_is_written_again(manifest: str, tmp_path: Path) -> None:
    publish(GRID, tmp_path / "whole")
    publish(GRID, tmp_path / "models")
    (tmp_path / "models" / FOLDER / "quant-manifest.json").write_text(manifest)
    check_ahead(str(tmp_path / "models"), {FOLDER: finished().trial})
    publish(GRID, tmp_path / "models")
    assert contents(tmp_path / "models" / "tiny") == contents(tmp_path / "whole" / "tiny")


def test_files_of_someone_else_beside_the_tree_stay_and_are_no_hindrance(tmp_path: Path) -> None:
    publish(GRID, tmp_path)
    for directory in (tmp_path, tmp_path / "tiny" / "layer-analysis"):
        (directory / "notes.txt").write_text("mine")
    assert publish(GRID, tmp_path).written == ()
    assert len(list(tmp_path.rglob("notes.txt"))) == 2


def test_a_full_disk_says_so_and_leaves_a_tree_that_the_next_call_completes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(GRID[:1], tmp_path)
    before = contents(tmp_path)
    n_written, write = iter(range(100)), Files.write

    def full(files: Files, path: str, data: bytes) -> None:
        if next(n_written) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(files, path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Files, "write", full)
        with pytest.raises(StoreFailed, match=f"^Cannot publish into {tmp_path}: No space left on device.$"):
            publish(GRID, tmp_path)
    assert {name: data for name, data in contents(tmp_path).items() if "/." not in name} == before
    publish(GRID, tmp_path)
    publish(GRID, tmp_path / "whole")
    assert contents(tmp_path / "tiny") == contents(tmp_path / "whole" / "tiny")


def test_a_crash_while_writing_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish([finished()], tmp_path)
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        patch.setattr("sweep.report.publish.sync", lambda _: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            publish([finished(score=9.0)], tmp_path, overwrite=True)
    result = publish([finished()], tmp_path)
    assert contents(tmp_path) == before
    assert len(result.removed) == 1


@pytest.mark.parametrize("name", ["..", "a..b", ".hidden", "a/b", "Über", "", "UPPER"])
def test_names_that_are_no_path_part_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SweepError, match="cannot be part of a published path"):
        publish([finished(model=name)], tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_a_link_out_of_the_tree_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "models/tiny/layer-analysis").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "models/tiny/layer-analysis/weight-int4-act-int8").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SweepError, match="is a link"):
        publish([finished()], tmp_path / "models")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_an_unfinished_trial_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="is running"):
        publish([finished(state="running")], tmp_path)


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("")
    with pytest.raises(SweepError, match="Cannot publish into"):
        publish([finished()], tmp_path / "models")


def test_a_newer_tree_is_refused(tmp_path: Path) -> None:
    publish([finished()], tmp_path)
    path = tmp_path / FOLDER / "quant-manifest.json"
    newer = json.dumps(json.loads(path.read_text()) | {"layout_version": 99, "summary": "of another kind"})
    path.write_text(newer)
    with pytest.raises(SweepError, match="newer version"):
        publish([finished()], tmp_path)
    assert path.read_text() == newer


def test_nothing_secret_and_no_local_place_is_published(tmp_path: Path) -> None:
    publish(GRID, tmp_path)
    for name, data in contents(tmp_path).items():
        assert b"/secret" not in data, name
        assert str(tmp_path).encode() not in data, name


def test_a_url_gets_the_same_files(tmp_path: Path) -> None:
    publish(GRID, tmp_path)
    memory = fsspec.filesystem("memory")
    url = "memory://publish-test"
    try:
        assert publish(GRID, url).written[0] == f"{url}/{FOLDER}"
        there = {name.removeprefix("/publish-test/"): memory.cat_file(name) for name in memory.find("/publish-test")}
        assert there == contents(tmp_path)
        again = publish(GRID, url)
        assert (again.written, again.pages, len(again.unchanged)) == ((), (), 2)
        memory.rm_file(f"/publish-test/{FOLDER}/quant-manifest.json")  # as after a crash: the folder is not there
        assert len(publish(GRID, url).written) == 1
        with pytest.raises(SweepError, match="holds other content"):
            publish([finished(score=9.0)], url)
        assert len(publish([finished(score=9.0)], url, overwrite=True).written) == 1
    finally:
        memory.rm("/publish-test", recursive=True)


def test_many_folders_are_made_in_several_processes_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = [finished("default"), finished("w_group64"), finished("w_group128")]
    publish(some, tmp_path / "one")
    monkeypatch.setattr("sweep.report.publish._FOLDERS_A_PROCESS", 1)
    monkeypatch.setattr("sweep.report.publish.n_cores", lambda: 2)
    assert len(publish(some, tmp_path / "several").written) == 3
    assert contents(tmp_path / "one") == contents(tmp_path / "several")
