"""Directories of the project's own data: beside the packages in a checkout, inside them in a wheel."""

from pathlib import Path
from typing import Final

_PACKAGE = Path(__file__).resolve().parents[1]
_ROOT = _PACKAGE / "_data" if (_PACKAGE / "_data").is_dir() else _PACKAGE.parent


# In a directory that a command has filled: a name that transformers, vLLM and TensorRT-LLM do not look for.
MANIFEST: Final = "sweep_manifest.json"


def conf_dir() -> Path:
    """The Hydra config tree."""
    return _ROOT / "conf"


def bundled_model_dir() -> Path:
    """The bundled tiny model, with its tokenizer and its calibration texts."""
    return _ROOT / "models" / "qwen3_vl_tiny"
