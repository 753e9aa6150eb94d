"""From what a store says and what a person asks to a mixed-precision recipe."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sweep.config.targets import Target
from sweep.core.errors import SweepError, require_known
from sweep.formats.mixed import GroupChoice, GroupFormat, MixedRecipe, is_called
from sweep.formats.quantizer import UNQUANTIZED_BITS
from sweep.mixed_precision.candidates import Options
from sweep.mixed_precision.knapsack import Infeasible, Problem, cost_range, solve, total
from sweep.report.analysis import FloatArray, IntArray, bootstrap_interval

SIXTEEN = "16"  # what a pin calls the choice to leave a group unquantized


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How large the model may be."""

    bits: float | None = None  # mean bits a weight of the covered groups
    gb: float | None = None  # 1e9 bytes of all weights

    def __post_init__(self) -> None:
        if (self.bits is None) == (self.gb is None):
            raise SweepError(
                "A budget is --bits B (mean bits a weight of the covered layers) or --gb G (GB of all weights). Type one of the two."
            )
        if not 0 < (self.bits or self.gb or 0) < float("inf"):
            raise SweepError(f"{self} is no budget. Type a number above 0.")

    def __str__(self) -> str:
        return f"--bits {self.bits:g}" if self.bits is not None else f"--gb {self.gb:g}"

    @property
    def slug(self) -> str:
        """As part of a file name: ``4_5bits``."""
        return re.sub(r"[^0-9a-z]", "_", f"{self.bits:g}bits" if self.bits is not None else f"{self.gb:g}gb")

    def cost(self, options: Options) -> float:
        """Bits of the covered groups that it leaves room for."""
        if self.bits is not None:
            return self.bits * float(options.weights.sum())
        assert self.gb is not None
        return (self.gb * 1e9 - options.other_bytes) * 8

    def say(self, options: Options, cost: float) -> str:
        """A cost in the unit of this budget, rounded up: what to type instead."""
        value = cost / float(options.weights.sum()) if self.bits is not None else options.gb(cost)
        return (
            f"--bits {np.ceil(value * 1e4) / 1e4:g}"
            if self.bits is not None
            else f"--gb {np.ceil(value * 1e5) / 1e5:g}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a recipe must respect."""

    pins: Mapping[str, str]  # pattern of group or module names -> label of a format, or "16"
    excludes: Sequence[str] = ()  # patterns of what stays in 16 bits
    uniform_layer: bool = False  # all groups of a decoder layer get the same format
    allowed: Callable[[GroupFormat], bool] = lambda _: True  # by the target


def problem_of(options: Options, rules: Rules, damage: FloatArray | None = None) -> Problem:
    """The choices as arrays; the last option of every group is to stay in 16 bits.

    Args:
        options: what was measured.
        rules: what must be respected.
        damage: [groups, formats], instead of what the store predicts.

    Raises: SweepError: a pattern that matches nothing, an unknown label, or rules that leave a group without a choice.
    """
    n = len(options.groups)
    measured = np.stack([option.predicted_kl for option in options.formats], axis=1) if damage is None else damage
    table = np.concatenate([measured, np.zeros((n, 1))], axis=1)
    bits = np.array([*(option.format.effective_bits for option in options.formats), UNQUANTIZED_BITS])
    labels = [*(option.format.label for option in options.formats), SIXTEEN]
    ruled_out = np.array([*(not rules.allowed(option.format) for option in options.formats), False])
    table[:, ruled_out] = np.inf
    for pattern, label in [*rules.pins.items(), *((pattern, SIXTEEN) for pattern in rules.excludes)]:
        require_known("format", label, labels)
        matching = [
            index
            for index, group in enumerate(options.groups)
            if is_called([group["group"], *group["modules"]], pattern)
        ]
        if not matching:
            raise SweepError(
                f"{pattern!r} matches no layer group. Groups are called like {options.groups[0]['group']!r}; * stands for anything."
            )
        column = labels.index(label)
        for index in matching:
            keep = table[index, column]
            table[index] = np.inf
            table[index, column] = keep
            if not np.isfinite(keep):
                raise SweepError(
                    f"{options.groups[index]['group']} cannot be {label}: the target does not run it, another rule forbids it, or it was not measured."
                )
    layers = [group["layer_index"] for group in options.groups]
    together = np.array(
        [n + layer if rules.uniform_layer and layer is not None else index for index, layer in enumerate(layers)]
    )
    return Problem(damage=table, cost=options.weights[:, None] * bits[None, :], together=together)


def solved(options: Options, problem: Problem, budget: Budget, rules: Rules) -> IntArray:
    """The best choices under a budget.

    Args:
        options: what was measured.
        problem: of these options and rules.
        budget: of all groups.
        rules: for the message.

    Raises: SweepError: nothing fits; names the least budget that does, and the rules that keep it from being less.
    """
    try:
        return solve(problem, budget.cost(options))
    except Infeasible as error:
        if not np.isfinite(error.least_cost):
            raise SweepError(
                "The rules leave some layer group no format that was measured. Loosen --pin, --exclude or --uniform-layer."
            ) from error
        least = budget.say(options, error.least_cost)
        binding = [
            f"{budget.say(options, cost)} without {name}"
            for name, cost in least_costs_without(options, rules).items()
            if cost < error.least_cost
        ]
        smallest = min(
            (option.format for option in options.formats if rules.allowed(option.format)),
            key=lambda each: each.effective_bits,
        )
        allowed = f"the smallest format that may be used is {smallest.label}, {smallest.effective_bits:g} bits"
        raise SweepError(
            f"{budget} is too little. The nearest that works: {least}; {'; '.join([*binding, allowed])}."
        ) from error


def least_costs_without(options: Options, rules: Rules) -> dict[str, float]:
    """What the cheapest choices cost without one rule each, in bits of all groups."""
    loosened = {
        "the target": replace(rules, allowed=lambda _: True),
        "--pin": replace(rules, pins={}),
        "--exclude": replace(rules, excludes=()),
        "--uniform-layer": replace(rules, uniform_layer=False),
    }
    return {name: cost_range(problem_of(options, without))[0] for name, without in loosened.items() if without != rules}


def recipe(
    options: Options, choice: IntArray, name: str, target: str | None, damage: FloatArray | None = None
) -> MixedRecipe:
    """The recipe that choices make up. Args: choice: [groups], the last index standing for 16 bits; damage: as for `problem_of`."""
    row, config = options.trial, options.config
    used = sorted({int(index) for index in choice if index < len(options.formats)})
    groups: list[GroupChoice] = []
    for index, (group, chosen) in enumerate(zip(options.groups, choice.tolist(), strict=True)):
        option = options.formats[chosen] if chosen < len(options.formats) else None
        kl = 0.0 if option is None else float(option.predicted_kl[index] if damage is None else damage[index, chosen])
        groups.append(
            GroupChoice(
                group=group["group"],
                modules=tuple(group["modules"]),
                layer_index=group["layer_index"],
                weight_elements=group["weight_elements"],
                format=option and option.format.label,
                cell_id=option and option.cell_id,
                predicted_kl=kl,
            )
        )
    return MixedRecipe(
        name=name,
        model=row.model,
        model_revision=row.model_revision,
        model_path=config.model.path,
        dataset=row.dataset,
        dataset_revision=row.dataset_revision,
        size=config.dataset.size,
        coverage=config.sensitivity.coverage,
        target=target,
        formats={options.formats[index].format.label: options.formats[index].format for index in used},
        groups=tuple(groups),
    )


def weights_gb(options: Options, made: MixedRecipe) -> float:
    """GB (1e9 bytes) of all weights under a recipe. Raises: SweepError: the store does not know the model's size."""
    return options.gb(made.effective_bits * float(options.weights.sum()))


def interval(options: Options, choice: IntArray) -> tuple[float, float] | None:
    """90 % bootstrap interval over samples of a choice's summed predicted KL; None if some cell kept no sample's scores."""
    samples: list[FloatArray] = []
    for index, chosen in enumerate(choice.tolist()):
        if chosen < len(options.formats):
            own = options.formats[chosen].sample_kl
            if own is None:
                return None
            samples.append(own[index])
    if not samples:
        return 0.0, 0.0
    low, high = bootstrap_interval(np.sum(samples, axis=0)[None], 1, options.trial.dataset_revision)[:, 0]
    return float(low), float(high)


def uniform_choices(options: Options, problem: Problem) -> dict[str, tuple[float, float]]:
    """Cost in bits and damage of giving every group the same format, by label; formats that some group cannot get are left out."""
    found: dict[str, tuple[float, float]] = {}
    for index, option in enumerate(options.formats):
        choice = np.full(len(options.groups), index, dtype=np.int64)
        if np.isfinite(total(problem.damage, choice)):
            found[option.format.label] = total(problem.cost, choice), total(problem.damage, choice)
    return found


def rules_of(
    typed_pins: Sequence[str], excludes: Sequence[str], uniform_layer: bool, target: Target, options: Options
) -> Rules:
    """The rules that were typed. Raises: SweepError: a pin without a label, or a target that runs none of the formats."""
    pins: dict[str, str] = {}
    for pin in typed_pins:
        pattern, sign, label = pin.rpartition("=")
        if not sign or not pattern:
            raise SweepError(
                f"--pin {pin!r} is not PATTERN=FORMAT. Type for example --pin '*.down_proj=wfp8_afp8/default', or =16 for 16 bits."
            )
        pins[pattern] = label
    formats = [option.format for option in options.formats]
    if not any(runs_natively(target, each) for each in formats):
        found = "; ".join(
            f"{each.label}: {target.status(each.quant_pair, each.quant_granularity, each.algorithm).words}"
            for each in formats[:6]
        )
        raise SweepError(
            f"target={target.name} runs none of the {len(formats)} recipes as they are scored ({found}). "
            f"Score what it runs: sweep run -m grid=deployable target={target.name}"
        )
    return Rules(
        pins=pins, excludes=excludes, uniform_layer=uniform_layer, allowed=lambda each: runs_natively(target, each)
    )


def runs_natively(target: Target, chosen: GroupFormat) -> bool:
    """Whether the target computes a format as it was scored: what runs as another one has another damage."""
    return target.status(chosen.quant_pair, chosen.quant_granularity, chosen.algorithm).kind == "native"
