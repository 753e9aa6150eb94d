"""The files of one published folder, as bytes.

Equal trials give equal bytes; nothing here depends on time, host or path.
"""

import hashlib
import io
import json
import re
from collections.abc import Mapping

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from sweep.core.errors import SweepError
from sweep.core.json import Json
from sweep.report.analysis import summarize
from sweep.report.render import render_json, render_markdown
from sweep.report.rows import analyse, pair_of, portable_config, served_as_of
from sweep.store.records import ATTRIBUTES, SCHEMA_VERSION, SCORES_SCHEMA, FinishedTrial, TrialRow

# Raise it when the text of a report or the set of files changes, so that folders published before are written anew.
# 2: what every target makes of the recipe. 3: algorithm, scales and dtype. 4: scores by kind of token, intervals of
# ratios. 5: what the trial covers of the model's weights.
LAYOUT_VERSION = 5
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
_IDENTITY = ("trial_id", "cell_id", "model_revision", "dataset_revision", *ATTRIBUTES)
_PUBLISHED_SCHEMA = pa.schema(
    [field for field in SCORES_SCHEMA if not field.name.startswith(("sample_", "projections"))],
    metadata=SCORES_SCHEMA.metadata,
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


def manifest_identity(finished: FinishedTrial) -> dict[str, Json]:
    """The manifest without the checksums: the trial, its config and versions, and the key figures for index pages."""
    trial = finished.trial
    identity = {
        "layout_version": LAYOUT_VERSION,
        "schema_version": SCHEMA_VERSION,
        **{name: getattr(trial, name) for name in _IDENTITY},
        "versions": msgspec.json.decode(trial.versions),
        "config": portable_config(trial),
        "served_as": served_as_of(trial),
        "summary": summarize(finished.scores),
        "weights": finished.weights,
    }
    return json.loads(json.dumps(msgspec.to_builtins(identity)))  # as it reads back: lists for tuples


def published_scores(finished: FinishedTrial) -> pa.Table:
    """The cell's rows without the per-sample scores."""
    return finished.scores.select(_PUBLISHED_SCHEMA.names).cast(_PUBLISHED_SCHEMA).combine_chunks()


def checksums(files: Mapping[str, bytes]) -> dict[str, Json]:
    """Size and SHA-256 of each file, as the manifest lists them."""
    return {name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for name, data in files.items()}


def folder_of(trial: TrialRow) -> tuple[str, ...]:
    """The path of a trial's reports under the models directory: its parts, unchecked.

    The usual calibration algorithm and scales go without saying.

    Raises: SweepError: the composed config does not say which formats the pair has.
    """
    pair = pair_of(trial)
    if pair.weight is None or pair.activation is None:
        raise SweepError(
            f"Trial {trial.trial_id} names no quant_pair.weight and .activation in its config. "
            "Run it again to publish it."
        )
    return (
        trial.model,
        "layer-analysis",
        f"weight-{pair.weight}-act-{pair.activation}",
        trial.quant_granularity,
        "-".join([trial.coverage, trial.dataset, trial.size, trial.method, *trial.variant]),
    )


def _config_yaml(finished: FinishedTrial) -> bytes:
    text = yaml.safe_dump(portable_config(finished.trial), sort_keys=False, allow_unicode=True, width=150)
    # Whole-number keys, which JSON turned into text (``block_sizes: {-1: 64}``), are numbers again.
    return re.sub(r"(?m)^([ -]*)'(-?\d+)':", r"\1\2:", text).encode()


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

    trial = finished.trial
    recipe = ".".join([trial.quant_pair, trial.quant_granularity, *trial.variant])
    stats = {
        f"{row['group']}.quant_recipe": {
            "formats": [recipe, "NONE"],
            "scores": [row["score"], 0.0],
            "costs": [row["weight_elements"] * row["effective_bits"] / 16, float(row["weight_elements"])],
            "module_names": row["modules"],
            "cost_weight": 1.0,
            "allow_no_quant": True,
            "is_fixed": False,
            "uncompressed_cost": float(row["weight_elements"]),
        }
        for row in published_scores(finished).to_pylist()
        if row["score"] is not None
    }
    state = {
        "method": trial.method,
        "candidate_stats": stats,
        "best": {"recipe": {}, "constraints": {}, "score": float("inf"), "is_satisfied": False},
    }
    buffer = io.BytesIO()  # torch.save to a path would put the file's name into the bytes
    torch.save(state, buffer)
    return buffer.getvalue()
