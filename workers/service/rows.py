"""Rows of one task's scores, and their parts and cells in the store. Needs neither PyTorch nor the scoring engines."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from sweep.core.groups import Part, ShapedGroup
from sweep.core.sizes import SIZES
from sweep.store.records import SCORES_SCHEMA
from sweep.store.store import Store
from workers.scoring.scores import GroupScore, PartScores
from workers.task import Task


class TaskWriter:
    """Writes a task's parts, and turns them into cells when all are there."""

    def __init__(self, task: Task, n_predictions: Mapping[str, int], parts: Sequence[Part], store_uri: str) -> None:
        """Start with no part written.

        Args:
            task: of the rows.
            n_predictions: by size.
            parts: all parts of the model, in its order.
            store_uri: of the store for parts and cells.
        """
        self.task = task
        self._n_predictions, self._store = n_predictions, Store(store_uri)
        self._parts = {part.name: part for part in parts}
        self._tables: dict[str, dict[str, pa.Table]] = {size: {} for size in task.cells}  # written by this worker

    def write(self, part: str, measured: PartScores) -> None:
        """Put a part's rows into the store."""
        for size, scores in measured.items():
            rows = [
                self._row(group, size, _columns(score))
                for group, score in zip(self._parts[part].groups, scores, strict=True)
            ]
            table = pa.Table.from_pylist(rows, schema=SCORES_SCHEMA)
            self._store.write_part(self.task.cells[size], part, table)
            self._tables[size][part] = table

    def complete(self) -> None:
        """Turn the parts of each cell into its scores, if all are in the store.

        Several workers may score parts of one cell; the last one completes it.
        """
        for size, tables in self._tables.items():
            cell_id = self.task.cells[size]
            others = self._store.part_names(cell_id) if len(tables) < len(self._parts) else set[str]()
            if self._parts.keys() <= tables.keys() | others:
                self._store.complete(cell_id, {name: tables.get(name) for name in self._parts})
            elif self._store.is_finished(cell_id):
                self._store.drop_parts(cell_id)

    def _row(self, group: ShapedGroup, size: str, columns: Mapping[str, Any]) -> dict[str, Any]:
        n_predictions, score = self._n_predictions[size], columns["score"]
        divisor = n_predictions if self.task.method == "kl_div" else 2 * n_predictions
        return {
            "cell_id": self.task.cells[size],
            "group": group.name,
            "modules": list(group.modules),
            "layer_index": group.layer_index,
            "sensitivity": None if score is None else score / n_predictions,
            "predicted_kl": None if score is None else score / divisor,
            "n_predictions": n_predictions,
            "n_samples": SIZES[size],
            "weight_elements": group.weight_elements,
            "effective_bits": self.task.format.effective_bits,
            **columns,
        }


def _columns(score: GroupScore | float | None) -> dict[str, Any]:
    """The measured columns; all NULL for a group that was never called."""
    if not isinstance(score, GroupScore):
        return {"score": score}
    relative = _ratio(score.dy_square_sum, score.y_square_sum)
    return {
        "score": score.score,
        "output_rel_error": relative,
        "output_sqnr_db": -20 * math.log10(relative) if relative else None,
        "weight_rel_error": _ratio(score.dw_square_sum, score.w_square_sum),
        "input_amax": score.input_amax,
        "sample_scores": score.sample_scores.astype(np.float32),
    }


def _ratio(error_square: float, signal_square: float) -> float | None:
    return math.sqrt(error_square / signal_square) if signal_square else None
