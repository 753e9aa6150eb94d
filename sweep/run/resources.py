"""The number of workers that a run starts, and their device: on this machine, or on a Ray cluster that exists."""

from sweep.config.schema import ClusterConfig
from sweep.core.errors import SweepError
from sweep.core.machine import Workers, fit, n_cores, n_gpus


def pick_workers(cluster: ClusterConfig) -> Workers:
    """One worker a GPU (or a share of it), else one a CPU core, unless the config says otherwise.

    On a Ray cluster that exists: see sweep.run.cluster.join.

    Raises: SweepError: the config asks for what this machine, or the cluster, does not have.
    """
    if cluster.address != "local":
        from sweep.run.cluster import join  # imports Ray

        return join(cluster)
    gpus = n_gpus()
    device = cluster.device if cluster.device != "auto" else "cuda" if gpus else "cpu"
    if device == "cuda" and not gpus:
        raise SweepError(
            "cluster.device=cuda, but no NVIDIA GPU is visible here. "
            "Type cluster.device=cpu, or check nvidia-smi and CUDA_VISIBLE_DEVICES."
        )
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
    return Workers(device=device, count=count, gpus_each=cluster.gpus_per_worker, dashboard=dashboard)
