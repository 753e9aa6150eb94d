"""Subjects of benchmarks: the bundled model and its texts, or Qwen3-VL-4B's shape with random weights and texts."""

# pyright: basic

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from sweep.config.compose import expand
from sweep.core.batches import Plan, Sample
from sweep.core.paths import bundled_model_dir
from sweep.core.sizes import SIZES
from sweep.plan.trials import plan_sweep
from workers.data.batches import make_plan
from workers.data.samples import read_captions, text_samples
from workers.model import loading
from workers.scoring.gradient import Job
from workers.task import Task

# Shape of Qwen/Qwen3-VL-4B-Instruct, from the config.json of its model card.
TEXT_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 262144,
    "rope_theta": 5000000,
    "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
}
VISION_4B = {
    "depth": 24,
    "hidden_size": 1024,
    "num_heads": 16,
    "intermediate_size": 4096,
    "patch_size": 16,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "deepstack_visual_indexes": [5, 11, 17],
    "out_hidden_size": 2560,
    "num_position_embeddings": 2304,
    "hidden_act": "gelu_pytorch_tanh",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A loaded model, its canonical plan, and the distinct recipes of the origin's grid on it."""

    name: str
    model: Any
    samples: list[Sample]
    plan: Plan
    tasks: list[Task]  # one a distinct recipe, all with the same layer groups
    device: torch.device


def subject(model: str, device: str) -> Subject:
    """The subject that the command line names: ``tiny`` or ``qwen3_vl_4b_shape``."""
    if device == "cpu":
        torch.set_num_threads(1)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    network = loading.load(bundled_model_dir(), dtype=dtype, device=device) if model == "tiny" else random_4b(device)
    if model == "tiny":
        texts = read_captions(bundled_model_dir() / "wordnet_glosses.txt", 512)
        samples = text_samples(loading.tokenize(bundled_model_dir(), texts), 512)
    else:
        samples = random_captions(512)
    return Subject(
        name=model,
        model=network,
        samples=samples,
        plan=make_plan(samples, packed=True),
        tasks=grid_tasks(network, device),
        device=torch.device(device),
    )


def random_4b(device: str) -> Any:
    """The 4B shape with random weights of a trained model's size; tied embeddings."""
    config = Qwen3VLConfig(text_config=TEXT_4B, vision_config=VISION_4B, tie_word_embeddings=True)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Qwen3VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.02)
    return model.eval().requires_grad_(False)


def random_captions(n: int, mean_tokens: float = 13.95, longest: int = 60) -> list[Sample]:
    """Samples as long as COCO captions are: 512 of them hold about 7,100 tokens."""
    generator = np.random.default_rng(0)
    lengths = np.clip(np.round(generator.gamma(20.0, mean_tokens / 20.0, n)), 6, longest).astype(int)
    return [Sample(token_ids=generator.integers(10, 150_000, int(length))) for length in lengths]


def grid_tasks(network: Any, device: str, overrides: tuple[str, ...] = ("dataset.size=large",)) -> list[Task]:
    """The distinct recipes of the origin's grid, on the layer groups of `network`."""
    from dataclasses import replace

    from torch import nn

    from sweep.core.groups import ShapedGroup
    from workers.quant.modelopt import layer_groups

    points = expand(["grid=origin", *overrides], multirun=True).points
    tasks = list(plan_sweep(points, "cpu" if device == "cpu" else "cuda").tasks.values())
    linears = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and "language_model" in name
    }
    groups: list[ShapedGroup] = []
    for first, modules in layer_groups(linears).items():
        n_inputs, n_outputs = linears[first].in_features, sum(linears[name].out_features for name in modules)
        groups.append(
            ShapedGroup(
                name=first,
                modules=modules,
                weight_elements=n_inputs * n_outputs,
                n_inputs=n_inputs,
                n_outputs=n_outputs,
            )
        )
    return [replace(task, groups=tuple(groups)) for task in tasks]


def job(task: Task, *sizes: str) -> Job:
    """The engine's job of a task."""
    wanted = {size: SIZES[size] for size in sizes or SIZES}
    return Job(name=task.label, format=task.format, sizes=wanted)


def seconds(function: Callable[[], Any], device: torch.device, repeats: int = 1) -> float:
    """Mean wall time of a call, with the GPU's work."""
    sync(device)
    started = time.perf_counter()
    for _ in range(repeats):
        function()
    sync(device)
    return (time.perf_counter() - started) / repeats


def sync(device: torch.device) -> None:
    """Wait for the GPU, if there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def machine(device: torch.device) -> dict[str, str]:
    """Machine, versions and commit that the figures come from."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    ).stdout.strip()
    where = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    )
    return {
        "device": where,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
    }


def report(benchmark: str, device: torch.device, figures: dict[str, Any]) -> None:
    """One JSON line."""
    rounded = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in figures.items()}
    print(json.dumps({"benchmark": benchmark, **rounded, **machine(device)}), flush=True)


@contextmanager
def peak_gb(device: torch.device) -> Iterator[dict[str, float]]:
    """Peak GPU memory in GB (1e9 bytes) within the block."""
    found: dict[str, float] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    yield found
    found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0


def spearman(some: Any, others: Any) -> float:
    """Rank correlation."""
    result: Any = spearmanr(some, others)
    return float(result.statistic)
