"""The CUDA extensions of ModelOpt that a task needs."""

from dataclasses import replace
from typing import Any

import pytest

from tests.formats import format_of
from tests.tasks import TASK

INT8: dict[str, Any] = {"num_bits": 8, "axis": 0}
NVFP4: dict[str, Any] = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
MXFP8: dict[str, Any] = {"num_bits": (4, 3), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}}


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, set()),
        ({"format": format_of(NVFP4, None)}, set()),  # Triton has it
        ({"format": format_of(INT8, MXFP8)}, {"mx"}),
        ({"engine": "modelopt"}, {"integers", "fp8"}),
    ],
)
def test_only_what_has_no_kernel_elsewhere_needs_modelopts_extensions(
    changes: dict[str, Any], needed: set[str]
) -> None:
    assert replace(TASK, **{"format": format_of(INT8, None), **changes}).extensions == needed
