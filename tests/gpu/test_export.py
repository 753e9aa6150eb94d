"""An export from a model on a GPU: it is read back, and says what the same quantizers give on a CPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

NAMES = (
    "int4_groups_weight_only",
    "nvfp4",
    "fp8_blocks",
    "fp8_tensor_static",
    "int8_channel_token",
    "int8_channel_static",
    "mxfp4_weight_only",
    "mxfp8",
)


@pytest.mark.parametrize("algorithm", ["max", "awq_lite"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_export_from_a_gpu_holds_the_recipe(tmp_path: Path, dtype: torch.dtype, algorithm: str) -> None:
    from sweep.config.compose import expand
    from sweep.core.paths import bundled_model_dir
    from sweep.plan.model import Model
    from sweep.plan.samples import samples_of
    from tests.exports import FORMATS, recipe_of
    from tests.formats import group_format
    from workers.export.calibrated import calibrated
    from workers.export.checkpoint import write_checkpoint
    from workers.export.compute import CPU, Compute
    from workers.export.readback import check_export
    from workers.model.loading import load
    from workers.quant.linear import LinearQuant

    names = NAMES if algorithm == "max" else (NAMES[0], None)  # all groups but those whose inputs' scale folds nowhere
    recipe = recipe_of([name and group_format(name, *FORMATS[name], algorithm, "fused") for name in names])
    model = Model(bundled_model_dir())
    dataset = expand(["dataset.size=small"], multirun=False).points[0].dataset
    batches = list(model.plan(samples_of(dataset, model, 16)).batches("small"))
    loaded = load(model.path, dtype=dtype, device="cuda")
    linears, compute = model.structure.linears, Compute.of(loaded)
    assert (compute.device.type, compute.dtype) == ("cuda", dtype)
    quants = calibrated(loaded, recipe, linears, batches)
    assert all(quant.weight_amax is None or quant.weight_amax.is_cuda for quant in quants.values())
    on_gpu, on_cpu = tmp_path / "gpu", tmp_path / "cpu"
    for directory in (on_gpu, on_cpu):
        directory.mkdir()
    write_checkpoint(model.path, on_gpu, recipe, quants, linears, compute)
    check_export(on_gpu, model.path, recipe, quants, linears, compute)

    def moved(quant: LinearQuant) -> LinearQuant:
        places = ("weight_amax", "input_amax", "pre_quant_scale")
        tensors = {place: getattr(quant, place) for place in places}
        return replace(quant, **{place: None if each is None else each.cpu() for place, each in tensors.items()})

    again = {name: moved(quant) for name, quant in quants.items()}
    write_checkpoint(model.path, on_cpu, recipe, again, linears, CPU)
    check_export(on_gpu, model.path, recipe, again, linears, CPU)  # the CPU reads what the GPU wrote as the recipe, too
    ours, theirs = (load_file(directory / "model.safetensors") for directory in (on_gpu, on_cpu))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape)
        if name.endswith("_scale"):  # one division each, of the same ranges
            assert torch.equal(tensor.float(), theirs[name].float()), name
