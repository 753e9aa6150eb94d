"""The device and dtype in which an export quantizes weights: those of the model that was calibrated."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Self, TypeVar

import torch
from torch import Tensor, nn

from sweep.core.machine import memory_gb, n_cores

_BYTES: Final = 48  # a weight, while it is quantized on a CPU: float32 and float64 copies; measured with NVFP4: 40

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """Where and how precisely an export computes."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """As a model computes. Args: model: on one device."""
        parameter = next(model.parameters())
        return cls(device=parameter.device, dtype=parameter.dtype)

    def weight(self, held: Tensor) -> Tensor:
        """A weight of the checkpoint as the model has it, so that what is quantized is what was measured."""
        return held.to(self.device, self.dtype)

    def each(self, function: Callable[[Item], Made], items: Iterable[Item], largest: int) -> list[Made]:
        """The function of each item, in order: on a CPU in threads, as many as cores and memory allow.

        A weight's numbers do not depend on how many there are: each thread has weights of its own.

        Args:
            function: of one tensor; its first error ends all.
            items: to call it with.
            largest: weights of the largest one.
        """
        if self.device.type != "cpu":  # the GPU is busy with one thread's work
            return list(map(function, items))
        room = int(memory_gb() * 1e9 / 2 / (_BYTES * max(largest, 1)))
        with ThreadPoolExecutor(max(1, min(n_cores(), room))) as threads:
            return list(threads.map(function, items))


CPU: Final = Compute(device=torch.device("cpu"), dtype=torch.float32)
