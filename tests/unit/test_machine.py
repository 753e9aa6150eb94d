"""How many workers a machine gets, on what."""

from pathlib import Path
from typing import Any

import pytest

from sweep import machine
from sweep.config import ClusterConfig
from sweep.errors import SweepError
from sweep.machine import Gpu, Hardware, Needs, Workers, n_cores, n_gpus, own_device, own_hardware, pick_workers


def cluster(**changed: Any) -> ClusterConfig:
    return ClusterConfig(
        **({"address": "local", "dashboard": "auto", "device": "auto", "workers": "auto", "gpus_per_worker": 1.0, "retry_failed": False} | changed)
    )


@pytest.fixture
def has(monkeypatch: pytest.MonkeyPatch) -> Any:
    def machine_with(gpus: int, cores: int = 8) -> None:
        monkeypatch.setattr(machine, "n_gpus", lambda: gpus)
        monkeypatch.setattr(machine, "n_cores", lambda: cores)
        monkeypatch.setattr(machine, "own_hardware", lambda device: Hardware(host=f"here, {device}"))

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


LISTED = "NVIDIA A100-SXM4-80GB, 81920, 8.0\nNVIDIA T1000, 4096, 7.5\nNVIDIA GB10, [N/A], 12.1\n"


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            f"printf '{LISTED}'",
            (Gpu("NVIDIA A100-SXM4-80GB", 85.89934592, (8, 0)), Gpu("NVIDIA T1000", 4.294967296, (7, 5))),
        ),
        ("printf 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", ()),
        (None, ()),
    ],
)
def test_the_gpus_are_those_that_nvidia_smi_lists(
    script: str | None,
    expected: tuple[Gpu, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever CUDA_VISIBLE_DEVICES says: Ray empties it for a task that asks for no GPU."""
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(machine, "_gpus", machine._gpus.__wrapped__)  # asked once in a process
    assert own_hardware("cuda").gpus == expected
    assert own_hardware("cpu").gpus == ()
    assert own_hardware("cuda").memory_gb > 0


A100, L4, H100 = Gpu("A100", 85.9, (8, 0)), Gpu("L4", 24.2, (8, 9)), Gpu("H100", 85.5, (9, 0))


@pytest.mark.parametrize(
    ("hardware", "needs", "reason"),
    [
        (Hardware(host="n", gpus=(A100,)), Needs(), None),
        (Hardware(host="n", gpus=(A100,)), Needs(capability=(8, 9)), "capability 8.9; A100 has 8.0."),
        (Hardware(host="n", gpus=(A100, L4)), Needs(capability=(8, 9)), None),
        (Hardware(host="n", gpus=(L4,)), Needs(gpu_gb=30), "about 30.0 GB; L4 has 24.2 GB."),
        (Hardware(host="n", gpus=(L4, A100)), Needs(gpu_gb=30), None),
        (Hardware(host="n", gpus=(L4, A100)), Needs(gpu_gb=30, capability=(8, 9)), "about 30.0 GB; L4 has 24.2 GB."),
        (Hardware(host="n", gpus=(H100,)), Needs(nvcc=True), "nvcc, which n lacks."),
        (Hardware(host="n", gpus=(H100,), has_nvcc=True), Needs(nvcc=True, capability=(8, 9), gpu_gb=80), None),
        (Hardware(host="n"), Needs(capability=(8, 9), gpu_gb=1000), None),  # GPUs of an unknown kind
        (Hardware(host="n", unknown="no answer"), Needs(nvcc=True, capability=(8, 9), gpu_gb=1000), None),
    ],
)
def test_a_recipe_is_refused_for_what_is_known_to_be_lacking(
    hardware: Hardware,
    needs: Needs,
    reason: str | None,
) -> None:
    refusal = hardware.refusal(needs)
    assert (refusal is None) == (reason is None)
    assert (reason or "") in (refusal or "")
