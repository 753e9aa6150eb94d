"""The files of one published folder, as bytes.

Equal trials give equal bytes; nothing here depends on time, host or path.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from sweep.core.errors import SweepError
from sweep.report.analysis import summarize
from sweep.report.render import render_json, render_markdown
from sweep.report.rows import analyse, portable_config, served_as_of
from sweep.store.records import SCHEMA_VERSION, SCORES_SCHEMA, FinishedTrial

# Raise it when the text of a report or the set of files changes, so that folders published before are written anew.
# 2: what every target makes of the recipe.
LAYOUT_VERSION = 2
MANIFEST = "quant-manifest.json"
STATE = "autoquant-state.pt"  # the only file that git ignores
FILES = (
    "per-layer-sensitivity.md",
    "per-layer-sensitivity.json",
    "composed-config.yaml",
    "scores.parquet",
    STATE,
    MANIFEST,
)
_RECIPE = ("quant_pair", "quant_granularity", "coverage", "method", "engine")
_IDENTITY = ("trial_id", "cell_id", "model", "model_revision", "dataset", "dataset_revision", "size", *_RECIPE)
_PUBLISHED_SCHEMA = pa.schema(
    [field for field in SCORES_SCHEMA if field.name != "sample_scores"], metadata=SCORES_SCHEMA.metadata
)


def render_files(finished: FinishedTrial) -> dict[str, bytes]:
    """Every file of the folder by name, the manifest last."""
    report = analyse(finished)
    files = {
        "per-layer-sensitivity.md": render_markdown(report).encode(),
        "per-layer-sensitivity.json": render_json(report).encode(),
        "composed-config.yaml": _config_yaml(finished),
        "scores.parquet": _parquet(published_scores(finished)),
        STATE: _autoquant_state(finished),
    }
    manifest = {**manifest_identity(finished), "files": checksums(files)}
    return {**files, MANIFEST: (json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()}


def manifest_identity(finished: FinishedTrial) -> dict[str, Any]:
    """The manifest without the checksums: the trial, its config and versions, and the key figures for index pages."""
    trial = finished.trial
    summary = asdict(summarize(finished.scores))
    modules = dict(zip(finished.scores["group"].to_pylist(), finished.scores["modules"].to_pylist(), strict=True))
    identity = {
        "layout_version": LAYOUT_VERSION,
        "schema_version": SCHEMA_VERSION,
        **{name: getattr(trial, name) for name in _IDENTITY},
        "versions": json.loads(trial.versions),
        "config": portable_config(trial),
        "served_as": served_as_of(trial),
        "summary": {**summary, "top_modules": modules[summary["top_groups"][0]] if summary["top_groups"] else []},
    }
    return json.loads(json.dumps(identity))  # as it reads back: lists for tuples, text for keys


def published_scores(finished: FinishedTrial) -> pa.Table:
    """The cell's rows without the per-sample scores."""
    return finished.scores.select(_PUBLISHED_SCHEMA.names).cast(_PUBLISHED_SCHEMA).combine_chunks()


def checksums(files: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file, as the manifest lists them."""
    return {name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for name, data in files.items()}


def folder_of(
    model: str,
    pair: Mapping[str, Any],
    granularity: str,
    coverage: str,
    dataset: str,
    size: str,
    method: str,
    *,
    algorithm: str,
    scales: str,
) -> tuple[str, ...]:
    """The path of a trial's reports under the models directory: its parts, unchecked.

    Args:
        model: its name, as all others but `pair`.
        pair: `weight` and `activation`, the number formats.
        granularity: see model.
        coverage: see model.
        dataset: see model.
        size: see model.
        method: see model.
        algorithm: sensitivity.quant_algorithm; `max` goes without saying.
        scales: sensitivity.scales; `private` goes without saying.
    """
    variant = "".join(f"-{value}" for value, usual in ((algorithm, "max"), (scales, "private")) if value != usual)
    return (
        model,
        "layer-analysis",
        f"weight-{pair['weight']}-act-{pair['activation']}",
        granularity,
        f"{coverage}-{dataset}-{size}-{method}{variant}",
    )


def folder_of_finished(finished: FinishedTrial) -> tuple[str, ...]:
    """The path, as `folder_of` gives it, of a trial in the store.

    Raises: SweepError: the composed config does not say which formats the pair has.
    """
    trial = finished.trial
    config = json.loads(trial.config)
    pair, sensitivity = config.get("quant_pair", {}), config.get("sensitivity", {})
    if "weight" not in pair or "activation" not in pair:
        raise SweepError(
            f"Trial {trial.trial_id} names no quant_pair.weight and .activation in its config. "
            "Run it again to publish it."
        )
    return folder_of(
        trial.model,
        pair,
        trial.quant_granularity,
        trial.coverage,
        trial.dataset,
        trial.size,
        trial.method,
        algorithm=sensitivity.get("quant_algorithm", "max"),
        scales=sensitivity.get("scales", "private"),
    )


def _config_yaml(finished: FinishedTrial) -> bytes:
    return yaml.safe_dump(portable_config(finished.trial), sort_keys=False, allow_unicode=True, width=150).encode()


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _autoquant_state(finished: FinishedTrial) -> bytes:
    """ModelOpt's searcher state (0.47: `candidate_stats` by hparam name) in plain types.

    ``torch.load(weights_only=True)`` reads it.

    Costs are weight elements x bits / 16, as ModelOpt counts them. Groups never called have no score and are left out.
    """
    import torch  # 1-2 s; only needed when a folder is written

    recipe = f"{finished.trial.quant_pair}.{finished.trial.quant_granularity}"
    stats: dict[str, dict[str, Any]] = {}
    for row in published_scores(finished).to_pylist():
        if row["score"] is None:
            continue
        stats[f"{row['group']}.quant_recipe"] = {
            "formats": [recipe, "NONE"],
            "scores": [row["score"], 0.0],
            "costs": [row["weight_elements"] * row["effective_bits"] / 16, float(row["weight_elements"])],
            "module_names": row["modules"],
            "cost_weight": 1.0,
            "allow_no_quant": True,
            "is_fixed": False,
            "uncompressed_cost": float(row["weight_elements"]),
        }
    state = {
        "method": finished.trial.method,
        "candidate_stats": stats,
        "best": {"recipe": {}, "constraints": {}, "score": float("inf"), "is_satisfied": False},
    }
    buffer = io.BytesIO()  # torch.save to a path would put the file's name into the bytes
    torch.save(state, buffer)
    return buffer.getvalue()
