"""What a sweep does not cover of a model is said by doctor, run, solve and reports, before and after scoring."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sweep.cli import main
from sweep.commands.run import say_grid, say_results
from sweep.config.compose import expand
from sweep.plan.trials import plan_sweep
from sweep.run.session import Session
from sweep.store.records import RunRecord
from sweep.store.store import Store
from tests.models import EXPERTS, overrides_of, place_at
from tests.scored import INT4, store_at

# The 10,000 weights of tests/scored.py are linears; experts are 25,000 of 50,000 weights.
MOE = {
    "parameters": 50_000,
    "embeddings": 8_000,
    "lm_head": 5_000,
    "linears": 10_000,
    "experts": 25_000,
    "routers": 1_500,
    "vectors": 500,
}
COVERS = (
    "covers 20.0 % of 50,000 parameters; not covered: experts 50.0 % (they are not scored yet), embeddings 16.0 % "
    "(a table that is looked up), lm_head 10.0 % (sensitivity.lm_head=true covers it), routers 3.0 % (runtimes keep "
    "them in 16 bits), norms and biases 1.0 %"
)
LEFT_OUT = "not looked at: experts, 50.0 % of all weights (they are not scored yet)"
OLD = {name: MOE[name] for name in ("parameters", "embeddings", "lm_head")}


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*overrides_of(place_at(tmp_path_factory.mktemp("moe"), "qwen3_moe", **EXPERTS)), "dataset.size=small"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def doctor(capsys: pytest.CaptureFixture[str], *overrides: str, code: int) -> dict[str, tuple[str, str]]:
    assert main(["doctor", "--json", *overrides]) == code
    return {each["subject"]: (each["verdict"], each["text"]) for each in json.loads(capsys.readouterr().out)}


def test_doctor_warns_of_experts(moe: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    verdict, text = doctor(capsys, *moe, code=0)["coverage"]
    assert verdict == "warning"
    assert text.startswith("model, lm_only: covers 29.8 % of 329,472 parameters; not covered: experts 29.8 % ")
    assert "routers 0.3 % (runtimes keep them in 16 bits)" in text


def test_doctor_has_nothing_to_warn_of_where_all_linears_are_covered(capsys: pytest.CaptureFixture[str]) -> None:
    verdict, text = doctor(capsys, "sensitivity.coverage=all_layers", "dataset.size=small", code=0)["coverage"]
    assert (verdict, "covers 73.8 % of 4.8 M parameters" in text) == ("ok", True)


def test_gpt2_is_refused_by_doctor_and_run_before_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = overrides_of(place_at(tmp_path, "gpt2", n_captions=16))
    found = doctor(capsys, *own, code=2)
    assert "its linears are transformers' Conv1D" in found["grid"][1]
    assert "coverage" not in found
    monkeypatch.delattr("sweep.run.driver.run_trials")
    assert main(["run", *own]) == 2
    assert "Conv1D (66.3 % of its weights), which is not scored" in capsys.readouterr().err


def test_run_says_it_before_scoring_and_warns_at_the_end(moe: list[str], tmp_path: Path) -> None:
    grid = expand(moe, multirun=True)
    session = Session(grid, plan_sweep(grid.points, "cpu"), Store(str(tmp_path / "store")))
    console = Console(file=io.StringIO(), width=80)
    say_grid(session, console)
    said = console.file.getvalue()
    assert "not covered: experts" in " ".join(said.split())
    console = Console(file=io.StringIO(), width=80)
    say_results(session, [], console, "reports", 0, 1.0)
    assert "model, lm_only: not looked at: experts, 29.8 % of all weights" in console.file.getvalue()


def solved(tmp_path: Path, capsys: pytest.CaptureFixture[str], elements: Mapping[str, int], *words: str) -> str:
    store = store_at(tmp_path / "store", elements=elements)
    assert main(["solve", "--bits", "5.2875", *words, f"store.uri={store.uri}"]) == 0
    return capsys.readouterr().out


def test_solve_says_bits_and_gb_of_the_covered_weights_and_of_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """10,000 weights in 5.2875 bits and 40,000 in 16: 692,875 bits, 13.8575 a weight."""
    said = solved(tmp_path, capsys, MOE)
    assert "5.287 bits a weight of the covered layers, 13.857 of the whole checkpoint\n" in said
    assert f"\n{COVERS}\n8.661e-05 GB of weights; lm_head: 16 bits\n   6.609e-06 GB  covered layers\n" in said
    assert "\n       5e-05 GB  experts, in 16 bits\n" in said


def test_solve_has_it_in_its_document_and_in_the_front(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, Any] = json.loads(solved(tmp_path, capsys, MOE, "--json", "--front", "3"))
    assert found["checkpoint_bits"] == pytest.approx(13.8575)
    assert (found["coverage"]["parameters"], found["coverage"]["covered"]) == (50_000, 10_000)
    first = found["coverage"]["not_covered"][0]
    assert first == {
        "kind": "experts",
        "name": "experts",
        "elements": 25_000,
        "share": 0.5,
        "reason": "they are not scored yet",
        "warns": True,
    }
    assert found["front"][0]["checkpoint_bits"] == pytest.approx((41_250 + 640_000) / 50_000)
    uniform = {point["format"]: point["checkpoint_bits"] for point in found["uniform"]}
    assert uniform[INT4] == found["front"][0]["checkpoint_bits"]


def test_solve_says_of_an_old_store_what_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = solved(tmp_path, capsys, OLD)
    assert "other weights 54.0 % (an earlier version did not record their kinds), embeddings 16.0 % " in said
    assert "13.857 of the whole checkpoint" in said


def test_a_run_that_knows_more_counts(tmp_path: Path) -> None:
    store = store_at(tmp_path / "store", elements=OLD)
    store.write_run("q", RunRecord(run_id="q", models={"r1": dict(MOE)}))
    store.write_run("s", RunRecord(run_id="s", models={"r1": dict(OLD)}))
    assert store.models() == {"r1": MOE}


def test_a_run_with_nothing_left_to_score_teaches_the_store_what_it_knows(moe: list[str], tmp_path: Path) -> None:
    store, grid = Store(str(tmp_path / "store")), expand(moe, multirun=True)
    plan = plan_sweep(grid.points, "cpu")
    ((revision, elements),) = plan.models.items()
    old = {name: elements[name] for name in ("parameters", "embeddings", "lm_head")}
    store.write_run("a", RunRecord(run_id="a", models={revision: old}, ended_at="2026-01-01T00:00:00+00:00"))
    for n_records in (2, 2):
        session = Session(grid, plan, store)
        session.tasks = {}
        session.end(None)
        assert store.models() == {revision: elements}
        assert len(store.runs()) == n_records


@pytest.mark.parametrize("elements", [MOE, OLD, None])
def test_published_reports_say_it(
    elements: Mapping[str, int] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = store_at(tmp_path / "store", {INT4: [0.1] * 5}, elements)
    assert main(["publish", f"store.uri={store.uri}", f"output_layout.root={tmp_path / 'models'}"]) == 0
    (report,) = tmp_path.glob("models/*/layer-analysis/*/*/*/per-layer-sensitivity.md")
    said = [report.read_text()]
    said += [page.read_text() for page in tmp_path.glob("models/**/README.md")]
    assert len(said) == 4
    document = json.loads(report.with_suffix(".json").read_text())
    assert "`lm_only`: 5 of 5 layer groups measured" in said[0]
    if elements is None:
        assert document["weights"] is None
        assert not any("covers" in text for text in said)
        return
    assert all("covers 20.0 % of 50,000 parameters" in text for text in said)
    assert document["weights"]["covered"] == 10_000
    if elements is MOE:
        assert all(COVERS in text for text in said)
        assert f"\n- **Not the whole model**: {LEFT_OUT}.\n" in said[0]
