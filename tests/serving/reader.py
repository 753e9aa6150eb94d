"""Runs inside vLLM's own environment: how vLLM reads exported checkpoints, as JSON on standard output.

    python reader.py schemes CAPABILITY DIRECTORY...   its configuration parser, scheme choice and weight loaders, under
                                                       the compute capability of a GPU that is not here (90, 100, 120)
    python reader.py logits PROMPTS.json DIRECTORY...  logits of the prompts' tokens, computed on the CPU in the dtype
                                                       of PROMPTS.json, written to DIRECTORY/served_logits.npy
    python reader.py speed - DIRECTORY...              tokens a second on this GPU, with dummy weights

One line of JSON a directory. What no CPU build can tell is taken from vLLM's requirements for CUDA: FlashInfer and
DeepGEMM are there; Humming, which 0.32 prefers to Marlin on Hopper, is left out.
"""

import gc
import importlib
import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}

import numpy as np
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability, PlatformEnum

NO_PICTURES = {"image": 0, "video": 0}
# Scales of the cache and of attention, which have values of their own where a checkpoint has none.
CACHE_SCALES = ("_scale", "_zero_point")


def pretend(capability: int) -> None:
    """Let the modules that choose schemes and kernels see a CUDA GPU; all others still see the CPU."""
    for name in ("compressed_tensors.compressed_tensors", "modelopt"):  # with the kernels that they choose from
        importlib.import_module(f"vllm.model_executor.layers.quantization.{name}")

    class Pretended(type(current_platform)):
        _enum = PlatformEnum.CUDA

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(capability // 10, capability % 10)

        @classmethod
        def support_deep_gemm(cls) -> bool:
            return True  # on all three

    platform = Pretended()
    facts = {  # of the CUDA build: its kernels, by the architectures that they are compiled for
        "cutlass_scaled_mm_supports_fp8": lambda found: found >= 89,
        "cutlass_scaled_mm_supports_block_fp8": lambda found: found >= 90,
        "cutlass_scaled_mm_supports_fp4": lambda found: found >= 100,
        "cutlass_fp4_supported": lambda: capability >= 100,
        "cutlass_fp8_supported": lambda: capability >= 89,
        "CUTLASS_FP8_SUPPORTED": capability >= 89,
        "CUTLASS_BLOCK_FP8_SUPPORTED": capability >= 90,
        "has_flashinfer": lambda: True,
        "has_flashinfer_cutedsl": lambda: True,
        "has_deep_gemm": lambda: True,
        "has_humming": lambda: False,  # it compiles what it chooses, with a CUDA toolkit
        "is_flashinfer_fp8_blockscale_gemm_supported": lambda: False,  # off unless asked for
        "current_platform": platform,
    }
    for name, module in list(sys.modules.items()):
        if name.startswith(
            ("vllm.model_executor.kernels", "vllm.model_executor.layers.quantization", "vllm.utils", "vllm._custom_ops")
        ):
            for attribute in facts.keys() & vars(module).keys():
                setattr(module, attribute, facts[attribute])


def pictures(directory: str) -> dict:
    """How many a prompt may have: none where the checkpoint lacks what prepares them."""
    return {} if (Path(directory) / "preprocessor_config.json").exists() else NO_PICTURES


def built(directory: str):
    """The model as vLLM builds it for a checkpoint, without weights, and the configuration that it was built from."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = EngineArgs(
        model=directory,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=256,
        limit_mm_per_prompt=pictures(directory),
    ).create_engine_config()
    _one_process()
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        return initialize_model(config), config


def _one_process() -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment

    if not torch.distributed.is_initialized():
        with set_current_vllm_config(VllmConfig()):  # of no model: with a group for experts, which some models need
            init_distributed_environment(1, 0, f"file:///tmp/vllm-reader-{os.getpid()}", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)


def read(directory: str) -> dict:
    """Schemes and kernels by linear, elements that no tensor filled, tensors that filled nothing."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    model, config = built(directory)
    schemes = {}
    for name, module in model.named_modules():
        if isinstance(module, LinearBase | ParallelLMHead):
            scheme = getattr(module, "scheme", None)
            method = type(module.quant_method).__name__
            kernels = [type(part).__name__ for part in _kernels(scheme or module.quant_method)]
            is_plain = scheme is None and "Unquantized" in method
            schemes[name] = None if is_plain else [type(scheme).__name__ if scheme is not None else method, *kernels]
    bytes_of = {}
    surplus = []
    for filling in (0, 255):
        parameters = dict(model.named_parameters())
        for parameter in parameters.values():
            parameter.data.view(torch.uint8).fill_(filling)
        loader = DefaultModelLoader(config.load_config)
        surplus = _load(model, loader.get_all_weights(config.model_config, model), parameters)
        bytes_of[filling] = {
            name: parameter.data.reshape(-1).view(torch.uint8).clone() for name, parameter in parameters.items()
        }
    unfilled = {
        name: int((first != bytes_of[255][name]).sum())
        for name, first in bytes_of[0].items()
        if not torch.equal(first, bytes_of[255][name]) and not (".attn." in name and name.endswith(CACHE_SCALES))
    }
    return {"schemes": schemes, "unfilled": unfilled, "surplus": surplus}


def _kernels(holder) -> list:
    found = [vars(holder).get(name) for name in ("kernel", "fp8_linear", "linear_kernel", "w8a8_block_fp8_linear")]
    return [kernel for kernel in found if kernel is not None]


def _load(model, weights, parameters) -> list[str]:
    """Load a checkpoint. Returns: its tensors that no parameter took."""
    taken = defaultdict(int)
    now = [""]

    def watched(load):
        def loader(*args, **kwargs):
            taken[now[0]] += 1
            return load(*args, **kwargs)

        return loader

    def announced():
        for name, tensor in weights:
            now[0] = name
            taken[name] += 0
            yield name, tensor

    from vllm.model_executor.model_loader.weight_utils import default_weight_loader

    originals = {}
    for name, parameter in parameters.items():
        place = "_weight_loader" if hasattr(parameter, "_weight_loader") else "weight_loader"
        originals[name] = place, getattr(parameter, place, None)
        setattr(parameter, place, watched(originals[name][1] or default_weight_loader))
    model.load_weights(announced())
    for name, parameter in parameters.items():
        place, original = originals[name]
        if original is None:
            delattr(parameter, place)
        else:
            setattr(parameter, place, original)
    return sorted(name for name, count in taken.items() if not count)


def serve(directory: str, prompts: list, dtype: str) -> dict:
    """Write the logits of all tokens of the prompts but the last: [tokens, vocabulary], float32; name the kernels."""
    from vllm import LLM

    llm = LLM(
        directory,
        dtype=dtype,
        enforce_eager=True,
        gpu_memory_utilization=0.2,
        kv_cache_memory_bytes=256 << 20,
        max_model_len=512,
        skip_mm_profiling=True,
        limit_mm_per_prompt=pictures(directory),
        enable_prefix_caching=False,
    )
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    seen, kept = [], []
    compute = model.compute_logits

    def compute_logits(hidden_states, *args):
        logits = compute(hidden_states, *args)
        seen.append(logits.float().cpu().numpy().copy())
        return logits

    model.compute_logits = compute_logits
    for prompt in prompts:
        seen.clear()
        llm.generate([{"prompt_token_ids": prompt}], SamplingParams(max_tokens=1, prompt_logprobs=1), use_tqdm=False)
        kept.append(max(seen, key=len)[: len(prompt) - 1])  # the prompt's, beside those of the token that is sampled
    np.save(Path(directory) / "served_logits.npy", np.concatenate(kept))
    return {"kernels": chosen_kernels(model)}


def speed(directory: str) -> dict:
    """Tokens a second with dummy weights, best of three: prefill of 8 x 1,024, decode at batch 1 and 32; GB."""
    from vllm import LLM

    llm = LLM(
        directory,
        dtype="bfloat16",
        load_format="dummy",
        skip_tokenizer_init=True,
        compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 32]},
        gpu_memory_utilization=0.2,
        kv_cache_memory_bytes=2 << 30,
        max_model_len=2048,
        max_num_seqs=32,
        skip_mm_profiling=True,
        limit_mm_per_prompt=NO_PICTURES,
        enable_prefix_caching=False,
    )
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    generator = np.random.default_rng(0)

    def seconds(batch: int, n_prompt: int, n_tokens: int) -> float:
        prompts = [{"prompt_token_ids": generator.integers(10, 100_000, n_prompt).tolist()} for _ in range(batch)]
        sampling = SamplingParams(max_tokens=n_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - started

    def best(*shape: int) -> float:
        seconds(*shape)
        return min(seconds(*shape) for _ in range(3))

    answer = {"prefill": 8 * 1024 / best(8, 1024, 1), "gb": runner.model_memory_usage / 1e9}
    for batch in (1, 32):
        answer[f"decode_{batch}"] = batch * 128 / (best(batch, 32, 129) - best(batch, 32, 1))
    return {**answer, "kernels": chosen_kernels(runner.model)}


def chosen_kernels(model) -> list:
    """Scheme and kernels of the language model's linears, each kind once."""
    found = {}
    for name, module in model.named_modules():
        scheme = getattr(module, "scheme", None)
        if scheme is not None:
            kinds = [type(scheme).__name__, *(type(part).__name__ for part in _kernels(scheme))]
            found[" ".join(kinds)] = name
    return sorted(found)


def main(verb: str, argument: str, *directories: str) -> None:
    """Answer one line a directory: `{"directory", ...}`, with `error` where vLLM refuses it."""
    if verb == "schemes":
        pretend(int(argument))
    for directory in directories:
        answer = {"directory": directory}
        try:
            if verb == "schemes":
                answer |= read(directory)
            elif verb == "speed":
                answer |= speed(directory)
                gc.collect()  # the engine, before the next takes its place
                torch.cuda.empty_cache()
            else:
                answer |= serve(directory, **json.loads(Path(argument).read_text()))
        except (
            AssertionError,
            AttributeError,
            KeyError,
            NotImplementedError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            answer["error"] = f"{type(error).__name__}: {error}"
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
