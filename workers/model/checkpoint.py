"""A checkpoint on disk: checks that it can be loaded safely, and the hash of its content. Imports nothing heavy."""

import contextlib
import hashlib
import shlex
from collections.abc import Collection, Sequence
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
from workers.model.place import INDEX, SINGLE, check_place, source_to_type
from workers.model.quantizers import FILES, Header, Mark, config_marks, lora_tensor, tensor_mark

_SETTINGS = (".json", ".jinja", ".model", ".tiktoken", ".txt")  # tokenizer, preprocessor and generation settings
NOT_HELD: Final = "tied to another module, or made of several tensors"  # why a linear has no weight of its own on disk
_LEGAL = ("licen", "notice", "copying")  # how names of files begin that must travel with the weights
_LFS_POINTER = b"version https://git-lfs"  # begins the text that stands for a file which Git LFS has not fetched

# What else can be done than giving the source, by method.
_WAYS_OUT = {
    "bitsandbytes": "Merge an adapter that was trained on it (QLoRA) into the 16-bit checkpoint, not into this one.",
    "mxfp4": "Where none was published (gpt-oss), dequantize it: AutoModelForCausalLM.from_pretrained(DIR, "
    "quantization_config=Mxfp4Config(dequantize=True)).save_pretrained(OUT).",
    "mlx": "Without one, write its values, with the errors that they have: "
    "mlx_lm.convert --hf-path DIR --mlx-path OUT --dequantize.",
    "bitnet": "A BitNet model is trained with ternary weights: without them it is another model.",
    "compressed-tensors": "Without one, write its values, with the errors that they have: "
    "AutoModelForCausalLM.from_pretrained(DIR, quantization_config=CompressedTensorsConfig(dequantize=True))"
    ".save_pretrained(OUT).",
}


class _Sections(msgspec.Struct):
    """The part of config.json that says how the language model computes."""

    num_key_value_heads: int | None = None
    dtype: str | None = None
    torch_dtype: str | None = None  # as transformers before 5 wrote it


class _Config(_Sections):
    """config.json; that of a vision-language model has a section for the language model."""

    text_config: _Sections | None = None


class _Fp8(msgspec.Struct):
    """A section of config.json for FP8 (transformers' FineGrainedFP8Config)."""

    fmt: str = "e4m3"
    weight_block_size: tuple[int, int] | None = None


class _Named(msgspec.Struct):
    """A quantizer's own file, as far as it names the method."""

    quant_method: str | None = None


class _Index(msgspec.Struct):
    """The index of a sharded checkpoint."""

    weight_map: dict[str, str]  # weight file by tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Source:
    """A checkpoint that holds weights in FP8 (E4M3) beside their scales, in the layout of official releases."""

    block: tuple[int, int] | None  # rows and columns under one scale; None: a scale a row or tensor
    dtype: str  # that config.json has for the model, by torch's name


def check_checkpoint(path: Path) -> None:
    """Refuse what cannot be loaded safely as plain weights or FP8 beside scales, before anything heavy is imported.

    Raises: SweepError: no directory of a model; weights of another kind than safetensors; an adapter; weights that are
        quantized in another way.
    """
    check_place(path)
    check_unquantized(path)


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


def loaded_index(path: Path) -> list[Path]:
    """The index by which transformers loads the weights; none where they are one file."""
    return [] if (path / SINGLE).is_file() or not (path / INDEX).is_file() else [path / INDEX]


def loaded_files(path: Path) -> list[Path]:
    """The weight files that transformers loads, sorted by name; copies of the weights in another layout are left out.

    Raises: SweepError: the index is damaged.
    """
    if index := loaded_index(path):
        return sorted(path / name for name in _shards(index[0]))
    return [path / SINGLE] if (path / SINGLE).is_file() else []


def headers(file: Path) -> dict[str, Header]:
    """The tensors of a weight file by name; none is read.

    Raises: SweepError: the file is not as long as its header says, cannot be read, or stands for one in Git LFS.
    """
    _check_fetched(file)
    try:
        with safe_open(file, framework="numpy") as opened:
            slices = ((name, opened.get_slice(name)) for name in opened.keys())  # noqa: SIM118 -- no mapping
            return {name: Header(dtype=each.get_dtype(), shape=tuple(each.get_shape())) for name, each in slices}
    except SafetensorError as error:
        raise SweepError(
            f"{file} is cut short or damaged. Download it again, or compare its checksum with the published one."
        ) from error
    except OSError as error:
        raise SweepError(
            f"Cannot read {file}: {error.strerror or error}. Check the path and its permissions."
        ) from error


def check_unquantized(path: Path) -> None:
    """Refuse a checkpoint whose weights are quantized, but in FP8 beside scales, which are dequantized.

    Raises: SweepError: as `fp8_source`; names the method, and the place that says so.
    """
    fp8_source(path)


def fp8_source(path: Path) -> Fp8Source | None:
    """How a checkpoint in FP8 of the official layout holds its weights; None: its weights are plain.

    Args: path: a directory with config.json and weight files.

    Raises: SweepError: weights that are quantized in any other way, by config.json, by a file that quantizers put
        beside it, or by the dtypes and names of tensors; an adapter's weights that are not merged; damaged files.
    """
    said = check_marks(path)
    tensors = _tensors(path)
    if (lora := lora_tensor(tensors)) is not None:
        raise SweepError(
            f"The checkpoint {path} holds an adapter's weights beside the model's ({lora}): they would be left out. "
            "Merge them (PEFT: model.merge_and_unload().save_pretrained(DIR)), and give that: model.path=DIR."
        )
    found = tensor_mark(tensors)
    if not said:
        if found is None:
            return None
        raise _quantized(path, [found])
    if found is None:
        raise _quantized(path, said)
    try:
        sections = [msgspec.convert(mark.section, _Fp8) for mark in said]
    except msgspec.ValidationError as error:
        raise SweepError(f"{said[0].place}, of {path}, is damaged: {error}. Download it again.") from error
    odd = [f"fmt={each.fmt}" for each in sections if each.fmt != "e4m3"]
    odd += [f"{name} is {each.dtype}" for name, each in tensors.items() if _is_other_code(name, each)]
    if odd:
        raise _quantized(path, [*said, Mark(method="codes that are not E4M3", place=odd[0], section={})])
    return Fp8Source(block=sections[0].weight_block_size, dtype=_dtype(path))


def check_marks(path: Path) -> list[Mark]:
    """The marks of FP8 in config.json and in files beside it; no weight file need be there.

    Raises: SweepError: marks of any other quantizer.
    """
    said = _said(path)
    if any(mark.method != "fp8" for mark in said):
        raise _quantized(path, said)
    return said


def _is_other_code(name: str, header: Header) -> bool:
    """Whether a tensor of an FP8 checkpoint is a matrix of codes that are not E4M3, as FP4 experts are."""
    return header.dtype not in ("F8_E4M3", "F8_E8M0") and tensor_mark({name: header}) is not None


def _said(path: Path) -> list[Mark]:
    """The marks of quantizers in config.json and in files beside it."""
    found: list[Mark] = []
    _check_fetched(path / "config.json")
    with contextlib.suppress(msgspec.DecodeError):  # whoever makes the model of it says what is wrong
        found += config_marks(msgspec.json.decode((path / "config.json").read_bytes()))
    for name, method in FILES.items():
        if (path / name).is_file():
            found.append(Mark(method=_method(path / name, method), place=name, section={}))
    return found


def _method(file: Path, default: str) -> str:
    """The method that a quantizer's own file names. Args: default: of the quantizer that writes such a file."""
    with contextlib.suppress(msgspec.DecodeError):
        return (msgspec.json.decode(file.read_bytes(), type=_Named).quant_method or default).lower()
    return default


def _quantized(path: Path, marks: Sequence[Mark]) -> SweepError:
    """The refusal of a checkpoint with these marks, and what to do with it."""
    tensors: dict[str, Header] = {}
    with contextlib.suppress(SweepError):  # damaged, too
        tensors = _tensors(path)
    said = "; ".join(f"{mark.method}, by {mark.place}" for mark in marks)
    way_out = f"ive the checkpoint that it was made from: {source_to_type(path)}."
    for method in dict.fromkeys(mark.method for mark in marks):
        way_out += f" {_WAYS_OUT[method]}" if method in _WAYS_OUT else ""
    if tensors and tensor_mark(tensors) is None:
        dtypes = ", ".join(sorted({header.dtype for header in tensors.values()}))
        return SweepError(
            f"The checkpoint {path} is marked as quantized ({said}), but all its tensors hold plain values ({dtypes}). "
            f"If these are the whole weights, delete {' and '.join(mark.place for mark in marks)}. If not, g{way_out}"
        )
    if marks[0].method == "fp8" and marks[0].place.startswith("tensor"):
        way_out += (
            ' Or name the method in config.json: "quantization_config": {"quant_method": "fp8", '
            '"weight_block_size": [128, 128]}, with the block that its scales have.'
        )
    return SweepError(
        f"The checkpoint {path} is quantized already ({said}): its codes are no weights to quantize. G{way_out}"
    )


def _tensors(path: Path) -> dict[str, Header]:
    """All tensors that are loaded, by name; headers are read, no values.

    Raises: SweepError: names a file that was cut short, is missing from a sharded checkpoint, or is empty.
    """
    if (index := path / INDEX).is_file():
        missing = sorted(name for name in _shards(index) if not (path / name).is_file())
        if missing:
            raise SweepError(
                f"{path} lacks {missing[0]} ({len(missing)} such files), which {index.name} names. "
                "Download the checkpoint again."
            )
    for file in settings_files(path):
        _check_fetched(file)
    found: dict[str, Header] = {}
    for file in loaded_files(path):
        if not (tensors := headers(file)):
            raise SweepError(f"{file} is empty: it holds no tensor. Download it again.")
        found |= tensors
    return found


def _dtype(path: Path) -> str:
    """The dtype that config.json has for the model, by torch's name; bfloat16 where it has none."""
    named: list[str | None] = []
    with contextlib.suppress(msgspec.DecodeError):  # whoever makes the model of it says what is wrong
        config = msgspec.json.decode((path / "config.json").read_bytes(), type=_Config)
        for part in (config, config.text_config or config):
            named += (part.dtype, part.torch_dtype)
    return next((name for name in named if name is not None), "bfloat16")


def _shards(index: Path) -> set[str]:
    """Names of the weight files of an index. Raises: SweepError: it names none."""
    try:
        return {*msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values()}
    except (OSError, msgspec.DecodeError) as error:
        raise SweepError(f"{index} is damaged: it names no weight files. Download it again.") from error


def _check_fetched(file: Path) -> None:
    """Refuse the text that Git LFS leaves in place of a file. Raises: SweepError: it cannot be read, either."""
    try:
        with file.open("rb") as opened:
            begins = opened.read(len(_LFS_POINTER))
    except OSError as error:
        raise SweepError(f"Cannot read {file}: {error.strerror}. Check the path and its permissions.") from error
    if begins == _LFS_POINTER:
        raise SweepError(
            f"{file} is a Git LFS pointer, not the file itself. Fetch it: cd {shlex.quote(str(file.parent))} && "
            "git lfs pull"
        )


def key_value_heads(path: Path) -> int | None:
    """The language model's key-value heads, by config.json; None: it does not say."""
    config = msgspec.json.decode((path / "config.json").read_bytes(), type=_Config)
    return (config.text_config or config).num_key_value_heads


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
    """SHA-256 over config.json and every weight file that is loaded: two checkpoints with equal revisions score alike.

    Hashes of files are kept on disk by size, mtime and inode, so that 9 GB are read once, not at every start.
    """
    files = [path / "config.json", *loaded_files(path)]
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


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SweepError(f"Cannot read {path}: {error.strerror}. Check the path and its permissions.") from error
