"""The speed of this machine's workers, measured in about a second: products, element-wise work, Python."""

import argparse
import inspect
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import torch

from sweep.core.errors import SweepError
from sweep.core.machine import Device, Speed, n_cores
from workers.quant import kernels

_SECONDS: Final = 0.2  # that products and element-wise work are measured for
_ROWS: Final = 2048  # of a product, at most: what batches have
_LAUNCHES: Final = 50  # between two waits for a GPU
_COMPILATIONS: Final = 15
# Of one compilation of argparse.py, AMD EPYC, Python 3.11, 2026-11-26.
_REFERENCE_SECONDS: Final = 0.0125


def measured_speed(device: Device, dtype: str, n_rows: int, shape: tuple[int, int], n_workers: int) -> Speed:
    """Measure one worker's speed while others compute as well.

    Args:
        device: of the workers, which are on this machine.
        dtype: of the sweep, a name of torch's. Products of scores are float32 on a CPU in any case.
        n_rows: that a product has.
        shape: inputs and outputs of a typical linear.
        n_workers: that share this machine's cores, or one of its GPUs.

    Raises: SweepError: PyTorch cannot compute on this machine's GPUs.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise SweepError(
            f"torch {torch.__version__} cannot use the NVIDIA GPU that is here. "
            "Install its build for the driver's CUDA (nvidia-smi names it), or type cluster.device=cpu."
        )
    rows, (n_in, n_out) = min(n_rows, _ROWS), shape
    chosen = torch.float32 if device == "cpu" else getattr(torch, dtype)
    x_TI = torch.randn(rows, n_in, device=device, dtype=chosen)
    weight_OI = torch.randn(n_out, n_in, device=device, dtype=chosen)
    product_TO = x_TI @ weight_OI.T
    sums = torch.zeros(2, 1, rows, device=device)

    def multiply() -> None:
        torch.mm(x_TI, weight_OI.T)

    def square() -> None:
        kernels.score_rows(product_TO, product_TO[None], product_TO, [rows], [rows], sums[0], sums[1])

    n_threads = min(n_workers, n_cores()) if device == "cpu" else 1
    turns = n_workers / n_threads  # that workers take on a core or a GPU
    products, crowd = _rate(multiply, n_threads, device)
    values, _ = _rate(square, n_threads, device)
    return Speed(
        products=products * rows * n_in * n_out / turns,
        values=values * rows * n_out / turns,
        python=min(_compilation() for _ in range(_COMPILATIONS)) / _REFERENCE_SECONDS,
        crowd=crowd,
    )


def _compilation() -> float:
    """Processor seconds of one compilation; the fastest of several shows the machine, the others its load."""
    source, started = inspect.getsource(argparse), time.thread_time()
    compile(source, "argparse.py", "exec")
    return time.thread_time() - started


def _rate(call: Callable[[], None], n_threads: int, device: Device) -> tuple[float, float]:
    """Calls a second of one of several threads that all call, and wall seconds that such a second takes now.

    On a CPU that is a second of processor time: what other programs take of the cores may end before the sweep begins.
    """

    def timed(_: int) -> tuple[float, float]:
        torch.set_num_threads(1)
        call()
        _wait(device)
        clock = time.thread_time if device == "cpu" else time.perf_counter
        n, started, started_wall = 0, clock(), time.perf_counter()
        while clock() - started < _SECONDS:
            for _ in range(1 if device == "cpu" else _LAUNCHES):
                call()
                n += 1
            _wait(device)
        return n / (clock() - started), (time.perf_counter() - started_wall) / (clock() - started)

    n_before = torch.get_num_threads()
    with ThreadPoolExecutor(n_threads) as pool:
        rates, crowds = zip(*pool.map(timed, range(n_threads)), strict=True)
    torch.set_num_threads(n_before)
    return sum(rates) / n_threads, sum(crowds) / n_threads


def _wait(device: Device) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
