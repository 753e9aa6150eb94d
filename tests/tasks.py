"""A task of one layer group, for tests that hand tasks about and score nothing."""

from typing import Final

from sweep.core.groups import ShapedGroup
from sweep.core.machine import Needs
from tests.formats import format_of
from workers.task import ModelSpec, Picture, Task

GROUP: Final = ShapedGroup(
    name="layers.0.a",
    modules=("layers.0.a",),
    weight_elements=4,
    n_inputs=2,
    n_outputs=2,
)
TASK: Final = Task(
    task_id="",
    label="",
    model=ModelSpec(path="/model", revision="r", dtype="float32"),
    plan_id="plan",
    method="gradient",
    engine="layerwise",
    quant_cfg=(),
    format=format_of({"num_bits": 8}, None),
    groups=(GROUP,),
    cells={"small": "cell"},
    needs=Needs(),
)
PICTURE: Final = Picture(
    trials={},
    groups_done=0,
    groups_total=0,
    groups_scored=0,
    failed_trials=0,
    queue=0,
    models=0,
    eta_seconds=None,
    trial_seconds=(),
)
