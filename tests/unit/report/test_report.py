"""A report says what the scores say, in Markdown and in JSON."""

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest

from sweep.commands.recipes import by_recipe
from sweep.config.targets import all_targets
from sweep.core.batches import TOKEN_KINDS
from sweep.report.files import folder_of, manifest_identity, published_scores
from sweep.report.index import Manifest, render_index
from sweep.report.render import largest, render_json, render_markdown, summary_table
from sweep.report.rows import analyse, portable_config
from sweep.store.records import SCORES_SCHEMA, FinishedTrial, TrialRow

TARGETS = {target.name: target for target in all_targets()}
LAYERS = "model.language_model.layers"
CONFIG = {
    "model": {"name": "tiny", "path": "/home/ann/models/tiny-vl"},
    "dataset": {"name": "glosses", "size": "small", "captions_path": "data/captions.txt"},
    "quant_pair": {
        "name": "wint4_afp16",
        "weight": "int4",
        "activation": "fp16",
        "format_name": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    },
    "quant_granularity": {
        "name": "w_group64",
        "quant_cfg_overrides": {"*weight_quantizer": {"block_sizes": {"-1": 64}}},
    },
    "output_layout": {"root": "models"},
    "sensitivity": {"engine": "layerwise"},
    "cluster": {"workers": 2},
    "store": {"uri": "s3://key:secret@bucket"},
}
TRIAL = TrialRow(
    trial_id="t1",
    cell_id="c1",
    model="tiny",
    model_revision="a" * 64,
    dataset="glosses",
    dataset_revision="b" * 64,
    size="small",
    coverage="lm_only",
    method="gradient",
    engine="layerwise",
    quant_pair="wint4_afp16",
    quant_granularity="w_group64",
    algorithm="max",
    scales="private",
    dtype="float32",
    state="done",
    reason=None,
    config=json.dumps(CONFIG),
    versions='{"modelopt": "0.47.0"}',
    created_at=datetime(2026, 1, 1, tzinfo=UTC),
    run_id="r1",
)


def finished(
    samples: dict[str, list[float] | None], *, keep_samples: bool = True, n_predictions: int = 100, **trial: Any
) -> FinishedTrial:
    """A trial whose groups have these per-sample scores; None for a group never called."""
    rows: list[dict[str, Any]] = []
    for group, values in samples.items():
        row: dict[str, Any] = {
            "cell_id": "c1",
            "group": group,
            "modules": [group],
            "n_predictions": n_predictions,
            "n_samples": 4,
        }
        row |= {"weight_elements": 1000, "effective_bits": 4.25, "weight_rel_error": 0.1}
        if values is not None:
            score = sum(values)
            row |= {
                "score": score,
                "sensitivity": score / n_predictions,
                "predicted_kl": score / n_predictions / 2,
                "input_amax": 3.5,
            }
            row |= {"output_rel_error": 0.01, "output_sqnr_db": 40.0, "sample_scores": values if keep_samples else None}
        rows.append(row)
    return FinishedTrial(trial=replace(TRIAL, **trial), scores=pa.Table.from_pylist(rows, schema=SCORES_SCHEMA))


SMALL = finished(
    {
        f"{LAYERS}.0.mlp.down_proj": [1.0, 1.0, 1.0, 1.0],
        f"{LAYERS}.1.mlp.down_proj": [3.0] * 4,
        f"{LAYERS}.2.mlp.down_proj": None,
    }
)


def test_the_table_ranks_groups_and_shares_add_up() -> None:
    lines = render_markdown(analyse(SMALL)).splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith(("| 1 |", "| 2 |"))]
    assert [row[1] for row in rows] == ["`layers.1.mlp.down_proj`", "`layers.0.mlp.down_proj`"]
    assert [row[2] for row in rows] == ["60.0", "20.0"]  # mnat: 12 / 200 and 4 / 200
    assert [row[3] for row in rows] == ["60.0 … 60.0", "20.0 … 20.0"]  # equal samples: no spread
    assert [row[4] for row in rows] == ["75.0%", "25.0%"]
    assert rows[0][6:] == ["12.0", "0.120", "40.0", "0.100", "3.50", "4.25"]


def test_the_summary_states_total_and_half() -> None:
    text = render_markdown(analyse(SMALL))
    assert "**Total predicted KL: 0.08 nats per prediction** (90% interval 0.08 to 0.08)" in text
    assert "**1 of 2 groups carries half of it**: `layers.1.mlp.down_proj` 75.0%." in text


def test_groups_never_called_are_listed_apart() -> None:
    text = render_markdown(analyse(SMALL))
    assert "2 of 3 layer groups measured" in text
    assert "- `layers.2.mlp.down_proj`" in text.split("## Not measured")[1]
    document = json.loads(render_json(analyse(SMALL)))
    assert [row["layer"] for row in document["not_measured"]] == [f"{LAYERS}.2.mlp.down_proj"]
    assert len(document["layer_sensitivity"]) == 2


def test_without_sample_scores_the_report_says_so() -> None:
    stock = finished(
        {f"{LAYERS}.0.mlp.down_proj": [2.0], f"{LAYERS}.1.mlp.down_proj": [4.0]}, keep_samples=False, engine="modelopt"
    )
    assert "The engine `modelopt` keeps no per-sample scores" in render_markdown(analyse(stock))
    document = json.loads(render_json(analyse(stock)))
    assert document["rank_stability"] is None
    assert document["layer_sensitivity"][0]["predicted_kl_interval"] is None


@pytest.mark.parametrize(("odd_factor", "verdict"), [(1.0, "Ranking: stable."), (-1.0, "Ranking: unstable")])
def test_the_verdict_compares_halves(odd_factor: float, verdict: str) -> None:
    groups = {f"{LAYERS}.{i}.mlp.down_proj": [10.0 + i, 10.0 + odd_factor * i] for i in range(9)}
    assert verdict in render_markdown(analyse(finished(groups)))


def test_nothing_measured_is_a_report_too() -> None:
    text = render_markdown(analyse(finished({"a.b": None})))
    assert "**Nothing was measured**" in text
    assert json.loads(render_json(analyse(finished({"a.b": None}))))["totals"]["predicted_kl"] is None


def test_a_recipe_without_error_has_a_report() -> None:
    text = render_markdown(analyse(finished({"a.b": [0.0, 0.0], "a.c": [0.0, 0.0]})))
    assert "No group changes the loss" in text


def test_json_has_the_origins_sections_and_no_nan() -> None:
    document = json.loads(render_json(analyse(SMALL)), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert document["scheme"]["auto_quantize_bits"] == 4.25
    assert document["scheme"]["quant_formats"] == ["INT4_BLOCKWISE_WEIGHT_ONLY_CFG"]
    assert (document["model"]["id"], document["dataset"]["name"], document["dataset"]["num_calib_samples"]) == (
        "tiny",
        "glosses",
        4,
    )
    first = document["layer_sensitivity"][0]
    assert (first["layer"], first["num_bits"], first["size_cost"]) == (
        f"{LAYERS}.1.mlp.down_proj",
        4.25,
        1000 * 4.25 / 16,
    )
    assert first["predicted_kl_interval"] == [0.06, 0.06]
    assert render_json(analyse(SMALL)) == render_json(analyse(SMALL))


def by_kind(parts: list[dict[str, float]], top_tokens: list[float]) -> FinishedTrial:
    """Layers whose scores are split so; the shorter sample has a tenth of the predictions."""
    rows = finished({f"{LAYERS}.{i}.mlp.down_proj": [sum(part.values())] for i, part in enumerate(parts)})
    table = rows.scores.to_pylist()
    for row, part, top in zip(table, parts, top_tokens, strict=True):
        row |= {f"score_{kind}": part.get(kind, 0.0) for kind in TOKEN_KINDS} | {"score_top_token": top}
        row |= {"sample_scores": [row["score"] / 10, row["score"] * 9 / 10], "sample_predictions": [10, 90]}
    return replace(rows, scores=pa.Table.from_pylist(table, schema=SCORES_SCHEMA))


def test_shares_by_kind_of_token_name_what_stands_out() -> None:
    """Of 20 in all the prompt has 14 (70 %), images 5, the first token 1; there are no answers."""
    report = analyse(
        by_kind([{"prompt": 12.0}, {"image": 4.0, "prompt": 2.0}, {"first_token": 1.0, "image": 1.0}], [1, 1, 1.5])
    )
    text = render_markdown(report).split("## By kind of token")[1]
    assert "an error at an image is felt in the answers that look at it" in text
    assert [line for line in text.splitlines() if line.startswith("|")] == [
        "| # | layer group | first token | image | prompt | largest token |",
        "|---:|---|---:|---:|---:|---:|",
        "|  | **all** | 5.0% | 25.0% | 70.0% | – |",  # noqa: RUF001
        "| 1 | `layers.0.mlp.down_proj` | 0.0% | 0.0% | 100.0% | 8.3% |",
        "| 2 | `layers.1.mlp.down_proj` | 0.0% | 66.7% | 33.3% | 16.7% |",
        "| 3 | `layers.2.mlp.down_proj` | 50.0% | 50.0% | 0.0% | 75.0% |",
    ]
    assert [line for line in text.splitlines() if line.startswith("- ")] == [
        "- **Mostly at image tokens**: `layers.1.mlp.down_proj` 67%.",
        "- **Mostly at one token, as massive activations and attention sinks have it**: `layers.2.mlp.down_proj` 75%.",
    ]
    document = json.loads(render_json(report))
    assert document["totals"]["token_shares"] == pytest.approx({"first_token": 0.05, "image": 0.25, "prompt": 0.7})
    assert document["layer_sensitivity"][2]["token_shares"] == {"first_token": 0.5, "image": 0.5, "prompt": 0.0}
    assert document["layer_sensitivity"][2]["top_token_share"] == 0.75


def test_intervals_are_of_scores_per_prediction_of_the_same_samples() -> None:
    """Both samples have as much a prediction: no draw of them has another sensitivity."""
    (row, *_) = analyse(by_kind([{"prompt": 12.0}], [1.0])).rows
    assert row.sensitivity_interval == [0.12, 0.12]
    assert row.predicted_kl_interval == [0.06, 0.06]


def test_scores_without_kinds_have_no_section_of_them() -> None:
    assert "By kind of token" not in render_markdown(analyse(SMALL))
    document = json.loads(render_json(analyse(SMALL)))
    assert (document["totals"]["token_shares"], document["layer_sensitivity"][0]["token_shares"]) == (None, None)


def test_sparkline_keeps_the_place_of_a_group_never_called() -> None:
    groups = {f"{LAYERS}.{i}.mlp.down_proj": value for i, value in enumerate([[1.0, 1.0], None, [100.0, 100.0]])}
    assert "`▁x█`" in render_markdown(analyse(finished(groups)))


def test_published_config_names_no_machine_and_no_store() -> None:
    config = portable_config(TRIAL)
    assert list(config) == ["model", "dataset", "quant_pair", "quant_granularity", "sensitivity"]
    assert config["model"]["path"] == "tiny-vl"
    assert config["dataset"]["captions_path"] == "data/captions.txt"


def test_the_summary_names_the_most_sensitive_groups_of_each_trial() -> None:
    heading, row = summary_table([SMALL], 1, TARGETS["vllm_sm90"])
    recipe = {"pair": "wint4_afp16", "granularity": "w_group64", "algorithm": "max", "scales": "private"}
    figures = {"dtype": "float32", "size": "small", "bits": "4.25", "KL/pred.": "0.08", "on vllm_sm90": "native"}
    assert dict(zip(heading[:-1], row[:-1], strict=True)) == recipe | figures
    assert row[-1] == "layers.1.mlp.down_proj 75%"


@pytest.mark.parametrize(
    ("pair", "granularity", "algorithm", "words"),
    [
        ("wfp4_afp4", "default", "max", "as wfp4_afp16/default"),
        ("wfp8_aint8", "default", "max", "none"),
        ("wint4_afp16", "w_group64", "awq_lite", "native"),
        ("wint4_afp16", "w_group64", "smoothquant", "none"),
    ],
)
def test_the_summary_says_what_the_target_makes_of_each_recipe(
    pair: str, granularity: str, algorithm: str, words: str
) -> None:
    one = finished(
        {"a.b": [1.0]},
        quant_pair=pair,
        quant_granularity=granularity,
        algorithm=algorithm,
    )
    _, row = summary_table([one], 1, TARGETS["vllm_sm90"])
    assert row[-2:] == (words, "a.b 100%")


def test_a_report_says_what_every_target_makes_of_the_recipe() -> None:
    one = finished({"a.b": [1.0]}, quant_pair="wfp4_afp4", quant_granularity="default")
    lines = [line for line in render_markdown(analyse(one)).splitlines() if line.startswith("| on ")]
    assert [line.split("`")[1] for line in lines] == sorted(TARGETS)
    assert "| on `vllm_sm90` | runs as `wfp4_afp16/default`: `CompressedTensorsW4A4Fp4 on Marlin (NVFP4)` |" in lines
    assert "| on `trtllm_sm100` | runs as it is: `NVFP4` |" in lines
    assert "| on `vllm_sm90` | nothing runs it |" in render_markdown(
        analyse(finished({"a.b": [1.0]}, quant_pair="wfp8_aint8"))
    )
    served = json.loads(render_json(analyse(one)))["scheme"]["served_as"]
    assert served["trtllm_sm100"] == {"status": "native", "runs_as": None, "reader_name": "NVFP4"}
    assert [name for name, status in served.items() if status["status"] == "runs_as"] == ["trtllm_sm90", "vllm_sm90"]


def test_a_report_does_not_depend_on_the_target_it_was_run_for() -> None:
    with_target = finished({"a.b": [1.0]}, config=json.dumps(CONFIG | {"target": {"name": "vllm_sm120"}}))
    assert render_json(analyse(with_target)) == render_json(analyse(finished({"a.b": [1.0]})))


VARIANTS = [  # of one pair and granularity
    {"algorithm": algorithm, "scales": scales, "dtype": dtype}
    for algorithm in ("max", "mse", "awq_lite")
    for scales in ("private", "fused")
    for dtype in ("float32", "bfloat16")
]


def test_every_title_and_table_tells_algorithms_scales_and_dtypes_apart() -> None:
    trials = [finished({"a.b": [1.0]}, **variant) for variant in VARIANTS]
    assert largest([*trials, *trials]) == trials
    heading, *rows = summary_table(trials, 1, TARGETS["vllm_sm90"])
    assert [dict(zip(heading[2:5], row[2:5], strict=True)) for row in rows] == VARIANTS
    titles = [render_markdown(analyse(one)).splitlines()[0] for one in trials]
    assert titles[0].endswith("tiny, wint4_afp16, w_group64, algorithm max, scales private, dtype float32")
    assert len(set(titles)) == len(trials)
    schemes = [json.loads(render_json(analyse(one)))["scheme"] for one in trials]
    named = [(scheme["quant_algorithm"], scheme["scales"], scheme["dtype"]) for scheme in schemes]
    assert named == [tuple(variant.values()) for variant in VARIANTS]
    manifests = [manifest_identity(one) for one in trials]
    assert [{name: each[name] for name in VARIANTS[0]} for each in manifests] == VARIANTS
    base = "tiny/layer-analysis/weight-int4-act-fp16/w_group64"
    documents = {f"{base}/{i:02}": Manifest.from_json(json.dumps(each).encode()) for i, each in enumerate(manifests)}
    lines = render_index(base, documents).splitlines()
    cells = [line.split(" | ")[1:4] for line in lines if line.startswith("| [")]
    assert cells == [list(variant.values()) for variant in VARIANTS]


def test_negative_shares_are_explained() -> None:
    finished = by_kind([{"prompt": 12.0, "image": -3.0}], [1])
    drawn = replace(finished, trial=replace(finished.trial, method="fisher", draws=8))
    text = render_markdown(analyse(drawn))
    assert "| 1 | `layers.0.mlp.down_proj` | -33.3% | 133.3% |" in text
    assert "A share is negative where errors at these tokens undo those at others" in text
    assert "A share is negative" not in render_markdown(analyse(finished))
    assert "mean over draws of (sum over tokens and outputs of dLoss/dy" in text
    assert json.loads(render_json(analyse(drawn)))["scheme"]["draws"] == 8


def by_projections(values: Sequence[Sequence[float]]) -> FinishedTrial:
    """A trial of method=fisher with one draw a sample. Args: values: of each layer, one a sample."""
    names = [f"{LAYERS}.{layer}.mlp.down_proj" for layer in range(len(values))]
    squares = {name: [value**2 for value in each] for name, each in zip(names, values, strict=True)}
    plain = finished(squares, n_predictions=25 * len(values[0]))
    columns = {
        "projections": pa.array(values, pa.list_(pa.float32())),
        "sample_predictions": pa.array([[25] * len(values[0])] * len(values), pa.list_(pa.int32())),
    }
    scores = plain.scores
    for name, column in columns.items():
        scores = scores.set_column(scores.schema.get_field_index(name), SCORES_SCHEMA.field(name), column)
    return replace(plain, scores=scores, trial=replace(plain.trial, method="fisher", draws=1))


def test_published_scores_leave_projections_out() -> None:
    assert "projections" not in published_scores(by_projections([[1.0, 2.0], [1.0, 2.0]])).column_names


def test_a_report_has_all_groups_at_once_and_the_pairs_that_stand_out() -> None:
    """Of three groups the second undoes half of what the first does, on every sample; the third has no part in it."""
    first = [1.0, -2.0, 1.5, -1.0] * 8
    third = [0.1, 0.1, -0.1, -0.1] * 8
    report = analyse(by_projections([first, [-each / 2 for each in first], third]))
    document = json.loads(render_json(report))["interactions"]
    (pair,) = document["pairs"]
    assert pair["names"] == ["layers.0.mlp.down_proj", "layers.1.mlp.down_proj"]
    squares = sum(each**2 for each in first)
    assert pair["predicted_kl"] == pytest.approx(-squares / (2 * 25 * 32))
    assert pair["correlation"] == pytest.approx(-1.0)
    text = render_markdown(report)
    assert "## Pairs of layer groups" in text
    line = next(line for line in text.splitlines() if line.startswith("| `layers.0.mlp.down_proj` | `layers.1"))
    assert line.endswith("| -1.00 |")
    assert f"**All groups quantized at once: {document['predicted_kl']:.3g} nats per prediction.**" in text
    assert document["predicted_kl"] < sum(row.predicted_kl for row in report.rows)


def test_a_report_says_that_no_pair_stands_out() -> None:
    alike = [[1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0]]
    assert "No pair of layer groups stands out of the noise" in render_markdown(analyse(by_projections(alike)))
    assert "Pairs of layer groups" not in render_markdown(analyse(SMALL))
    assert "interactions" not in json.loads(render_json(analyse(SMALL)))


def test_intervals_of_predicted_kl_are_of_what_counts() -> None:
    """A sample that is beyond the estimate's range counts one nat a prediction, in the figure and in its interval."""
    report = analyse(by_projections([[1.0, 1.0, 1.0, 1000.0], [1.0, 1.0, 1.0, 1.0]]))
    largest_kl = report.rows[0].predicted_kl_interval
    assert largest_kl is not None
    assert largest_kl[1] <= 1.0
    assert report.rows[0].sensitivity_interval is not None
    assert report.rows[0].sensitivity_interval[1] > 1000


def test_the_table_tells_methods_apart_where_there_are_several() -> None:
    drawn, target = replace(SMALL, trial=replace(SMALL.trial, method="fisher", draws=8)), TARGETS["vllm_sm90"]
    heading, *rows = summary_table([SMALL, drawn], 1, target)
    assert [row[heading.index("method")] for row in rows] == ["gradient", "fisher"]
    assert "method" not in summary_table([drawn], 1, target)[0]


def test_titles_and_paths_tell_numbers_of_draws_apart() -> None:
    two, eight = (replace(SMALL, trial=replace(SMALL.trial, method="fisher", draws=draws)) for draws in (2, 8))
    assert largest([two, eight, eight]) == [two, eight]
    assert eight.trial.title == f"{SMALL.trial.title}, draws 8"
    assert [folder_of(one.trial)[-1] for one in (two, eight)] == [
        f"{folder_of(SMALL.trial)[-1].replace('gradient', 'fisher')}-draws{draws}" for draws in (2, 8)
    ]


def test_titles_paths_and_tables_tell_numbers_of_ranks_apart_where_there_are_several() -> None:
    alone, split = SMALL, replace(SMALL, trial=replace(SMALL.trial, tp=8))
    assert largest([alone, split, split]) == [alone, split]
    assert split.trial.title == f"{alone.trial.title}, tp 8"
    assert folder_of(split.trial) == (*folder_of(alone.trial)[:-1], f"{folder_of(alone.trial)[-1]}-tp8")
    schemes = [json.loads(render_json(analyse(one)))["scheme"] for one in (alone, split)]
    assert schemes[1] == schemes[0] | {"name": f"{schemes[0]['name']}_tp8", "tp": 8}
    counted = by_recipe((one.trial, "done") for one in (alone, split))
    assert [each.attributes["tp"] for each in counted] == ["1", "8"]
    assert "tp" not in by_recipe([(alone.trial, "done")])[0].attributes


def manifest(kl: float, **more: Any) -> Manifest:
    """Of a published folder."""
    summary = {
        "n_groups": 3,
        "n_measured": 3,
        "n_samples": 16,
        "n_predictions": 100,
        "total_predicted_kl": kl,
        "effective_bits": 8.0,
        "n_groups_half": 2,
        "top_groups": ["model.a.b"],
        "top_modules": ["model.a.b"],
        "top_shares": [0.4],
    }
    return Manifest.from_json(json.dumps({"layout_version": 2, "cell_id": "c", "summary": summary} | more).encode())


def test_index_pages_link_downwards() -> None:
    base = "tiny/layer-analysis"
    served = {"a_sm90": {"status": "native"}, "b_sm90": {"status": "runs_as"}, "c_sm90": {"status": "none"}}
    manifests = {
        f"{base}/weight-fp8-act-fp8/default/lm_only-glosses-small-gradient": manifest(
            0.25, served_as=served, dtype="x"
        ),
        f"{base}/weight-fp8-act-fp8/w_group64/lm_only-glosses-small-gradient": manifest(0.125),
    }
    top = render_index(base, manifests)
    directory = "[weight-fp8-act-fp8](weight-fp8-act-fp8/README.md)"
    assert f"| {directory} | 2 | max | private | unknown, x | 8 | 0.125 |" in top
    assert "With algorithm max, scales private, dtype unknown, x:" in top
    assert "[0.25](weight-fp8-act-fp8/default/lm_only-glosses-small-gradient/per-layer-sensitivity.md)" in top
    pair = render_index(f"{base}/weight-fp8-act-fp8", manifests)
    assert "| [default](default/README.md) | 1 | max | private | x | 8 | 0.25 |" in pair
    leaf = render_index(
        f"{base}/weight-fp8-act-fp8/default", {folder: m for folder, m in manifests.items() if "/default/" in folder}
    )
    link = "[lm_only-glosses-small-gradient](lm_only-glosses-small-gradient/per-layer-sensitivity.md)"
    assert f"| {link} | max | private | x | 16 | 8 | 0.25 | 2 groups | `a.b` 40% | a_sm90, (b_sm90) |" in leaf
    assert "`a.b` 40% | none |" in pair  # of a folder that an older version left


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        ({"loss": "all", "answers": "file"}, "`) |"),
        ({"loss": "answers", "answers": "file"}, "`), loss on the answers |"),
        (
            {"loss": "answers", "answers": "model"},
            "`), loss on the answers, last answers drawn from the unquantized model |",
        ),
    ],
)
def test_a_report_says_how_conversations_were_read(dataset: dict[str, str], said: str) -> None:
    trial = replace(SMALL.trial, config=json.dumps(json.loads(SMALL.trial.config) | {"dataset": dataset}))
    text = render_markdown(analyse(replace(SMALL, trial=trial)))
    (line,) = (line for line in text.splitlines() if line.startswith("| data set |"))
    assert line.endswith(said)
