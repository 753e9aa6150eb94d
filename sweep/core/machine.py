"""Resources of this machine (GPUs, cores, memory), found without importing anything heavy."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """Number of workers and the devices that they use."""

    device: Literal["cpu", "cuda"]
    count: int
    gpus_each: float  # a fraction: several workers share a GPU; 2 or more: a worker spreads the model over so many
    address: str | None = None  # of the Ray cluster that they work on; None: one of their own, on this machine
    per_node: int | None = None  # at most, that share a node; None: all of them
    elastic: bool = False  # more of them as nodes join
    dashboard: bool = False  # of a cluster of their own


def memory_gb() -> float:
    """Memory of this machine that is available, in 1e9 bytes."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 / 1e9
    return 0.0


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU's name, memory and compute capability."""

    name: str
    memory_gb: float  # 1e9 bytes, all of it
    capability: tuple[int, int]


@cache
def first_gpu() -> Gpu | None:
    """The first GPU that this machine shows, None without nvidia-smi or a GPU."""
    if not n_gpus() or (tool := shutil.which("nvidia-smi")) is None:
        return None
    asked = subprocess.run(
        [tool, "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        check=False,
    )
    if asked.returncode or not asked.stdout.strip():
        return None
    name, mib, capability = (field.strip() for field in asked.stdout.splitlines()[0].rsplit(",", 2))
    major, _, minor = capability.partition(".")
    return Gpu(name, int(mib) * 2**20 / 1e9, (int(major), int(minor)))


def has_compiler() -> bool:
    """Whether ModelOpt can build its CUDA extensions: there is an nvcc."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return shutil.which("nvcc") is not None or any(home and (Path(home) / "bin" / "nvcc").is_file() for home in homes)


def n_gpus() -> int:
    """NVIDIA GPUs that this process may use."""
    present = sum(path.name.removeprefix("nvidia").isdigit() for path in Path("/dev").glob("nvidia*"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    return min(present, len([device for device in visible.split(",") if device.strip() and device.strip() != "-1"]))


def n_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def fit(gpus: float, share: float) -> int:
    """Number of workers that fit on the GPUs of one node; a share lies on one GPU."""
    return int(gpus) * int(1 / share) if share <= 1 else int(gpus) // int(share)
