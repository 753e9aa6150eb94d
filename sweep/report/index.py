"""Index pages of the published tree: from a model's page down to every report."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import msgspec

from sweep.core.coverage import ModelCoverage
from sweep.core.groups import short_group
from sweep.core.json import Json
from sweep.core.text import count
from sweep.report.analysis import Summary
from sweep.store.records import UNKNOWN, VARIANT
from sweep.store.upgrades import unrecorded

# First line of every page we write: a README without it is someone's own and is left alone.
GENERATED = "<!-- Written by `sweep publish` from the folders below; edits are lost. -->"

_REPORT = "per-layer-sensitivity.md"
_COLUMNS, _LINES = f"{' | '.join(VARIANT)}", "---|" * len(VARIANT)
_LEGEND = (
    "KL: predicted, all layer groups added up, in nats per prediction; smaller is better. "
    "Served by: targets that run it as it is; "
    "(in brackets) those that run it as another recipe, which the report names."
)


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """As much of a published folder's manifest as is read; the rest is only compared."""

    cell_id: str
    summary: Summary
    served_as: dict[str, dict[str, str | None]] = {}  # by target; a folder of an older layout has none
    weights: ModelCoverage | None = None  # as served_as; None, too, where the store did not know


@dataclass(frozen=True, slots=True)
class Manifest:
    """A published folder's quant-manifest.json."""

    document: Mapping[str, Json]
    figures: Figures

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Read it; one of an older layout gets the attributes that it lacks. Raises: ValueError: it is none of ours."""
        document = msgspec.json.decode(data, type=dict)
        figures = msgspec.convert(document, Figures)
        return cls({**unrecorded(document, document.get("config", {})), **document}, figures)

    @property
    def summary(self) -> Summary:
        return self.figures.summary

    @property
    def variant(self) -> tuple[str, ...]:
        """Its values of `VARIANT`."""
        return tuple(str(self.document.get(name) or UNKNOWN) for name in VARIANT)


def render_index(path: str, manifests: Mapping[str, Manifest]) -> str:
    """README.md of one directory level.

    Args:
        path: the level: ``<model>/layer-analysis``, with ``/<pair>`` and ``/<granularity>`` behind it on lower levels.
        manifests: every published folder below it, by its path from the same root (``<path>/.../<run>``).
    """
    below = {folder.removeprefix(f"{path}/"): manifest for folder, manifest in sorted(manifests.items())}
    model, _, *deeper = path.split("/")
    parts = [
        GENERATED,
        f"# Layer sensitivity of {' / '.join([model, *deeper])}",
        f"{count(len(below), 'report')}. {_LEGEND}",
        *_coverages(below.values()),
    ]
    if not deeper:
        parts += ["## By quant pair", _children(below), *_grids(below)]
    elif len(deeper) == 1:
        parts += ["## By granularity", _children(below), "## Reports", _reports(below)]
    else:
        parts += ["## Reports", _reports(below)]
    return "\n\n".join(parts) + "\n"


def _coverages(manifests: Iterable[Manifest]) -> list[str]:
    """What the reports cover of the model, one sentence for all that cover the same."""
    known = ((manifest.document.get("coverage"), manifest.figures.weights) for manifest in manifests)
    return list(dict.fromkeys(f"`{option}` {weights.text}." for option, weights in known if weights is not None))


def _children(below: Mapping[str, Manifest]) -> str:
    """A row for each directory of the next level, with its report of least predicted KL among those of most samples."""
    children: dict[str, dict[str, Manifest]] = {}
    for folder, manifest in below.items():
        children.setdefault(folder.split("/")[0], {})[folder] = manifest
    lines = [
        f"| directory | reports | {_COLUMNS} | bits | least KL | in | most sensitive group there | served by |",
        f"|---|---:|{_LINES}---:|---:|---|---|---|",
    ]
    for child, folders in children.items():
        most = max(manifest.summary.n_samples for manifest in folders.values())
        candidates = [folder for folder, manifest in folders.items() if manifest.summary.n_samples == most]
        best = min(candidates, key=lambda folder: _order(folders[folder].summary))
        summary, manifests = folders[best].summary, folders.values()
        row = [
            f"[{child}]({child}/README.md)",
            str(len(folders)),
            *_variants(manifests),
            _bits(manifests),
            _kl(summary),
            f"[{best.partition('/')[2]}]({best}/{_REPORT})",
            _worst(summary),
            _served(manifests),
        ]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _grids(below: Mapping[str, Manifest]) -> list[str]:
    """One table a run setting: pairs down, granularities across, KL in the cells; most samples first."""
    runs: dict[str, dict[tuple[str, str], tuple[str, Manifest]]] = {}
    for folder, manifest in below.items():
        pair, granularity, run = folder.split("/")
        runs.setdefault(run, {})[pair, granularity] = (folder, manifest)
    parts: list[str] = []
    n_samples: dict[str, int] = {}
    for run, cells in runs.items():
        n_samples[run] = max(manifest.summary.n_samples for _, manifest in cells.values())
    for run, cells in sorted(runs.items(), key=lambda item: (-n_samples[item[0]], item[0])):
        pairs = sorted({pair for pair, _ in cells})
        granularities = sorted({granularity for _, granularity in cells}, key=lambda name: (name != "default", name))
        lines = [f"| KL | {' | '.join(granularities)} |", "|---|" + "---:|" * len(granularities)]
        for pair in pairs:
            found = [cells.get((pair, granularity)) for granularity in granularities]
            links = [f"[{_kl(cell[1].summary)}]({cell[0]}/{_REPORT})" if cell else "" for cell in found]
            lines.append(f"| {pair} | {' | '.join(links)} |")
        values = _variants([manifest for _, manifest in cells.values()])
        named = ", ".join(f"{name} {value}" for name, value in zip(VARIANT, values, strict=True))
        parts += [f"## {run}", f"With {named}:", "\n".join(lines)]
    return parts


def _reports(below: Mapping[str, Manifest]) -> str:
    lines = [
        f"| report | {_COLUMNS} | samples | bits | KL | half of it in | most sensitive group | served by |",
        f"|---|{_LINES}---:|---:|---:|---:|---|---|",
    ]
    for folder, manifest in sorted(
        below.items(), key=lambda item: (item[0].rpartition("/")[0], item[1].summary.n_samples, item[0])
    ):
        summary = manifest.summary
        row = [
            f"[{folder}]({folder}/{_REPORT})",
            *manifest.variant,
            str(summary.n_samples),
            f"{summary.effective_bits:.3g}",
            _kl(summary),
            count(summary.n_groups_half, "group"),
            _worst(summary),
            _served([manifest]),
        ]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _order(summary: Summary) -> tuple[bool, float]:
    kl = summary.total_predicted_kl
    return (kl is None, kl or 0.0)


def _kl(summary: Summary) -> str:
    kl = summary.total_predicted_kl
    return "not measured" if kl is None else f"{kl:.3g}"


def _worst(summary: Summary) -> str:
    if not summary.top_groups:
        return "none"
    return f"`{short_group(summary.top_groups[0], summary.top_modules)}` {summary.top_shares[0]:.0%}"


def _variants(manifests: Collection[Manifest]) -> list[str]:
    """Every value of each attribute in `VARIANT`."""
    values = zip(*(manifest.variant for manifest in manifests), strict=True)
    return [", ".join(sorted(set(each))) for each in values]


def _served(manifests: Collection[Manifest]) -> str:
    """Targets that run at least one of the recipes as it is.

    Those that only run it as another one follow in brackets.
    """
    kinds: dict[str, set[str]] = {"native": set(), "runs_as": set(), "none": set()}
    for manifest in manifests:
        for target, served in manifest.figures.served_as.items():
            kinds[served["status"] or "none"].add(target)
    in_brackets = [f"({target})" for target in sorted(kinds["runs_as"] - kinds["native"])]
    return ", ".join([*sorted(kinds["native"]), *in_brackets]) or "none"


def _bits(manifests: Collection[Manifest]) -> str:
    bits = sorted({f"{manifest.summary.effective_bits:.3g}" for manifest in manifests}, key=float)
    return bits[0] if len(bits) == 1 else f"{bits[0]} to {bits[-1]}"
