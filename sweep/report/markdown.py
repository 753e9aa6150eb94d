"""The parts of a Markdown report: tables and sentences."""

import math
from collections.abc import Mapping

from sweep.core.sample_kl import TRUSTED_KL
from sweep.report.rows import CoveredGroup, Interactions, Report, ScoredGroup, ratio
from sweep.store.records import UNKNOWN

_FORMATS = {"fp16": "not quantized"}
_BAR = 12  # characters of the longest bar
_MOST = 0.5  # of a score: more is most of it
_NAMED = 8  # layer groups that a line names
_LEVELS = "▁▂▃▄▅▆▇█"
_MISSING = "–"  # noqa: RUF001 -- a dash in print
_UNITS = ((1.0, "nat"), (1e-3, "mnat"), (1e-6, "µnat"), (1e-9, "nnat"))


def facts_table(report: Report) -> str:
    """Model, data set, recipe, coverage, method and versions of a trial."""
    trial, summary = report.trial, report.summary
    named = (("weights", report.pair.weight), ("activations", report.pair.activation))
    formats = ", ".join(f"{what} {_FORMATS.get(name, name)}" for what, name in named if name is not None)
    facts = {
        "model": f"{trial.model} (revision `{trial.model_revision[:12]}`)",
        "data set": f"{trial.dataset} (revision `{trial.dataset_revision[:12]}`){_conversations(report)}",
        "size": f"{trial.size}: {summary.n_samples} samples, {summary.n_predictions} predictions",
        "quant pair": f"`{trial.quant_pair}`: {formats}" if formats else f"`{trial.quant_pair}`",
        "granularity": f"`{trial.quant_granularity}`",
        "algorithm, scales": f"`{trial.algorithm}`, `{trial.scales}`",
        "computed in": trial.dtype or UNKNOWN,
        "effective bits": f"{summary.effective_bits:.3f} a weight, block scales counted",
        "coverage": _coverage(report),
        "method, engine": f"`{trial.method}`, `{trial.engine}`",
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(report.versions.items())) or "unknown",
        "trial, cell": f"`{trial.trial_id}`, `{trial.cell_id}`",
        **{f"on `{target}`": _served(status) for target, status in report.served_as.items()},
    }
    return "| measured | |\n|---|---|\n" + "\n".join(f"| {name} | {_cell(text)} |" for name, text in facts.items())


def _coverage(report: Report) -> str:
    """The layer groups that were measured, and what they are of the model."""
    summary, weights = report.summary, report.weights
    measured = f"`{report.trial.coverage}`: {summary.n_measured} of {summary.n_groups} layer groups measured"
    return measured if weights is None else f"{measured}; the sweep {weights.text}"


def _conversations(report: Report) -> str:
    """How a data set of conversations was read; nothing of others."""
    dataset = report.section("dataset")
    words = [", loss on the answers"] if dataset.get("loss") == "answers" else []
    written = {"model": "drawn from", "model_greedy": "written greedily by"}.get(str(dataset.get("answers")))
    return "".join([*words, *([f", last answers {written} the unquantized model"] if written else [])])


def _served(status: Mapping[str, str | None]) -> str:
    words = {"native": "runs as it is", "runs_as": f"runs as `{status['runs_as']}`", "none": "nothing runs it"}[
        status["status"] or "none"
    ]
    return f"{words}: `{status['reader_name']}`" if status["reader_name"] else words


def sentences(report: Report) -> list[str]:
    """The summary: total, which groups carry it, how far to trust the ranking."""
    summary, total = report.summary, report.summary.total_predicted_kl
    if total is None:
        return ["**Nothing was measured**: no covered module was called on these samples."]
    ends = report.total_interval
    interval = f" (90% interval {ends[0]:.3g} to {ends[1]:.3g})" if ends else ""
    counting = "what counts of " if report.trial.method == "fisher" else ""
    meaning = (
        f"The sum over groups of {counting}score / (2 x predictions): the second-order estimate of the KL divergence "
        "that quantizing one group alone causes. Interactions between groups are not in it."
    )
    if report.trial.method == "kl_div":
        meaning = (
            "The sum over groups of the KL divergence from the original model, measured with that group alone "
            "quantized. Interactions are not in it."
        )
    sentences = [f"**Total predicted KL: {total:.3g} nats per prediction**{interval}. {meaning}"]
    if report.weights is not None and (left := report.weights.warning) is not None:
        sentences.append(f"**Not the whole model**: {left}.")
    if report.interactions is not None:
        sentences.append(_joint_sentence(report.interactions))
    joint = total if report.interactions is None else report.interactions.predicted_kl
    if max(total, joint) > TRUSTED_KL and report.trial.method != "kl_div":
        sentences.append(
            f"A total above {TRUSTED_KL:g} nats is outside the range of a small-perturbation estimate: "
            "trust the ranking, not the size."
        )
    if half := summary.n_groups_half:
        largest = report.rows[: min(half, 8)]
        names = [f"`{row.name}` {row.share:.1%}" for row in largest]
        more = f" and {half - len(names)} more" if half > len(names) else ""
        verb = "carries" if half == 1 else "carry"
        sentences.append(f"**{half} of {summary.n_measured} groups {verb} half of it**: {', '.join(names)}{more}.")
    else:
        sentences.append("No group changes the loss: the recipe reproduces every output.")
    sentences.append(_stability_sentence(report))
    return sentences


def _joint_sentence(found: Interactions) -> str:
    return (
        f"**All groups quantized at once: {found.predicted_kl:.3g} nats per prediction.** Interactions between groups, "
        "whose errors partly undo each other or add up, are in it."
    )


def pairs_text(found: Interactions) -> str:
    """The pairs of layer groups whose errors have most to do with each other, as a table."""
    if not found.pairs:
        return "No pair of layer groups stands out of the noise of these samples."
    meaning = (
        "KL of two groups quantized at once beyond the sum of each alone, in nats per prediction, with its standard "
        "error over samples: below 0 the errors of one undo those of the other. Shown are pairs that differ from 0 by "
        "four standard errors and more."
    )
    lines = ["| layer group | and | predicted KL | standard error | correlation |", "|---|---|---:|---:|---:|"]
    for pair in found.pairs:
        figures = f"{pair.predicted_kl:+.3g} | {pair.standard_error:.2g} | {pair.correlation:+.2f}"
        lines.append(f"| `{pair.names[0]}` | `{pair.names[1]}` | {figures} |")
    return "\n".join([meaning, "", *lines])


def _stability_sentence(report: Report) -> str:
    stability = report.stability
    if report.total_interval is None:
        return (
            f"**Ranking: confidence unknown.** The engine `{report.trial.engine}` keeps no per-sample scores: "
            "no intervals, no stability check."
        )
    if stability is None or stability.spearman is None:
        return "**Ranking: confidence unknown.** Too few samples or groups to compare two halves."
    if stability.spearman >= 0.95 and stability.top_overlap >= 0.8:
        verdict = "stable"
    elif stability.spearman >= 0.8 and stability.top_overlap >= 0.6:
        verdict = "fair, the middle may reorder with other samples"
    else:
        verdict = "unstable, measure a larger `dataset.size` before acting on it"
    top = f"{round(stability.top_overlap * stability.top_k)} of the top {stability.top_k} in common"
    return f"**Ranking: {verdict}.** Even against odd samples: Spearman {stability.spearman:.3f}, {top}."


def kinds_table(report: Report) -> str:
    """Share by kind of layer, with a sparkline over depth."""
    values = [row.sensitivity for row in report.rows if row.sensitivity > 0]
    low, high = (math.log(min(values)), math.log(max(values))) if values else (0.0, 0.0)
    kinds: dict[str, list[CoveredGroup]] = {}
    for row in sorted([*report.rows, *report.not_measured], key=lambda row: _numbers(row.layer)):
        kind = ".".join("*" if part.isdecimal() else part for part in row.name.split("."))
        kinds.setdefault(kind, []).append(row)
    lines: list[tuple[float, str]] = []
    for kind, rows in kinds.items():
        measured = [row for row in rows if isinstance(row, ScoredGroup)]
        share = sum(row.share for row in measured)
        worst = min(measured, key=lambda row: row.rank, default=None)
        most = f"`{worst.name}` (rank {worst.rank})" if worst else "not measured"
        spark = "".join(_spark(row, low, high) for row in rows)
        lines.append((share, f"| `{kind}` | {len(rows)} | {share:.1%} | `{spark}` | {most} |"))
    table = "\n".join(line for _, line in sorted(lines, key=lambda item: -item[0]))
    missing = " `x`: not measured." if report.not_measured else ""
    return f"""First layer to last, on a log scale that is the same for all rows.{missing}

| kind | groups | share | sensitivity over depth | most sensitive |
|---|---:|---:|---|---|
{table}"""


def tokens_table(report: Report) -> str:
    """Shares of the score by kind of token: of the trial, of each group, and of the one token with the largest."""
    shares = report.token_shares or {}
    heading = ["#", "layer group", *(kind.replace("_", " ") for kind in shares), "largest token"]
    lines = [f"| {' | '.join(heading)} |", f"|---:|---|{'---:|' * (len(shares) + 1)}"]
    lines.append(_shares_line("", "**all**", shares, None))
    lines += [
        _shares_line(str(row.rank), f"`{row.name}`", row.token_shares, row.top_token_share)
        for row in report.rows
        if row.token_shares is not None
    ]
    return "\n".join(lines)


def _shares_line(rank: str, name: str, shares: Mapping[str, float], top: float | None) -> str:
    cells = [rank, name, *(f"{share:.1%}" for share in shares.values()), _MISSING if top is None else f"{top:.1%}"]
    return f"| {' | '.join(cells)} |"


def tokens_text(report: Report) -> str:
    """The meaning of `tokens_table`, and the groups that stand out in it.

    These have more than half of their score from one kind that has less than half of the trial's, or from one token.
    """
    parts = [
        "Shares of the score by the kind of token at whose position an error arises, not of the token whose prediction "
        "suffers from it: an error at an image is felt in the answers that look at it.",
    ]
    if report.trial.method == "fisher":
        parts[0] += (
            " A share is negative where errors at these tokens undo those at others, whose shares then add up to more "
            "than 100%."
        )
    standing: dict[str, list[str]] = {}
    for row in report.rows:
        for kind, share in (row.token_shares or {}).items():
            if share > _MOST >= (report.token_shares or {})[kind]:
                standing.setdefault(f"Mostly at {kind.replace('_', ' ')} tokens", []).append(
                    f"`{row.name}` {share:.0%}"
                )
        if (row.top_token_share or 0) > _MOST:
            line = "Mostly at one token, as massive activations and attention sinks have it"
            standing.setdefault(line, []).append(f"`{row.name}` {row.top_token_share:.0%}")
    for line, names in standing.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        parts.append(f"- **{line}**: {', '.join(names[:_NAMED])}{more}.")
    return "\n".join([parts[0], "", *parts[1:]]).strip()


def groups_table(report: Report) -> str:
    """Every measured layer group, most sensitive first."""
    largest = max(row.predicted_kl for row in report.rows)
    scale, unit = next(
        ((scale, unit) for scale, unit in _UNITS if largest >= scale), _UNITS[-1] if largest > 0 else _UNITS[0]
    )
    top_share = max(row.share for row in report.rows)
    names = (
        f"#|layer group|predicted KL, {unit}|90% interval|share||score|sensitivity|SQNR dB|weight error|input amax|bits"
    )
    lines = [f"| {' | '.join(names.split('|'))} |", "|---:|---|---:|:---:|---:|---|---:|---:|---:|---:|---:|---:|"]
    for row in report.rows:
        ends = row.predicted_kl_interval
        cells = [
            str(row.rank),
            f"`{row.name}`",
            _number(row.predicted_kl, scale),
            f"{_number(ends[0], scale)} … {_number(ends[1], scale)}" if ends else _MISSING,
            f"{row.share:.1%}",
            "█" * round(_BAR * ratio(row.share, top_share)) or "▏",
            _number(row.score),
            _number(row.sensitivity),
            _MISSING if row.output_sqnr_db is None else f"{row.output_sqnr_db:.1f}",
            _number(row.weight_rel_error),
            _number(row.input_amax),
            f"{row.num_bits:.4g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def columns_text(method: str) -> str:
    """The meaning of the columns of `groups_table`."""
    score = {
        "gradient": "sum over tokens and outputs of (dLoss/dy · error of y)²",
        "fisher": "sum over samples of the mean over draws of (sum over tokens and outputs of dLoss/dy · error of y)², "
        "with labels that the model itself draws",
        "kl_div": "sum over predictions of KL(original ‖ quantized)",
    }[method]
    return (
        "- **predicted KL**: nats per prediction with this group alone quantized; "
        "**interval**: 90% bootstrap over samples.\n"
        f"- **score**: {score}, the loss summed over predictions. "
        "**sensitivity**: score per prediction, comparable across sizes.\n"
        "- **SQNR**: signal to quantization noise of the group's outputs. **weight error**: |ΔW| / |W|. "
        "**input amax**: largest |x| seen.\n"
        "- **bits**: effective bits a weight, block scales counted. "
        "In machine form: `per-layer-sensitivity.json`, `scores.parquet`."
    )


def _numbers(group: str) -> list[int]:
    return [int(part) for part in group.split(".") if part.isdecimal()]


def _spark(group: CoveredGroup, low: float, high: float) -> str:
    if not isinstance(group, ScoredGroup):
        return "x"
    if group.sensitivity <= 0:
        return "·"
    place = (math.log(group.sensitivity) - low) / (high - low) if high > low else 1.0
    return _LEVELS[round(place * (len(_LEVELS) - 1))]


def _number(value: float | None, scale: float = 1.0) -> str:
    """Three significant digits."""
    return _MISSING if value is None else f"{value / scale:#.3g}".removesuffix(".")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
