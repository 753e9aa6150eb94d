"""The Ray cluster of a run, its own on this machine or one that exists, and the workers on its nodes.

Of a cluster that exists a run stops only its own workers. Each run has a namespace of its own, so that several may have
a `sweep-worker-0` there.
"""

import contextlib
import functools
import logging
import os
import secrets
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import psutil

from sweep.config.schema import ClusterConfig
from sweep.core.errors import ClusterLost, SweepError
from sweep.core.interrupts import rearm, signals_wait
from sweep.core.json import Json
from sweep.core.machine import Device, Hardware, Workers, fit, own_hardware
from sweep.run.watchdog import Watchdog

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
from ray._common import utils as common_utils  # noqa: E402
from ray._private import parameter, services, utils  # noqa: E402
from ray._private.node import Node  # noqa: E402
from ray._private.state import GlobalState  # noqa: E402
from ray.exceptions import AuthenticationError, GetTimeoutError, RayError  # noqa: E402
from ray.util import list_named_actors  # noqa: E402
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: E402

_LOOPBACK = "127.0.0.1"
_RAYLET_SECONDS = 30.0  # until a new raylet must have registered, as Ray has it
_RAYLET_LOOK_SECONDS = 0.1
_SLOT = "sweep_trial"  # a resource that lets as many trials run at a time as there are workers
_HEAD = "node:__internal_head__"  # which every cluster has once, 1.0 of it
WORKER = "sweep-worker-"  # prefix of the names of workers
_SPACE = "sweep-"  # prefix of the names of namespaces
_HARDWARE_SECONDS = 30.0  # for a node to say what it can do; a new process takes about 2


class _Node(msgspec.Struct, kw_only=True):
    """A node of the cluster, as `ray.nodes` describes it."""

    identity: str = msgspec.field(name="NodeID")
    is_alive: bool = msgspec.field(name="Alive")
    resources: dict[str, float] = msgspec.field(name="Resources", default_factory=dict[str, float])
    host: str = msgspec.field(name="NodeManagerHostname", default="")
    address: str = msgspec.field(name="NodeManagerAddress", default="")
    raylet_port: int = msgspec.field(name="NodeManagerPort", default=0)
    metrics_port: int = msgspec.field(name="MetricsExportPort", default=0)

    @property
    def cpus(self) -> float:
        return self.resources.get("CPU", 0.0)

    @property
    def gpus(self) -> float:
        return self.resources.get("GPU", 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """A Ray cluster that this process is connected to."""

    address: str  # host:port of its head
    dashboard_url: str | None
    metrics: tuple[str, ...]  # host:port of each node, where Prometheus may ask for /metrics
    trial_resources: Mapping[str, float]  # of one process of Tune
    essential: Mapping[str, tuple[str, int]]  # host and port of the processes of a joined cluster that must answer


def connect(workers: Workers, watchdog: Watchdog) -> Connection:
    """Start a cluster of this process' own, or join the workers'.

    The caller's signal handlers stay: Ray's ends the process with exit code 15.

    Raises: ClusterLost: Ray did not start, nor when it was tried once more.
    """
    if not ray.is_initialized():
        if workers.address is None:
            _start(workers, watchdog)
        else:
            _init(address=workers.address)
    with _starting():
        # The same as the first call has returned.
        url = ray.init(ignore_reinit_error=True, logging_level=logging.ERROR).dashboard_url
    address, nodes = ray.get_runtime_context().gcs_address, _alive_nodes()
    return Connection(
        address=address,
        dashboard_url=f"http://{url}" if url else None,
        metrics=tuple(f"{node.address}:{node.metrics_port}" for node in nodes if node.metrics_port > 0),
        trial_resources={_SLOT: 1} if workers.address is None else {_HEAD: 0.001},
        essential={} if workers.address is None else _essential(address, nodes),
    )


def join(config: ClusterConfig) -> Workers:
    """Connect to the cluster that the config names, and see how many workers it has room for.

    Raises: SweepError: there is no such cluster, or not what the config asks for.
    """
    address = config.address or os.environ.get("RAY_ADDRESS")
    if not address:
        raise SweepError(
            "cluster=auto joins a Ray cluster, but none is named. "
            "Type cluster.address=HOST:6379 or set RAY_ADDRESS; cluster=local starts one here."
        )
    if "://" in address:
        raise SweepError(
            f"The address {address} is not a cluster's own. Type cluster.address=HOST:6379 on one of its machines, "
            "or submit the same command as a job: ray job submit --working-dir . -- sweep run cluster=auto ..."
        )
    _join(address, "type cluster=local")
    nodes = _alive_nodes()
    device = config.device
    if device == "auto":
        device = "cuda" if any(node.gpus for node in nodes) else "cpu"
    rooms = _rooms(nodes, device, config.gpus_per_worker)
    if config.workers == "auto" and not sum(rooms):
        what = f"GPU for cluster.gpus_per_worker={config.gpus_per_worker:g}" if device == "cuda" else "CPU"
        raise SweepError(
            f"The cluster at {address} has no {what}. "
            "Type cluster.workers=N to wait until N have been added, or cluster.device=cpu."
        )
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

    def kill_all_processes(self: Node, *arguments: bool, **options: bool) -> None:
        rearm()  # Ray's core worker, which has stopped by now, has reset SIGTERM to the system's default
        kill(self, *arguments, **options)

    with signals_wait(), _replaced(Node, kill_all_processes=kill_all_processes):
        ray.shutdown()


def room(workers: Workers) -> int:
    """Workers that the nodes of the cluster have room for, running ones included."""
    return sum(_rooms(_alive_nodes(), workers.device, workers.gpus_each))


def look(address: str, *, on_loopback: bool = False) -> dict[str, Json]:
    """Nodes, GPUs and workers of a cluster.

    Args:
        address: host:port of its head.
        on_loopback: the cluster was started by a run, on this machine.

    Returns: `address`; `nodes`: `host`, `cpus` and `gpus` of each that lives; `gpus` and `gpus_free` of all; `workers`:
        names of the workers of all sweeps there, by namespace.

    Raises: SweepError: nothing answers there.
    """
    with _on_loopback() if on_loopback else nullcontext():
        _join(address, "leave out --cluster to see what the store says")
    named: list[dict[str, str]] = list_named_actors(all_namespaces=True)  # pyright: ignore[reportAssignmentType]
    workers: dict[str, list[Json]] = {}
    for actor in sorted(named, key=lambda actor: (actor["namespace"], actor["name"])):
        if actor["namespace"].startswith(_SPACE) and actor["name"].startswith(WORKER):
            workers.setdefault(actor["namespace"], []).append(actor["name"])
    nodes = _alive_nodes()
    return {
        "address": address,
        "nodes": [{"host": node.host, "cpus": node.cpus, "gpus": node.gpus} for node in nodes],
        "gpus": sum(node.gpus for node in nodes),
        "gpus_free": ray.available_resources().get("GPU", 0.0),
        "workers": workers,
    }


def _start(workers: Workers, watchdog: Watchdog) -> None:
    """Start a cluster of this process' own, on loopback.

    It is started once more if its raylet does not come up, as happens on a machine under load.

    Raises: ClusterLost: one of its processes has not come up, or not lived.
    """
    sessions: list[str] = []
    for is_last in (False, True):
        try:
            with _on_loopback(), _private_session(watchdog, sessions), _raylet_watched(watchdog):
                _init(
                    address="local",
                    num_cpus=workers.count + 1,
                    num_gpus=None if workers.device == "cuda" else 0,
                    resources={_SLOT: workers.count},
                    # None: if it can be started; True would end the run if it does not start.
                    include_dashboard=None if workers.dashboard else False,
                    _node_ip_address=_LOOPBACK,
                )
            return
        except (RuntimeError, ConnectionError, TimeoutError, RayError) as error:
            raise ClusterLost(f"Ray did not start: {str(error).splitlines()[0]}.") from error
        except ClusterLost:
            watchdog.failed()
            _kill_processes_of(sessions)
            if is_last:
                raise


@contextmanager
def _raylet_watched(watchdog: Watchdog) -> Generator[None]:
    """End the wait for a new raylet when it has died; Ray waits for 30 seconds even then (2.60)."""
    get_node, deadline = services.get_node, time.monotonic() + _RAYLET_SECONDS

    def get_living_node(gcs_address: str, node_id: str) -> Mapping[str, Json]:
        state = GlobalState()
        options = services._get_gcs_client_options(gcs_address)  # pyright: ignore[reportPrivateUsage]
        state._initialize_global_state(options)  # pyright: ignore[reportPrivateUsage]
        while node_id not in [row["NodeID"] for row in state.node_table()]:
            names = [child.name() for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
            if not any("raylet" in name for name in names):
                raise ClusterLost("Ray did not start: its raylet has died.")
            if time.monotonic() > deadline:
                raise ClusterLost(f"Ray did not start: its raylet did not register within {_RAYLET_SECONDS:.0f} s.")
            time.sleep(_RAYLET_LOOK_SECONDS)
        watchdog.started()
        return get_node(gcs_address, node_id)

    with _replaced(services, get_node=get_living_node):
        yield


def _kill_processes_of(sessions: Collection[str]) -> None:
    """Kill the processes of clusters that did not come up, whose command lines name the session."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(session in argument for argument in child.cmdline() for session in sessions):
                child.kill()


@contextmanager
def _on_loopback() -> Generator[None]:
    """Have Ray listen on loopback alone.

    It does for a node of that address, but would replace the address by the machine's (2.60).
    """
    with _replaced(services, resolve_ip_for_localhost=lambda *_: _LOOPBACK, get_node_ip_address=lambda *_: _LOOPBACK):
        yield


@contextmanager
def _private_session(watchdog: Watchdog, sessions: list[str]) -> Generator[None]:
    """Have Ray make its session directory for this user alone.

    By itself Ray opens it to everybody, with all that its processes log (2.60).

    Args:
        watchdog: its `own` is called with the directory.
        sessions: the directory is appended.
    """
    share = common_utils.try_make_directory_shared

    def keep_private(directory: str) -> None:
        if os.path.basename(directory).startswith("session_"):
            os.chmod(directory, 0o700)
            sessions.append(directory)
            watchdog.own(directory)
        else:
            share(directory)

    worker = functools.partial(parameter.RayParams, worker_path=str(Path(__file__).with_name("ray_worker.py")))
    with _replaced(common_utils, try_make_directory_shared=keep_private), _replaced(parameter, RayParams=worker):
        yield


def _essential(address: str, nodes: Sequence[_Node]) -> dict[str, tuple[str, int]]:
    """Host and port, by name, of a joined cluster's control service and of this node's raylet."""
    host, _, port = address.rpartition(":")
    own = next(node for node in nodes if node.identity == ray.get_runtime_context().get_node_id())
    return {"Ray's control service (GCS)": (host, int(port)), "Ray's raylet": (own.address, own.raylet_port)}


def _join(address: str, otherwise: str) -> None:
    if ray.is_initialized():
        return
    try:
        _init(address=address)
    except (ConnectionError, RuntimeError, ValueError, AuthenticationError) as error:
        raise SweepError(
            f"No Ray cluster answers at {address}: {_lines(error)[0]} "
            f"Check `ray status --address {address}`, or {otherwise}."
        ) from error


def _init(**options: Any) -> None:
    with _starting():
        ray.init(
            log_to_driver=False, logging_level=logging.ERROR, namespace=f"{_SPACE}{secrets.token_hex(4)}", **options
        )


@contextmanager
def _starting() -> Generator[None]:
    """Have signals wait until Ray has started.

    A half connected process cannot be stopped, and crashes at its end (exit code -11, Ray 2.60).
    """
    with _replaced(utils, set_sigterm_handler=lambda sigterm_handler: None), signals_wait():
        yield


@contextmanager
def _replaced(owner: ModuleType | type, **functions: Callable[..., object]) -> Generator[None]:
    """Have Ray call other functions than its own; put its own back at the end."""
    before = {name: getattr(owner, name) for name in functions}
    try:
        for name, function in functions.items():
            setattr(owner, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(owner, name, function)


def _alive_nodes() -> list[_Node]:
    return [node for node in msgspec.convert(ray.nodes(), list[_Node]) if node.is_alive]


def _rooms(nodes: Sequence[_Node], device: Device, share: float) -> list[int]:
    """Workers that each node has room for, running ones included."""
    return [int(node.cpus) if device == "cpu" else min(int(node.cpus), fit(node.gpus, share)) for node in nodes]


def _hardware(nodes: Sequence[_Node], device: Device) -> tuple[Hardware, ...]:
    """The hardware of nodes, as they say themselves. A question takes no CPU and no GPU: busy nodes answer, too."""
    ask = ray.remote(num_cpus=0, max_retries=0)(own_hardware)
    deadline = time.monotonic() + _HARDWARE_SECONDS
    asked = [
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.identity, soft=False)).remote(device)
        for node in nodes
    ]
    found: list[Hardware] = []
    for node, answer in zip(nodes, asked, strict=True):
        try:
            found.append(ray.get(answer, timeout=max(0.0, deadline - time.monotonic())))
            continue
        except GetTimeoutError:
            why = f"no answer in {_HARDWARE_SECONDS:g} s"
        except RayError as error:  # of what went wrong there the last line names the cause
            why = _lines(error)[-1].strip()
        found.append(Hardware(host=node.host, unknown=why))
    return tuple(found)


def _lines(error: Exception) -> list[str]:
    """The lines of an error's message, at least one."""
    return str(error).strip().splitlines() or [type(error).__name__]
