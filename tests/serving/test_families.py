"""vLLM's parser and weight loaders read exports of every family that it has, in two formats beside each other."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from sweep.config.compose import expand
from sweep.core.groups import is_vision
from sweep.formats.mixed import MixedRecipe
from sweep.plan.model import Model
from sweep.plan.trials import plan_sweep
from tests.exports import recipe_of
from tests.families import FAMILIES, UNUSED, save_family
from tests.serving.conftest import Point, format_of
from workers.export.calibrated import calibrated
from workers.export.checkpoint import write_checkpoint
from workers.export.names import linears_on_disk, recipe_on_disk
from workers.export.readback import check_export
from workers.model.loading import load

# Scheme that vLLM has for each point on Hopper.
SCHEMES: dict[Point, str] = {
    ("wint4_afp16", "w_per_out_channel", "max"): "CompressedTensorsWNA16",
    ("wint8_aint8", "a_per_token_dynamic", "max"): "CompressedTensorsW8A8Int8",
}


@dataclass(frozen=True)
class Read:
    """An export, and what vLLM says to it."""

    recipe: MixedRecipe
    answer: dict[str, Any]


@pytest.fixture(scope="module")
def read(vllm: Callable[..., list[dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Read]:
    """Exports of all families, read in one process."""
    root = tmp_path_factory.mktemp("families")
    torch.set_num_threads(1)
    recipes = {
        family: exported(save_family(root / family, family), root / f"{family}-export", lm_head=family == "mistral")
        for family in FAMILIES
    }
    answers = vllm("schemes", 90, [root / f"{family}-export" for family in FAMILIES])
    found = zip(recipes.items(), answers, strict=True)
    return {family: Read(recipe=recipe, answer=answer) for (family, recipe), answer in found}


def exported(source: Path, directory: Path, *, lm_head: bool) -> MixedRecipe:
    """Export a checkpoint in two formats in turn, over the groups that a sweep covers, as `sweep export` does."""
    own = ["model=hf_causal_lm", f"model.path={source}", "dataset=wordnet_glosses", "dataset.size=small"]
    own.append(f"sensitivity.lm_head={str(lm_head).lower()}")
    plan = plan_sweep(expand(["quant_pair=wint8_aint8", *own], multirun=False).points, "cpu")
    (task,), (batches,) = plan.tasks.values(), plan.plans.values()
    model = Model(source)
    structure = model.structure
    recipe = recipe_of([format_of(point) for point in SCHEMES], source, task.groups)
    base = load(source, dtype=torch.float32, device="cpu")
    found = calibrated(base, recipe, structure.linears, list(batches.batches("small"))[:2])
    names = structure.on_disk
    recipe, linears = recipe_on_disk(recipe, names), linears_on_disk(structure.linears, names)
    quants = {names[module]: quant for module, quant in found.items()}
    directory.mkdir()
    write_checkpoint(source, directory, recipe, quants, linears)
    check_export(directory, source, recipe, quants, linears)
    return recipe


@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_reads_each_family_as_exported(read: dict[str, Read], family: str) -> None:
    """Every fused linear has one group's scheme, as often as the recipe has it; all is filled, nothing left over."""
    recipe, answer = read[family].recipe, read[family].answer
    assert answer.get("error") is None
    left = re.compile(UNUSED.get(family, "(?!)") + r"|\.layer_scalar")  # a buffer, which vLLM fills apart
    surplus = [name for name in answer["surplus"] if not left.search(name) and not is_vision(name)]
    assert (answer["unfilled"], surplus) == ({}, [])  # a tower's last layers have no use
    schemes = {name: found and found[0] for name, found in answer["schemes"].items()}
    promised: list[str] = []
    for choice in recipe.groups:
        point = choice.format and next(point for point in SCHEMES if format_of(point).label == choice.format)
        promised += [SCHEMES[point]] if point else []
    assert sorted(filter(None, schemes.values())) == sorted(promised)
    assert not any(scheme for name, scheme in schemes.items() if is_vision(name))
    heads = [scheme for name, scheme in schemes.items() if "lm_head" in name]
    assert heads == ["CompressedTensorsWNA16" if family == "mistral" else None]
