"""The speed of this machine's workers, measured in about a second: products, element-wise work, Python."""

import argparse
import inspect
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import torch

from sweep.core.machine import Device, Speed, n_cores
from workers.quant import kernels

_SECONDS: Final = 0.2  # that each of the three is measured for
_ROWS: Final = 2048  # of a batch, at most
# Compilations of argparse.py a second of processor time, AMD EPYC, Python 3.11, 2026-11-26.
_REFERENCE_COMPILATIONS: Final = 75.0


def measured_speed(device: Device, dtype: str, n_rows: int, shape: tuple[int, int], n_workers: int) -> Speed:
    """Measure one worker's speed while others compute as well.

    Args:
        device: of the workers, which are on this machine.
        dtype: of the sweep, a name of torch's.
        n_rows: that a product has.
        shape: inputs and outputs of a typical linear.
        n_workers: that compute at a time.
    """
    rows, (n_in, n_out) = min(n_rows, _ROWS), shape
    place = {"device": device, "dtype": getattr(torch, dtype)}
    x_TI, weight_OI = torch.randn(rows, n_in, **place), torch.randn(n_out, n_in, **place)
    product = x_TI @ weight_OI.T
    seconds = product[None].float() if device == "cpu" else product[None]
    sums = torch.zeros(2, 1, rows, device=device)

    def multiply() -> None:
        torch.mm(x_TI, weight_OI.T)

    def square() -> None:
        kernels.score_rows(product, seconds, product, [rows], [rows], sums[0], sums[1])

    n_threads = min(n_workers, n_cores()) if device == "cpu" else 1
    share = n_workers / n_threads  # of a core or a GPU, that workers take turns on
    return Speed(
        products=_rate(multiply, n_threads, device) * rows * n_in * n_out / share,
        values=_rate(square, n_threads, device) * rows * n_out / share,
        python=_REFERENCE_COMPILATIONS / _rate(_compile, 1, "cpu"),
    )


def _compile() -> None:
    compile(inspect.getsource(argparse), "argparse.py", "exec")


def _rate(call: Callable[[], None], n_threads: int, device: Device) -> float:
    """Calls a second of one of several threads that all call."""

    def timed(_: int) -> float:
        torch.set_num_threads(1)
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        # Not what other programs take of the cores: they may have ended when the sweep runs.
        clock = time.thread_time if device == "cpu" else time.perf_counter
        n, started = 0, clock()
        while clock() - started < _SECONDS:
            for _ in range(1 if device == "cpu" else 50):  # a GPU is waited for now and then
                call()
                n += 1
            if device == "cuda":
                torch.cuda.synchronize()
        return n / (clock() - started)

    with ThreadPoolExecutor(n_threads) as pool:
        return sum(pool.map(timed, range(n_threads))) / n_threads
