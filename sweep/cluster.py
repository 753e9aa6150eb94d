"""The Ray cluster of a run, its own on this machine or one that exists, and the workers on its nodes.

Of a cluster that exists only what this run has started is ever stopped. Each run has a namespace of its own, so that several
may have a `sweep-worker-0` there.
"""

import logging
import os
import secrets
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from sweep.config import ClusterConfig
from sweep.errors import ClusterLost, SweepError
from sweep.interrupts import rearm, signals_wait
from sweep.machine import Device, Hardware, Workers, fit, own_hardware

# Read by Ray when it is imported. Loggers would write three files a trial; Tune's own Ctrl-C handling would hide ours.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # nobody restores an experiment; saving one costs 5 ms a trial
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints a box whatever the verbosity
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402
from ray._private import services, utils  # noqa: E402
from ray._private.node import Node  # noqa: E402
from ray.exceptions import AuthenticationError, GetTimeoutError, RayActorError, RayError  # noqa: E402
from ray.util import list_named_actors  # noqa: E402
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: E402

_LOOPBACK = "127.0.0.1"
_SLOT = "sweep_trial"  # a resource that lets as many trials run at a time as there are workers
_HEAD = "node:__internal_head__"  # which every cluster has once, 1.0 of it
_SPACE = "sweep-"  # what the names of namespaces start with
_WORKER = "sweep-worker-"  # and those of workers
_MAX_RESTARTS = 20  # of a worker, over a whole sweep
_INFO_SECONDS = 10.0  # until a worker that does not answer is left out of the record
_HARDWARE_SECONDS = 30.0  # for a node to say what it can do; a new process takes about 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """A Ray cluster that this process is connected to."""

    address: str  # host:port of its head
    dashboard_url: str | None
    metrics: tuple[str, ...]  # host:port of each node, where Prometheus may ask for /metrics
    trial_resources: Mapping[str, float]  # of one process of Tune
    essential: Mapping[str, tuple[str, int]]  # what of a cluster that exists must answer, with its host and port


def connect(workers: Workers) -> Connection:
    """Start a cluster of this process' own, or join the workers'. The caller's signal handlers stay: Ray's ends the process with exit code 15.

    Raises: ClusterLost: Ray did not start.
    """
    if not ray.is_initialized():
        if workers.address is None:
            _start(workers)
        else:
            _init(address=workers.address)
    with _starting():
        context: Any = ray.init(ignore_reinit_error=True, logging_level=logging.ERROR)  # what the first call has returned
    return Connection(
        address=context.address_info["gcs_address"],
        dashboard_url=f"http://{context.dashboard_url}" if context.dashboard_url else None,
        metrics=tuple(f"{node['NodeManagerAddress']}:{port}" for node in _alive_nodes() if (port := node["MetricsExportPort"]) > 0),
        trial_resources={_SLOT: 1} if workers.address is None else {_HEAD: 0.001},
        essential={} if workers.address is None else _essential(context.address_info),
    )


def join(config: ClusterConfig) -> Workers:
    """Connect to the cluster that the config names, and see how many workers it has room for.

    Raises: SweepError: there is no such cluster, or not what the config asks for.
    """
    address = config.address or os.environ.get("RAY_ADDRESS")
    if not address:
        raise SweepError(
            "cluster=auto joins a Ray cluster, but none is named. Type cluster.address=HOST:6379 or set RAY_ADDRESS; cluster=local starts one here."
        )
    if "://" in address:
        raise SweepError(
            f"The address {address} is not a cluster's own. Type cluster.address=HOST:6379 on one of its machines, or submit the same command as a job: "
            "ray job submit --working-dir . -- sweep run cluster=auto ..."
        )
    _join(address, "type cluster=local")
    nodes = _alive_nodes()
    device = config.device
    if device == "auto":
        device = "cuda" if any(node["Resources"].get("GPU") for node in nodes) else "cpu"
    rooms = _rooms(nodes, device, config.gpus_per_worker)
    if config.workers == "auto" and not sum(rooms):
        what = f"GPU for cluster.gpus_per_worker={config.gpus_per_worker:g}" if device == "cuda" else "CPU"
        raise SweepError(f"The cluster at {address} has no {what}. Type cluster.workers=N to wait until N have been added, or cluster.device=cpu.")
    return Workers(
        device=device,
        count=sum(rooms) if config.workers == "auto" else config.workers,
        gpus_each=config.gpus_per_worker,
        address=address,
        per_node=max([*rooms, 1]),
        elastic=config.workers == "auto",
        nodes=_hardware([node for node, room in zip(nodes, rooms, strict=True) if room], device),
    )


def stop() -> None:
    """Stop the run's own cluster, or leave the one that it has joined.

    Signals wait: half stopped, a driver whose raylet ends takes exit code 1 (Ray 2.60).
    """
    kill = Node.kill_all_processes

    def kill_all_processes(self: Node, *arguments: Any, **options: Any) -> None:
        rearm()  # Ray's core worker, which has stopped by now, has reset SIGTERM to the system's default
        kill(self, *arguments, **options)

    with signals_wait():
        Node.kill_all_processes = kill_all_processes
        try:
            ray.shutdown()
        finally:
            Node.kill_all_processes = kill


class Crew:
    """A run's workers, by name."""

    def __init__(self, workers: Workers, hire: Callable[[Mapping[str, Any]], tuple[Any, Any]]) -> None:
        """Prepare an empty crew.

        Args:
            workers: how many, on what.
            hire: makes a worker of Ray's options for it: the actor, and an object reference that is there when it is ready.
        """
        self._workers, self._hire = workers, hire
        self._actors: dict[str, Any] = {}

    def hire(self) -> dict[str, Any]:
        """Start the workers that are lacking: all at first, later those that nodes which have joined have room for. Ray places them as soon as it can.

        Returns: by name, object references that are there when they are ready.
        """
        workers = self._workers
        count = workers.count
        if workers.elastic and self._actors:
            count = sum(_rooms(_alive_nodes(), workers.device, workers.gpus_each))
        options = {"num_cpus": 1, "num_gpus": workers.gpus_each if workers.device == "cuda" else 0, "max_restarts": _MAX_RESTARTS}
        ready: dict[str, Any] = {}
        for index in range(len(self._actors), count):
            name = f"{_WORKER}{index}"
            self._actors[name], ready[name] = self._hire(options | {"name": name})
        return ready

    def call_back(self, name: str) -> Any:
        """An object reference that is there when the worker, which died, works again; getting it raises RayActorError if it never will."""
        return self._actors[name].info.options(max_task_retries=-1).remote()

    def infos(self, names: Iterable[str]) -> list[dict[str, Any]]:
        """What these workers say of themselves, as far as they answer."""
        asked = [self.call_back(name) for name in sorted(names)]
        answered = ray.wait(asked, num_returns=len(asked), timeout=_INFO_SECONDS)[0] if asked else []
        return [info for answer in asked if answer in answered and (info := _unless_dead(answer)) is not None]

    def dismiss(self) -> None:
        """Stop them."""
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors.clear()


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """Where an actor lives and dies with the driver."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def look(address: str, *, on_loopback: bool = False) -> dict[str, Any]:
    """What a cluster says of itself.

    Args:
        address: host:port of its head.
        on_loopback: it is one that a run has started.

    Returns: `address`; `nodes`: of each that lives its `host`, `cpus` and `gpus`; `gpus` and `gpus_free` of all; `workers`: their names, of all
        sweeps there, by namespace.

    Raises: SweepError: nothing answers there.
    """
    with _on_loopback() if on_loopback else nullcontext():
        _join(address, "leave out --cluster to see what the store says")
    named: list[dict[str, str]] = list_named_actors(all_namespaces=True)  # pyright: ignore[reportAssignmentType]
    workers: dict[str, list[str]] = {}
    for actor in sorted(named, key=lambda actor: (actor["namespace"], actor["name"])):
        if actor["namespace"].startswith(_SPACE) and actor["name"].startswith(_WORKER):
            workers.setdefault(actor["namespace"], []).append(actor["name"])
    nodes = [
        {"host": node["NodeManagerHostname"], "cpus": node["Resources"].get("CPU", 0.0), "gpus": node["Resources"].get("GPU", 0.0)} for node in _alive_nodes()
    ]
    gpus_free = ray.available_resources().get("GPU", 0.0)
    return {"address": address, "nodes": nodes, "gpus": sum(node["gpus"] for node in nodes), "gpus_free": gpus_free, "workers": workers}


def _start(workers: Workers) -> None:
    """Start a cluster of this process' own, on loopback. Raises: ClusterLost: one of its processes has not come up, or not lived."""
    try:
        with _on_loopback():
            _init(
                address="local",
                num_cpus=workers.count + 1,
                num_gpus=None if workers.device == "cuda" else 0,
                resources={_SLOT: workers.count},
                include_dashboard=None if workers.dashboard else False,  # True would end the run if it does not start
                _node_ip_address=_LOOPBACK,
            )
    except (RuntimeError, ConnectionError, TimeoutError, RayError) as error:
        raise ClusterLost(f"Ray did not start: {str(error).splitlines()[0]}.") from error


@contextmanager
def _on_loopback() -> Generator[None]:
    """Have Ray listen on loopback alone: it does for a node of that address, but would replace the address by the machine's (2.60)."""
    names = ("resolve_ip_for_localhost", "get_node_ip_address")
    before = {name: getattr(services, name) for name in names}
    try:
        for name in names:
            setattr(services, name, lambda *_: _LOOPBACK)
        yield
    finally:
        for name, function in before.items():
            setattr(services, name, function)


def _essential(address_info: Mapping[str, Any]) -> dict[str, tuple[str, int]]:
    """Of a cluster that exists: its control service, and the raylet of this node."""
    host, _, port = address_info["gcs_address"].rpartition(":")
    own = next(node for node in _alive_nodes() if node["NodeID"] == ray.get_runtime_context().get_node_id())
    return {"Ray's control service (GCS)": (host, int(port)), "Ray's raylet": (own["NodeManagerAddress"], own["NodeManagerPort"])}


def _join(address: str, otherwise: str) -> None:
    if ray.is_initialized():
        return
    try:
        _init(address=address)
    except (ConnectionError, RuntimeError, ValueError, AuthenticationError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SweepError(f"No Ray cluster answers at {address}: {reason} Check `ray status --address {address}`, or {otherwise}.") from error


def _init(**options: Any) -> None:
    with _starting():
        ray.init(log_to_driver=False, logging_level=logging.ERROR, namespace=f"{_SPACE}{secrets.token_hex(4)}", **options)


@contextmanager
def _starting() -> Generator[None]:
    """Have signals wait until Ray has started: what is half connected cannot be stopped, and crashes this process at its end (exit code -11, Ray 2.60)."""
    set_by_ray = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda sigterm_handler: None
    try:
        with signals_wait():
            yield
    finally:
        utils.set_sigterm_handler = set_by_ray


def _alive_nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _rooms(nodes: Sequence[Mapping[str, Any]], device: Device, share: float) -> list[int]:
    """Workers that each node has room for, whoever is there now."""
    cpus = [int(node["Resources"].get("CPU", 0.0)) for node in nodes]
    if device == "cpu":
        return cpus
    gpus = [node["Resources"].get("GPU", 0.0) for node in nodes]
    return [min(n_cpus, fit(n_gpus, share)) for n_cpus, n_gpus in zip(cpus, gpus, strict=True)]


def _hardware(nodes: Sequence[Mapping[str, Any]], device: Device) -> tuple[Hardware, ...]:
    """What nodes can do, as they say themselves. A question takes no CPU and no GPU: busy nodes answer, too."""
    ask: Any = ray.remote(num_cpus=0, max_retries=0)(own_hardware)
    deadline = time.monotonic() + _HARDWARE_SECONDS
    asked: list[Any] = []
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked.append(ask.options(scheduling_strategy=there).remote(device))
    found: list[Hardware] = []
    for node, answer in zip(nodes, asked, strict=True):
        try:
            found.append(ray.get(answer, timeout=max(0.0, deadline - time.monotonic())))
            continue
        except GetTimeoutError:
            why = f"no answer in {_HARDWARE_SECONDS:g} s"
        except RayError as error:  # of what went wrong there the last line names the cause
            why = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        found.append(Hardware(host=node["NodeManagerHostname"], unknown=why))
    return tuple(found)


def _unless_dead(answer: Any) -> dict[str, Any] | None:
    try:
        return ray.get(answer)
    except RayActorError:
        return None
