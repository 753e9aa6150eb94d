"""What lies at a path that is given as a checkpoint, by the names of its files; what is none is refused by its kind."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from sweep.core.errors import SweepError
from sweep.core.text import override

# The names by which transformers finds weights: all in one file, or the index of shards.
SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
# Weights that are not safetensors, by the names of their files; the first kind that is found is named, with a way out.
_KINDS: Final = (
    (
        ("*.gguf",),
        "GGUF weights, which llama.cpp reads",
        "Give the safetensors checkpoint that they were made from: {source}. F16, BF16 and F32 lose nothing when "
        "transformers converts them: "
        'AutoModelForCausalLM.from_pretrained(DIR, gguf_file="{name}").save_pretrained(OUT).',
    ),
    (
        ("*.onnx", "onnx/*.onnx", "openvino_model.xml"),
        "a graph for inference (ONNX or OpenVINO)",
        "Give the checkpoint that it was exported from: {source}.",
    ),
    (
        ("tf_model*.h5", "saved_model.pb"),
        "TensorFlow weights",
        "Convert them with transformers 4 (from_pretrained(DIR, from_tf=True).save_pretrained(OUT)): {source}.",
    ),
    (
        ("flax_model*.msgpack",),
        "Flax weights",
        "Convert them with transformers 4 (from_pretrained(DIR, from_flax=True).save_pretrained(OUT)): {source}.",
    ),
    (("weights*.npz",), "MLX weights", "Give the checkpoint that they were made from: {source}."),
    (
        ("consolidated*.pth", "consolidated*.safetensors", "original/consolidated*", "params.json"),
        "weights in the layout of Llama's or Mistral's own code",
        "Download the same model in Hugging Face's layout (config.json and model*.safetensors): {source}.",
    ),
    (
        ("*.bin", "*.pt", "*.pth", "*.ckpt"),
        "pickled weights",
        "They can run code when loaded, so only safetensors are: save them again with model.save_pretrained(DIR) of a "
        "current transformers.",
    ),
)
_ADAPTERS: Final = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors")
_N_NAMED: Final = 3  # files that a message names
# ORG/NAME of the model card's front matter, alone or as the first of a list.
_BASE: Final = re.compile(r"^base_model:[ \t]*(?:\n[ \t]*-[ \t]*)?[\"']?([\w.-]+/[\w.-]+)", re.MULTILINE)


class _Adapter(msgspec.Struct):
    """adapter_config.json of PEFT."""

    base_model_name_or_path: str | None = None


def is_hub_id(path: str) -> bool:
    """Whether a typed path, at which nothing lies here, can be a model of the hub: ``ORG/NAME``."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).exists()


def check_place(path: Path) -> None:
    """Refuse what is no directory with config.json and safetensors that transformers loads.

    Raises: SweepError: names what is there, and what to type.
    """
    if path.is_file():
        raise SweepError(f"model.path={path} is a file. {_instead_of_file(path)}")
    if not path.is_dir():
        raise SweepError(f"model.path={path} is no directory. Give a local checkpoint directory: model.path=DIR.")
    _check_hub_cache(path)
    _check_links(path)
    _check_adapter(path)
    if not (path / "config.json").is_file():
        raise SweepError(f"model.path={path} has no config.json ({_contents(path)}). {_instead_of(path)}")
    if any((path / name).is_file() for name in (SINGLE, INDEX)):
        return
    if (found := _kind(path)) is not None:
        raise SweepError(f"model.path={path} holds {found}")
    if weights := sorted(file.name for file in path.glob("*.safetensors")):
        raise SweepError(
            f"model.path={path} has neither {SINGLE} nor {INDEX}, by which its weights "
            f"are found (there are: {', '.join(weights[:_N_NAMED])}). Download the index of these shards, or name a "
            f"single file {SINGLE}."
        )
    raise SweepError(
        f"model.path={path} has no *.safetensors file. Download the weights, or give another model.path=DIR."
    )


def source_to_type(path: Path) -> str:
    """The override that names what a checkpoint was made from, by its model card's base_model; else a placeholder."""
    card = path / "README.md"
    found = _BASE.search(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    return f"model.path={found[1]} (the base model by its README.md)" if found else "model.path=DIR"


def _check_hub_cache(path: Path) -> None:
    """Refuse a directory of the hub's cache above its snapshots."""
    caches = sorted(path.glob("models--*--*"))
    if caches and not (path / "config.json").is_file():
        names = [cache.name.removeprefix("models--").replace("--", "/") for cache in caches]
        raise SweepError(
            f"model.path={path} is the cache of the hub. Give one of its models by name: "
            + ", ".join(f"model.path={name}" for name in names[:_N_NAMED])
            + "."
        )
    cache = path.parent if path.name == "snapshots" else path
    if not cache.name.startswith("models--") or (path / "config.json").is_file():
        return
    named = cache / "refs" / "main"
    main = cache / "snapshots" / named.read_text(encoding="utf-8").strip() if named.is_file() else None
    snapshots = sorted(each for each in (cache / "snapshots").glob("*") if each.is_dir())
    if main in snapshots:
        snapshots = [main]
    if not snapshots:
        name = cache.name.removeprefix("models--").replace("--", "/")
        raise SweepError(
            f"model.path={path} is a hub cache without a snapshot. Download the model: hf download {name}."
        )
    raise SweepError(
        f"model.path={path} is a hub cache, which holds the checkpoint of each revision apart. Give one: "
        + " or ".join(override("model.path", str(each)) for each in snapshots[:_N_NAMED])
        + "."
    )


def _check_links(path: Path) -> None:
    """Refuse links to nothing, as a hub cache's snapshot has them that was copied alone."""
    files = [path / "config.json", *sorted(path.glob("*.safetensors*"))]
    if broken := next((file for file in files if file.is_symlink() and not file.exists()), None):
        raise SweepError(
            f"{broken} is a link to {broken.readlink()}, which is not there. Copy the directory with what its links "
            "lead to (cp -rL), or download the checkpoint again."
        )


def _check_adapter(path: Path) -> None:
    """Refuse a directory of an adapter's weights (PEFT or MLX), alone or beside the model's."""
    files = [name for name in _ADAPTERS if (path / name).is_file()]
    if not files:
        return
    try:
        base = msgspec.json.decode((path / _ADAPTERS[0]).read_bytes(), type=_Adapter).base_model_name_or_path
    except (OSError, msgspec.DecodeError):
        base = None
    of = f" of {base}" if base is not None else ""
    merge = (
        "merge the two and give the result (PEFT: "
        f'AutoPeftModelForCausalLM.from_pretrained("{path}").merge_and_unload().save_pretrained(DIR)): model.path=DIR.'
    )
    if (path / "config.json").is_file() and any(path.glob("model*.safetensors")):
        raise SweepError(
            f"model.path={path} holds an adapter ({', '.join(files)}) beside a model's weights, which would be scored "
            f"without it. For the model alone, move these files away; for both, {merge}"
        )
    raise SweepError(
        f"model.path={path} holds an adapter{of} ({', '.join(files)}), which changes another checkpoint's weights. "
        f"{merge[0].upper()}{merge[1:]}"
    )


def _instead_of_file(path: Path) -> str:
    """What to type instead of a file."""
    if path.suffix == ".gguf":
        return f"It holds {_words(*_KINDS[0][1:], path.parent, [path.name])}"
    if (path.parent / "config.json").is_file():
        return f"Give its directory: {override('model.path', str(path.parent))}."
    return "Give a Hugging Face checkpoint directory: model.path=DIR."


def _instead_of(path: Path) -> str:
    """What to type instead of a directory without config.json."""
    near = [path.parent, *sorted(each for each in path.iterdir() if each.is_dir())]
    checkpoints = [each for each in near if (each / "config.json").is_file() and any(each.glob("*.safetensors"))]
    if checkpoints:
        return "Give " + " or ".join(override("model.path", str(each)) for each in checkpoints[:_N_NAMED]) + "."
    if (found := _kind(path)) is not None:
        return f"It holds {found}"
    return "Give a Hugging Face checkpoint directory."


def _kind(path: Path) -> str | None:
    """The kind of weights in a directory that are not safetensors, with the way out; None: none that is known."""
    for patterns, kind, advice in _KINDS:
        if names := sorted(str(file.relative_to(path)) for pattern in patterns for file in path.glob(pattern)):
            return _words(kind, advice, path, names)
    return None


def _words(kind: str, advice: str, path: Path, names: Sequence[str]) -> str:
    """The kind of weights that these files hold, with the way out. Args: path: their directory."""
    return f"{kind} ({', '.join(names[:_N_NAMED])}). {advice.format(source=source_to_type(path), name=names[0])}"


def _contents(path: Path) -> str:
    return "found: " + (", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing")
