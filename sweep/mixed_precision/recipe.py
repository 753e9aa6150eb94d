"""A mixed-precision recipe from scored candidates, a budget and the user's rules."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from sweep.config.schema import DatasetConfig
from sweep.config.targets import Target
from sweep.core.errors import SweepError, require_known
from sweep.core.text import count
from sweep.formats.format import GroupFormat
from sweep.formats.mixed import GroupChoice, MixedRecipe, Value, is_called
from sweep.formats.quantizer import UNQUANTIZED_BITS
from sweep.mixed_precision.candidates import Candidates
from sweep.mixed_precision.interactions import Interactions
from sweep.mixed_precision.knapsack import Infeasible, Problem, cost_range, solve
from sweep.mixed_precision.pricing import total
from sweep.report.analysis import FloatArray, IntArray, bootstrap_interval
from sweep.report.interactions import Float32Array, counted_projections, joint_samples

SIXTEEN = "16"  # label of the choice to leave a group unquantized


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The largest size that a recipe may have, in one of two units."""

    bits: float | None = None  # mean bits a weight of the covered groups
    gb: float | None = None  # 1e9 bytes of all weights

    def __post_init__(self) -> None:
        if (self.bits is None) == (self.gb is None):
            raise SweepError(
                "A budget is --bits B (mean bits a weight of the covered layers) or --gb G (GB of all weights). "
                "Type one of the two."
            )
        if not 0 < (self.bits or self.gb or 0) < float("inf"):
            raise SweepError(f"{self} is no budget. Type a number above 0.")

    def __str__(self) -> str:
        return f"--bits {self.bits:g}" if self.bits is not None else f"--gb {self.gb:g}"

    @property
    def slug(self) -> str:
        """As part of a file name: ``4_5bits``."""
        return re.sub(r"[^0-9a-z]", "_", f"{self.bits:g}bits" if self.bits is not None else f"{self.gb:g}gb")

    def cost(self, candidates: Candidates) -> float:
        """Bits of the covered groups that it leaves room for."""
        if self.bits is not None:
            return self.bits * float(candidates.weights.sum())
        assert self.gb is not None
        return (self.gb * 1e9 - candidates.other_bytes) * 8

    def say(self, candidates: Candidates, cost: float) -> str:
        """A cost in the unit of this budget, rounded up: what to type instead."""
        value = cost / float(candidates.weights.sum()) if self.bits is not None else candidates.gb(cost)
        return (
            f"--bits {np.ceil(value * 1e4) / 1e4:g}"
            if self.bits is not None
            else f"--gb {np.ceil(value * 1e5) / 1e5:g}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Constraints on a recipe besides its budget."""

    pins: Mapping[str, str]  # pattern of group or module names -> label of a format, or "16"
    excludes: Sequence[str] = ()  # patterns of what stays in 16 bits
    uniform_layer: bool = False  # all groups of a decoder layer get the same format
    allowed: Callable[[GroupFormat], bool] = lambda _: True  # whether the target runs it
    # By label of a format and name of a layer group, why the target's kernels do not take the group's shape.
    refused: Mapping[tuple[str, str], str] = field(default_factory=dict[tuple[str, str], str])


def problem_of(candidates: Candidates, rules: Rules, predicted_kl: FloatArray | None = None) -> Problem:
    """The choices as arrays; the last option of every group is to stay in 16 bits.

    Args:
        candidates: scored formats.
        rules: constraints on the choices.
        predicted_kl: [groups, formats], nats per prediction, in the place of the candidates' own; it adds up.

    Raises: SweepError: a pattern that matches nothing, an unknown label, or rules that leave a group without a choice.
    """
    n, interactions = len(candidates.groups), None
    if predicted_kl is None:
        interactions = _interactions(candidates)
        predicted_kl = np.stack([candidate.predicted_kl for candidate in candidates.formats], axis=1)
    table = np.concatenate([predicted_kl, np.zeros((n, 1))], axis=1)
    bits = np.array([*(candidate.format.effective_bits for candidate in candidates.formats), UNQUANTIZED_BITS])
    labels = [*(candidate.format.label for candidate in candidates.formats), SIXTEEN]
    ruled_out = np.array([*(not rules.allowed(candidate.format) for candidate in candidates.formats), False])
    table[:, ruled_out] = np.inf
    for index, group in enumerate(candidates.groups):
        table[index, [(label, group.name) in rules.refused for label in labels]] = np.inf
    for pattern, label in [*rules.pins.items(), *((pattern, SIXTEEN) for pattern in rules.excludes)]:
        require_known("format", label, labels)
        matching = [
            index for index, group in enumerate(candidates.groups) if is_called([group.name, *group.modules], pattern)
        ]
        if not matching:
            raise SweepError(
                f"{pattern!r} matches no layer group. "
                f"Groups are called like {candidates.groups[0].name!r}; * stands for anything."
            )
        column = labels.index(label)
        for index in matching:
            keep = table[index, column]
            table[index] = np.inf
            table[index, column] = keep
            if not np.isfinite(keep):
                name = candidates.groups[index].name
                why = "the target does not run it, another rule forbids it, or it was not measured"
                raise SweepError(f"{name} cannot be {label}: {rules.refused.get((label, name), why)}.")
    layers = [group.layer_index for group in candidates.groups]
    together = np.array(
        [n + layer if rules.uniform_layer and layer is not None else index for index, layer in enumerate(layers)]
    )
    cost = candidates.weights[:, None] * bits[None, :]
    return Problem(predicted_kl=table, cost=cost, together=together, interactions=interactions)


def _interactions(candidates: Candidates) -> Interactions | None:
    """Of the candidates, and of 16 bits as the last option; None: they are not known, or not asked for."""
    if candidates.interaction_weight is None:
        return None
    counts = _counts(candidates)
    known = [each.projections for each in candidates.formats]
    none = np.zeros_like(next(each for each in known if each is not None))
    found = [none if each is None else each for each in (*known, none)]  # a format that measured no group is not chosen
    return Interactions(
        projections=np.stack(found, axis=1),
        counted=np.stack([counted_projections(each, counts) for each in found], axis=1),
        weight=candidates.interaction_weight,
        n_predictions=counts,
    )


def _counts(candidates: Candidates) -> FloatArray:
    """[samples], predictions of each, where interactions are known."""
    counts = candidates.formats[0].sample_predictions
    assert counts is not None
    return counts


def solved(candidates: Candidates, problem: Problem, budget: Budget, rules: Rules) -> IntArray:
    """The best choices under a budget.

    Args:
        candidates: scored formats.
        problem: of these candidates and rules.
        budget: size that all layer groups may have together.
        rules: named by the message if nothing fits.

    Raises: SweepError: nothing fits; names the least budget that does, and the rules that keep it from being less.
    """
    try:
        return solve(problem, budget.cost(candidates))
    except Infeasible as error:
        if not np.isfinite(error.least_cost):
            raise SweepError(
                "The rules leave some layer group no format that was measured. "
                "Loosen --pin, --exclude or --uniform-layer."
            ) from error
        least = budget.say(candidates, error.least_cost)
        binding = [
            f"{budget.say(candidates, cost)} without {name}"
            for name, cost in least_costs_without(candidates, rules).items()
            if cost < error.least_cost
        ]
        smallest = min(
            (candidate.format for candidate in candidates.formats if rules.allowed(candidate.format)),
            key=lambda each: each.effective_bits,
        )
        allowed = f"the smallest format that may be used is {smallest.label}, {smallest.effective_bits:g} bits"
        raise SweepError(
            f"{budget} is too little. The nearest that works: {least}; {'; '.join([*binding, allowed])}."
        ) from error


def least_costs_without(candidates: Candidates, rules: Rules) -> dict[str, float]:
    """Bits of the cheapest choices with one rule left out, by the name of that rule."""
    loosened = {
        "the target": replace(rules, allowed=lambda _: True, refused={}),
        "--pin": replace(rules, pins={}),
        "--exclude": replace(rules, excludes=()),
        "--uniform-layer": replace(rules, uniform_layer=False),
    }
    return {
        name: cost_range(problem_of(candidates, without))[0] for name, without in loosened.items() if without != rules
    }


def recipe_of_choice(
    candidates: Candidates, choice: IntArray, name: str, target: str | None, predicted_kl: FloatArray | None = None
) -> MixedRecipe:
    """The recipe that choices make up.

    Args:
        candidates: scored formats.
        choice: [groups], an index into the formats, or their number for 16 bits.
        name: of the recipe.
        target: name of the runtime and card that it is for, if for one.
        predicted_kl: as for `problem_of`.
    """
    row, config = candidates.trial, candidates.config
    used = sorted({int(index) for index in choice if index < len(candidates.formats)})
    groups: list[GroupChoice] = []
    for index, (group, chosen) in enumerate(zip(candidates.groups, choice.tolist(), strict=True)):
        candidate = candidates.formats[chosen] if chosen < len(candidates.formats) else None
        kl = 0.0
        if candidate is not None:
            kl = float(candidate.predicted_kl[index] if predicted_kl is None else predicted_kl[index, chosen])
        groups.append(
            GroupChoice(
                group=group,
                format=candidate and candidate.format.label,
                cell_id=candidate and candidate.cell_id,
                predicted_kl=kl,
            )
        )
    samples = mix_samples(candidates, choice) if predicted_kl is None else None
    return MixedRecipe(
        name=name,
        joint_kl=None if samples is None else float(samples.sum()),
        model=row.model,
        model_revision=row.model_revision,
        model_path=config.model.path,
        dataset=row.dataset,
        dataset_revision=row.dataset_revision,
        size=config.dataset.size,
        coverage=config.sensitivity.coverage,
        target=target,
        tokens=candidates.tokens,
        samples=_samples(config.dataset),
        calibration_samples=config.calibration.n_samples,
        dtype=row.dtype,
        store=config.store.uri,
        formats={candidates.formats[index].format.label: candidates.formats[index].format for index in used},
        groups=tuple(groups),
    )


def _samples(dataset: DatasetConfig) -> dict[str, Value]:
    """What a recipe records of its data set's configuration beside name and size; a file by its absolute path."""
    found = {key: value for key, value in asdict(dataset).items() if key not in ("name", "size")}
    for key, path in (("captions_path", dataset.captions_path), ("path", dataset.path)):
        if path is not None and (local := Path(path).expanduser()).exists():  # else a hub id
            found[key] = str(local.absolute())
    return found


def weights_gb(candidates: Candidates, made: MixedRecipe) -> float:
    """GB (1e9 bytes) of all weights under a recipe. Raises: SweepError: the store does not know the model's size."""
    return candidates.gb(made.effective_bits * float(candidates.weights.sum()))


def mix_samples(candidates: Candidates, choice: IntArray) -> FloatArray | None:
    """Predicted KL of a mix with the interactions of its groups, by sample.

    Returns: [samples], nats per prediction of all samples; they add up to it. None: interactions are not known.
    """
    if candidates.interaction_weight is None:
        return None
    counts, mixed = _counts(candidates), list[Float32Array]()
    for index, chosen in enumerate(choice.tolist()):
        if chosen < len(candidates.formats) and (own := candidates.formats[chosen].projections) is not None:
            mixed.append(own[index])
    return joint_samples(mixed, counts) if mixed else np.zeros(len(counts))


def interval(candidates: Candidates, choice: IntArray) -> tuple[float, float] | None:
    """90 % bootstrap interval, over samples, of a mix's predicted KL.

    Returns: low and high, nats per prediction; None if some cell kept no scores of single samples.
    """
    samples, counts = mix_samples(candidates, choice), candidates.formats[0].sample_predictions
    if samples is None:
        chosen_samples: list[FloatArray] = []
        for index, chosen in enumerate(choice.tolist()):
            if chosen < len(candidates.formats):
                own = candidates.formats[chosen].sample_kl
                if own is None:
                    return None
                chosen_samples.append(own[index])
        if not chosen_samples:
            return 0.0, 0.0
        samples = np.sum(chosen_samples, axis=0)
    drawn = 1 if counts is None else counts / counts.sum()  # `samples` are per prediction of all samples
    low, high = bootstrap_interval(samples[None], drawn, candidates.trial.dataset_revision)[:, 0]
    return float(low), float(high)


def uniform_choices(candidates: Candidates, problem: Problem) -> dict[str, tuple[float, float]]:
    """Bits and predicted KL where every group has the same format, by the format's label.

    Formats that some group cannot have are left out.
    """
    found: dict[str, tuple[float, float]] = {}
    for index, candidate in enumerate(candidates.formats):
        choice = np.full(len(candidates.groups), index, dtype=np.int64)
        if np.isfinite(total(problem.predicted_kl, choice)):
            found[candidate.format.label] = total(problem.cost, choice), problem.kl(choice)
    return found


def rules_of(
    typed_pins: Sequence[str], excludes: Sequence[str], uniform_layer: bool, target: Target, candidates: Candidates
) -> Rules:
    """Parse the rules that were typed.

    Raises: SweepError: a pin without a label, or a target that runs none of the formats.
    """
    pins: dict[str, str] = {}
    for pin in typed_pins:
        pattern, sign, label = pin.rpartition("=")
        if not sign or not pattern:
            raise SweepError(
                f"--pin {pin!r} is not PATTERN=FORMAT. "
                "Type for example --pin '*.down_proj=wfp8_afp8/default', or =16 for 16 bits."
            )
        pins[pattern] = label
    formats = [candidate.format for candidate in candidates.formats]
    if not any(runs_natively(target, each) for each in formats):
        found = "; ".join(
            f"{each.label}: {target.status(each.quant_pair, each.quant_granularity, each.algorithm).words}"
            for each in formats[:6]
        )
        raise SweepError(
            f"target={target.name} runs none of {count(len(formats), 'scored recipe')} as it is ({found}). "
            f"Score what it runs: sweep run -m grid=deployable target={target.name}"
            + (f" target.tp={target.tp}" if target.tp > 1 else "")
        )
    return Rules(
        pins=pins, excludes=excludes, uniform_layer=uniform_layer, allowed=lambda each: runs_natively(target, each)
    )


def runs_natively(target: Target, chosen: GroupFormat) -> bool:
    """Whether the target computes a format as it was scored.

    A format that the target runs as another one has another KL than the predicted one.
    """
    return target.status(chosen.quant_pair, chosen.quant_granularity, chosen.algorithm).kind == "native"
