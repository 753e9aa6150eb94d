"""What this machine offers to workers, found without importing anything heavy."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sweep.config import ClusterConfig
from sweep.errors import SweepError


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """How many workers, on what."""

    device: Literal["cpu", "cuda"]
    count: int
    gpus_each: float  # fractions share a GPU; more than one for models that need several


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


def pick_workers(cluster: ClusterConfig) -> Workers:
    """One worker a GPU (or a share of it), else one a CPU core, unless the config says otherwise.

    Raises: SweepError: the config asks for what this machine does not have.
    """
    gpus = n_gpus()
    device = cluster.device if cluster.device != "auto" else "cuda" if gpus else "cpu"
    if device == "cuda" and not gpus:
        raise SweepError("cluster.device=cuda, but no NVIDIA GPU is visible here. Type cluster.device=cpu, or check nvidia-smi and CUDA_VISIBLE_DEVICES.")
    share = cluster.gpus_per_worker
    room = n_cores() if device == "cpu" else gpus * int(1 / share) if share <= 1 else gpus // int(share)  # a fraction lies on one GPU
    if room < 1:
        raise SweepError(
            f"cluster.gpus_per_worker={cluster.gpus_per_worker:g}, but only {gpus} GPU(s) are visible here. Type cluster.gpus_per_worker={gpus} or less."
        )
    count = room if cluster.workers == "auto" else cluster.workers
    if device == "cuda" and count > room:
        raise SweepError(f"cluster.workers={count} at {cluster.gpus_per_worker:g} GPU(s) each do not fit {gpus} GPU(s). Type cluster.workers={room} or less.")
    return Workers(device=device, count=count, gpus_each=cluster.gpus_per_worker)
