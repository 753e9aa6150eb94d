"""`sweep recommend` on the bundled model, whose scores are in the store already.

The page, the files, and the input that is refused before anything is scored.
"""

import html as markup
import io
import json
import re
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForImageTextToText

from sweep.cli import main
from sweep.config import compose
from sweep.config.compose import expand
from sweep.core.batches import TOKEN_KINDS
from sweep.core.paths import bundled_model_dir
from sweep.formats.mixed import MixedRecipe
from sweep.mixed_precision import recipe_context
from sweep.plan import trials
from sweep.plan.model import Model
from sweep.plan.samples import samples_of
from sweep.plan.trials import plan_sweep
from sweep.store.records import SCORES_SCHEMA
from sweep.store.store import Store
from tests.exports import SERVED_WITH
from tests.foreign import PLACES, foreign, seen
from workers.model import loading
from workers.model.loading import load
from workers.service.scorer import Scorer

COMMON = ["dataset.size=small", "cluster.device=cpu", "validation.n_samples=16"]
VLLM = [
    "target=vllm_sm100",
    "quant_pair=wint4_afp16,wint8_afp16,wfp4_afp16",
    *COMMON,
]  # no inputs are quantized: figures do not hang on the last bit of a sum
TRTLLM = ["target=trtllm_sm90", "quant_pair=wfp8_afp8", *COMMON]
NAMES = ["compact", "balanced", "faithful"]
MODEL = Model(bundled_model_dir())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a store that holds all cells of both grids."""
    path = tmp_path_factory.mktemp("recommend")
    for overrides in (VLLM, TRTLLM):
        plan = plan_sweep(expand(["grid=deployable", *overrides], multirun=True).points, "cpu")
        list(Scorer(str(path / "store"), "cpu").score(list(plan.tasks.values()), next(iter(plan.plans.values()))))
    return path


def recommended(place: Path, *words: str) -> str:
    """The command's output; it must end well, and need no cluster for cells that are in the store."""
    with redirect_stdout(io.StringIO()) as said, pytest.MonkeyPatch.context() as patch:
        patch.delattr("sweep.run.driver.run_trials")
        assert (
            main(["recommend", *words, f"store.uri={place / 'store'}", f"output_layout.root={place / 'reports'}"]) == 0
        )
    return said.getvalue()


@pytest.fixture(scope="module")
def said(place: Path) -> str:
    return recommended(place, "--bits", "5", "--out", str(place / "five"), *VLLM)


@pytest.fixture(scope="module")
def out(place: Path, said: str) -> Path:
    return place / "five"


def recipe(path: Path) -> MixedRecipe:
    return MixedRecipe.from_yaml(path.read_text(), str(path))


def gb(made: MixedRecipe) -> float:
    """Of all weights, those that the recipe does not name in 16 bits."""
    covered = sum(choice.group.weight_elements for choice in made.groups)
    quantized = sum(made.bits_of(choice) * choice.group.weight_elements for choice in made.groups) / 8
    return (quantized + (MODEL.structure.parameters - covered) * 2) / 1e9


def test_the_page_has_the_picture_three_recipes_uniform_ones_and_the_line_that_serves(out: Path, said: str) -> None:
    page = (out / "README.md").read_text()
    made = {name: recipe(out / f"{name}.yaml") for name in NAMES}
    number = r"[-+\d.e]+"
    kl = rf"({number}) \(({number}) to ({number})\)"
    for name in NAMES:
        line = rf"^\| \[{name}\]\({name}.yaml\) \| (\S+) \| (\S+) \| (\S+) \| (\S+) \| {kl} \| {kl} \|"
        found = re.search(line, page, re.M)
        assert found is not None, name
        bits, whole, covered, size, predicted, *others = map(float, found.groups())
        low, high, measured, measured_low, measured_high = others
        assert (bits, size) == (
            pytest.approx(made[name].effective_bits, abs=5e-4),
            pytest.approx(gb(made[name]), rel=5e-4),
        )
        assert whole == pytest.approx(gb(made[name]) * 8e9 / MODEL.structure.parameters, abs=5e-4)
        n_covered = sum(choice.group.weight_elements for choice in made[name].groups)
        assert covered == pytest.approx(made[name].effective_bits * n_covered / 8e9, rel=5e-4)
        assert predicted == pytest.approx(made[name].predicted_kl, rel=5e-3)
        assert low < predicted < high
        assert measured_low < measured < measured_high
    assert "\n\nThe sweep covers 41.0 % of 4.8 M parameters; not covered: linears of the vision tower 32.8 % (" in page
    assert re.search(r"^Recommended: balanced, \S+ bits a weight of the covered layers, \S+ of the whole ", said, re.M)
    uniform = set(re.findall(r"^\| uniform (\S+) \|", page, re.M))
    assert {"wint8_afp16/default", "wint4_afp16/default", "wfp4_afp16/default"} < uniform
    assert "wfp4_afp16/mx" not in uniform  # the target computes it as another format
    picture = (out / "front.svg").read_text()
    assert all(
        f">{text}</text>" in picture
        for text in (*NAMES, "wint8_afp16/default", "KL, nats per prediction", "weights, GB", "recipe, measured")
    )
    assert f"```\nvllm serve {out / 'checkpoint'} {SERVED_WITH}\n```" in page
    assert "- wfp4_afp16/default: CompressedTensorsW4A4Fp4 with use_a16 (NVFP4A16) (vllm-project/vllm@" in page
    html = (out / "index.html").read_text()
    shared = "scales fused, dtype float32"
    assert re.search(rf"^# .* mixed precision under --bits \S+, {shared}$", page, re.M)
    assert re.search(rf"<title>.*, {shared}</title>", html)
    assert '<img src="front.svg"' in html
    assert all(f'<a href="{name}.yaml">{name}</a>' in html for name in NAMES)
    assert f"vllm serve {out / 'checkpoint'} {SERVED_WITH}" in markup.unescape(html)
    assert said.splitlines()[-1] == f"vllm serve {out / 'checkpoint'} {SERVED_WITH}"


def test_every_data_set_of_validation_has_its_measured_kl(place: Path) -> None:
    """Drawn scenes first, whose KL stands beside the recommended recipe, and other samples of what calibrated."""
    two = [*VLLM, "validation.dataset=scenes,wordnet_glosses", "--bits", "5", "--out", str(place / "two")]
    said = recommended(place, *two)
    document = json.loads(recommended(place, *two, "--json"))
    page = (place / "two" / "README.md").read_text()
    assert [row["dataset"] for row in document["measured"]] == ["scenes", "wordnet_glosses"] * (
        len(document["measured"]) // 2
    )
    assert "| measured KL on scenes (90 %) | measured KL on wordnet_glosses (90 %) | layer groups" in page
    for each in document["recipes"]:
        on = {row["dataset"]: row for row in document["measured"] if row["name"] == each["name"]}
        assert each["measured_kl"] == on["scenes"]["measured_kl"] != on["wordnet_glosses"]["measured_kl"]
        kl = " | ".join(rf"{row['measured_kl']:.3g} \([^|]*\)" for row in on.values()).replace("|", r"\|")
        assert re.search(rf"^\| \[{each['name']}\].* \| {kl} \|", page, re.M)
    assert " measured on scenes, " in said
    assert "warning" not in document
    assert "on other samples of what calibrated it" not in page + said


def test_measured_on_nothing_but_what_calibrated_is_said(place: Path, out: Path, said: str) -> None:
    document = json.loads(recommended(place, "--bits", "5", "--out", str(out), *VLLM, "--json"))
    assert document["warning"].startswith("Measured on other samples of what calibrated it, wordnet_glosses: ")
    assert document["warning"] in (out / "README.md").read_text()
    assert document["warning"] in said


def test_the_kinds_of_token_that_are_named_decide(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention's score is all of images here, and that of the other layers all of the prompt."""
    whole = Store.scores

    def by_kind(store: Store, cell_id: str) -> pa.Table:
        rows = whole(store, cell_id).to_pylist()
        for row in rows:
            kind = "image" if "self_attn" in row["group"] else "prompt"
            row |= {f"score_{each}": row["score"] * (each == kind) for each in TOKEN_KINDS}
            row["sample_scores_image"] = row["sample_scores"] if kind == "image" else None
        return pa.Table.from_pylist(rows, schema=SCORES_SCHEMA)

    monkeypatch.setattr(Store, "scores", by_kind)
    words = ["--bits", "6", "--out", str(place / "image"), *VLLM]
    document = json.loads(recommended(place, *words, "--tokens", "image", "--json"))
    made = recipe(place / "image" / "balanced.yaml")
    assert made.tokens == ("image",)
    assert {choice.predicted_kl > 0 for choice in made.groups if "self_attn" not in choice.group.name} == {False}
    assert document["recipes"][1]["tokens"] == ["image"]
    assert "Predicted KL counts errors at image tokens alone" in (place / "image" / "README.md").read_text()
    attention = [made.bits_of(choice) for choice in made.groups if "self_attn" in choice.group.name]
    others = [made.bits_of(choice) for choice in made.groups if "self_attn" not in choice.group.name]
    assert min(attention) >= max(others)
    assert sum(attention) / len(attention) > max(others)


def test_recipes_keep_to_their_budgets_and_to_what_the_target_runs(out: Path) -> None:
    compact, balanced, faithful = (recipe(out / f"{name}.yaml") for name in NAMES)
    assert compact.effective_bits < balanced.effective_bits <= 5 < faithful.effective_bits
    assert compact.predicted_kl > balanced.predicted_kl > faithful.predicted_kl > 0
    assert {made.target for made in (compact, balanced, faithful)} == {"vllm_sm100"}
    assert not any("mx" in label for made in (compact, balanced, faithful) for label in made.formats)


def test_the_checkpoint_in_transformers_is_as_far_from_the_original_as_the_page_says(place: Path, out: Path) -> None:
    """The KL of 16 samples that nothing was calibrated on, by plain forward passes of what was exported."""
    document = json.loads(recommended(place, "--bits", "5", "--out", str(out), *VLLM, "--json"))
    (measured,) = [row["measured_kl"] for row in document["measured"] if row["name"] == "balanced"]
    theirs: Any = AutoModelForImageTextToText.from_pretrained(out / "checkpoint", dtype=torch.float32)
    for hook in list(theirs._forward_pre_hooks.values()):
        hook(theirs, ())  # the reader decompresses before its first forward pass
    models = [load(MODEL.path, dtype=torch.float32, device="cpu"), nn.Module.float(theirs).eval()]
    total, n_predictions = 0.0, 0
    for sample in samples_of(expand(COMMON, multirun=False).points[0].dataset, MODEL, 32)[16:]:
        ids = torch.from_numpy(sample.token_ids)[None]
        with torch.no_grad():
            base, changed = (
                model(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1) for model in models
            )
        total += F.kl_div(changed, base, log_target=True, reduction="sum").item()
        n_predictions += len(base)
    assert measured == pytest.approx(total / n_predictions, rel=1e-3)


def test_the_same_command_again_finds_everything(place: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    exported = {path: path.stat().st_mtime_ns for path in (out / "checkpoint").iterdir()}
    monkeypatch.delattr("workers.model.loading.load")
    document = json.loads(recommended(place, "--bits", "5", "--out", str(out), *VLLM, "--json"))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == kept
    assert {path: path.stat().st_mtime_ns for path in (out / "checkpoint").iterdir()} == exported
    assert [each["name"] for each in document["recipes"]] == NAMES
    assert (document["page"], document["export"]) == (str(out / "index.html"), str(out / "checkpoint"))
    for each in document["recipes"]:
        assert each["measured_kl_interval"][0] < each["measured_kl"] < each["measured_kl_interval"][1]
        assert each["gb"] == pytest.approx(gb(recipe(out / f"{each['name']}.yaml")))
    assert {row["kind"] for row in document["measured"]} == {"recipe", "uniform"}


def test_one_command_composes_and_plans_once_and_loads_the_model_once(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it checks, scores, measures and exports."""
    counts: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, counted)

    count(compose, "_expand")
    count(trials._Planner, "__init__")
    count(loading, "load")
    recipe_context._loaded.cache_clear()
    recommended(place, "--bits", "6.5", "--out", str(place / "counted"), *VLLM)
    assert counts == {"_expand": 1, "__init__": 1, "load": 1}


def test_another_budget_in_the_same_place_exports_again(place: Path, said: str) -> None:
    target = place / "again"
    for gb_typed in ("0.0069", "0.0071"):
        recommended(place, "--gb", gb_typed, "--out", str(target), *VLLM)
        assert (target / "checkpoint" / "sweep_recipe.yaml").read_text() == (target / "balanced.yaml").read_text()
        assert gb(recipe(target / "balanced.yaml")) <= float(gb_typed)


def test_the_page_and_the_json_have_the_speeds_that_were_measured(place: Path) -> None:
    """Ratios by hand: 235 / 209, 7,050 / 5,870 and 65,900 / 68,800 tokens a second, 2.92 / 8.31 GB."""
    words = ["--bits", "5", "--out", str(place / "fast"), *VLLM[1:], "target=vllm_sm90"]
    said = recommended(place, *words)
    page, html = ((place / "fast" / name).read_text() for name in ("README.md", "index.html"))
    section = page.partition("\n## Speed, measured\n")[2].partition("\n## ")[0]
    assert (
        "\nvLLM 0.26 on one H100 80GB, language model of Qwen3-VL-4B's shape; measured 2026-11-25 and 26: " in section
    )
    assert "A mix lies between its formats" in section
    assert "it was not measured." in section
    assert "| unquantized | 8.31 | 209 | 5,870 | 68,800 |" in section
    assert "| wint4_afp16/default | 2.92 (0.35) | 235 (1.12) | 7,050 (1.20) | 65,900 (0.96) |" in section
    assert "| wint4_afp16/w_group64 | not measured | - | - | - |" in section
    rows = re.findall(r"^\| (\w+/\w+) \|", section, re.M)
    used = {label for name in NAMES for label in recipe(place / "fast" / f"{name}.yaml").formats}
    assert used | set(re.findall(r"^\| uniform (\S+) \|", page, re.M)) == {*rows}
    assert len({*rows}) == len(rows)
    assert "<td>wint4_afp16/default</td>" in html
    assert "tokens a second" not in said
    speeds = json.loads(recommended(place, *words, "--json"))["speeds"]
    assert (speeds["card"], speeds["runtime"], {*speeds["recipes"]}) == (
        "one H100 80GB",
        "vLLM 0.26",
        {"unquantized", *rows},
    )
    int4 = {"gb": 2.92, "decode_1": 235, "decode_32": 7050, "prefill": 65900}
    assert [speeds["recipes"][f"wint4_afp16/{name}"] for name in ("default", "w_group64")] == [int4, None]


def test_without_measured_speeds_the_page_says_so(place: Path, out: Path) -> None:
    section = (out / "README.md").read_text().partition("\n## Speed, measured\n")[2].partition("\n## ")[0]
    assert section.strip() == "No speeds were measured for this target."
    assert json.loads(recommended(place, "--bits", "5", "--out", str(out), *VLLM, "--json"))["speeds"] == {}


def test_room_for_all_in_16_bits_needs_no_quantization(place: Path) -> None:
    recommended(place, "--bits", "16", "--out", str(place / "all"), *VLLM)
    assert {choice.format for choice in recipe(place / "all" / "balanced.yaml").groups} == {None}
    assert "| balanced | 16.000 | 0 | 0 (0 to 0) | - |" in (place / "all" / "README.md").read_text()


def test_a_runtime_that_reads_modelopts_checkpoints_gets_one(place: Path) -> None:
    said = recommended(place, "--bits", "10", "--out", str(place / "trt"), *TRTLLM)
    exported = place / "trt" / "checkpoint"
    line = f"trtllm-serve {exported} --max_seq_len 4096"
    assert said.splitlines()[-1] == line
    page = (place / "trt" / "README.md").read_text()
    assert f"```\n{line}\n```" in page
    assert "sweep export compact.yaml --format modelopt-checkpoint --out compact" in page
    config = json.loads((exported / "hf_quant_config.json").read_text())["quantization"]
    labels = {choice.format for choice in recipe(place / "trt" / "balanced.yaml").groups}
    assert len(labels - {None}) > 0
    assert config["quant_algo"] in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "fp8_pb_wo", "MIXED_PRECISION")


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must exit with 2 and write nothing, on a store without scores. Returns its message."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*words: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main(["recommend", *words]) == 2
        heard, message = capsys.readouterr()
        assert not heard
        assert message.startswith("sweep recommend: ")
        assert sorted(tmp_path.rglob("*")) == before
        return message

    return run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "A budget is --bits B"),
        (["--bits", "5", "--gb", "1"], "Type one of the two."),
        (["--bits", "nan"], "Type a number above 0."),
        (
            ["--bits", "3"],
            "--bits 3 is too little. The nearest that works: --bits 4; "
            "the smallest format that may be used is wint4_afp16/w_per_out_channel, 4 bits.",
        ),
        (["--gb", "0.001"], "--gb 0.001 is too little. The nearest that works: --gb 0.00665;"),
        (["--bits", "5", "target=vllm_sm9"], "Did you mean 'vllm_sm90'?"),
        (["--bits", "5", "quant_pair=wfp8_aint8"], "runs none of the points asked for: quant_pair=wfp8_aint8"),
        (
            ["--bits", "5", "quant_pair=wfp4_afp8"],
            "target=vllm_sm100 runs none of 1 scored recipe as it is (wfp4_afp8/mx: as wfp4_afp4/mx)",
        ),
        (["--bits", "5", "dataset.size=large", "validation.n_samples=129"], "too few samples for 129 after the 512"),
        (
            ["--bits", "5", f"validation.captions_path={bundled_model_dir() / 'wordnet_glosses.txt'}"],
            "calibrated the recipe, the first is number 1",
        ),
        (["--bits", "5", "--tokens", "images"], "Did you mean 'image'?"),
        (["--bits", "5", "validation.dataset=[scenes,text]"], "Type validation.path=PATH"),
        (["--bits", "5", "--out", "/dev/null/x"], "Choose a writable place: --out"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_scored(
    words: list[str], message: str, refused: Callable[..., str]
) -> None:
    keys = {word.partition("=")[0] for word in words}
    assert message in refused(*words, *(typed for typed in VLLM if typed.partition("=")[0] not in keys))


IN_THE_WAY = {
    "checkpoint": ["a file", "a link to nothing", "a pipe", "a file that is needed", "a link that is needed"],
    "": ["a file", "a link to a file", "a link to nothing", "a manifest that climbs", "a manifest of links"],
}
IN_THE_WAY["checkpoint"] += ["weights that a reader would load", "a manifest that climbs", "a manifest that is a link"]


@pytest.mark.parametrize(("where", "what"), [(where, what) for where, some in IN_THE_WAY.items() for what in some])
def test_what_others_have_put_in_the_way_is_kept_and_named_before_anything_is_scored(
    refused: Callable[..., str], tmp_path: Path, where: str, what: str
) -> None:
    place = tmp_path / "mine" / where
    place.parent.mkdir(exist_ok=True)
    PLACES[what].make(place, tmp_path / "elsewhere")
    before = seen(tmp_path)
    message = refused("--bits", "5", *VLLM, "--out", str(tmp_path / "mine"))
    assert seen(tmp_path) == before
    assert "ive another place" in message


@pytest.mark.parametrize("name", ["README.md", "index.html", "front.svg", "balanced.yaml"])
def test_a_page_of_someone_else_is_kept(
    refused: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    others = foreign(tmp_path / "mine")
    (tmp_path / "mine" / name).write_text("# My project")
    monkeypatch.chdir(tmp_path / "mine")
    message = refused("--bits", "5", *VLLM, "--out", ".")
    page = tmp_path / "mine" / name
    assert f"{tmp_path / 'mine'} holds {name}, in the way of a recommendation." in message
    assert f"Type mv -n {page} {page}.old, or give another place with --out." in message
    assert page.read_text() == "# My project"
    assert others.items() <= seen(tmp_path / "mine").items()


def test_the_root_is_refused(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("sweep.commands.recommend.run_prepared")
    assert "is the root of a file system" in refused("--bits", "5", *VLLM, "--out", "/")


def test_everything_goes_beside_what_others_have_there(place: Path, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the working directory, through a link, and a second time."""
    others = [foreign(place / "work"), foreign(place / "work" / "checkpoint")]
    (place / "linked").symlink_to("work")
    monkeypatch.chdir(place / "work")
    for out, bits in ((".", "5"), (str(place / "linked"), "6"), (".", "6")):
        recommended(place, "--bits", bits, "--out", out, *VLLM)
        for there, directory in zip(others, (place / "work", place / "work" / "checkpoint"), strict=True):
            assert there.items() <= seen(directory).items()
        recipes = [place / "work" / name for name in ("checkpoint/sweep_recipe.yaml", "balanced.yaml")]
        assert recipes[0].read_bytes() == recipes[1].read_bytes()
    assert (place / "linked").is_symlink()


def test_a_checkpoint_that_lacks_a_file_is_exported_again(place: Path, said: str) -> None:
    """Though its recipe is the one wanted."""
    recommended(place, "--bits", "5", "--out", str(place / "lacking"), *VLLM)
    (place / "lacking" / "checkpoint" / "model.safetensors").unlink()
    recommended(place, "--bits", "5", "--out", str(place / "lacking"), *VLLM)
    assert (place / "lacking" / "checkpoint" / "model.safetensors").is_file()


def test_a_tied_head_is_scored_and_stays_in_16_bits(tmp_path: Path) -> None:
    """Its weight is no tensor of its own: an export could not quantize it, which is known before anything is scored."""
    typed = ["target=vllm_sm100", "quant_pair=wint8_afp16", "quant_granularity=w_group64", *COMMON]
    typed.append("sensitivity.lm_head=true")
    plan = plan_sweep(expand(["grid=deployable", *typed], multirun=True).points, "cpu")
    assert any(note.startswith("lm_head: scored, but exports must leave it in 16 bits") for note in plan.notes)
    list(Scorer(str(tmp_path / "store"), "cpu").score(list(plan.tasks.values()), next(iter(plan.plans.values()))))
    recommended(tmp_path, "--bits", "12", "--out", str(tmp_path / "out"), *typed)
    formats = {choice.group.name: choice.format for choice in recipe(tmp_path / "out" / "balanced.yaml").groups}
    assert formats.pop("lm_head") is None
    assert any(formats.values())
