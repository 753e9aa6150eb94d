"""The speed of this machine: positive rates, shared by workers, and no setting of the process changed."""

import pytest
import torch

from sweep.core.errors import SweepError
from sweep.core.machine import n_cores
from workers.service import speed
from workers.service.speed import measured_speed


def test_every_rate_is_measured_and_threads_stay_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_SECONDS", 0.01)
    before = torch.get_num_threads()
    found = measured_speed("cpu", "bfloat16", 64, (32, 48), 2)
    assert min(found.products, found.values, found.python) > 0
    assert torch.get_num_threads() == before


def test_workers_beyond_the_cores_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_rate", lambda call, n_threads, device: (100.0, 1.0))
    one, many = (measured_speed("cpu", "float32", 10, (3, 5), n * n_cores()) for n in (1, 4))
    assert one.products == 100 * 10 * 3 * 5
    assert one.values == 100 * 10 * 5
    assert many.products == one.products / 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU can be used")
def test_a_gpu_that_pytorch_cannot_use_is_refused() -> None:
    with pytest.raises(SweepError, match=r"cluster\.device=cpu"):
        measured_speed("cuda", "bfloat16", 10, (3, 5), 1)
