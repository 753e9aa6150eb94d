"""GPUs, cores and compiler of this machine, and recipes that are refused for want of them."""

from pathlib import Path

import pytest

from sweep.core import machine
from sweep.core.machine import Gpu, Hardware, Needs, n_cores, n_gpus, own_hardware


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, 3), ("", 0), ("-1", 0), ("1", 1), ("0,2", 2), ("0, 1,", 2), ("GPU-8a1c,GPU-77fe", 2), ("0,1,2,3,4", 3)],
)
def test_gpus_are_those_present_and_visible(
    visible: str | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
