"""vLLM's own parser, scheme choice, weight loaders and CPU kernels read what is exported."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import log_softmax

from sweep.config.targets import TargetRecipe, all_targets
from tests.serving.conftest import CAPABILITIES, MIXED, SOURCE, Export, Point, exported_points, name_of
from workers.quant.applied import applied

Reader = Callable[..., list[dict[str, Any]]]
HELD_OUT = slice(512, 560)  # glosses
PARTS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
PROMISES = [
    pytest.param(target.name, recipe, point, id=f"{target.name}-{name_of(point)}")
    for target in all_targets()
    for recipe in target.recipes
    for point in exported_points()
    if target.name in CAPABILITIES
    and "compressed_tensors" in recipe.export
    and (recipe.quant_pair, recipe.quant_granularity) == point[:2]
    and point[2] in recipe.algorithms
]


@pytest.fixture(scope="session")
def read(vllm: Reader, exports: dict[str, Export]) -> Callable[[str], dict[str, dict[str, Any]]]:
    """What vLLM says to every export on a target's hardware, by the export's name; asked once a target."""
    known: dict[str, dict[str, dict[str, Any]]] = {}

    def ask(target: str) -> dict[str, dict[str, Any]]:
        if target not in known:
            answers = vllm("schemes", CAPABILITIES[target], [each.directory for each in exports.values()])
            known[target] = dict(zip(exports, answers, strict=True))
        return known[target]

    return ask


def check(answer: dict[str, Any], promised: dict[str, str]) -> None:
    """Each linear of the language model has its scheme, no other has one; all is filled and nothing is left over."""
    assert answer.get("error") is None
    for name, found in answer["schemes"].items():
        scheme = next((scheme for part, scheme in promised.items() if part in name), None)
        assert (found and found[0]) == scheme, name
    assert (answer["unfilled"], answer["surplus"]) == ({}, [])
    assert sum("visual" in name for name in answer["schemes"]) > 10  # the vision tower is built, too


@pytest.mark.parametrize(("target", "recipe", "point"), PROMISES)
def test_vllm_reads_what_the_target_promises(
    read: Callable[[str], Any], target: str, recipe: TargetRecipe, point: Point
) -> None:
    scheme, _, kernel = recipe.reader_name.partition(" on ")
    answer = read(target)[name_of(point)]
    check(answer, {"language_model.model.layers": scheme.split()[0]})
    if kernel:
        kernels = {name for found in answer["schemes"].values() if found for name in found[1:]}
        assert all(name.lower().startswith(kernel.split()[0].lower()) for name in kernels), kernels


@pytest.mark.parametrize("target", CAPABILITIES)
def test_each_group_of_a_mixed_checkpoint_has_its_own_scheme(read: Callable[[str], Any], target: str) -> None:
    """Groups of four a layer; the third of the six formats leaves its group in 16 bits."""
    schemes = {point: scheme_of(target, point) for point in MIXED if point is not None}
    places = [f"language_model.model.layers.{layer}.{part}" for layer in range(4) for part in PARTS]
    formats = [MIXED[i % len(MIXED)] for i in range(len(places))]
    promised = {place: schemes[point] for place, point in zip(places, formats, strict=True) if point is not None}
    check(read(target)["mixed"], promised)


def scheme_of(target: str, point: Point) -> str:
    """The scheme that a target promises; on Blackwell it promises none for INT8 inputs, but vLLM has one."""
    (found,) = (each for each in all_targets() if each.name == target)
    return (found.status(*point).reader_name or "CompressedTensorsW8A8Int8").split()[0]


@pytest.fixture(scope="session")
def broken(exports: dict[str, Export], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exports that are damaged on purpose, by what is wrong with them."""
    root = tmp_path_factory.mktemp("broken")
    found: dict[str, Path] = {}
    module = "model.language_model.layers.1.mlp.down_proj"

    def damaged(fault: str, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
        directory = found[fault] = root / fault
        shutil.copytree(exports["wint4_afp16-default-max"].directory, directory)
        tensors, config = (
            load_file(directory / "model.safetensors"),
            json.loads((directory / "config.json").read_text()),
        )
        change(tensors, config)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "config.json").write_text(json.dumps(config))

    damaged("a scale is missing", lambda tensors, _: tensors.__delitem__(f"{module}.weight_scale"))
    damaged("a tensor too many", lambda tensors, _: tensors.update({f"{module}.input_scale": torch.ones(1)}))
    damaged("a byte a weight", lambda tensors, _: as_bytes(tensors, module))
    damaged("a linear is ignored", lambda _, config: config["quantization_config"]["ignore"].append(module))
    damaged(
        "another group size",
        lambda _, config: config["quantization_config"]["config_groups"]["group_0"]["weights"].update(group_size=64),
    )
    return found


def as_bytes(tensors: dict[str, Tensor], module: str) -> None:
    """INT4 weights as this project wrote them once under INT8 inputs: unpacked, under the name of plain weights."""
    shape = tensors.pop(f"{module}.weight_shape")
    del tensors[f"{module}.weight_packed"]
    tensors[f"{module}.weight"] = torch.zeros(*shape.tolist(), dtype=torch.int8)


def test_a_broken_export_is_seen(vllm: Reader, broken: dict[str, Path]) -> None:
    answers = dict(zip(broken, vllm("schemes", 90, [*broken.values()]), strict=True))
    for fault, answer in answers.items():
        with pytest.raises(AssertionError):
            check(answer, {"language_model.model.layers": "CompressedTensorsWNA16"})
        assert set(answer) == {"directory", "schemes", "unfilled", "surplus"} or "error" in answer, fault
    assert answers["a scale is missing"]["unfilled"] == {
        "language_model.model.layers.1.mlp.down_proj.weight_scale": 2 * 256 * 3
    }


# What vLLM's CPU build has kernels for; INT4 weights compute in bfloat16 alone.
ON_CPU = {
    "wint8_aint8-a_per_token_dynamic-max": "float32",
    "wfp8_afp8-recipe_match_channel_token-max": "float32",
    "wint4_afp16-default-max": "bfloat16",
    "wint4_afp16-w_group64-max": "bfloat16",
    "wint4_afp16-w_per_out_channel-max": "bfloat16",
    "wint4_afp16-default-awq_lite": "bfloat16",
}


@pytest.fixture(scope="session")
def served(
    vllm: Reader, exports: dict[str, Export], glosses: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tensor]:
    """Log probabilities by vLLM of held-out glosses, [tokens, vocabulary], by export; `plain-DTYPE`: unquantized."""
    root, found = tmp_path_factory.mktemp("served"), dict[str, Tensor]()
    for dtype in ("float32", "bfloat16"):
        plain = root / f"plain-{dtype}"
        shutil.copytree(SOURCE, plain, ignore=shutil.ignore_patterns("layer-analysis"))
        names = [name for name, own in ON_CPU.items() if own == dtype]
        places = [plain, *(exports[name].directory for name in names)]
        prompts = root / f"{dtype}.json"
        prompts.write_text(json.dumps({"dtype": dtype, "prompts": [list(map(int, ids)) for ids in glosses[HELD_OUT]]}))
        for name, answer in zip([plain.name, *names], vllm("logits", prompts, places), strict=True):
            assert answer.get("error") is None
            logits = torch.from_numpy(np.load(Path(answer["directory"]) / "served_logits.npy"))
            found[name] = log_softmax(logits.double(), -1)
    return found


@pytest.fixture(scope="session")
def ours(base: Any, exports: dict[str, Export], glosses: list[Any]) -> dict[str, Tensor]:
    """The same of the fake-quantized model, in float32; `plain`: unquantized."""
    found = {"plain": log_probabilities(base, glosses)}
    for name in ON_CPU:
        with applied(base, exports[name].quants):
            found[name] = log_probabilities(base, glosses)
    return found


@torch.no_grad()
def log_probabilities(model: Any, glosses: list[Any]) -> Tensor:
    """[tokens, vocabulary], of the held-out glosses one after another, each without its last token."""
    rows = [model(input_ids=torch.tensor(ids)[None], use_cache=False).logits[0, :-1] for ids in glosses[HELD_OUT]]
    return log_softmax(torch.cat(rows).double(), -1)


def kl(p: Tensor, q: Tensor) -> float:
    """Mean over tokens, in nats."""
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_unquantized_the_bundled_model_is_the_same_in_vllm(served: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    assert abs(kl(ours["plain"], served["plain-float32"])) < 1e-9
    assert 1e-5 < kl(ours["plain"], served["plain-bfloat16"]) < 1e-3  # there is noise to tell apart at all


@pytest.mark.parametrize("name", ON_CPU)
def test_what_is_served_is_what_is_measured(served: dict[str, Tensor], ours: dict[str, Tensor], name: str) -> None:
    """KL(unquantized || served) is the measured one, within 5 % or twice the noise of the precision."""
    measured, found = kl(ours["plain"], ours[name]), kl(ours["plain"], served[name])
    noise = kl(ours["plain"], served[f"plain-{ON_CPU[name]}"])
    assert measured > 1e-4
    assert abs(found - measured) < max(0.05 * measured, 2 * noise), (found, measured, noise)
