"""Which workers a Ray cluster that exists gets, and what is said when it cannot be joined; no cluster is started."""

import signal
from typing import Any

import pytest

from sweep.core.errors import SweepError
from sweep.core.machine import Workers
from sweep.run import cluster
from sweep.run.resources import pick_workers
from tests.unit.run.test_resources import cluster as config


def node(*, cpus: float = 8, gpus: float = 0, alive: bool = True) -> dict[str, Any]:
    return {"Alive": alive, "Resources": {"CPU": cpus} | ({"GPU": gpus} if gpus else {})}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The resources that Ray reports for the cluster."""
    found: list[dict[str, Any]] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(cluster.ray, "nodes", lambda: found)
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
    assert pick_workers(config(**({"address": "h:6379"} | asked))) == Workers(
        device=device,  # pyright: ignore[reportArgumentType]
        count=count,
        gpus_each=asked.get("gpus_per_worker", 1.0),
        address="h:6379",
        per_node=per_node,
        elastic=elastic,
    )


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
