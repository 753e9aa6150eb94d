"""A wrong name is answered with the right one; the project finds its own data in a checkout and in a wheel."""

import importlib.util
import shutil
from pathlib import Path

import pytest

from sweep.core import paths
from sweep.core.errors import InvalidRecipe, SweepError, require_known

PAIRS = ("wint8_aint8", "wfp8_afp8", "wint4_afp16")


@pytest.mark.parametrize(
    ("typed", "meant"), [("wfp8_fp8", "wfp8_afp8"), ("wint4_afp61", "wint4_afp16"), ("int8_aint8", "wint8_aint8")]
)
def test_a_misspelt_name_is_answered_with_the_nearest_and_with_all(typed: str, meant: str) -> None:
    with pytest.raises(SweepError) as error:
        require_known("quant pair", typed, PAIRS)
    assert (
        str(error.value)
        == f"Unknown quant pair {typed!r}. Did you mean {meant!r}? Choose one of: wfp8_afp8, wint4_afp16, wint8_aint8."
    )


def test_a_name_like_no_other_is_answered_with_all_of_them() -> None:
    with pytest.raises(SweepError) as error:
        require_known("quant pair", "zzz", iter(PAIRS))
    assert str(error.value) == "Unknown quant pair 'zzz'. Choose one of: wfp8_afp8, wint4_afp16, wint8_aint8."


@pytest.mark.parametrize("name", PAIRS)
def test_a_known_name_is_not_refused(name: str) -> None:
    require_known("quant pair", name, iter(PAIRS))


def test_an_invalid_recipe_is_wrong_input() -> None:
    """Asked for alone, it ends like any other wrong input: one message and exit code 2."""
    with pytest.raises(SweepError, match="needs blocks"):
        raise InvalidRecipe("FP4 needs blocks.")


def test_a_checkout_has_its_data_beside_the_packages() -> None:
    root = Path(__file__).resolve().parents[3]
    assert paths.conf_dir() == root / "conf"
    assert (paths.conf_dir() / "config.yaml").is_file()
    assert paths.bundled_model_dir() == root / "models" / "qwen3_vl_tiny"
    assert (paths.bundled_model_dir() / "config.json").is_file()


def test_an_installed_wheel_has_its_data_inside_the_package(tmp_path: Path) -> None:
    """Where pyproject.toml's force-include puts it."""
    package = tmp_path / "site-packages" / "sweep"
    for directory in ("_data", "core"):
        (package / directory).mkdir(parents=True)
    shutil.copy(paths.__file__, package / "core" / "paths.py")
    spec = importlib.util.spec_from_file_location("installed_paths", package / "core" / "paths.py")
    assert spec is not None
    assert spec.loader is not None
    installed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(installed)
    assert installed.conf_dir() == package / "_data" / "conf"
    assert installed.bundled_model_dir() == package / "_data" / "models" / "qwen3_vl_tiny"
