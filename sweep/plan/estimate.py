"""What is left of a sweep will take: seconds by part, memory, bytes of store. Arithmetic on a plan and a speed."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Final

from sweep.core.machine import Device, Speed, Workers
from sweep.core.text import duration
from sweep.plan import costs
from sweep.plan.trials import SweepPlan
from sweep.plan.work import Family

_CROWDED: Final = 1.5  # what other programs then take of the cores shows in the time


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """Wall seconds of a sweep by part, on a machine that runs nothing else."""

    start: float  # until the workers load the model
    load: float
    capture: float
    scoring: float
    end: float  # from the last score to the end of the command

    @property
    def total(self) -> float:
        """From the command to its end."""
        return self.start + self.load + self.capture + self.scoring + self.end


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What is left of a sweep, and what that will take."""

    cells: int  # still to be scored
    seconds: Seconds | None  # None: the workers' speed is not known
    crowd: float  # see Speed.crowd
    worker_gb: float  # 1e9 bytes: resident in a worker, or allocated on its GPUs
    driver_gb: float  # resident
    store_mb: float  # 1e6 bytes, that are added

    @property
    def figures(self) -> dict[str, float]:
        """Numbers by name, for programs."""
        found = {"worker_gb": self.worker_gb, "driver_gb": self.driver_gb, "store_mb": self.store_mb}
        if (parts := self.seconds) is not None:
            found |= asdict(parts) | {"seconds": parts.total, "crowd": self.crowd}
        return found

    def text(self, device: Device) -> str:
        """For people. Args: device: of the workers."""
        if not self.cells:
            return "nothing is left to score"
        place = "on a worker's GPU" if device == "cuda" else "a worker"
        space = f"{self.worker_gb:.1f} GB {place}, {self.driver_gb:.1f} GB the driver, {self.store_mb:.2g} MB of store"
        if (parts := self.seconds) is None:
            return f"{space}; how long is not known, as the speed of these workers is not"
        named = {"start": parts.start, "model": parts.load, "capture": parts.capture, "scores": parts.scoring}
        steps = ", ".join(f"{name} {duration(seconds)}" for name, seconds in {**named, "reports": parts.end}.items())
        free = " on free cores, which other programs use now" if self.crowd > _CROWDED else ""
        return f"about {duration(parts.total)} ({steps}){free}; {space}"


def estimated(
    plan: SweepPlan, families: Sequence[Family], workers: Workers, cores: int, speed: Speed | None
) -> Estimate:
    """Estimate what is left of a sweep.

    Args:
        plan: of the whole grid.
        families: of the tasks that are left.
        workers: that will score it.
        cores: that the workers of a machine share.
        speed: of one of them; None: not known.
    """
    cells = {cell for family in families for task in family.tasks for cell in task.cells.values()}
    n_bytes = sum(family.store_bytes for family in families) + len(plan.trials) * costs.TRIAL_BYTES
    device_costs = costs.COSTS[workers.device]
    largest = max((family.bytes for family in families), default=0)
    return Estimate(
        cells=len(cells),
        seconds=None if speed is None else _seconds(plan, families, workers, cores, speed, cells),
        crowd=1.0 if speed is None else speed.crowd,
        worker_gb=largest / 1e9 + device_costs.process_gb,
        driver_gb=device_costs.driver_gb + n_bytes * costs.TABLE_BYTES / 1e9,
        store_mb=(n_bytes + costs.RUN_BYTES) / 1e6 if cells else 0.0,
    )


def _seconds(
    plan: SweepPlan, families: Sequence[Family], workers: Workers, cores: int, speed: Speed, cells: Collection[str]
) -> Seconds:
    own = costs.COSTS[workers.device]
    sizes = {family.revision: family.model_bytes / 1e9 for family in families}
    reported = [plan.tasks[trial.task_id] for trial in plan.trials if trial.task_id and trial.cell_id in cells]
    n_rows = sum(len(task.groups) for task in reported)
    crowd = max(1.0, (workers.per_node or workers.count) / cores)  # workers that start on a core
    return Seconds(
        start=own.start + (costs.START + costs.START_WORKER * (crowd - 1)) * speed.python,
        load=sum(own.load + own.load_gb * size for size in sizes.values()) * speed.python,
        capture=own.warm_up + sum(own.seconds(family.capture, speed) for family in families),
        scoring=sum(own.seconds(family.scoring.times(family.share), speed) for family in families),
        end=costs.STOP + (costs.END + costs.END_TRIAL * len(reported) + costs.END_ROW * n_rows) * speed.python,
    )
