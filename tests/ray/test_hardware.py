"""A joined cluster whose node has a GPU and nvcc, which the driver lacks: recipes are planned for the node."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.ray.test_cluster import Head, head_node
from tests.ray.test_sweep import ROOT

# A driver on a machine without nvcc, wherever this is; what it has a node do is not touched.
DRIVER = """
import sys
from sweep.core import machine
machine.has_compiler = lambda: False
from sweep.cli import main
sys.exit(main(sys.argv[1:]))
"""


def write_program(path: Path, script: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def write_gpu(folder: Path, name: str, capability: str) -> None:
    write_program(folder / "nvidia-smi", f"echo '{name}, 81559, {capability}'")


def examined(head: Head, store: Path, path: str) -> dict[str, tuple[str, str]]:
    """Verdict and text of `sweep doctor` by subject, from a driver with this PATH."""
    own = ["cluster=auto", f"cluster.address={head.address}", f"store.uri={store}"]
    grid = ["-m", "quant_pair=wfp4_afp16,wint8_aint8", "quant_granularity=default,w_mx"]
    command = [sys.executable, "-c", DRIVER, "doctor", "--json", *grid, *own]
    environment = {**os.environ, "PATH": path, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 2), done.stderr
    return {finding["subject"]: (finding["verdict"], finding["text"]) for finding in json.loads(done.stdout)}


def test_what_can_run_is_decided_by_the_node_and_not_by_the_drivers_machine(tmp_path: Path) -> None:
    usual, theirs, mine = os.environ["PATH"], tmp_path / "theirs", tmp_path / "mine"
    write_gpu(theirs, "NVIDIA H100", "9.0")
    write_program(theirs / "nvcc", "exit 0")
    with head_node(n_gpus=1, path=f"{theirs}:{usual}") as head:
        found = examined(head, tmp_path / "store", usual)
        assert found["grid"] == ("ok", "4 trials, 4 distinct cells, 0 in the store already")
        assert found["workers"] == ("ok", "1 on cuda (NVIDIA H100)")
        write_gpu(theirs, "NVIDIA A100", "8.0")
        write_gpu(mine, "NVIDIA H100", "9.0")
        found = examined(head, tmp_path / "store", f"{mine}:{usual}")
        assert found["grid"][0] == "warning"
        assert "1 skipped: NVFP4 needs a GPU of compute capability 8.9; NVIDIA A100 has 8.0." in found["grid"][1]
        assert found["workers"] == ("ok", "1 on cuda (NVIDIA A100)")
