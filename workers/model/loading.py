"""Checkpoints through transformers: structure without weights, token ids, loaded models. The home of `transformers`."""

import inspect
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils import logging as transformers_logging

from sweep.core.coverage import OTHER_HEAD, Holder, weight_kind
from sweep.core.errors import SweepError
from sweep.core.groups import Linear, ModelStructure
from sweep.core.text import count
from workers.model.checkpoint import check_checkpoint, check_complete, check_marks
from workers.model.place import is_hub_id
from workers.model.tensors import HeldTensor, meta_tensors, open_tensors

# Model types whose attention keeps samples of one row apart when their positions start again at 0; each has a test.
# Any other model gets batches of equal lengths, which is right for every architecture and slower on a GPU.
PACKABLE = frozenset({"qwen3_vl", "qwen2", "qwen3", "llama", "mistral"})

# The errors that transformers raises on a config.json or on weights that make no model.
UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ArithmeticError),
    *(StrictDataclassError, SafetensorError),
)


def local_checkpoint(path: str) -> Path:
    """A checkpoint directory for a local path or a hub id (from the local hub cache, or downloaded).

    Raises: SweepError: neither, or pickled weights only.
    """
    directory = Path(path).expanduser()
    if is_hub_id(path):
        from huggingface_hub import snapshot_download

        settings = ["*.json", "*.txt", "*.model", "*.jinja"]
        try:
            small = Path(snapshot_download(path, allow_patterns=settings))
            if (small / "config.json").is_file():
                check_marks(small)  # before gigabytes are fetched
            directory = Path(snapshot_download(path, allow_patterns=[*settings, "model*.safetensors"]))
        except (OSError, ValueError) as error:
            raise SweepError(
                f"Checkpoint {path!r} is neither a local directory nor in reach on the hub "
                f"({type(error).__name__}). Give a local copy: model.path=DIR."
            ) from error
    check_checkpoint(directory)
    return directory


def read_config(path: Path) -> PreTrainedConfig:
    """The checkpoint's transformers configuration; code from the checkpoint is never run.

    Raises: SweepError: unreadable, or a model that needs its own code.
    """
    _be_quiet()
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except UNREADABLE as error:
        raise _no_model(path, error) from error
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            delattr(part, "quantization_config")  # weights are dequantized as they are read: workers.model.tensors
    return config


def structure(path: Path) -> ModelStructure:
    """Linears and sizes of the checkpoint's model, and how the checkpoint holds it; no weight is read.

    transformers loads tensors without values, with the shapes that the headers of the weight files have, into a model
    without values: what it misses, renames and joins here is what it will when it loads them.

    Raises: SweepError: the configuration makes no model, or one that predicts no next tokens; tensors that make no
        parameter together, or one twice; FP8 weights without their scales.
    """
    config = read_config(path)
    with ExitStack() as stack:
        held = open_tensors(path, stack)
        tensors = meta_tensors(held)
        try:
            model, info = _model_class(config).from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except UNREADABLE as error:
            _check_parts(path, config, tensors)
            raise _no_model(path, error) from error
        head = _output_layer(path, model)
        parameter_of = parameters_by_tensor(model, held)
        _check_once(path, parameter_of)
        copies, untied = _tie_copies(model, held, {name: tensor for tensor, (name, _) in parameter_of.items()})
    elements = _elements(model, model.get_input_embeddings().weight, head)
    linears = _linears(model)
    weights = {name: tensor for tensor, (name, is_whole) in parameter_of.items() if is_whole and name not in copies}
    return ModelStructure(
        linears=linears,
        parameters=sum(elements.values()),
        elements=elements,
        vocabulary=config.get_text_config().vocab_size,
        packable=config.model_type in PACKABLE,
        on_disk={
            linear.name: tensor.removesuffix(".weight")
            for linear in linears
            if (tensor := weights.get(f"{linear.name}.weight")) is not None
        },
        missing=tuple(sorted(info["missing_keys"])),
        mismatched=tuple(
            f"{name} {[*found]}, not {[*expected]}" for name, found, expected in sorted(info["mismatched_keys"])
        ),
        unused=tuple(sorted(held.keys() - parameter_of.keys())),
        other_head=None if _has_usual_name(head) else head,
        untied=untied,
        from_fp8=sum(tensors[name].numel() for name in parameter_of if held[name].scale is not None),
    )


def configured_linears(path: Path) -> tuple[Linear, ...]:
    """The linears of the model that config.json builds, whatever its weight files hold: an export's, among others.

    Raises: SweepError: the configuration makes no model.
    """
    config = read_config(path)
    try:
        return _linears(_empty_model(config))
    except UNREADABLE as error:
        raise _no_model(path, error) from error


def _empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model that a configuration builds, without values. Raises: one of UNREADABLE: it builds none."""
    with torch.device("meta"):
        return _model_class(config)(config)


def _linears(model: nn.Module) -> tuple[Linear, ...]:
    return tuple(
        Linear(name=name, n_inputs=module.in_features, n_outputs=module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    )


def parameters_by_tensor(model: PreTrainedModel, tensors: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """The parameter or buffer that transformers makes of each tensor of a checkpoint, by the tensor's name.

    Args:
        model: any state of it.
        tensors: names on disk.

    Returns: its name, and whether it is the tensor as it is, not one of several or turned; tensors that the model does
        not have are left out.
    Source: the renaming in `convert_and_load_state_dict_in_model` of transformers 5.17 and 5.24.
    """
    known, conversions = model.state_dict(), get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    found: dict[str, tuple[str, bool]] = {}
    for tensor in tensors:
        name, pattern = rename_source_key(tensor, renamings, converters, model.base_model_prefix, known)
        if name not in known and tensor in known:
            name, pattern = tensor, None
        if name in known:
            found[tensor] = name, pattern is None
    return found


def _elements(model: PreTrainedModel, embedding: nn.Parameter, head: str) -> dict[str, int]:
    """Numbers of elements of a model's weights, by kind; tied weights, which transformers has made one, count once.

    Args:
        model: any state of it.
        embedding: of its tokens.
        head: name of its output layer.
    """
    found = Counter(embeddings=embedding.numel(), lm_head=0)
    if not _has_usual_name(head):
        found[OTHER_HEAD] = 0  # where it is tied
    for name, parameter in model.named_parameters():
        if parameter is not embedding:
            module = name.rpartition(".")[0]
            is_other_head = name == f"{head}.weight" and not _has_usual_name(head)
            holder = _holder(model.get_submodule(module))
            kind = OTHER_HEAD if is_other_head else weight_kind(name, parameter.shape, holder)
            found[kind] += parameter.numel()
    return dict(found)


def _output_layer(path: Path, model: PreTrainedModel) -> str:
    """The name of the module that makes logits of next tokens.

    Raises: SweepError: the model has none, has an encoder, or fills in masked tokens.
    """
    kind, head = type(model), model.get_output_embeddings()
    masked, causal = (
        getattr(mapping.get(type(model.config), None), "__name__", None)
        for mapping in (MODEL_FOR_MASKED_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)
    )
    why = None
    if model.config.is_encoder_decoder:
        why = "it reads with an encoder and writes with a decoder"
    elif kind.__name__ == masked != causal:
        why = "it fills in masked tokens"
    elif head is None:
        why = "it has no output layer"
    name = next((name for name, module in model.named_modules() if module is head), None)
    if why is not None or name is None:
        raise SweepError(
            f"{path} is no causal language model: config.json names {kind.__name__}, and {why or 'it has no logits'}. "
            "Scores and KL are of next tokens. Choose a model that predicts them: model.path=DIR."
        )
    return name


def _has_usual_name(head: str) -> bool:
    """Whether an output layer has the name by which ModelOpt's presets and the coverage know it."""
    return head.rpartition(".")[2] == "lm_head"


def _tie_copies(
    model: PreTrainedModel, held: Mapping[str, HeldTensor], tensor_of: Mapping[str, str]
) -> tuple[frozenset[str], tuple[str, ...]]:
    """Make one of parameters that config.json ties and the checkpoint holds twice, as transformers does with values.

    Args:
        model: without values; it is changed.
        held: of its checkpoint, to be read: both of such a pair are.
        tensor_of: a tensor on disk, by the parameter that it makes.

    Returns: the parameters that are copies; those that have other values than what they are tied to, and stay apart.
    """
    copies, untied = set[str](), list[str]()
    for copy, origin in model.all_tied_weights_keys.items():
        if not tensor_of.keys() >= {copy, origin} or model.get_parameter(copy) is model.get_parameter(origin):
            continue
        ours, theirs = held[tensor_of[copy]], held[tensor_of[origin]]
        if ours.shape == theirs.shape and torch.equal(ours.read(), theirs.read()):
            module, _, leaf = copy.rpartition(".")
            setattr(model.get_submodule(module), leaf, model.get_parameter(origin))
            copies.add(copy)
        else:
            untied.append(copy)
    return frozenset(copies), tuple(untied)


def _check_once(path: Path, parameter_of: Mapping[str, tuple[str, bool]]) -> None:
    """Refuse several tensors for one parameter, as a checkpoint has that was saved under old and new names.

    Raises: SweepError: names them.
    """
    tensors: dict[str, str] = {}
    for tensor, (name, is_whole) in parameter_of.items():
        if is_whole and (other := tensors.setdefault(name, tensor)) != tensor:
            raise SweepError(
                f"{path} holds {name} twice, as {other} and as {tensor}: which one a runtime takes is not known. "
                "Remove one, or download the checkpoint again."
            )


def _fit(kinds: Collection[Counter[tuple[int, ...]]]) -> bool:
    """Whether each kind of part has one shape, and all have equally many. Args: kinds: numbers of parts by shape."""
    return all(len(sizes) == 1 for sizes in kinds) and len({sizes.total() for sizes in kinds}) == 1


def _sizes(sizes: Counter[tuple[int, ...]]) -> str:
    return ", ".join(f"{n} of {[*size]}" for size, n in sizes.most_common())


def _check_parts(path: Path, config: PreTrainedConfig, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that make no parameter together, as experts do of which one lacks a matrix or has another shape.

    Raises: SweepError: names the parameter, and the tensors by their number and sizes.
    """
    try:
        model = _empty_model(config)
    except UNREADABLE:
        return  # the caller says what is wrong with the configuration
    parts: dict[str, dict[str, Counter[tuple[int, ...]]]] = {}  # by parameter, by name without numbers
    for tensor, (name, is_whole) in parameters_by_tensor(model, tensors).items():
        if not is_whole:
            kinds = parts.setdefault(name, {})
            kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", tensor), Counter())[tuple(tensors[tensor].shape)] += 1
    odd = sorted(name for name, kinds in parts.items() if not _fit(kinds.values()))
    if odd:
        name = odd[0]
        found = "; ".join(f"{kind}: {_sizes(sizes)}" for kind, sizes in parts[name].items())
        raise SweepError(
            f"The checkpoint {path} lacks tensors, or has them in a wrong shape: {name} is made of equally many of one "
            f"shape, but there are {found} ({count(len(odd), 'such parameter')}). Download it again."
        )


def _holder(module: nn.Module) -> Holder:
    """The kind of module, as sweep.core.coverage tells them apart."""
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, Conv1D):
        return "conv1d"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "convolution" if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else "other"


def read_tokenizer(path: Path) -> Any:
    """The checkpoint's own tokenizer. Raises: SweepError: there is none that loads."""
    _be_quiet()
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except UNREADABLE as error:
        raise SweepError(
            f"{path} has no tokenizer that loads: {first_line(error)} Copy the model's tokenizer files there."
        ) from error


def tokenize(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, with the special tokens that the checkpoint's own tokenizer adds; nothing cut or padded.

    Raises: SweepError: the checkpoint has no tokenizer that loads.
    """
    tokens = [list(ids) for ids in read_tokenizer(path)(list(texts))["input_ids"]]
    if not any(tokens):  # transformers makes such a tokenizer for a directory without tokenizer files
        raise SweepError(f"{path} has no tokenizer: no text gives a token. Copy the model's tokenizer files there.")
    return tokens


def image_tokens(path: Path) -> dict[str, int]:
    """Token ids and merge factor with which the model reads an image.

    Raises: SweepError: a model without a Qwen3-VL style vision tower.
    """
    config = read_config(path)
    vision = getattr(config, "vision_config", None)
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id")
    patch = [getattr(vision, f"{name}_size", None) for name in ("patch", "temporal_patch", "spatial_merge")]
    if patch != [16, 2, 2] or any(not hasattr(config, name) for name in names):
        raise SweepError(
            "dataset=scenes needs a model that reads images in patches of 16 as Qwen3-VL does; "
            f"{config.model_type!r} does not. Choose a text data set."
        )
    return {
        "vision_start": config.vision_start_token_id,
        "vision_end": config.vision_end_token_id,
        "image_token": config.image_token_id,
        "merge": config.vision_config.spatial_merge_size,
    }


def load(path: Path, *, dtype: torch.dtype, device: str, n_gpus: int = 1) -> PreTrainedModel:
    """The model with its weights, ready for capture: evaluation mode, no parameter takes a gradient.

    Args:
        path: checkpoint directory.
        dtype: of the weights.
        device: "cpu" or "cuda".
        n_gpus: that its decoder layers are spread over, the first ones that are visible; each layer computes where its
            weights are.

    Raises: SweepError: the weights do not fit the configuration or the GPUs, or cannot be read.
    """
    config = read_config(path)
    # Straight to the GPU, without a copy in the host's memory.
    on_gpus = device if n_gpus == 1 else "balanced"
    try:
        with ExitStack() as stack:
            model, info = _model_class(config).from_pretrained(
                None,
                config=config,
                state_dict=open_tensors(path, stack),
                dtype=dtype,
                device_map=None if device == "cpu" else on_gpus,
                output_loading_info=True,
            )
        if (path / GENERATION_CONFIG_NAME).is_file():
            model.generation_config = GenerationConfig.from_pretrained(path)
    except torch.OutOfMemoryError as error:
        raise SweepError(
            f"The checkpoint {path} does not fit the GPU's memory. "
            f"Type cluster.gpus_per_worker={n_gpus + 1} for a sweep, cluster.device=cpu to validate or export, "
            "or take a larger GPU."
        ) from error
    except UNREADABLE as error:
        advice = "Its weights must fit its config.json: download both again."
        raise SweepError(f"The checkpoint {path} does not load: {first_line(error)} {advice}") from error
    check_complete(path, info["missing_keys"])
    if away := {str(place) for place in getattr(model, "hf_device_map", {}).values()} & {"cpu", "disk"}:
        raise SweepError(
            f"The checkpoint {path} does not fit {n_gpus} GPU(s), {away.pop()} would hold the rest. "
            f"Type cluster.gpus_per_worker={n_gpus + 1}."
        )
    return model.eval().requires_grad_(False)


def key_value_cache(model: PreTrainedModel) -> dict[str, Any]:
    """Forward's arguments for a cache of keys and values: empty, and extended by each pass that is given them."""
    names = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in names else "past_key_values"  # as transformers 5.17 calls it; 5.24 warns of that name
    return {name: DynamicCache(config=model.config.get_text_config()), "use_cache": True}


def _no_model(path: Path, error: BaseException) -> SweepError:
    version = transformers.__version__
    return SweepError(
        f"{path / 'config.json'} is no model that transformers {version} knows: {first_line(error)} "
        "Give another checkpoint: model.path=DIR."
    )


def _model_class(config: PreTrainedConfig) -> Any:
    """The class that the checkpoint names, so that a vision-language model keeps its vision tower."""
    for architecture in config.architectures or ():
        if (found := getattr(transformers, architecture, None)) is not None:
            return found
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _be_quiet() -> None:
    """Have transformers print no progress bars and no advice while a checkpoint is read."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def first_line(error: BaseException) -> str:
    """An error's kind and first line, with the next one if that only announces it."""
    first, *rest = str(error).strip().splitlines() or ["no message"]
    if rest and first.endswith(":"):
        first = f"{first} {rest[0].strip()}"
    return f"{type(error).__name__}: {first}"
