"""Models of many families in one session: swept, solved and exported, each as a user types it.

What must be covered is counted in the checkpoint's own files.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sweep.cli import main
from tests.families import FAMILIES, UNUSED, WITH_EXPERTS, save_family
from tests.ray.test_sweep import ROOT

DATA = ["model=hf_causal_lm", "dataset=wordnet_glosses", "dataset.size=small", "target=vllm_sm90"]
GRID = ["quant_pair=wint8_aint8,wint4_afp16", "quant_granularity=a_per_token_dynamic"]
SCALES = ("_packed", "_scale", "_shape")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each family, and the store of one sweep over all of them."""
    root = tmp_path_factory.mktemp("families")
    paths = [str(save_family(root / family, family)) for family in FAMILIES]
    own = [f"store.uri={root / 'store'}", f"output_layout.root={root / 'reports'}", "cluster.workers=1"]
    command = [sys.executable, "-m", "sweep", "run", "-m", *DATA, *GRID, *own, f"model.path={','.join(paths)}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"{2 * len(paths)} of {2 * len(paths)} trials done" in done.stdout
    return root


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, place: Path) -> str:
    """A family with an export of 4.6 bits a weight, in INT4 and INT8: too few to leave a layer group in 16."""
    name, recipe, own = str(request.param), f"{place}/{request.param}.yaml", [f"store.uri={place / 'store'}"]
    assert main(["solve", "--bits", "4.6", "--out", recipe, *DATA, *own, f"model.path={place / name}"]) == 0
    out = f"{place}/{name}-export"
    assert main(["export", recipe, "--format", "compressed-tensors", "--out", out, *own, "cluster.device=cpu"]) == 0
    return name


def test_the_decoders_linears_are_quantized_and_all_else_is_kept(family: str, place: Path) -> None:
    source, export = (load_file(place / name / "model.safetensors") for name in (family, f"{family}-export"))
    quantized = {name for name in source if f"{name}_scale" in export}
    unused = re.compile(UNUSED.get(family, "(?!)"))
    decoder = {
        name: weight for name, weight in source.items() if is_decoder_linear(name, weight) and not unused.search(name)
    }
    assert quantized <= decoder.keys()
    share = sum(decoder[name].numel() for name in quantized) / sum(map(torch.numel, decoder.values()))
    assert (share < 0.9) if family in WITH_EXPERTS else (share > 0.99), (share, sorted(decoder.keys() - quantized))
    assert {export[name].dtype for name in quantized if name in export} <= {torch.int8}
    assert {name for name in quantized if f"{name}_packed" in export}  # INT4
    parts = {f"{name}{part}" for name in quantized for part in ("", *SCALES)}
    assert export.keys() - parts == source.keys() - quantized
    for name in source.keys() - quantized:  # norms, embeddings, biases, experts, towers, and what no model builds
        assert torch.equal(export[name], source[name]), name


def is_decoder_linear(name: str, weight: Tensor) -> bool:
    """Whether a tensor is a matrix of the language model that multiplies activations, of its head's none."""
    others = ("visual", "vision", "projector", "embed", "lm_head")
    return name.endswith(".weight") and weight.dim() == 2 and not any(word in name for word in others)
