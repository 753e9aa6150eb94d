"""A store with made-up scores, for tests of `solve`: two decoder layers of two groups each, and one group outside."""

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import pyarrow as pa

from sweep.config.compose import expand
from sweep.config.schema import to_record
from sweep.core.batches import TOKEN_KINDS
from sweep.store.records import SCORES_SCHEMA, RunRecord, TrialRow
from sweep.store.store import Store

# name, modules, decoder layer, weight elements
GROUPS: Final = (
    ("m.layers.0.attn.q_proj", ("m.layers.0.attn.q_proj", "m.layers.0.attn.k_proj"), 0, 1000),
    ("m.layers.0.mlp.down_proj", ("m.layers.0.mlp.down_proj",), 0, 3000),
    ("m.layers.1.attn.q_proj", ("m.layers.1.attn.q_proj", "m.layers.1.attn.k_proj"), 1, 1000),
    ("m.layers.1.mlp.down_proj", ("m.layers.1.mlp.down_proj",), 1, 3000),
    ("m.merger.fc", ("m.merger.fc",), None, 2000),
)
N_WEIGHTS: Final = 10_000
N_PREDICTIONS: Final = 50
INT4 = "wint4_afp16/default"  # 4.125 bits
INT8 = "wint8_aint8/recipe_match_channel_token"  # 8 bits
FP8 = "wfp8_afp8/default"  # 8 bits
PREDICTED_KL: Final[Mapping[str, Sequence[float | None]]] = {  # nats per prediction
    INT4: (0.04, 0.01, 0.02, 0.03, 0.05),
    INT8: (0.004, 0.002, 0.003, 0.002, 0.001),
    FP8: (0.005, 0.003, 0.004, 0.003, 0.0005),
}
NO_PART: Final = (0.0,) * len(GROUPS)
ELEMENTS: Final = {"parameters": 25_000, "embeddings": 8_000, "lm_head": 0}


def scores(
    cell_id: str,
    predicted_kl: Sequence[float | None],
    bits: float = 8.0,
    by_kind: Mapping[str, Sequence[float]] | None = None,
    signs: Sequence[float] | None = None,
) -> pa.Table:
    """Rows of one cell; None: never called. Two samples, of which the first has a quarter of the score.

    Args:
        cell_id: of all rows.
        predicted_kl: of each group.
        bits: a weight.
        by_kind: part of each group's score, by kind of token; then the samples' predictions are known, too: 10 and 40.
        signs: 1 or -1, of each group's projections, of one draw a sample: groups of one sign add up, of two undo each
            other. Then the samples' predictions are known, too.
    """
    rows: list[dict[str, Any]] = []
    for (group, modules, layer, elements), kl in zip(GROUPS, predicted_kl, strict=True):
        score = None if kl is None else kl * 2 * N_PREDICTIONS
        row = {
            "cell_id": cell_id,
            "group": group,
            "modules": modules,
            "layer_index": layer,
            "weight_elements": elements,
            "predicted_kl": kl,
            "score": score,
        }
        row["sensitivity"] = None if score is None else score / N_PREDICTIONS
        row |= {"n_predictions": N_PREDICTIONS, "n_samples": 2, "effective_bits": bits}
        row |= {"sample_scores": None if score is None else [score / 4, score * 3 / 4]}
        if signs is not None and score is not None:
            row["projections"] = [signs[len(rows)] * math.sqrt(each) for each in (score / 4, score * 3 / 4)]
        if by_kind is not None or signs is not None:
            row |= {"sample_predictions": [10, N_PREDICTIONS - 10]}
        if by_kind is not None and score is not None:
            parts = {kind: score * by_kind.get(kind, NO_PART)[len(rows)] for kind in TOKEN_KINDS}
            row |= {f"score_{kind}": part for kind, part in parts.items()} | {"score_top_token": score / 8}
            lists = {kind: [part / 4, part * 3 / 4] if part else None for kind, part in parts.items()}
            row |= {f"sample_scores_{kind}": each for kind, each in lists.items() if kind != "prompt"}
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=SCORES_SCHEMA)


def add(
    store: Store,
    recipe: str,
    predicted_kl: Sequence[float | None],
    *overrides: str,
    minute: int = 0,
    by_kind: Mapping[str, Sequence[float]] | None = None,
    signs: Sequence[float] | None = None,
    **changed: Any,
) -> str:
    """Enter one finished trial; returns its cell. `changed` are columns of its row."""
    pair, granularity = recipe.split("/")
    config = expand([f"quant_pair={pair}", f"quant_granularity={granularity}", *overrides], multirun=False).points[0]
    cell_id = f"{pair}-{granularity}-{config.dataset.size}-{minute}"
    store.write_part(cell_id, "m", scores(cell_id, predicted_kl, by_kind=by_kind, signs=signs))
    store.complete(cell_id, {"m": None})
    row: dict[str, Any] = {
        "trial_id": cell_id,
        "cell_id": cell_id,
        "model": config.model.name,
        "model_revision": "r1",
        "dataset": config.dataset.name,
        "dataset_revision": f"d-{config.dataset.size}",
        "size": config.dataset.size,
        "coverage": config.sensitivity.coverage,
        "method": config.sensitivity.method,
        "engine": config.sensitivity.engine,
        "quant_pair": pair,
        "quant_granularity": granularity,
        "algorithm": config.sensitivity.quant_algorithm,
        "scales": config.sensitivity.scales,
        "dtype": config.model.dtype_on("cpu"),
        "state": "done",
        "reason": None,
        "config": json.dumps(to_record(config)),
        "versions": json.dumps({"score": "1"}),
        "created_at": datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=minute),
        "run_id": "r",
    }
    store.write_trials(cell_id, [TrialRow(**(row | changed))])
    return cell_id


def store_at(
    path: Any,
    predicted_kl: Mapping[str, Sequence[float | None]] = PREDICTED_KL,
    elements: Mapping[str, int] | None = ELEMENTS,
    by_kind: Mapping[str, Sequence[float]] | None = None,
) -> Store:
    """The store of these recipes, in size `small`."""
    store = Store(str(path))
    for recipe, each in predicted_kl.items():
        add(store, recipe, each, by_kind=by_kind)
    store.write_run("r", RunRecord(run_id="r", models={} if elements is None else {"r1": dict(elements)}))
    return store
