"""nvidia-smi tells the driver the same about a GPU as CUDA tells a worker."""

from pathlib import Path

import pytest
import torch

from sweep.core.machine import own_hardware
from workers.service.scorer import Scorer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def test_a_worker_has_a_gpu_that_the_plan_was_made_for(tmp_path: Path) -> None:
    (own,) = Scorer(str(tmp_path), "cuda").hardware().gpus
    listed = {(gpu.name, gpu.capability): gpu.memory_gb for gpu in own_hardware("cuda").gpus}
    assert listed[own.name, own.capability] == pytest.approx(own.memory_gb, rel=0.03)  # the driver keeps some
