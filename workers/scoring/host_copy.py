"""Device-to-host copies that the GPU's stream does not wait for."""

from collections.abc import Callable

import torch
from torch import Tensor


def start_host_copy(values: Tensor) -> Callable[[], Tensor]:
    """Start a copy of a tensor to pinned host memory.

    Returns: a function that waits for the copy and returns it. It doesn't wait for kernels launched since, as
        `Tensor.cpu` would.
    """
    if not values.is_cuda:
        return lambda: values
    on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    on_host.copy_(values, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def wait() -> Tensor:
        done.synchronize()
        return on_host

    return wait
