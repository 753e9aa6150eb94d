"""The number of workers that a run starts, and their device: on this machine, or on a Ray cluster that exists."""

from sweep.config.schema import ClusterConfig
from sweep.core.errors import SweepError
from sweep.core.machine import Device, Workers, fit, n_cores, n_gpus, own_hardware


def own_device(cluster: ClusterConfig) -> Device:
    """Device of this process itself, on which it validates and exports, whatever the workers of a sweep have.

    Raises: SweepError: the config asks for a GPU of this machine, which has none.
    """
    # Beside a cluster that exists, cluster.device=cuda is about the cluster's nodes.
    wanted = cluster.device if cluster.address == "local" or cluster.device == "cpu" else "auto"
    if wanted == "cuda" and not n_gpus():
        advice = "Type cluster.device=cpu, or check nvidia-smi and CUDA_VISIBLE_DEVICES."
        raise SweepError(f"cluster.device=cuda, but no NVIDIA GPU is visible here. {advice}")
    return wanted if wanted != "auto" else "cuda" if n_gpus() else "cpu"


def pick_workers(cluster: ClusterConfig) -> Workers:
    """One worker a GPU (or a share of it), else one a CPU core, unless the config says otherwise.

    On a Ray cluster that exists: see sweep.run.cluster.join.

    Raises: SweepError: the config asks for what this machine, or the cluster, does not have.
    """
    if cluster.address != "local":
        from sweep.run.cluster import join  # imports Ray

        return join(cluster)
    device, gpus = own_device(cluster), n_gpus()
    share = cluster.gpus_per_worker
    room = n_cores() if device == "cpu" else fit(gpus, share)
    if room < 1:
        raise SweepError(
            f"cluster.gpus_per_worker={share:g}, but only {gpus} GPU(s) are visible here. "
            f"Type cluster.gpus_per_worker={gpus} or less."
        )
    count = room if cluster.workers == "auto" else cluster.workers
    if device == "cuda" and count > room:
        raise SweepError(
            f"cluster.workers={count} at {cluster.gpus_per_worker:g} GPU(s) each do not fit {gpus} GPU(s). "
            f"Type cluster.workers={room} or less."
        )
    dashboard = device == "cuda" if cluster.dashboard == "auto" else cluster.dashboard
    nodes = (own_hardware(device),)
    return Workers(device=device, count=count, gpus_each=share, dashboard=dashboard, nodes=nodes)
