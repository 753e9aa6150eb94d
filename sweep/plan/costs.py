"""Measured costs of a sweep's steps, on a CPU and on a GPU, and the speeds of known GPUs: the place to correct them.

Work has three kinds: multiply-adds of products, values of element-wise passes, seconds of Python on the reference
machine. `sweep.core.machine.Speed` turns them into seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from sweep.core.machine import Device, Speed
from sweep.formats.quantizer import Quantizer


@dataclass(frozen=True, slots=True)
class Work:
    """Work of one worker."""

    products: float = 0.0  # multiply-adds
    values: float = 0.0  # of element-wise passes
    python: float = 0.0  # seconds on the reference machine

    def __add__(self, other: "Work") -> "Work":
        """Both."""
        return Work(self.products + other.products, self.values + other.values, self.python + other.python)

    def times(self, n: float) -> "Work":
        """The same n times."""
        return Work(self.products * n, self.values * n, self.python * n)


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Costs on one kind of device. Values are counted in those that kernels.score_rows squares and sums."""

    integer: float  # values a value that is quantized, and its error
    float8: float
    blocks: float  # NVFP4 and MX
    weight: float  # values more a value of a weight: its sums of squares, and whether it is finite
    activation: float  # values a value of x and g in a capture: norms, activations, copies, both passes
    logit: float  # values a logit of the loss and its gradient
    attention: float  # multiply-adds of the products of attention, counted as products of linears
    divergence: float  # values a logit of the KL divergence
    layer: float  # seconds of Python: a decoder layer on a batch, both passes
    replayed: float  # the share of it that a layer costs in another pass over the same batch: CUDA graphs
    visit: float  # a module under one format of its weight
    column: float  # a module under one recipe with one range of its inputs
    row: float  # a row of the store
    start: float  # until workers load the model, whatever Python's speed: Ray's waits; on a GPU CUDA and its libraries
    load: float  # a model's, but for its bytes
    load_gb: float  # a GB of it
    warm_up: float  # before the first score: kernels compiled, libraries loaded
    process_gb: float  # resident in a worker without a model; on a GPU what cuBLAS and fragments take
    driver_gb: float  # resident in the driver, with Ray and pyarrow, on a GPU with torch's CUDA libraries
    is_asynchronous: bool  # whether Python runs beside the device

    def quantized(self, quantizer: Quantizer | None) -> float:
        """Values a value that is quantized; 0 without a quantizer."""
        if quantizer is None:
            return 0.0
        if quantizer.has_dynamic_blocks:
            return self.blocks
        return self.integer if isinstance(quantizer.num_bits, int) else self.float8

    def seconds(self, work: Work, speed: Speed) -> float:
        """Seconds that a worker takes for it."""
        device, python = work.products / speed.products + work.values / speed.values, work.python * speed.python
        return max(device, python) if self.is_asynchronous else device + python


COSTS: Final[Mapping[Device, Costs]] = {
    # 2026-11-26, AMD EPYC (2 cores), torch 2.13.0+cpu, Python 3.11, float32: processor time of one thread.
    "cpu": Costs(
        integer=2.0,
        float8=4.5,
        blocks=15.0,
        weight=2.0,
        activation=8.0,
        logit=10.0,
        attention=1.4,
        divergence=6.0,
        layer=1.5e-3,
        replayed=1.0,
        visit=2e-3,
        column=6e-4,
        row=1e-3,
        start=8.0,
        load=0.3,
        load_gb=0.7,
        warm_up=0.0,
        process_gb=0.72,
        driver_gb=0.44,
        is_asynchronous=False,
    ),
    # 2026-11-26, H100, torch 2.11.0+cu130, Python 3.12, bfloat16: start, load and memory of thirteen sweeps of three
    # models (tests.bench.estimates); the rest from tests/bench/RESULTS.md. 4B shape, 7,042 tokens: 16 recipes took
    # 0.54 s of squaring and summing to 0.09 of quantizing, a capture 1.24 s, 270 cells 13 to 20 s (bound by the host),
    # a KL trial 15.6 s (0.50 of 1.34 s in products, 0.24 in attention).
    "cuda": Costs(
        integer=1.0,
        float8=1.0,
        blocks=2.0,
        weight=1.0,
        activation=3.0,
        logit=6.0,
        attention=2.0,
        divergence=3.0,
        layer=5e-3,
        replayed=0.1,
        visit=1.1e-3,
        column=1.2e-4,
        row=1e-4,
        start=19.0,
        load=0.25,
        load_gb=0.13,
        warm_up=3.0,
        process_gb=0.06,
        driver_gb=0.76,
        is_asynchronous=True,
    ),
}
# Seconds of the reference machine until workers load the model, beside Costs.start: imports, and those of workers that
# wait for a core.
START: Final = 8.0
START_WORKER: Final = 9.0
# And after the last score: Tune and Ray stop, which takes the same everywhere; tables are printed; a trial's report, a
# row of it.
STOP: Final = 2.0
END: Final = 3.0
END_TRIAL: Final = 8e-3
END_ROW: Final = 2e-4
# Quantizations of a weight, and products of the calibration rows, that the search of an algorithm makes for a linear.
SEARCHES: Final[Mapping[str, tuple[float, float]]] = {
    "max": (1.0, 0.0),
    "mse": (40.0, 0.0),
    "awq_lite": (24.0, 13.0),
    "smoothquant": (2.0, 1.0),
}
STOCK_PASSES: Final = 8.0  # forward passes of mtq.auto_quantize: calibration, gradients, every linear quantized as well
TABLE_BYTES: Final = 3.0  # of the driver's tables, a byte of the store
# Of the store: bytes of a run's record and table, of a cell without rows, of a row without samples, of a sample's score
# (float32, of which zstd saves 8 %), of a trial.
RUN_BYTES: Final = 14_000
FILE_BYTES: Final = 9_500
ROW_BYTES: Final = 100
SAMPLE_BYTES: Final = 3.7
TRIAL_BYTES: Final = 300

# Speeds of GPUs that are not here to be measured. H100 and H200, RESULTS.md of 2026-11-26: one product of all linears
# in 1.1 s is 0.33e15 multiply-adds a second; score_rows takes 16 recipes of two layers, 98e9 values, in 0.54 s.
_KNOWN: Final[Mapping[str, Speed]] = {
    name: Speed(products=0.33e15, values=180e9, python=1.0) for name in ("H100", "H200", "GH200")
}


def known_speed(gpu: str) -> Speed | None:
    """The speed of a GPU by the name that its driver gives, ``NVIDIA H100 80GB HBM3``; None: not known."""
    words = gpu.replace("-", " ").split()
    return next((speed for name, speed in _KNOWN.items() if name in words), None)
