"""The metrics of driver and workers, recorded by a stand-in for ray.util.metrics."""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from sweep.run import driver
from tests.tasks import PICTURE
from workers.service import metrics


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Values by metric, with its labels."""
    values: dict[str, list[Any]] = defaultdict(list)

    class Metric:
        def __init__(self, name: str, description: str, *arguments: Any) -> None:
            assert description.endswith(".")
            self.name = name

        def record(self, value: float = 1, tags: dict[str, str] | None = None) -> None:
            values[self.name].append((value, *(tags or {}).values()))

        set = inc = observe = record

    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(metrics, kind, Metric)
    return values


def test_a_sweep_is_recorded_as_it_stands_and_counters_by_what_is_new(recorded: dict[str, list[Any]]) -> None:
    pictures = [
        replace(
            PICTURE,
            trials={"done": 1, "running": 2},
            groups_done=5,
            groups_total=9,
            groups_scored=4,
            queue=3,
            trial_seconds=(1.5,),
        ),
        replace(
            PICTURE,
            trials={"done": 2, "running": 1},
            groups_done=7,
            groups_total=9,
            groups_scored=6,
            failed_trials=1,
            eta_seconds=8.0,
        ),
    ]
    sweep = metrics.SweepMetrics()
    for picture in pictures:
        sweep.show(picture, {"starting": 4, "idle": 1, "busy": 2}, deaths=1, replacements=1)
    assert recorded == {
        "sweep_trials": [(1, "done"), (2, "running"), (2, "done"), (1, "running")],
        "sweep_groups": [(5, "done"), (9, "total"), (7, "done"), (9, "total")],
        "sweep_queue": [(3,), (0,)],
        "sweep_workers": [(4, "starting"), (1, "idle"), (2, "busy")] * 2,
        "sweep_eta_seconds": [(-1.0,), (8.0,)],
        "sweep_trial_seconds": [(1.5,)],
        "sweep_groups_scored_total": [(4,), (2,)],
        "sweep_failed_trials_total": [(1,)],
        "sweep_models": [(0,), (0,)],
        "sweep_worker_replacements_total": [(1,)],
        "sweep_retries_total": [(1,)],
    }


def test_a_run_is_recorded_at_its_end_unless_it_fails(recorded: dict[str, list[Any]]) -> None:
    pool: Any = SimpleNamespace(counts=lambda: {"busy": 2}, n_deaths=1, n_replaced=0)
    with pytest.raises(KeyError), driver.exported(lambda: PICTURE, pool):
        raise KeyError
    assert not recorded
    with driver.exported(lambda: PICTURE, pool):
        pass
    assert recorded["sweep_workers"] == [(2, "busy")]
    assert recorded["sweep_retries_total"] == [(1,)]


def test_a_worker_counts_loads_and_rows_and_shares_the_time_among_these(recorded: dict[str, list[Any]]) -> None:
    worker = metrics.WorkerMetrics("sweep-worker-3")
    worker.timed("load_seconds", 12.0)
    worker.timed("capture_seconds", 2.0)
    worker.timed("busy_seconds", 20.0)
    worker.written(4, 2.0)
    worker.written(0, 2.0)
    worker.gpu_memory(3, 8)
    assert recorded == {
        "sweep_model_loads_total": [(1,)],
        "sweep_capture_seconds": [(2.0,)],
        "sweep_rows_written_total": [(4,)],
        "sweep_group_seconds": [(0.5,)] * 4,
        "sweep_gpu_memory_bytes": [(3, "sweep-worker-3", "used"), (8, "sweep-worker-3", "total")],
    }
