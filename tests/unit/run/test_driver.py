"""Ray Tune's part of a run, without a cluster."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from sweep.run import driver


@pytest.mark.parametrize("error", [OutOfMemoryError("1 worker(s) were killed"), RayActorError()])
def test_a_trial_whose_process_is_killed_for_want_of_memory_has_died_like_any_other(error: Exception) -> None:
    """Tune by itself ends the experiment with a RuntimeError for the first of them (2.60)."""
    assert driver.RayActorManager is RayActorManager
    died: list[type[Exception]] = []
    actor = SimpleNamespace(actor_id="a", _on_error=lambda actor, error: died.append(type(error)))
    task: Any = SimpleNamespace(_tracked_actor=actor, _on_error=None)
    manager: Any = RayActorManager.__new__(RayActorManager)
    manager._failed_actor_ids, manager._cleanup_actor = set[str](), lambda tracked_actor: None
    manager._actor_task_failed(task, error)
    assert died == [RayActorError]


def test_an_error_of_a_trial_itself_leaves_its_process() -> None:
    failed: list[type[Exception]] = []
    task: Any = SimpleNamespace(_tracked_actor=None, _on_error=lambda actor, error: failed.append(type(error)))
    manager: Any = RayActorManager.__new__(RayActorManager)
    manager._actor_task_failed(task, RayTaskError("step", "traceback", ValueError("bug")))
    assert failed == [RayTaskError]
