"""How many workers a machine gets, on what."""

from pathlib import Path
from typing import Any

import pytest

from sweep.config.schema import ClusterConfig
from sweep.core import machine
from sweep.core.errors import SweepError
from sweep.core.machine import Workers, n_cores, n_gpus, pick_workers


def cluster(**changed: Any) -> ClusterConfig:
    return ClusterConfig(
        **({"address": "local", "dashboard": "auto", "device": "auto", "workers": "auto", "gpus_per_worker": 1.0, "retry_failed": False} | changed)
    )


@pytest.fixture
def has(monkeypatch: pytest.MonkeyPatch) -> Any:
    def machine_with(gpus: int, cores: int = 8) -> None:
        monkeypatch.setattr(machine, "n_gpus", lambda: gpus)
        monkeypatch.setattr(machine, "n_cores", lambda: cores)

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
    ("visible", "expected"), [(None, 3), ("", 0), ("-1", 0), ("1", 1), ("0,2", 2), ("0, 1,", 2), ("GPU-8a1c,GPU-77fe", 2), ("0,1,2,3,4", 3)]
)
def test_gpus_are_those_present_and_visible(visible: str | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "nvidia-uvm", "nvidia-modeset", "null"):
        (tmp_path / name).touch()
    monkeypatch.setattr(machine, "Path", lambda path: tmp_path if path == "/dev" else Path(path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert n_gpus() == expected


def test_cores_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {2, 3, 5})
    assert n_cores() == 3
