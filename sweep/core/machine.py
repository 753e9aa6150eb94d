"""Resources of this machine (GPUs, cores, memory), found without importing anything heavy."""

import os
import shutil
import socket
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU's name, memory and compute capability."""

    name: str
    memory_gb: float  # 1e9 bytes, all of it
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """The GPU and the tools that a recipe needs where it is scored on a GPU. A CPU runs every recipe."""

    capability: tuple[int, int] = (0, 0)
    nvcc: bool = False
    gpu_gb: float = 0.0  # memory of each GPU, for one decoder layer at a time, at the share of it that a worker has


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Hardware and tools of one machine that may hold workers. An unknown field refuses no recipe."""

    host: str
    gpus: tuple[Gpu, ...] = ()  # none: not known
    has_nvcc: bool = False
    memory_gb: float = 0.0  # of the machine, available
    unknown: str | None = None  # why nothing of the above is known

    @property
    def warning(self) -> str | None:
        """A sentence for people if nothing is known."""
        if self.unknown is None:
            return None
        return f"{self.host} does not say what it can do ({self.unknown}): no recipe is refused on its account."

    def refusal(self, needs: Needs) -> str | None:
        """Why no GPU here does for a recipe, and what to type; None: one does, as far as is known."""
        if self.unknown is not None:
            return None
        able = [gpu for gpu in self.gpus if gpu.capability >= needs.capability]
        if self.gpus and not able:
            best = max(self.gpus, key=lambda gpu: gpu.capability)
            wanted, has = (".".join(map(str, each)) for each in (needs.capability, best.capability))
            return f"NVFP4 needs a GPU of compute capability {wanted}; {best.name} has {has}. Type cluster.device=cpu."
        if able and (most := max(able, key=lambda gpu: gpu.memory_gb)).memory_gb < needs.gpu_gb:
            return (
                f"One decoder layer at a time needs a GPU of about {needs.gpu_gb:.1f} GB; {most.name} has "
                f"{most.memory_gb:.1f} GB. Type a smaller dataset.size, or a larger cluster.gpus_per_worker."
            )
        if needs.nvcc and not self.has_nvcc:
            return (
                f"ModelOpt builds its extension for MX formats with nvcc, which {self.host} lacks. "
                "Install the CUDA toolkit there, or run it with cluster.device=cpu."
            )
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """The number of workers, their device, and their share of GPUs and nodes."""

    device: Device
    count: int
    gpus_each: float  # a fraction: several workers share a GPU; 2 or more: a worker spreads the model over so many
    address: str | None = None  # of the Ray cluster that they work on; None: one of their own, on this machine
    per_node: int | None = None  # at most, that share a node; None: all of them
    elastic: bool = False  # more of them as nodes join
    dashboard: bool = False  # of a cluster of their own
    nodes: tuple[Hardware, ...] = ()  # machines that have room for them now


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """How fast one worker computes while the others of its machine do."""

    products: float  # multiply-adds a second of matrix products, in the dtype of the sweep
    values: float  # values a second that are squared and summed (workers.quant.kernels.score_rows)
    python: float  # seconds for Python's part of what takes the reference machine one second
    crowd: float = 1.0  # times as long as a product takes now, beside other programs on the cores


def memory_gb() -> float:
    """Memory of this machine that is available, in 1e9 bytes."""
    import psutil  # 10 ms that --help has not

    return psutil.virtual_memory().available / 1e9


def own_hardware(device: Device) -> Hardware:
    """The hardware of this machine; its GPUs only if workers compute on them.

    As a Ray task it answers for its node. Ray hides the GPUs from a task that asks for none (CUDA_VISIBLE_DEVICES is
    empty there), but not from nvidia-smi.
    """
    gpus = _gpus() if device == "cuda" else ()
    return Hardware(host=socket.gethostname(), gpus=gpus, has_nvcc=has_compiler(), memory_gb=memory_gb())


@cache
def _gpus() -> tuple[Gpu, ...]:
    """The GPUs that nvidia-smi lists; none without it."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return ()
    query = [tool, "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    asked = subprocess.run(query, capture_output=True, text=True, check=False)
    found: list[Gpu] = []
    for line in asked.stdout.splitlines() if asked.returncode == 0 else ():
        name, mib, capability = (field.strip() for field in line.rsplit(",", 2))
        if mib.isdigit():  # not "[N/A]", where a GPU has no memory of its own
            major, _, minor = capability.partition(".")
            found.append(Gpu(name, int(mib) * 2**20 / 1e9, (int(major), int(minor))))
    return tuple(found)


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
