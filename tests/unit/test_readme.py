"""The README's two commands are what CI runs, word for word; what READMEs name exists, and they name every key."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from sweep.config.schema import SECTIONS
from sweep.config.targets import TargetRecipe
from sweep.core.paths import conf_dir
from sweep.core.typed import hints_of

ROOT = Path(__file__).resolve().parents[2]
READMES = ("README.md", "conf/README.md", "sweep/README.md", "workers/README.md", "deploy/README.md")


def blocks() -> list[str]:
    return re.findall(
        r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )


def test_the_first_two_commands_are_one_line_each_and_the_first_sweeps() -> None:
    first, second = blocks()[:2]
    assert [text.count("\n") for text in (first, second)] == [1, 1]
    assert "sweep run" in first


def test_ci_runs_exactly_these_two(tmp_path: Path) -> None:
    """`.ci/run` with a bash in its path that writes down what it is given; the script before them is given nothing."""
    bash = tmp_path / "bash"
    bash.write_text(f'#!/bin/sh\ntest -z "$4" || printf "%s\\n" "$4" >> {tmp_path}/commands\n')
    bash.chmod(0o755)
    (tmp_path / "promtool").write_text("#!/bin/sh\n")  # as if installed: nothing to fetch
    (tmp_path / "promtool").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run([shutil.which("bash"), ROOT / ".ci" / "run"], env=environment, check=True, capture_output=True)
    assert (tmp_path / "commands").read_text() == "".join(blocks()[:2])


def option_files() -> list[Path]:
    """Options but for pairs, of which the text says how they are named."""
    return [path for path in conf_dir().glob("*/*.yaml") if path.parent.name != "quant_pair"]


def test_conf_readme_names_every_group_key_and_option() -> None:
    text = (ROOT / "conf" / "README.md").read_text(encoding="utf-8")
    for section, kind in SECTIONS.items():
        assert f"**{section}**" in text, section
        for key in hints_of(kind):
            assert f"| `{section}.{key}` |" in text, f"{section}.{key}"
    for key in ("grid.axes", "grid.points"):
        assert f"| `{key}` |" in text
    for path in option_files():
        assert f"`{path.stem}`" in text, path


def test_conf_readme_names_every_key_of_a_targets_recipe() -> None:
    text = (ROOT / "conf" / "README.md").read_text(encoding="utf-8")
    for key in hints_of(TargetRecipe).keys() - {"quant_pair", "quant_granularity"}:
        assert f"| `{key}` |" in text, key


@pytest.mark.parametrize("name", READMES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, heading = link.partition("#")
        if "://" not in link:
            assert (page.parent / path).exists(), link
        if heading:
            titles = re.findall(r"^#+ (.*)$", (page.parent / path).read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert heading in [title.lower().replace(" ", "-") for title in titles], link


@pytest.mark.parametrize("name", READMES)
def test_what_is_said_to_be_typed_exists(name: str) -> None:
    """Keys and options of `group.key=value` and `group=option`, wherever a README names them."""
    text = (ROOT / name).read_text(encoding="utf-8")
    groups = {path.name for path in conf_dir().iterdir() if path.is_dir()}
    for group, key, value in re.findall(r"(?<![\w.])([a-z_]+)(?:\.([a-z_]+))?=([\w,]*)", text):
        if group in groups and key:
            assert key in hints_of(SECTIONS[group]), f"{group}.{key}"
        elif group in groups:
            for option in filter(None, value.split(",")):
                assert option == "NAME" or (conf_dir() / group / f"{option}.yaml").is_file(), f"{group}={option}"
