"""The CUDA extensions of ModelOpt that a task needs."""

from dataclasses import replace
from typing import Any

import pytest

from tests.tasks import TASK

INT8 = replace(TASK, weight_attributes={"num_bits": 8, "axis": 0})


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, set()),
        (
            {
                "weight_attributes": {
                    "num_bits": (2, 1),
                    "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)},
                }
            },
            set(),
        ),  # Triton has it
        (
            {
                "input_attributes": {
                    "num_bits": (4, 3),
                    "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)},
                }
            },
            {"mx"},
        ),
        ({"engine": "modelopt"}, {"integers", "fp8"}),
    ],
)
def test_only_what_has_no_kernel_elsewhere_needs_modelopts_extensions(
    changes: dict[str, Any], needed: set[str]
) -> None:
    assert replace(INT8, **changes).extensions == needed
