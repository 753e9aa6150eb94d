"""How far scores on a GPU in bf16 are from a float32 reference of the same recipe on the same captured x, g and W."""

# pyright: basic

import torch
from torch import Tensor

from tests.bench.setup import Subject, job, spearman
from workers.quant.modelopt import Quantizers
from workers.scoring.capture import Rows
from workers.scoring.gradient import Engine
from workers.task import Task

CHECKED = (
    "wint8_aint8/default",
    "wint8_afp16/default",
    "wfp8_afp8/default",
    "wint4_aint8/w_group64",
    "wfp4_afp16/default",
    "wint8_aint8/a_per_token_dynamic",
)


@torch.no_grad()
def reference_score(
    task: Task, weights: dict[str, Tensor], rows: dict[str, Rows], quantizers: Quantizers
) -> tuple[float, float]:
    """The score with float32 products (TF32 off) of float32 quantized tensors, and as stock bf16 scoring has it."""
    exact = stock = 0.0
    for name, weight in weights.items():
        seen = rows[name]
        w, x, g = weight.float(), seen.x_TI.float(), seen.g_TO.float()
        wq = quantizers.weight(name, task.format.weight, w)(w) if task.format.weight else w
        xq = quantizers.inputs(task.format.inputs, x, float(seen.input_amaxes.max()))(x) if task.format.inputs else x
        exact += (g * (x @ (wq - w).T + (xq - x) @ wq.T)).double().square().sum().item()
        difference = xq.bfloat16() @ wq.bfloat16().T - seen.x_TI @ weight.T
        stock += (g * difference.float()).double().square().sum().item()
    return exact, stock


def worst_against_fp32(bench: Subject, engine: Engine, rows: dict[str, Rows]) -> dict[str, float]:
    """Largest relative differences (ours, stock bf16) and least Spearman correlation, over groups and recipes."""
    figures = {"worst_relative_difference": 0.0, "stock_bf16_worst_relative_difference": 0.0, "least_spearman": 1.0}
    quantizers = Quantizers()
    for task in bench.tasks:
        if task.label not in CHECKED:
            continue
        ours: list[float] = []
        exact: list[float] = []
        for group in task.groups:
            weights = {name: bench.model.get_submodule(name).weight for name in group.modules}
            found = engine.score_group(weights, rows, [job(task, "large")])()
            assert found is not None
            ours.append(found[0]["large"].score)  # type: ignore[index]
            reference, stock = reference_score(task, weights, rows, quantizers)
            exact.append(reference)
            figures["stock_bf16_worst_relative_difference"] = max(
                figures["stock_bf16_worst_relative_difference"], abs(stock / reference - 1)
            )
            figures["worst_relative_difference"] = max(
                figures["worst_relative_difference"], abs(ours[-1] / reference - 1)
            )
        figures["least_spearman"] = min(figures["least_spearman"], spearman(ours, exact))
    return figures
