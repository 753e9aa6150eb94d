"""Where the project's own data lies: beside the packages in a checkout, inside the package in an installed wheel."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_ROOT = _PACKAGE / "_data" if (_PACKAGE / "_data").is_dir() else _PACKAGE.parent


def conf_dir() -> Path:
    """The Hydra config tree."""
    return _ROOT / "conf"


def bundled_model_dir() -> Path:
    """The bundled tiny model, with its tokenizer and its calibration texts."""
    return _ROOT / "models" / "qwen3_vl_tiny"
