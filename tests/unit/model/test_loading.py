"""Checkpoints through transformers: right packing, the tokenizer's own tokens, no code that runs, no random weight."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from sweep.core.coverage import coverage_of
from sweep.core.errors import SweepError
from sweep.plan.model import Model
from sweep.plan.trials import elements_of
from tests.models import random_model, random_samples, save_checkpoint
from workers.data.batches import make_plan
from workers.model import loading
from workers.model.forward import batch_to

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", sorted(loading.PACKABLE))
def test_a_packed_row_keeps_its_samples_apart(kind: str) -> None:
    """Logits of each sample in a row of 16 are those of the sample alone, and would not be if it saw its neighbours."""
    model, samples = random_model(kind), random_samples(16)
    (batch,) = make_plan(samples, packed=True).batches("small")
    with torch.no_grad():
        packed = model(**batch_to(batch, CPU, torch.float32), use_cache=False).logits[0]
        tokens = torch.from_numpy(batch.tensors["input_ids"])
        leaking = model(input_ids=tokens, position_ids=torch.arange(tokens.shape[1])[None], use_cache=False).logits[0]
        alone = torch.cat(
            [
                model(input_ids=torch.from_numpy(samples[i].token_ids)[None], use_cache=False).logits[0]
                for i in batch.order
            ]
        )
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    assert (leaking - alone).abs().max() > 0.1


def test_tokenize_adds_the_tokenizers_own_special_tokens_and_cuts_and_pads_nothing(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "model", "llama")
    assert loading.tokenize(path, ["w5 w6", "w7"]) == [[7, 8], [9]]
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save_pretrained(path)
    assert loading.tokenize(path, ["w5 w6", "w7"]) == [[1, 7, 8], [1, 9]]
    assert [len(ids) for ids in loading.tokenize(path, [" ".join(["w3"] * 3000), "unheard of"])] == [3001, 3]


def changed_config(path: Path, **changes: Any) -> Path:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    return path


def test_code_in_a_checkpoint_never_runs(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "model", "qwen3")
    (path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    changed_config(path, model_type="own", auto_map=auto_map)
    for call in (
        lambda: loading.read_config(path),
        lambda: loading.structure(path),
        lambda: loading.load(path, dtype=torch.float32, device="cpu"),
    ):
        with pytest.raises(SweepError, match=r"config\.json is no model that transformers .* knows"):
            call()
    changed_config(
        path, model_type="qwen3", auto_map=auto_map
    )  # a known type: transformers' own class, whatever the map says
    assert type(loading.load(path, dtype=torch.float32, device="cpu")).__module__.startswith("transformers.")
    assert not (tmp_path / "ran").exists()


def test_a_loaded_model_computes_in_the_dtype_asked_for_and_takes_no_gradient(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "model", "qwen3_vl")
    for dtype in (torch.float32, torch.bfloat16):
        model = loading.load(path, dtype=dtype, device="cpu")
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not model.training
        found = loading.structure(path)
        assert [
            (name, *reversed(module.weight.shape))
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
        ] == [(linear.name, linear.n_inputs, linear.n_outputs) for linear in found.linears]
        assert found.parameters == sum(parameter.numel() for parameter in model.parameters())


def drop(weights: dict[str, torch.Tensor]) -> None:
    del weights["model.layers.1.mlp.up_proj.weight"], weights["model.norm.weight"]


def cut(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"][:-1].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, "lacks 2 weights, the first 'model.layers.1.mlp.up_proj.weight': they would be random"),
        (cut, "Its weights must fit its config.json"),
    ],
)
def test_weights_that_do_not_make_the_model_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "model", "qwen3")
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SweepError) as error:
        loading.load(path, dtype=torch.float32, device="cpu")
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_only_a_model_that_reads_images_as_qwen3_vl_does_takes_scenes(tmp_path: Path) -> None:
    expected = {"vision_start": 1, "vision_end": 2, "image_token": 3, "merge": 2}
    assert loading.image_tokens(save_checkpoint(tmp_path / "vl", "qwen3_vl")) == expected
    with pytest.raises(SweepError, match=r"'qwen3' does not\. Choose a text data set\."):
        loading.image_tokens(save_checkpoint(tmp_path / "text", "qwen3"))


@pytest.mark.parametrize("method", [None, "awq"])
def test_weights_of_a_hub_id_are_fetched_once_nothing_speaks_against_them(
    method: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, snapshot = save_checkpoint(tmp_path / "source", "qwen3"), tmp_path / "snapshot"
    snapshot.mkdir()
    if method is not None:
        changed_config(source, quantization_config={"quant_method": method})
    fetched: list[str] = []

    def fetch(repository: str, allow_patterns: list[str]) -> str:
        assert repository == "org/name"
        for file in source.iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                fetched.append(file.name)
                shutil.copyfile(file, snapshot / file.name)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    if method is None:
        assert loading.local_checkpoint("org/name") == snapshot
        assert fetched.count("model.safetensors") == 1
    else:
        with pytest.raises(SweepError, match=r"quantized already \(awq, by quantization_config of config.json\)"):
            loading.local_checkpoint("org/name")
        assert "config.json" in fetched
        assert "model.safetensors" not in fetched


TINY: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"num_attention_heads": 2}


@pytest.mark.parametrize(
    ("architecture", "config", "why"),
    [
        ("LlamaModel", transformers.LlamaConfig(**TINY, **HEADS), "it has no output layer"),
        ("LlamaForSequenceClassification", transformers.LlamaConfig(**TINY, **HEADS), "it has no output layer"),
        ("BertForMaskedLM", transformers.BertConfig(**TINY, **HEADS), "it fills in masked tokens"),
        (
            "T5ForConditionalGeneration",
            transformers.T5Config(vocab_size=512, d_model=64, num_layers=1, d_ff=64),
            "an encoder",
        ),
    ],
)
def test_what_predicts_no_next_token_is_refused_by_name(
    architecture: str, config: Any, why: str, tmp_path: Path
) -> None:
    getattr(transformers, architecture)(config).save_pretrained(tmp_path)
    with pytest.raises(SweepError, match=f"is no causal language model: config.json names {architecture}") as error:
        loading.structure(tmp_path)
    assert why in str(error.value)


@pytest.mark.parametrize(
    ("name", "model", "elements"),
    [
        ("head", transformers.RwkvForCausalLM(transformers.RwkvConfig(**TINY, attention_hidden_size=64)), 512 * 64),
        ("output_projection", transformers.BioGptForCausalLM(transformers.BioGptConfig(**TINY, **HEADS)), 0),  # tied
    ],
)
def test_an_output_layer_of_another_name_is_in_no_layer_group(
    name: str, model: Any, elements: int, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    found = Model(tmp_path)
    assert name in found.linears
    assert name not in {module for group in found.groups.values() for module in group.modules}
    assert found.structure.elements["other_head"] == elements
    covered = {group.name: group.weight_elements for group in found.groups.values()}
    coverage = coverage_of(elements_of(found), covered, "lm_only")
    assert coverage.covered + sum(each.elements for each in coverage.not_covered) == coverage.parameters
    assert ("output layer" in coverage.text) is bool(elements)
    assert "sensitivity.lm_head" not in coverage.text
