"""The README's two commands are what CI runs, word for word."""

import os
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def blocks() -> list[str]:
    return re.findall(
        r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )


def test_the_first_two_commands_are_one_line_each_and_the_first_sweeps() -> None:
    first, second = blocks()[:2]
    assert [text.count("\n") for text in (first, second)] == [1, 1]
    assert "sweep run" in first


def test_ci_runs_exactly_these_two(tmp_path: Path) -> None:
    """`.ci/run` with a bash in its path that writes down what it is given."""
    bash = tmp_path / "bash"
    bash.write_text(f'#!/bin/sh\nprintf "%s\\n" "$4" >> {tmp_path}/commands\n')
    bash.chmod(0o755)
    (tmp_path / "promtool").write_text("#!/bin/sh\n")  # as if installed: nothing to fetch
    (tmp_path / "promtool").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run([shutil.which("bash"), ROOT / ".ci" / "run"], env=environment, check=True, capture_output=True)
    assert (tmp_path / "commands").read_text() == "".join(blocks()[:2])
