"""Layer groups that a target's kernels do not take in some format, because of the shapes that one rank has of them."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sweep.config.targets import Target
from sweep.core.errors import SweepError
from sweep.core.groups import LayerGroup, Linear
from sweep.core.parallel import RankPart, rank_part
from sweep.core.text import count
from sweep.formats.format import GroupFormat
from sweep.formats.mixed import MixedRecipe
from sweep.mixed_precision.candidates import Candidates
from sweep.plan.model import Model, checkpoint_dir


@dataclass(frozen=True, slots=True, kw_only=True)
class Misfit:
    """A layer group whose shape a kernel does not take."""

    kernel: str
    label: str  # of the format
    group: LayerGroup
    reason: str  # "1216 inputs a rank, no multiple of 128"


def misfits(
    target: Target,
    formats: Iterable[GroupFormat],
    groups: Collection[LayerGroup],
    linears: Mapping[str, Linear],
    kv_heads: int | None,
) -> list[Misfit]:
    """The layer groups that the target's kernels do not take, for each format.

    Args:
        target: with the number of ranks.
        formats: to look at.
        groups: of the model.
        linears: of the model, by name.
        kv_heads: see `sweep.core.parallel.rank_part`.

    Raises: SweepError: the ranks cannot share a group, whatever its format.
    """
    parts: dict[str, list[RankPart]] = {}
    for group in groups:
        parts[group.name] = [rank_part(linears[module], target.tp, kv_heads) for module in group.modules]
    found: list[Misfit] = []
    for each in formats:
        kernel = target.kernel_of(each.quant_pair, each.quant_granularity)
        if kernel is not None:
            found += _misfits_of(target, kernel, each.label, groups, parts)
    return found


def _misfits_of(
    target: Target, kernel: str, label: str, groups: Iterable[LayerGroup], parts: Mapping[str, Sequence[RankPart]]
) -> Iterator[Misfit]:
    for group in groups:
        if (reason := target.misfit(kernel, parts[group.name])) is not None:
            yield Misfit(kernel=kernel, label=label, group=group, reason=reason)


def candidate_misfits(target: Target, candidates: Candidates) -> list[Misfit]:
    """The same for scored candidates, with the shapes of their checkpoint.

    A store does not know shapes. Without the checkpoint only a target of one rank can do without this: what was scored
    has blocks that divide its linears.

    Raises: SweepError: several ranks, and the checkpoint is gone or has changed; or as `misfits`.
    """
    try:
        model = Model(checkpoint_dir(candidates.config.model))
        is_it = model.revision == candidates.trial.model_revision
    except SweepError:
        if target.tp > 1:
            raise
        return []
    if not is_it:
        if target.tp == 1:
            return []
        raise SweepError(
            f"target.tp={target.tp} depends on shapes of the linears, and {model.path} is not the checkpoint that was "
            f"scored (revision {candidates.trial.model_revision[:12]}). Give that one: model.path=DIR."
        )
    formats = [candidate.format for candidate in candidates.formats]
    return misfits(target, formats, candidates.groups, model.linears, model.kv_heads)


def check_shapes(recipe: MixedRecipe, target: Target, model: Model) -> None:
    """Refuse a recipe whose target's kernels do not take it. Raises: SweepError: the first group, and the reason."""
    for choice in recipe.groups:
        if (chosen := recipe.format_of(choice)) is not None:
            for each in misfits(target, [chosen], [choice.group], model.linears, model.kv_heads):
                what = f"{target.label} cannot run {choice.group.name} in {each.label}"
                raise SweepError(
                    f"{what}: {each.reason} ({_rule(target, each)}). "
                    f"Solve again with target={target.name} target.tp={target.tp}."
                )


def misfit_lines(target: Target, found: Sequence[Misfit]) -> Iterator[str]:
    """For people, a line a kernel: the formats, how many layer groups are left out and why."""
    by_kernel: dict[str, list[Misfit]] = defaultdict(list)
    for each in found:
        by_kernel[each.kernel].append(each)
    for several in by_kernel.values():
        first, labels = several[0], sorted({each.label for each in several})
        n = count(len({each.group.name for each in several}), "layer group")
        example = f"{first.group.short_name}: {first.reason}"
        yield f"no {', '.join(labels)} for {n} ({example}); {_rule(target, first)}"


def other_ranks_line(target: Target, candidates: Candidates) -> str | None:
    """The formats that are no candidates for want of scores on the target's number of ranks; None: there are none."""
    if not candidates.other_ranks:
        return None
    return (
        f"no {', '.join(candidates.other_ranks)}: their inputs have a range a token and rank, and were scored on other "
        f"numbers of ranks than {target.tp} alone; the same sweep run with target.tp={target.tp} scores them"
    )


def _rule(target: Target, misfit: Misfit) -> str:
    kernel = target.kernels[misfit.kernel]
    return f"{kernel.words}: {kernel.source}"
