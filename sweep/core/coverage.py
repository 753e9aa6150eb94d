"""What a sweep covers of a model: every weight has one kind, and the layer groups cover some of them.

Kinds are keys of RunRecord.models beside `parameters`, which they add up to; a matrix that is of no other kind has one
of its own, with its name: ``matrix.A_log``.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from sweep.core.groups import is_vision

Holder = Literal["linear", "conv1d", "embedding", "convolution", "other"]  # the module that has a weight as its own

_UNKNOWN: Final = "unknown"  # an older program has recorded `parameters`, `embeddings` and `lm_head` alone
OTHER_HEAD: Final = "other_head"  # an output layer that is not named lm_head; 0: tied to the embeddings
_MATRIX, _VISION_MATRIX = "matrix.", "vision_matrix."
_ROUTER: Final = re.compile(r"router|\.gate(\.|$)")
# Linears that every preset of ModelOpt 0.47 switches off by name, beside routers.
_GATE: Final = re.compile(r"\.(shared_expert_gate|linear_attn\.in_proj_(a|b|ba))$")


@dataclass(frozen=True, slots=True)
class _Words:
    """A kind as users read it."""

    name: str
    reason: str = ""  # why it may not be covered
    warns: bool = False  # part of what a sweep of the language model is about


_KINDS: Final[Mapping[str, _Words]] = {
    "linears": _Words("linears", "the recipe's patterns leave them out", warns=True),
    "vision_linears": _Words("linears of the vision tower", "the recipe's patterns leave them out"),
    "lm_head": _Words("lm_head", "sensitivity.lm_head=true covers it"),
    OTHER_HEAD: _Words("output layer", "only one that is named lm_head is scored"),
    "embeddings": _Words("embeddings", "a table that is looked up"),
    "other_embeddings": _Words("position and other embeddings", "tables that are looked up or added"),
    "experts": _Words("experts", "they are not scored yet", warns=True),
    "routers": _Words("routers", "runtimes keep them in 16 bits"),
    "gates": _Words("gates of linear attention and shared experts", "ModelOpt's presets keep them in 16 bits"),
    "conv1d": _Words("Conv1D layers", "transformers' Conv1D is not scored", warns=True),
    "convolutions": _Words("convolutions", "only linears are scored"),
    "vectors": _Words("norms and biases"),
    _UNKNOWN: _Words("other weights", "an earlier version did not record their kinds"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class NotCovered:
    """Weights of one kind that no layer group covers. Its fields are keys of JSON documents."""

    kind: str
    name: str  # for people
    elements: int
    share: float  # of all weights, 0..1
    reason: str  # empty: norms and biases, which nobody quantizes
    warns: bool  # matrices of the language model: a sweep without them is not complete


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCoverage:
    """How many of a model's weights the layer groups of a sweep cover, and which not."""

    parameters: int  # elements of all weights, that of a quantized copy of tied embeddings included
    covered: int
    not_covered: tuple[NotCovered, ...]  # largest first

    @property
    def share(self) -> float:
        return self.covered / self.parameters

    @property
    def warning(self) -> str | None:
        """Matrices of the language model that were left out and are no tables, routers or gates; None: there are none.

        ``not looked at: experts, 40.6 % of all weights (they are not scored yet)``.
        """
        left = [
            f"{each.name}, {percent(each.share)} of all weights ({each.reason})"
            for each in self.not_covered
            if each.warns
        ]
        return f"not looked at: {'; '.join(left)}" if left else None

    @property
    def text(self) -> str:
        """``covers 94.1 % of 30.5 B parameters; not covered: embeddings 1.2 % (a table that is looked up), ...``."""
        said = f"covers {percent(self.share)} of {number(self.parameters)} parameters"
        if not self.not_covered:
            return said
        others = (
            f"{each.name} {percent(each.share)}" + (f" ({each.reason})" if each.reason else "")
            for each in self.not_covered
        )
        return f"{said}; not covered: {', '.join(others)}"


def coverage_of(elements: Mapping[str, int], groups: Mapping[str, int], option: str) -> ModelCoverage:
    """The share of a model's weights that layer groups cover, and the kinds of all others.

    Args:
        elements: of the model: `parameters`, and by kind; a record of an older program knows few kinds.
        groups: weight elements of the covered layer groups, by first module.
        option: sensitivity.coverage.
    """
    left = Counter({kind: n for kind, n in elements.items() if kind != "parameters"})
    left[_UNKNOWN] = elements["parameters"] - left.total()
    parameters = elements["parameters"]
    covered: Counter[str] = Counter()
    for module, n in groups.items():
        covered[linear_kind(module)] += n
    if not elements["lm_head"]:  # tied: a copy of the embeddings is quantized, which stay as they are
        parameters += covered["lm_head"]
        left["lm_head"] += covered["lm_head"]
    for kind, n in covered.items():
        left[kind if kind in left else _UNKNOWN] -= n
    shared = not left["lm_head"] and not covered["lm_head"] and OTHER_HEAD not in elements
    return ModelCoverage(
        parameters=parameters,
        covered=covered.total(),
        not_covered=tuple(
            _not_covered(kind, n, parameters, _advice(kind, option, shared=shared))
            for kind, n in left.most_common()
            if n > 0
        ),
    )


def _not_covered(kind: str, n: int, parameters: int, advice: str | None) -> NotCovered:
    words = _words(kind)
    reason = advice or words.reason
    return NotCovered(kind=kind, name=words.name, elements=n, share=n / parameters, reason=reason, warns=words.warns)


def _advice(kind: str, option: str, *, shared: bool) -> str | None:
    """The option that covers a kind in this model, where it depends. Args: shared: embeddings are lm_head, too."""
    if kind == "vision_linears" and option == "lm_only":
        return "sensitivity.coverage=all_layers covers them"
    if kind == "embeddings" and shared:
        return "a table that is looked up; lm_head shares it, sensitivity.lm_head=true covers a copy"
    return None


def _words(kind: str) -> _Words:
    for prefix, place in ((_MATRIX, ""), (_VISION_MATRIX, " of the vision tower")):
        if kind.startswith(prefix):
            return _Words(kind.removeprefix(prefix) + place, "only linears are scored", warns=prefix == _MATRIX)
    return _KINDS[kind]


def linear_kind(module: str) -> str:
    """The kind of the weight of an ``nn.Linear``, by its module's name."""
    words = module.split(".")
    if words[-1] == "lm_head":
        return "lm_head"
    if "experts" in words:
        return "experts"
    if _ROUTER.search(module):
        return "routers"
    if is_vision(module):
        return "vision_linears"
    return "gates" if _GATE.search(module) else "linears"


def weight_kind(name: str, shape: Sequence[int], holder: Holder) -> str:
    """The kind of a parameter that is not the token embedding.

    Args:
        name: ``model.layers.0.mlp.experts.down_proj``.
        shape: of it. Experts that a module keeps together have three dimensions.
        holder: kind of the module whose own it is.
    """
    module, _, leaf = name.rpartition(".")
    if len(shape) < 2 or leaf.endswith("bias"):
        return "vectors"
    if holder == "linear":
        return linear_kind(module)
    if holder != "other":
        return {"conv1d": "conv1d", "embedding": "other_embeddings", "convolution": "convolutions"}[holder]
    n_axes = sum(size > 1 for size in shape)
    if "experts" in name.split(".") or (n_axes > 2 and not is_vision(name)):
        return "experts"
    if n_axes < 2:
        return "vectors"
    if _ROUTER.search(module):
        return "routers"
    own = module.rpartition(".")[2] if leaf == "weight" else leaf
    if "embed" in own or "position" in own:
        return "other_embeddings"
    return (_VISION_MATRIX if is_vision(name) else _MATRIX) + own


def percent(share: float) -> str:
    """``94.1 %``, ``0.01 %``; what is not all is never rounded to it."""
    text = f"{share:.1%}"
    if text == "100.0%":
        text = "100%" if share == 1 else f"{min(share, 0.9999):.2%}"
    elif text == "0.0%":
        text = "0%" if share == 0 else "under 0.01%" if share < 5e-5 else f"{share:.2%}"
    return text.replace("%", " %")


def number(n: int) -> str:
    """A number of weights as people say it: ``30.5 B``, ``135 M``, ``25,000``."""
    for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if n >= 0.9995 * scale:
            return f"{n / scale:.3g} {letter}"
    return f"{n:,}"
