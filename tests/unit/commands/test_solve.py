"""`sweep solve` as a user types it, on a made-up store."""

import io
import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from sweep.cli import main
from sweep.commands.solve import Tables, show
from sweep.formats.mixed import MixedRecipe
from sweep.mixed_precision.summary import Figures
from sweep.store.store import Store
from tests.scored import FP8, INT4, INT8, add, store_at


def shown(document: dict[str, Any]) -> list[str]:
    """The lines for the screen, of the document that --json prints."""
    console = Console(file=io.StringIO(), width=120)
    show(console, msgspec.convert(document, Figures), msgspec.convert(document, Tables))
    return console.file.getvalue().splitlines()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.chdir(tmp_path)
    return store_at(tmp_path / "store")


def solve(store: Store, *words: str) -> int:
    return main(["solve", *words, f"store.uri={store.uri}"])


def solved(store: Store, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert solve(store, *words, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_a_recipe_file_is_written_and_its_sizes_are_said(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert solve(store, "--bits", "5.2875") == 0
    path = Path("outputs/recipes/qwen3_vl_tiny-vllm_sm90-5_2875bits.yaml")
    made = MixedRecipe.from_yaml(path.read_text(encoding="utf-8"), str(path))
    assert (made.store, made.dtype) == (str(Path(store.uri).absolute()), "float32")
    assert made.samples is not None
    assert (made.samples["kind"], made.samples["max_tokens"]) == ("bundled", 512)
    assert [choice.format for choice in made.groups] == [INT8, INT4, INT4, INT4, FP8]
    assert (made.model, made.model_revision, made.dataset_revision, made.size, made.target) == (
        "qwen3_vl_tiny",
        "r1",
        "d-small",
        "small",
        "vllm_sm90",
    )
    out = capsys.readouterr().out
    # 25,000 weights: 52,875 bits, and 16 for each of the other 15,000
    bits = "5.287 bits a weight of the covered layers, 11.715 of the whole checkpoint"
    assert f"{bits}\nfrom 3 of 3 recipes scored on wordnet_glosses/small" in out
    # 52,875 bits; 8,000 embeddings and 7,000 others in 16 bits
    assert (
        "3.661e-05 GB of weights; lm_head: tied to the embeddings\n"
        "   6.609e-06 GB  covered layers\n     1.6e-05 GB  embeddings, in 16 bits\n" in out
    )
    assert (
        "     1.4e-05 GB  other weights, in 16 bits\n"
        "predicted KL 0.0645 nats per prediction (90 % interval over samples: 0.0323 to 0.0968)\n" in out
    )
    assert f"     3 layer groups: {INT4}\n" in out
    assert "most bits: m.layers.0.attn.q/k_proj, m.merger.fc\n" in out


PARTS = {"image": (0.1, 0.1, 0.8, 0.1, 0.1), "answer": (0.0, 0.0, 0.1, 0.0, 0.0), "prompt": (0.9, 0.9, 0.1, 0.9, 0.9)}


def test_the_kinds_of_token_that_are_named_decide_and_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By all tokens layer 0's attention gets 8 bits, see test_recipe; most of layer 1's score is at images."""
    monkeypatch.chdir(tmp_path)
    store = store_at(tmp_path / "store", by_kind=PARTS)
    assert solved(store, capsys, "--bits", "4.5125")["most_bits"] == ["m.layers.0.attn.q/k_proj"]
    document = solved(store, capsys, "--bits", "4.5125", "--tokens", "answer,image", "--rank", "--front", "3")
    assert document["tokens"] == ["image", "answer"]
    assert document["most_bits"] == ["m.layers.1.attn.q/k_proj"]
    kl = 0.04 * 0.1 + 0.01 * 0.1 + 0.003 * 0.9 + 0.03 * 0.1 + 0.05 * 0.1
    assert document["predicted_kl"] == pytest.approx(kl)
    assert document["front"][0]["predicted_kl"] == pytest.approx(kl + 0.017 * 0.9)
    assert document["rank"][0]["predicted_kl"] == pytest.approx(0.005)
    low, high = document["predicted_kl_interval"]  # samples with 1/4 and 3/4 of the score, 10 and 40 predictions
    assert (low, high) == pytest.approx((kl * 15 / 16, kl * 5 / 4))
    assert "  counting errors at image, answer tokens alone" in shown(document)
    path = Path("outputs/recipes/qwen3_vl_tiny-vllm_sm90-4_5125bits-image-answer.yaml")
    assert (document["recipe"], str(path)) == (str(path), document["recipe"])
    text = path.read_text(encoding="utf-8")
    assert "\ntokens:\n- image\n- answer\n" in text
    made = MixedRecipe.from_yaml(text, str(path))
    assert made.tokens == ("image", "answer")
    assert made.to_yaml() == text


def test_the_next_command_validates_on_the_data_sets_that_were_typed(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    assert solve(store, "--bits", "5", "validation.dataset=[chat,scenes]", "validation.path=[my chats.jsonl,null]") == 0
    words = " 'validation.dataset=[chat,scenes]' 'validation.path=[my chats.jsonl,null]'\n  sweep export "
    assert words in capsys.readouterr().out


def test_the_next_commands_can_be_typed_as_they_are_printed(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spaces are quoted, and a narrow screen breaks no command."""
    monkeypatch.setenv("COLUMNS", "40")
    path = "recipes of mine/mix of two formats.yaml"
    assert solve(store, "--bits", "5", "--out", path) == 0
    recipe = shlex.quote(path)
    exported = f"sweep export {recipe} --format compressed-tensors --out DIR"
    assert capsys.readouterr().out.endswith(f"\nNext:\n  sweep validate {recipe}\n  {exported}\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tokens", "images"), "Did you mean 'image'? Choose one of: answer, first_token, image, prompt."),
        (("--tokens", "image,"), "Unknown kind of token in --tokens ''"),
        (("--tokens", "first_token"), "no token of kind first_token. Kinds there: image, prompt, answer."),
        (("--tokens", "image", "--recapture", "1"), "--recapture scores again by all tokens"),
    ],
)
def test_kinds_of_token_that_cannot_decide_are_refused(
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    store = store_at(tmp_path / "store", by_kind=PARTS)
    assert solve(store, "--bits", "5", *words) == 2
    assert message in capsys.readouterr().err
    assert not Path("outputs").exists()


def interacting_store(path: Path) -> Store:
    """One format by projections; the errors of the third group undo those of all others."""
    store = Store(str(path))
    fisher = {"draws": 1, "versions": '{"score": "1+fisher.1"}'}
    overrides = ("sensitivity.method=fisher", "sensitivity.draws=1")
    add(store, INT4, [0.01, 0.01, 0.012, 0.01, 0.02], *overrides, signs=[1, 1, -1, 1, 1], **fisher)
    return store


def test_a_mix_is_chosen_with_the_interactions_of_its_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but one group of 1,000 weights fit: the one that stays in 16 bits is not the one that undoes others' errors.

    sqrt(KL): 0.1, 0.1, -0.1095, 0.1, 0.1414. In the choice interactions count 0.75.
    """
    monkeypatch.chdir(tmp_path)
    store = interacting_store(tmp_path / "store")
    fits = str((9_000 * 4.125 + 1_000 * 16) / 10_000)
    figures = solved(store, capsys, "--bits", fits)
    assert figures["joint"]["weight"] == pytest.approx(0.75)
    recipe = MixedRecipe.from_yaml(Path(figures["recipe"]).read_text(encoding="utf-8"), "recipe")
    assert [choice.format for choice in recipe.groups] == [None, INT4, INT4, INT4, INT4]
    together = (0.1 - math.sqrt(0.012) + 0.1 + math.sqrt(0.02)) ** 2
    assert figures["predicted_kl"] == pytest.approx(together, rel=1e-5)
    assert (recipe.joint_kl, recipe.predicted_kl) == (figures["predicted_kl"], figures["predicted_kl"])
    assert figures["joint"]["linear_kl"] == pytest.approx(0.052)
    assert 0 <= figures["joint"]["gap"] <= 1
    low, high = figures["predicted_kl_interval"]
    assert low <= figures["predicted_kl"] <= high
    assert "as the sum of each layer group alone; in the choice interactions count   75%, as" in " ".join(
        shown(figures)
    )


def test_a_format_that_measured_nothing_leaves_interactions_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    store = interacting_store(tmp_path / "store")
    overrides, versions = ("sensitivity.method=fisher", "sensitivity.draws=1"), '{"score": "1+fisher.1"}'
    add(store, FP8, [None] * 5, *overrides, minute=1, signs=[1] * 5, draws=1, versions=versions)
    figures = solved(store, capsys, "--bits", "4.125")
    assert (figures["formats"], figures["joint"]["weight"]) == ({INT4: 5}, pytest.approx(0.75))


def test_without_interactions_a_mix_has_the_sum_of_its_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    store = interacting_store(tmp_path / "store")
    fits = str((9_000 * 4.125 + 1_000 * 16) / 10_000)
    figures = solved(store, capsys, "--bits", fits, "--linear")
    text = Path(figures["recipe"]).read_text(encoding="utf-8")
    recipe = MixedRecipe.from_yaml(text, "recipe")
    assert [choice.format for choice in recipe.groups] == [INT4, INT4, None, INT4, INT4]
    assert (figures["joint"], recipe.joint_kl, "joint_kl" in text) == (None, None, False)
    assert figures["predicted_kl"] == pytest.approx(0.05)


def test_the_front_and_its_formats_count_interactions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    figures = solved(interacting_store(tmp_path / "store"), capsys, "--front", "6")
    everywhere = (0.3 + math.sqrt(0.02) - math.sqrt(0.012)) ** 2
    assert figures["uniform"][0]["predicted_kl"] == pytest.approx(everywhere, rel=1e-5)
    kl = [point["predicted_kl"] for point in figures["front"]]
    assert kl == sorted(kl, reverse=True)
    assert (kl[0], kl[-1]) == (pytest.approx(everywhere, rel=1e-5), 0.0)


def test_kinds_of_token_are_summed_without_interactions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store(str(tmp_path / "store"))
    parts = {"image": (0.5,) * 5, "prompt": (0.5,) * 5}
    fisher = ("sensitivity.method=fisher", "sensitivity.draws=1")
    versions = '{"score": "1+fisher.1"}'
    add(store, INT4, [0.01] * 5, *fisher, signs=[1] * 5, by_kind=parts, draws=1, versions=versions)
    figures = solved(store, capsys, "--bits", "4.125", "--tokens", "image")
    assert (figures["joint"], figures["predicted_kl"]) == (None, pytest.approx(0.025))


def test_projections_are_not_mixed_with_scores_around_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, versions = Store(str(tmp_path)), '{"score": "1+fisher.1"}'
    for minute, recipe in enumerate((INT4, FP8)):
        add(store, recipe, [0.1] * 5, "sensitivity.method=fisher", minute=minute, draws=8, versions=versions)
    assert solve(store, "--bits", "8", "--recapture", "1") == 2
    assert "Type sensitivity.method=gradient, or leave --recapture out" in capsys.readouterr().err
    assert solve(store, "--bits", "8", "--out", str(tmp_path / "mix.yaml")) == 0


def test_a_store_that_does_not_know_kinds_of_token_is_refused(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert solve(store, "--bits", "5", "--tokens", "image") == 2
    assert "not known by kind of token: an older program scored it" in capsys.readouterr().err


def test_the_front_goes_through_the_recipes_sizes_to_a_kl_of_zero(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    document = solved(store, capsys, "--bits", "5", "--front", "5", "--out", "r/mix.yaml")
    bits = [point["effective_bits"] for point in document["front"]]
    kls = [point["predicted_kl"] for point in document["front"]]
    assert (bits[0], kls[0], bits[-1], kls[-1]) == (4.125, pytest.approx(0.15), 16.0, 0.0)
    assert sorted(kls, reverse=True) == kls
    uniform = {point["format"]: point["predicted_kl"] for point in document["uniform"]}
    assert uniform == {INT4: pytest.approx(0.15), INT8: pytest.approx(0.012), FP8: pytest.approx(0.0155)}
    assert document["picture"] == "r/mix.svg"
    assert Path("r/mix.svg").read_text(encoding="utf-8").startswith("<?xml")
    table = "\n".join(shown(document))
    assert table.count("best mix") == len(bits)


def test_ranks_by_predicted_kl_and_by_what_a_byte_saves(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a budget those of the smallest recipe; INT4 saves 11.875 bits a weight."""
    document = solved(store, capsys, "--rank")
    assert document["effective_bits"] == 4.125
    groups = {row["group"]: row for row in document["rank"]}
    assert [row["predicted_kl"] for row in document["rank"]] == [0.05, 0.04, 0.03, 0.02, 0.01]
    first = groups["m.layers.0.attn.q_proj"]
    assert first["bytes_saved"] == 1000 * 11.875 / 8
    assert first["predicted_kl_per_gb_saved"] == pytest.approx(0.04 / (1000 * 11.875 / 8 / 1e9))
    ranks = [line.split() for line in shown(document) if "wint4_afp16/default" in line][1:]
    assert [(words[0], words[-1]) for words in ranks] == [("1", "2"), ("2", "1"), ("3", "4"), ("4", "3"), ("5", "5")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "A budget is --bits B"),
        (("--bits", "2"), "--bits 2 is too little. The nearest that works: --bits 4.125"),
        (("--bits", "5", "--pin", "down_proj"), "--pin 'down_proj' is not PATTERN=FORMAT"),
        (("--bits", "5", "--pin", "x*=16"), "'x*' matches no layer group"),
        (("--bits", "5", "--exclude", "x*"), "'x*' matches no layer group"),
        (("--bits", "5", "target=vllm_sm9"), "vllm_sm90"),
        (("--bits", "5", "quant_pair=wfp4_afp4"), "It has quant_pair="),
        (("--bits", "5", "--front", "1"), "--front 1"),
    ],
)
def test_wrong_input_is_one_message_and_writes_nothing(
    words: tuple[str, ...], message: str, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    assert solve(store, *words) == 2
    said = capsys.readouterr().err
    assert said.startswith("sweep solve: ")
    assert message in said
    assert not Path("outputs").exists()


def test_a_target_that_runs_nothing_that_was_scored_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = store_at(tmp_path / "store", {})
    add(store, "wfp8_aint8/default", [0.1] * 5)
    assert solve(store, "--bits", "8") == 2
    assert (
        "target=vllm_sm90 runs none of 1 scored recipe as it is (wfp8_aint8/default: none)" in capsys.readouterr().err
    )


def test_a_place_that_cannot_be_written_is_named(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("")
    assert solve(store, "--bits", "5", "--out", "file/mix.yaml") == 2
    assert "Give another place with --out" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mix.yaml", "mix.svg"])
def test_a_file_of_someone_else_is_not_replaced(store: Store, capsys: pytest.CaptureFixture[str], name: str) -> None:
    Path(name).write_text("my notes on recipe_version: 1")
    assert solve(store, "--bits", "5", "--front", "4", "--out", "mix.yaml") == 2
    place = Path(name).absolute()
    said = capsys.readouterr().err
    assert f"{place} is not what this command writes there, and stays. Type mv -n {place} {place}.old." in said
    assert Path(name).read_text() == "my notes on recipe_version: 1"
    assert {path.name for path in Path().glob("mix.*")} == {name}
    Path(name).unlink()
    for _ in range(2):  # its own it replaces
        assert solve(store, "--bits", "5", "--front", "4", "--out", "mix.yaml") == 0


def test_a_link_to_a_recipe_stays_a_link_and_no_device_is_replaced(store: Store) -> None:
    Path("there").mkdir()
    Path("link.yaml").symlink_to("there/mix.yaml")
    os.mkfifo("pipe.yaml")
    assert solve(store, "--bits", "5", "--out", "pipe.yaml") == 2
    assert solve(store, "--bits", "5", "--out", "link.yaml") == 2  # it leads nowhere yet
    assert solve(store, "--bits", "5", "--out", "there/mix.yaml") == 0
    assert solve(store, "--bits", "6", "--out", "link.yaml") == 0
    assert Path("link.yaml").is_symlink()
    assert Path("pipe.yaml").is_fifo()
    assert MixedRecipe.from_yaml(Path("there/mix.yaml").read_text(), "mix").name.endswith("6bits")


def test_solving_loads_nothing_heavy(store: Store) -> None:
    """Presets are on disk once `sweep run` has planned; here an earlier call has put them there."""
    assert solve(store, "--bits", "5") == 0
    code = "import sys\nfrom sweep.cli import main\n"
    code += f"assert main(['solve', '--gb', '0.00004', 'store.uri={store.uri}']) == 0\n"
    code += (
        "print([name for name in ('torch', 'ray', 'modelopt', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_equal_stores_give_equal_files(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for out in ("a.yaml", "b.yaml"):
        solved(store, capsys, "--bits", "5", "--front", "4", "--out", out)
        files.append((Path(out).read_bytes(), Path(out).with_suffix(".svg").read_bytes()))
    assert files[0] == files[1]
