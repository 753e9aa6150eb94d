"""Ray's side of a worker, and the pool that lends workers to trials. No arithmetic and no file formats live here."""

import asyncio
import os
import signal
from collections.abc import Iterator, Mapping
from typing import Any

import ray

from workers.data import Plan
from workers.task import Progress, Task


class Worker:
    """A named actor that holds one loaded model and scores the tasks that it is lent out for."""

    def __init__(self, store_uri: str, device: str) -> None:
        """Import the heavy libraries and prepare an empty worker; see workers.scorer.Scorer."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
        from workers.scorer import Scorer

        self._scorer = Scorer(store_uri, device)

    def load(self, task: Task) -> None:
        """Load the task's model before the first trial asks for it."""
        self._scorer.load(task.model)

    def info(self) -> dict[str, Any]:
        """Node, process and number of model loads."""
        return {"node": ray.get_runtime_context().get_node_id(), "pid": os.getpid(), "model_loads": self._scorer.model_loads}

    def score(self, task: Task, plan: Plan) -> Iterator[Progress]:
        """Stream progress; what it counts is in the store already."""
        yield from self._scorer.score(task, plan)


class Pool:
    """Lends free workers to trials, preferring one that holds the model already, and remembers how each task ended."""

    def __init__(self, names: list[str], tasks: Mapping[str, Task], plans: Mapping[str, list[Any]]) -> None:
        """Start with every worker free.

        Args:
            names: actor names of the workers.
            tasks: by task id.
            plans: object references of the plans, each in a list so that Ray does not fetch it, by plan id.
        """
        self._tasks, self._plans = tasks, plans
        self._free = dict.fromkeys(names, "")  # worker -> revision of the model that it holds
        self._ended: dict[str, str | None] = {}  # task id -> why it failed, None if it is done
        self._changed = asyncio.Condition()

    async def borrow(self, task_id: str) -> tuple[str, Task, list[Any]]:
        """Wait for a free worker. Returns its name, the task, and the plan's object reference in a list."""
        task = self._tasks[task_id]
        async with self._changed:
            await self._changed.wait_for(lambda: self._free)
            name = next((name for name, model in self._free.items() if model == task.model.revision), next(iter(self._free)))
            del self._free[name]
        return name, task, self._plans[task.plan_id]

    async def give_back(self, name: str, task_id: str) -> None:
        """The worker is free again."""
        async with self._changed:
            self._free[name] = self._tasks[task_id].model.revision
            self._changed.notify_all()

    async def end(self, task_id: str, failure: str | None) -> None:
        """The task has ended, for `failure` if that is not None."""
        async with self._changed:
            self._ended[task_id] = failure
            self._changed.notify_all()

    async def outcome(self, task_id: str) -> str | None:
        """Wait until the task has ended. Returns why it failed, None if it is done."""
        async with self._changed:
            await self._changed.wait_for(lambda: task_id in self._ended)
        return self._ended[task_id]

    async def failures(self) -> dict[str, str]:
        """Why tasks failed, by task id."""
        return {task_id: reason for task_id, reason in self._ended.items() if reason is not None}
