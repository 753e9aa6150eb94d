"""Rows of one task's scores, and their parts and cells in the store. Needs neither PyTorch nor the scoring engines."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sweep.core.batches import TOKEN_KINDS
from sweep.core.groups import Part, ShapedGroup
from sweep.core.sizes import n_samples_of
from sweep.store.records import SCORES_SCHEMA, per_prediction
from sweep.store.store import Store
from workers.scoring.scores import GroupScore, PartScores
from workers.task import Task

# Of a row of SCORES_SCHEMA.
_Cell = str | int | float | list[str] | npt.NDArray[np.float32 | np.int32] | None


class TaskWriter:
    """Writes a task's parts, and turns them into cells when all are there."""

    def __init__(
        self, task: Task, sample_predictions: Mapping[str, Sequence[int]], parts: Sequence[Part], store_uri: str
    ) -> None:
        """Start with no part written.

        Args:
            task: of the rows.
            sample_predictions: predictions of each sample, by size.
            parts: all parts of the model, in its order.
            store_uri: of the store for parts and cells.
        """
        self.task = task
        self._sample_predictions = {size: np.array(n, dtype=np.int32) for size, n in sample_predictions.items()}
        self._store = Store(store_uri)
        self._parts = {part.name: part for part in parts}
        self._tables: dict[str, dict[str, pa.Table]] = {size: {} for size in task.cells}  # written by this worker

    def write(self, part: str, measured: PartScores) -> None:
        """Put a part's rows into the store."""
        for size, scores in measured.items():
            scored = zip(self._parts[part].groups, scores, strict=True)
            table = pa.Table.from_pylist([self._row(size, *pair) for pair in scored], schema=SCORES_SCHEMA)
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

    def _row(self, size: str, group: ShapedGroup, found: GroupScore | float | None) -> dict[str, _Cell]:
        """A row of SCORES_SCHEMA; the measured columns are NULL for a group that was never called."""
        counts: list[int] = self._sample_predictions[size].tolist()
        score, samples = (found.score, found.sample_scores) if isinstance(found, GroupScore) else (found, None)
        row: dict[str, _Cell] = {
            "cell_id": self.task.cells[size],
            "group": group.name,
            "modules": list(group.modules),
            "layer_index": group.layer_index,
            **per_prediction(score, samples, counts, self.task.method),
            "n_predictions": sum(counts),
            "n_samples": n_samples_of(size),
            "sample_predictions": self._sample_predictions[size],
            "weight_elements": group.weight_elements,
            "effective_bits": self.task.format.effective_bits,
        }
        if isinstance(found, GroupScore):
            row |= {
                "output_rel_error": found.output_rel_error,
                "output_sqnr_db": found.output_sqnr_db,
                "weight_rel_error": found.weight_rel_error,
                "input_amax": found.input_amax,
                "sample_scores": found.sample_scores.astype(np.float32),
                "score_top_token": found.top_token_score,
            }
            if found.projections is not None:
                row["projections"] = found.projections.astype(np.float32).ravel()
            for kind, samples in zip(TOKEN_KINDS, found.kind_scores, strict=True):
                row[f"score_{kind}"] = float(samples.sum())
                if kind != "prompt" and samples.any():
                    row[f"sample_scores_{kind}"] = samples.astype(np.float32)
        return row
