"""Which workers a Ray cluster that exists gets, and what is said when it cannot be joined; no cluster is started."""

import signal
from dataclasses import replace
from typing import Any

import pytest

from sweep.core.errors import SweepError
from sweep.core.machine import Hardware, Workers
from sweep.run import cluster
from sweep.run.resources import pick_workers
from tests.unit.run.test_resources import cluster as config


def node(*, cpus: float = 8, gpus: float = 0, alive: bool = True, host: str = "n") -> dict[str, Any]:
    resources = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    identity = host.encode().hex().ljust(56, "0")
    return {"Alive": alive, "Resources": resources, "NodeID": identity, "NodeManagerHostname": host}


class Asking:
    """A Ray task whose object references name the node that it runs on."""

    def __init__(self, host: str = "") -> None:
        self._host = host

    def options(self, scheduling_strategy: Any) -> "Asking":
        return Asking(bytes.fromhex(scheduling_strategy.node_id).rstrip(b"\0").decode())

    def remote(self, device: str) -> tuple[str, str]:
        return self._host, device


def answer(reference: tuple[str, str], timeout: float) -> Hardware:
    host, device = reference
    if host == "silent":
        raise cluster.GetTimeoutError("Get timed out: some object(s) not ready.")
    if host == "bare":
        raise cluster.RayError("ray::own_hardware() (pid=7)\nModuleNotFoundError: No module named 'sweep'")
    return Hardware(host=f"{host}, {device}")


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The resources that Ray reports for the cluster."""
    found: list[dict[str, Any]] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(cluster.ray, "nodes", lambda: found)
    monkeypatch.setattr(cluster.ray, "remote", lambda **options: lambda function: Asking())
    monkeypatch.setattr(cluster.ray, "get", answer)
    return found


@pytest.mark.parametrize(
    ("has", "asked", "expected"),
    [
        ([node(), node(gpus=4), node(gpus=8, cpus=64)], {}, ("cuda", 12, 8, True)),
        ([node(gpus=4, cpus=2)], {}, ("cuda", 2, 2, True)),  # a worker asks for a core, too
        ([node(gpus=4), node(gpus=8, alive=False)], {}, ("cuda", 4, 4, True)),
        ([node(gpus=2), node(gpus=1)], {"gpus_per_worker": 0.5}, ("cuda", 6, 4, True)),
        ([node(cpus=2), node(cpus=3)], {}, ("cpu", 5, 3, True)),
        ([node(gpus=1)], {"device": "cpu"}, ("cpu", 8, 8, True)),
        ([node(gpus=1)], {"workers": 4}, ("cuda", 4, 1, False)),  # the others wait for nodes
        ([node(cpus=0)], {"workers": 4, "device": "cuda"}, ("cuda", 4, 1, False)),
    ],
)
def test_workers_of_a_cluster(
    has: list[dict[str, Any]], asked: dict[str, Any], expected: tuple[str, int, int, bool], nodes: list[dict[str, Any]]
) -> None:
    nodes += has
    device, count, per_node, elastic = expected
    found = pick_workers(config(**({"address": "h:6379"} | asked)))
    assert replace(found, nodes=()) == Workers(
        device=device,  # pyright: ignore[reportArgumentType]
        count=count,
        gpus_each=asked.get("gpus_per_worker", 1.0),
        address="h:6379",
        per_node=per_node,
        elastic=elastic,
    )


def test_nodes_with_room_for_a_worker_say_what_they_can_do(nodes: list[dict[str, Any]]) -> None:
    nodes += [node(host="head"), node(host="a", gpus=4), node(host="gone", gpus=8, alive=False), node(host="b", gpus=1)]
    found = cluster.join(config(address="h:6379"))
    assert found.nodes == (Hardware(host="a, cuda"), Hardware(host="b, cuda"))
    found = cluster.join(config(address="h:6379", device="cpu"))
    assert [each.host for each in found.nodes] == ["head, cpu", "a, cpu", "b, cpu"]


def test_of_a_node_that_does_not_answer_nothing_is_known(nodes: list[dict[str, Any]]) -> None:
    nodes += [node(host="a"), node(host="silent"), node(host="bare")]
    known, *others = cluster.join(config(address="h:6379")).nodes
    assert known == Hardware(host="a, cpu")
    rest = "no recipe is refused on its account."
    assert [each.warning for each in others] == [
        f"silent does not say what it can do (no answer in 30 s): {rest}",
        f"bare does not say what it can do (ModuleNotFoundError: No module named 'sweep'): {rest}",
    ]


@pytest.mark.parametrize(
    ("address", "has", "message"),
    [
        (
            None,
            [],
            r"none is named\. Type cluster\.address=HOST:6379 or set RAY_ADDRESS; cluster=local starts one here",
        ),
        ("ray://h:10001", [], r"Type cluster\.address=HOST:6379 .* ray job submit"),
        ("h:6379", [node(cpus=0)], r"has no CPU\. Type cluster\.workers=N"),
    ],
)
def test_a_cluster_that_cannot_be_used_is_an_error_that_says_what_to_type(
    address: str | None, has: list[dict[str, Any]], message: str, nodes: list[dict[str, Any]]
) -> None:
    nodes += has
    with pytest.raises(SweepError, match=message):
        cluster.join(config(address=address))


def test_the_environment_names_the_cluster_when_the_config_does_not(
    nodes: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes.append(node())
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert cluster.join(config(address=None)).address == "head:6379"


def test_room_is_what_nodes_that_are_there_have(nodes: list[dict[str, Any]]) -> None:
    workers = Workers(device="cuda", count=2, gpus_each=1.0, address="h:1", elastic=True)
    nodes.append(node(gpus=2))
    assert cluster.room(workers) == 2
    nodes.append(node(gpus=3))
    assert cluster.room(workers) == 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_ray_starts_waits_for_the_callers_own_handler(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A half connected process crashes as it ends."""
    seen: list[str] = []

    def init(**options: Any) -> None:
        cluster.utils.set_sigterm_handler(lambda number, frame: seen.append("Ray's"))
        signal.raise_signal(number)
        seen.append("started")

    monkeypatch.setattr(cluster.ray, "init", init)
    before = signal.signal(number, lambda number, frame: seen.append("the caller's"))
    try:
        cluster._init()
        signal.raise_signal(number)
    finally:
        signal.signal(number, before)
    assert seen == ["started", "the caller's", "the caller's"]
