"""A path that is no directory of safetensors is refused by its kind, with what to type."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sweep.core.errors import SweepError
from sweep.plan.model import checkpoint_gb
from tests.weights import write_checkpoint, write_weights
from workers.model.checkpoint import check_checkpoint, loaded_files

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def said_of(path: Path) -> str:
    with pytest.raises(SweepError) as error:
        check_checkpoint(path)
    return str(error.value)


def touched(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).touch()
    return path


KINDS = [
    (
        ("model-Q4_K_M.gguf",),
        "GGUF weights, which llama.cpp reads (model-Q4_K_M.gguf). ",
        'gguf_file="model-Q4_K_M.gguf"',
    ),
    (("model.onnx",), "a graph for inference (ONNX or OpenVINO) (model.onnx). ", "exported from: model.path=DIR"),
    (("onnx/model.onnx",), "a graph for inference (ONNX or OpenVINO) (onnx/model.onnx). ", "exported from"),
    (
        ("openvino_model.xml", "openvino_model.bin"),
        "a graph for inference (ONNX or OpenVINO) (openvino",
        "exported from",
    ),
    (("tf_model.h5",), "TensorFlow weights (tf_model.h5). ", "from_tf=True"),
    (("flax_model.msgpack",), "Flax weights (flax_model.msgpack). ", "from_flax=True"),
    (("weights.npz",), "MLX weights (weights.npz). ", "made from: model.path=DIR"),
    (
        ("consolidated.00.pth", "params.json"),
        "weights in the layout of Llama's or Mistral's own code (consolidated.00.pth, params.json). ",
        "in Hugging Face's layout (config.json and model*.safetensors)",
    ),
    (
        ("consolidated.safetensors", "params.json"),
        "weights in the layout of Llama's or Mistral's own code (consolidated.safetensors, params.json). ",
        "in Hugging Face's layout",
    ),
    (
        ("original/consolidated.00.pth",),
        "weights in the layout of Llama's or Mistral's own code (original/co",
        "Download",
    ),
    (("pytorch_model.bin",), "pickled weights (pytorch_model.bin). ", "model.save_pretrained(DIR)"),
]


@pytest.mark.parametrize("has_config", [False, True])
@pytest.mark.parametrize(("names", "kind", "advice"), KINDS)
def test_weights_of_another_kind_are_named(
    names: tuple[str, ...], kind: str, advice: str, has_config: bool, tmp_path: Path
) -> None:
    touched(tmp_path, *names)
    if has_config:
        (tmp_path / "config.json").write_text("{}")
    message = said_of(tmp_path)
    assert message.startswith(f"model.path={tmp_path} {'holds' if has_config else 'has no config.json'}")
    assert kind in message
    assert advice in message


@pytest.mark.parametrize(("names", "kind", "advice"), KINDS)
def test_weights_of_another_kind_beside_safetensors_are_not_loaded(
    names: tuple[str, ...], kind: str, advice: str, tmp_path: Path
) -> None:
    path = touched(write_checkpoint(tmp_path / "model"), *names)
    check_checkpoint(path)
    assert loaded_files(path) == [path / "model.safetensors"]


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("model.gguf", "is a file. It holds GGUF weights, which llama.cpp reads (model.gguf). "),
        ("model.safetensors", "is a file. Give its directory: model.path={parent}."),
        ("config.json", "is a file. Give its directory: model.path={parent}."),
    ],
)
def test_a_file_is_no_checkpoint(name: str, advice: str, tmp_path: Path) -> None:
    path = touched(write_checkpoint(tmp_path / "model"), "model.gguf", "another.gguf")
    assert advice.format(parent=path) in said_of(path / name)


def test_a_file_without_a_model_around_it(tmp_path: Path) -> None:
    touched(tmp_path, "weights.zip")
    assert said_of(tmp_path / "weights.zip").endswith(
        "is a file. Give a Hugging Face checkpoint directory: model.path=DIR."
    )


def test_the_checkpoints_near_a_directory_are_named(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path / "checkpoint-1")
    second = write_checkpoint(tmp_path / "checkpoint 2")
    assert said_of(tmp_path).endswith(f"Give 'model.path=\"{second}\"' or model.path={first}.")
    touched(first, "original/consolidated.00.pth")
    assert said_of(first / "original").endswith(f"Give model.path={first}.")


def hub_cache(path: Path, *, main: str | None) -> Path:
    for revision in ("0a", "1b"):
        (path / "snapshots").mkdir(parents=True, exist_ok=True)
        write_checkpoint(path / "snapshots" / revision)
    if main is not None:
        (path / "refs").mkdir()
        (path / "refs" / "main").write_text(main)
    return path


@pytest.mark.parametrize("inside", ["", "snapshots"])
@pytest.mark.parametrize(
    ("main", "advice"),
    [
        ("1b", "Give one: model.path={cache}/snapshots/1b."),
        (None, "Give one: model.path={cache}/snapshots/0a or model.path={cache}/snapshots/1b."),
        ("gone", "Give one: model.path={cache}/snapshots/0a or model.path={cache}/snapshots/1b."),
    ],
)
def test_the_snapshot_of_a_hub_cache_is_named(inside: str, main: str | None, advice: str, tmp_path: Path) -> None:
    cache = hub_cache(tmp_path / "models--org--name", main=main)
    assert said_of(cache / inside).endswith(advice.format(cache=cache))
    check_checkpoint(cache / "snapshots" / "1b")


def test_a_hub_cache_without_a_snapshot_and_the_whole_cache(tmp_path: Path) -> None:
    (tmp_path / "models--org--name" / "refs").mkdir(parents=True)
    assert said_of(tmp_path / "models--org--name").endswith("Download the model: hf download org/name.")
    assert said_of(tmp_path).endswith("Give one of its models by name: model.path=org/name.")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model-1-of-2.safetensors"])
def test_a_snapshot_that_was_copied_without_its_blobs_is_named(name: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model")
    (path / name).unlink(missing_ok=True)
    (path / name).symlink_to("../../blobs/0a")
    assert f"{path / name} is a link to ../../blobs/0a, which is not there. " in said_of(path)


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_alone_is_named_with_its_base(weights: str, tmp_path: Path) -> None:
    touched(tmp_path, weights)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base", "r": 8}))
    message = said_of(tmp_path)
    assert f"holds an adapter of org/base (adapter_config.json, {weights}), which changes" in message
    assert f'AutoPeftModelForCausalLM.from_pretrained("{tmp_path}").merge_and_unload()' in message


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_inside_a_models_directory_is_not_left_out_silently(name: str, tmp_path: Path) -> None:
    message = said_of(touched(write_checkpoint(tmp_path / "model"), name))
    assert f"holds an adapter ({name}) beside a model's weights, which would be scored without it" in message
    assert "For the model alone, move these files away; for both, merge" in message


def write_index(path: Path, *files: str) -> None:
    index = {"weight_map": {f"w{number}": name for number, name in enumerate(files)}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_copy_in_mistrals_layout_is_neither_loaded_nor_checked(tmp_path: Path) -> None:
    path = touched(write_checkpoint(tmp_path / "model"), "params.json")
    write_weights(path / "consolidated.safetensors")
    (path / "model.safetensors").rename(path / "model-1-of-1.safetensors")
    write_index(path, "model-1-of-1.safetensors")
    (path / "consolidated.safetensors.index.json").write_text('{"weight_map": {"w": "consolidated-9.safetensors"}}')
    check_checkpoint(path)
    assert loaded_files(path) == [path / "model-1-of-1.safetensors"]
    assert checkpoint_gb(path) * 1e9 == (path / "model-1-of-1.safetensors").stat().st_size


def test_shards_without_their_index_are_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model")
    (path / "model.safetensors").rename(path / "model-1-of-2.safetensors")
    message = said_of(path)
    assert "has neither model.safetensors nor model.safetensors.index.json" in message
    assert "(there are: model-1-of-2.safetensors). Download the index" in message


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_no_file(name: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a model")
    (path / name).write_bytes(POINTER)
    assert said_of(path) == (
        f"{path / name} is a Git LFS pointer, not the file itself. Fetch it: cd '{path}' && git lfs pull"
    )


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no bytes": (lambda file: file.write_bytes(b""), "is cut short or damaged. Download it again"),
    "no header": (lambda file: file.write_bytes(b"x"), "is cut short or damaged. Download it again"),
    "half": (lambda file: file.write_bytes(file.read_bytes()[:-1]), "is cut short or damaged. Download it again"),
    "no tensor": (lambda file: write_weights(file, {}), "is empty: it holds no tensor. Download it again."),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_weight_file_without_its_weights_is_named(damage: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model")
    act, expected = DAMAGES[damage]
    act(path / "model.safetensors")
    assert said_of(path).startswith(f"{path / 'model.safetensors'} {expected}")


def test_a_missing_shard_and_a_damaged_index_are_named(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model")
    write_index(path, "model.safetensors", "gone.safetensors")
    assert "lacks gone.safetensors (1 such files), which model.safetensors.index.json names." in said_of(path)
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text("{}")
    assert "model.safetensors.index.json is damaged: it names no weight files. Download it again." in said_of(path)


def test_what_was_quantized_is_named_before_its_damages(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", {"quantization_config": {"quant_method": "awq"}})
    (path / "model.safetensors").write_bytes(b"")
    assert "is quantized already (awq, " in said_of(path)
