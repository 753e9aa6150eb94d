"""A checkpoint on disk: checks that it can be loaded safely, and the hash of its content. Imports nothing heavy."""

import hashlib
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from safetensors import SafetensorError, safe_open

from sweep.core import cache
from sweep.core.errors import SweepError
from sweep.core.groups import ModelStructure
from sweep.core.paths import MANIFEST

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_SETTINGS = (".json", ".jinja", ".model", ".tiktoken", ".txt")  # tokenizer, preprocessor and generation settings
# Files by which quantizers say so, where config.json may not: ModelOpt, AutoGPTQ and AutoAWQ before transformers knew.
_QUANTIZED = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
NOT_HELD: Final = "tied to another module, or made of several tensors"  # why a linear has no weight of its own on disk
_LEGAL = ("licen", "notice", "copying")  # how names of files begin that must travel with the weights


_NULL = msgspec.Raw(b"null")


class _Quantization(msgspec.Struct):
    """The section of config.json that says how the weights are quantized."""

    quant_method: str = "unknown method"
    fmt: str = "e4m3"  # of FP8
    weight_block_size: list[int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Source:
    """A checkpoint that holds weights in FP8 beside scales, which is dequantized as it is read."""

    block: list[int] | None  # rows and columns under one scale; None: a scale a row or tensor
    dtype: str  # of the weights then, by torch's name


class _Sections(msgspec.Struct):
    """The sections of config.json by which readers take a checkpoint as quantized, whatever they hold; and heads."""

    num_key_value_heads: int | None = None
    dtype: str | None = None
    torch_dtype: str | None = None  # as transformers before 5 wrote it
    quantization_config: msgspec.Raw = _NULL
    compression_config: msgspec.Raw = _NULL  # of compressed-tensors before 0.7


class _Config(_Sections):
    """config.json; some vision-language models have the section in that of the language model."""

    text_config: _Sections | None = None


class _Index(msgspec.Struct):
    """The index of a sharded checkpoint."""

    weight_map: dict[str, str]  # weight file by tensor


def check_checkpoint(path: Path) -> None:
    """Refuse a directory that cannot be loaded safely, before anything heavy is imported.

    Raises: SweepError: missing, no config.json, no safetensors, or pickled weights only.
    """
    if not path.is_dir():
        raise SweepError(f"model.path={path} is no directory. Give a local checkpoint directory: model.path=DIR.")
    if (path / "adapter_config.json").is_file():
        raise SweepError(
            f"model.path={path} holds an adapter (adapter_config.json), which changes another checkpoint's weights. "
            "Merge the two and save the result (PEFT: merge_and_unload), then give that: model.path=DIR."
        )
    if not (path / "config.json").is_file():
        found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise SweepError(
            f"model.path={path} has no config.json (found: {found}). Give a Hugging Face checkpoint directory."
        )
    if not weight_files(path):
        pickles = sorted(p.name for pattern in _PICKLES for p in path.glob(pattern))
        if pickles:
            raise SweepError(
                f"model.path={path} holds pickled weights ({', '.join(pickles[:3])}), which can run code when loaded. "
                "Only safetensors are loaded: save it again with model.save_pretrained(DIR) of a current transformers."
            )
        raise SweepError(
            f"model.path={path} has no *.safetensors file. Download the weights, or give another model.path=DIR."
        )
    check_unquantized(path)


def check_weights(path: Path) -> None:
    """Refuse weight files that were cut short or are missing from a sharded checkpoint; reads their headers only.

    Raises: SweepError: names the file.
    """
    names = {file.name for file in weight_files(path)}
    for index in index_files(path):
        try:
            missing = sorted({*msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values()} - names)
        except (OSError, msgspec.DecodeError) as error:
            raise SweepError(f"{index} is damaged: it names no weight files. Download it again.") from error
        if missing:
            raise SweepError(
                f"{path} lacks {missing[0]} ({len(missing)} such files), which {index.name} names. "
                "Download the checkpoint again."
            )
    for file in weight_files(path):
        if not _is_whole(file):
            raise SweepError(
                f"{file} is cut short or damaged. Download it again, or compare its checksum with the published one."
            )


def check_fit(path: Path, structure: ModelStructure) -> None:
    """Refuse weights that are not those of the model that config.json names.

    Raises: SweepError: names the first tensor of another shape, or that is missing.
    """
    if structure.mismatched:
        n_others = len(structure.mismatched) - 1
        more = f" ({n_others} more such tensors)" if n_others else ""
        raise SweepError(
            f"Weights and config.json of {path} do not fit: {structure.mismatched[0]}, which config.json asks "
            f"for{more}. Download both again."
        )
    check_complete(path, structure.missing)


def check_complete(path: Path, missing: Collection[str]) -> None:
    """Refuse a checkpoint that lacks parameters. Raises: SweepError: names the first of `missing`, if there are any."""
    if missing:
        raise SweepError(
            f"The checkpoint {path} lacks {len(missing)} weights, the first {min(missing)!r}: they would be random. "
            "Download it again."
        )


def weight_files(path: Path) -> list[Path]:
    """The checkpoint's weight files, sorted by name."""
    return sorted(path.glob("*.safetensors"))


def loaded_index(path: Path) -> list[Path]:
    """The index by which transformers loads the weights; none where they are one file."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    return [index] if index.is_file() and not single.is_file() else []


def loaded_files(path: Path) -> list[Path]:
    """The weight files that transformers loads; copies of the weights in another layout are left out."""
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    if index := loaded_index(path):
        shards = msgspec.json.decode(index[0].read_bytes(), type=_Index).weight_map.values()
        return sorted(path / name for name in {*shards})
    return weight_files(path)


def check_unquantized(path: Path) -> None:
    """Refuse a checkpoint whose weights are quantized, by its config.json or by a file that quantizers put beside it.

    FP8 with scales is not refused: see workers.model.tensors.

    Raises: SweepError: names the method, and the file that says so.
    """
    if fp8_source(path) is not None:
        return
    try:
        config = msgspec.json.decode((path / "config.json").read_bytes(), type=_Config)
    except msgspec.DecodeError:
        return  # whoever makes the model of it says what is wrong
    parts = [part for part in (config, config.text_config) if part is not None]
    sections = [section for part in parts for section in (part.quantization_config, part.compression_config)]
    found = [(_method(section), "config.json") for section in sections if section != _NULL]
    found += [(method, name) for name, method in _QUANTIZED.items() if (path / name).is_file()]
    if found:
        method, name = found[0]
        raise SweepError(
            f"The checkpoint {path} is quantized already ({method}, by its {name}): its codes are no weights to "
            "quantize. Give the checkpoint that it was made from: model.path=DIR."
        )


def fp8_source(path: Path) -> Fp8Source | None:
    """How a checkpoint of official FP8 layout (`quant_method` fp8, E4M3) holds its weights; None: it is another."""
    try:
        config = msgspec.json.decode((path / "config.json").read_bytes(), type=_Config)
        parts = [part for part in (config, config.text_config) if part is not None]
        sections = [part.quantization_config for part in parts if part.quantization_config != _NULL]
        found = [msgspec.json.decode(section, type=_Quantization) for section in sections]
    except msgspec.DecodeError:
        return None
    if not found or any(each.quant_method != "fp8" or each.fmt != "e4m3" for each in found):
        return None
    dtypes = [name for part in parts for name in (part.dtype, part.torch_dtype) if name is not None]
    return Fp8Source(block=found[0].weight_block_size, dtype=dtypes[0] if dtypes else "bfloat16")


def _method(section: msgspec.Raw) -> str:
    try:
        return msgspec.json.decode(section, type=_Quantization).quant_method
    except msgspec.DecodeError:
        return _Quantization().quant_method


def key_value_heads(path: Path) -> int | None:
    """The language model's key-value heads, by config.json; None: it does not say."""
    config = msgspec.json.decode((path / "config.json").read_bytes(), type=_Config)
    return (config.text_config or config).num_key_value_heads


def index_files(path: Path) -> list[Path]:
    """The files that map tensors to weight files; a checkpoint of one weight file needs none."""
    return sorted(path.glob("*.safetensors.index.json"))


def settings_files(path: Path) -> list[Path]:
    """The files beside weights, their index and config.json, which are copied into an exported checkpoint."""
    others = {"config.json", MANIFEST, *(file.name for file in path.glob("*.index.json"))}
    found = [file for file in path.iterdir() if file.suffix in _SETTINGS or file.name.lower().startswith(_LEGAL)]
    return sorted(file for file in found if file.name not in others and file.is_file())


def checkpoint_names(path: Path) -> list[str]:
    """Names of the files of a checkpoint that is written from this one, quantized."""
    files = (*loaded_files(path), *loaded_index(path), *settings_files(path))
    return [*(file.name for file in files), "config.json"]


def revision(path: Path) -> str:
    """SHA-256 over config.json and every weight file: two checkpoints with equal revisions score alike.

    Hashes of files are kept on disk by size, mtime and inode, so that 9 GB are read once, not at every start.
    """
    files = [path / "config.json", *weight_files(path)]
    with ThreadPoolExecutor() as threads:  # hashing lets other threads run
        hashes = list(threads.map(file_hash, files))
    lines = "".join(f"{file.name}:{found}\n" for file, found in zip(files, hashes, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, remembered by its stat.

    Raises: SweepError: the file cannot be read.
    """
    return cache.remember("file-hash", file_key(path), lambda: _sha256(path))


def file_key(path: Path) -> list[str | int]:
    """A key that changes when a file does: path, size, mtime and inode.

    Raises: SweepError: the file is not there.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise SweepError(f"Cannot read {path}: {error.strerror}. Check the path and its permissions.") from error
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _is_whole(file: Path) -> bool:
    """Whether a file is as long as its header says; safetensors checks it when it opens one, and reads no tensor."""
    try:
        with safe_open(file, framework="numpy"):
            return True
    except SafetensorError:
        return False
    except OSError as error:
        raise SweepError(
            f"Cannot read {file}: {error.strerror or error}. Check the path and its permissions."
        ) from error


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SweepError(f"Cannot read {path}: {error.strerror}. Check the path and its permissions.") from error
