"""Index pages of the published tree: from a model's page down to every report."""

from collections.abc import Iterable, Mapping
from typing import Any

from sweep.core.groups import short_group
from sweep.core.text import count

# First line of every page we write: a README without it is someone's own and is left alone.
GENERATED = "<!-- Written by `sweep publish` from the folders below; edits are lost. -->"

Manifest = Mapping[str, Any]  # of a published folder, quant-manifest.json
_REPORT = "per-layer-sensitivity.md"
_LEGEND = (
    "KL: predicted, all layer groups added up, in nats per prediction; smaller is better. "
    "Served by: targets that run it as it is; "
    "(in brackets) those that run it as another recipe, which the report names."
)


def render_index(path: str, manifests: Mapping[str, Manifest]) -> str:
    """README.md of one directory level.

    Args:
        path: the level: ``<model>/layer-analysis``, with ``/<pair>`` and ``/<granularity>`` behind it on lower levels.
        manifests: every published folder below it, by its path from the same root (``<path>/.../<run>``).
    """
    below = {folder.removeprefix(f"{path}/"): manifest for folder, manifest in sorted(manifests.items())}
    model, _, *deeper = path.split("/")
    title = f"# Layer sensitivity of {' / '.join([model, *deeper])}"
    parts = [
        GENERATED,
        title,
        f"{count(len(below), 'report')}. {_LEGEND}",
    ]
    if not deeper:
        parts += ["## By quant pair", _children(below), *_grids(below)]
    elif len(deeper) == 1:
        parts += ["## By granularity", _children(below), "## Reports", _reports(below)]
    else:
        parts += ["## Reports", _reports(below)]
    return "\n\n".join(parts) + "\n"


def _children(below: Mapping[str, Manifest]) -> str:
    """A row for each directory of the next level, with its report of least predicted KL among those of most samples."""
    children: dict[str, dict[str, Manifest]] = {}
    for folder, manifest in below.items():
        children.setdefault(folder.split("/")[0], {})[folder] = manifest
    lines = [
        "| directory | reports | bits | least KL | in | most sensitive group there | served by |",
        "|---|---:|---:|---:|---|---|---|",
    ]
    for child, folders in children.items():
        most = max(manifest["summary"]["n_samples"] for manifest in folders.values())
        candidates = {
            folder: manifest for folder, manifest in folders.items() if manifest["summary"]["n_samples"] == most
        }
        best = min(candidates, key=lambda folder: _order(candidates[folder]))
        where = f"[{best.partition('/')[2]}]({best}/{_REPORT})"
        summary = folders[best]["summary"]
        row = [
            f"[{child}]({child}/README.md)",
            str(len(folders)),
            _bits(folders.values()),
            _kl(summary),
            where,
            _worst(summary),
            _served(folders.values()),
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
    n_samples = {run: max(map(_n_samples, cells.values())) for run, cells in runs.items()}
    for run, cells in sorted(runs.items(), key=lambda item: (-n_samples[item[0]], item[0])):
        pairs = sorted({pair for pair, _ in cells})
        granularities = sorted({granularity for _, granularity in cells}, key=lambda name: (name != "default", name))
        lines = [f"| KL | {' | '.join(granularities)} |", "|---|" + "---:|" * len(granularities)]
        for pair in pairs:
            found = [cells.get((pair, granularity)) for granularity in granularities]
            links = [f"[{_kl(cell[1]['summary'])}]({cell[0]}/{_REPORT})" if cell else "" for cell in found]
            lines.append(f"| {pair} | {' | '.join(links)} |")
        parts += [f"## {run}", "\n".join(lines)]
    return parts


def _n_samples(cell: tuple[str, Manifest]) -> int:
    return cell[1]["summary"]["n_samples"]


def _reports(below: Mapping[str, Manifest]) -> str:
    lines = [
        "| report | samples | bits | KL | half of it in | most sensitive group | served by |",
        "|---|---:|---:|---:|---:|---|---|",
    ]
    for folder, manifest in sorted(
        below.items(), key=lambda item: (item[0].rpartition("/")[0], item[1]["summary"]["n_samples"], item[0])
    ):
        summary = manifest["summary"]
        half = count(summary["n_groups_half"], "group")
        link = f"[{folder}]({folder}/{_REPORT})"
        lines.append(
            f"| {link} | {summary['n_samples']} | {summary['effective_bits']:.3g} | {_kl(summary)} | {half} | "
            f"{_worst(summary)} | {_served([manifest])} |"
        )
    return "\n".join(lines)


def _order(manifest: Manifest) -> tuple[bool, float]:
    kl = manifest["summary"]["total_predicted_kl"]
    return (kl is None, kl or 0.0)


def _kl(summary: Mapping[str, Any]) -> str:
    kl = summary["total_predicted_kl"]
    return "not measured" if kl is None else f"{kl:.3g}"


def _worst(summary: Mapping[str, Any]) -> str:
    if not summary["top_groups"]:
        return "none"
    return f"`{short_group(summary['top_groups'][0], summary['top_modules'])}` {summary['top_shares'][0]:.0%}"


def _served(manifests: Iterable[Manifest]) -> str:
    """Targets that run at least one of the recipes as it is.

    Those that only run it as another one follow in brackets.
    """
    kinds: dict[str, set[str]] = {"native": set(), "runs_as": set(), "none": set()}
    for manifest in manifests:
        for target, status in manifest.get("served_as", {}).items():  # a folder of an older layout has none
            kinds[status["status"]].add(target)
    in_brackets = [f"({target})" for target in sorted(kinds["runs_as"] - kinds["native"])]
    return ", ".join([*sorted(kinds["native"]), *in_brackets]) or "none"


def _bits(manifests: Any) -> str:
    bits = sorted({f"{manifest['summary']['effective_bits']:.3g}" for manifest in manifests}, key=float)
    return bits[0] if len(bits) == 1 else f"{bits[0]} to {bits[-1]}"
