"""The number of workers that a machine gets, and their device."""

from typing import Any

import pytest

from sweep.config.schema import ClusterConfig
from sweep.core.errors import SweepError
from sweep.core.machine import Hardware, Workers
from sweep.run import resources
from sweep.run.resources import own_device, pick_workers


def cluster(**changed: Any) -> ClusterConfig:
    return ClusterConfig(
        **(
            {
                "address": "local",
                "dashboard": "auto",
                "device": "auto",
                "workers": "auto",
                "gpus_per_worker": 1.0,
                "retry_failed": False,
            }
            | changed
        )
    )


@pytest.fixture
def has(monkeypatch: pytest.MonkeyPatch) -> Any:
    def machine_with(gpus: int, cores: int = 8) -> None:
        monkeypatch.setattr(resources, "n_gpus", lambda: gpus)
        monkeypatch.setattr(resources, "n_cores", lambda: cores)
        monkeypatch.setattr(resources, "own_hardware", lambda device: Hardware(host=f"here, {device}"))

    return machine_with


@pytest.mark.parametrize(
    ("gpus", "asked", "expected"),
    [
        (0, {}, ("cpu", 8)),
        (0, {"workers": 3}, ("cpu", 3)),
        (0, {"workers": 12}, ("cpu", 12)),  # more than cores is slow, not wrong
        (4, {}, ("cuda", 4)),
        (4, {"device": "cpu"}, ("cpu", 8)),
        (4, {"workers": 2}, ("cuda", 2)),
        (1, {"gpus_per_worker": 0.5}, ("cuda", 2)),
        (1, {"gpus_per_worker": 0.1}, ("cuda", 10)),
        (7, {"gpus_per_worker": 0.07}, ("cuda", 7 * 14)),
        (2, {"gpus_per_worker": 0.6}, ("cuda", 2)),  # a share lies on one GPU: the 0.4 left on each make no third
        (8, {"gpus_per_worker": 0.4}, ("cuda", 16)),
        (8, {"gpus_per_worker": 2.0}, ("cuda", 4)),
    ],
)
def test_workers_of_a_machine(gpus: int, asked: dict[str, Any], expected: tuple[str, int], has: Any) -> None:
    has(gpus=gpus)
    device, count = expected
    assert pick_workers(cluster(**asked)) == Workers(
        device=device,  # pyright: ignore[reportArgumentType]
        count=count,
        gpus_each=asked.get("gpus_per_worker", 1.0),
        dashboard=device == "cuda",
        nodes=(Hardware(host=f"here, {device}"),),
    )


@pytest.mark.parametrize(
    ("gpus", "asked", "advice"),
    [
        (0, {"device": "cuda"}, "Type cluster.device=cpu, or check nvidia-smi and CUDA_VISIBLE_DEVICES."),
        (2, {"workers": 3}, "Type cluster.workers=2 or less."),
        (2, {"workers": 3, "gpus_per_worker": 0.6}, "Type cluster.workers=2 or less."),
        (2, {"gpus_per_worker": 4.0}, "Type cluster.gpus_per_worker=2 or less."),
        (7, {"workers": 4, "gpus_per_worker": 2.0}, "Type cluster.workers=3 or less."),
    ],
)
def test_what_the_machine_does_not_have_is_refused(gpus: int, asked: dict[str, Any], advice: str, has: Any) -> None:
    has(gpus=gpus)
    with pytest.raises(SweepError) as error:
        pick_workers(cluster(**asked))
    assert str(error.value).endswith(advice)


@pytest.mark.parametrize(
    ("gpus", "asked", "expected"),
    [
        (1, {}, "cuda"),
        (0, {}, "cpu"),
        (1, {"device": "cpu"}, "cpu"),
        (1, {"address": "h:6379"}, "cuda"),
        (1, {"address": "h:6379", "device": "cpu"}, "cpu"),
        (0, {"address": "h:6379"}, "cpu"),
        (0, {"address": "h:6379", "device": "cuda"}, "cpu"),  # the nodes shall use theirs
        (0, {"address": None}, "cpu"),  # RAY_ADDRESS
    ],
)
def test_what_a_process_computes_itself_is_on_its_own_machine(
    gpus: int,
    asked: dict[str, Any],
    expected: str,
    has: Any,
) -> None:
    """So `sweep validate` on a head without a GPU does not look for the nodes' GPUs; no cluster is asked."""
    has(gpus=gpus)
    assert own_device(cluster(**asked)) == expected
