"""A worker whose GPU fails: its process ends, another goes on, and the rows are the same bits."""

import os
from pathlib import Path

import pytest
import torch

from tests.bench.faults import cells
from tests.ray.test_faults import end, start

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

# Every Python process of the run finds this file: the first that uses CUDA when there are parts has a device-side
# assertion fail, once.
FAILING_GPU = """
import os, sys, threading, time
from pathlib import Path

def fail():
    while True:
        time.sleep(0.005)
        torch = sys.modules.get("torch")
        if torch is None or not hasattr(torch, "cuda") or not torch.cuda.is_initialized():
            continue
        if not any(Path(os.environ["STORE"]).glob("parts/*/*.parquet")):
            continue
        try:
            os.rename(os.environ["FAULT"], os.environ["FAULT"] + ".done")
        except FileNotFoundError:
            return
        torch.zeros(1, device="cuda")[torch.tensor([5], device="cuda")]
        return

if os.path.exists(os.environ["FAULT"]):
    threading.Thread(target=fail, daemon=True).start()
"""


def test_a_failed_device_assertion_retires_the_process_and_loses_nothing(tmp_path: Path) -> None:
    slow = "sensitivity.method=kl_div"  # a gradient's scores are there in a moment
    code, output = end(start(tmp_path / "whole", "whole", slow))
    assert code == 0, output
    (tmp_path / "sitecustomize.py").write_text(FAILING_GPU)
    fault = tmp_path / "fault"
    fault.touch()
    environment = {
        "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
        "FAULT": str(fault),
        "STORE": str(tmp_path / "store"),
    }
    code, output = end(start(tmp_path / "store", "failing", slow, **environment))
    assert Path(f"{fault}.done").exists()
    assert (code, "sweep-worker-0 starts anew: CUDA error: device-side assert triggered" in output) == (0, True), output
    assert cells(tmp_path / "store") == cells(tmp_path / "whole")
    assert not list(tmp_path.glob("store/parts/*"))
