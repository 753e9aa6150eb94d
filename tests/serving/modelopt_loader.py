"""vLLM's ModelOpt loader on an export: run with vLLM's own Python, prints what it found as JSON.

Configuration parsing, the choice of a method for each linear and the weight loaders are vLLM's. The kernels are left
out: on a CPU it has none for most of these formats.
"""

import json
import sys
from typing import Any
from unittest import mock

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import modelopt
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.platforms import current_platform


def found_in(directory: str) -> dict[str, Any]:
    """What vLLM reads an export as.

    Returns: `config`, the class that parsed it; `linears`, by name the method that each linear got, with the keys of
        weights and inputs; `unfilled`, parameters that the loader left as they were made, but for the scales of the
        key-value cache, which stays in 16 bits.
    """
    current_platform.supported_quantization = []  # the CPU's list, which has no ModelOpt
    arguments = EngineArgs(model=directory, dtype="bfloat16", enforce_eager=True, max_model_len=256)
    config = arguments.create_engine_config()
    with (
        set_current_vllm_config(config),
        mock.patch.object(modelopt, "select_linear_kernel"),
        mock.patch.object(modelopt, "expose_input_quant_key"),
    ):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        model = initialize_model(vllm_config=config)
        for parameter in model.parameters():
            blank = torch.nan if parameter.is_floating_point() else 255
            parameter.data.fill_(blank)
        loader = DefaultModelLoader(config.load_config)
        tensors = dict(loader.get_all_weights(config.model_config, model))
        filled = set(model.load_weights(iter(tensors.items())))
    return {
        "config": type(config.quant_config).__name__,
        "linears": {name: _method(module) for name, module in model.named_modules() if isinstance(module, LinearBase)},
        "unfilled": sorted(
            name
            for name, parameter in model.named_parameters()
            if ".self_attn.attn." not in name
            if name not in filled or (parameter.is_floating_point() and bool(parameter.float().isnan().any()))
        ),
    }


def _method(module: LinearBase) -> list[str]:
    spec = getattr(module.quant_method, "spec", None)
    return [type(module.quant_method).__name__, *([] if spec is None else [str(spec.weight), str(spec.activation)])]


if __name__ == "__main__":
    for place in sys.argv[1:]:
        sys.stdout.write(f"FOUND {json.dumps(found_in(place))}\n")
    cleanup_dist_env_and_memory()
