"""What `sweep solve` prints, as lines of text."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from sweep.core.text import aligned
from sweep.mixed_precision.recipe import SIXTEEN

_SHOWN_GROUPS: Final = 8
_SHOWN_RANKS: Final = 20


def lines(document: Mapping[str, Any]) -> Iterator[str]:
    """A solved recipe for people: size, damage, formats, and the tables that were asked for."""
    yield f"Recipe {document['name']} for {document['target']}: {document['effective_bits']:.3f} bits a weight of the covered layers"
    scored = document["scored"]
    yield f"from {scored['usable']} of {scored['recipes']} recipes scored on {scored['dataset']}/{scored['size']} that the target runs as scored, and 16 bits"
    if document["gb"] is not None:
        yield from _size(document)
    spread = document["predicted_kl_interval"]
    interval = "" if spread is None else f" (90 % interval over samples: {spread[0]:.3g} to {spread[1]:.3g})"
    yield f"predicted KL {document['predicted_kl']:.4g} nats per prediction{interval}"
    for label, n in document["formats"].items():
        yield f"  {n:4d} layer groups: {label if label != SIXTEEN else '16 bits'}"
    most = document["most_bits"]
    if len(most) < sum(document["formats"].values()):
        more = f" and {len(most) - _SHOWN_GROUPS} more" if len(most) > _SHOWN_GROUPS else ""
        yield "most bits: " + ", ".join(most[:_SHOWN_GROUPS]) + more
    if "rank" in document:
        yield from _ranks(document["rank"])
    if "front" in document:
        yield from _front([*document["front"], *document["uniform"]])
        yield f"Picture: {document['picture']}"


def _size(document: Mapping[str, Any]) -> Iterator[str]:
    parts = {"covered layers": "gb_covered", "embeddings, in 16 bits": "gb_embeddings", "lm_head, in 16 bits": "gb_lm_head", "all else, in 16 bits": "gb_rest"}
    yield f"{document['gb']:.4g} GB of weights; lm_head: {document['lm_head']}"
    yield from (f"  {document[key]:10.4g} GB  {name}" for name, key in parts.items() if document[key] is not None)


def _ranks(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Both orders side by side: by damage, and by damage for what the format saves."""
    by_byte = sorted((row for row in rows if row["predicted_kl_per_gb_saved"] is not None), key=lambda row: -row["predicted_kl_per_gb_saved"])
    place = {row["group"]: rank for rank, row in enumerate(by_byte, start=1)}
    table = [("rank", "layer group", "format", "predicted KL", "KL per GB saved", "rank by that")]
    for rank, row in enumerate(rows[:_SHOWN_RANKS], start=1):
        per_gb = row["predicted_kl_per_gb_saved"]
        saved, second = ("-", "-") if per_gb is None else (f"{per_gb:.3g}", str(place[row["group"]]))
        table.append((str(rank), str(row["name"]), str(row["format"]), f"{row['predicted_kl']:.3g}", saved, second))
    yield from (f"  {line}" for line in aligned(table))
    if len(rows) > _SHOWN_RANKS:
        yield f"and {len(rows) - _SHOWN_RANKS} more: --json has all"


def _front(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    table = [("recipe", "bits", "GB", "predicted KL")]
    table += [
        (row.get("format", "best mix"), f"{row['effective_bits']:.3f}", "-" if row["gb"] is None else f"{row['gb']:.4g}", f"{row['predicted_kl']:.4g}")
        for row in rows
    ]
    yield from (f"  {line}" for line in aligned(table))
