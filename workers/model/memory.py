"""Estimates of the memory that scoring takes, and windows of decoder layers that fit into it. Arithmetic on bytes.

The estimates are for planning; running out of memory all the same halves the window (workers.service.scorer).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from sweep.core.batches import Batch, Plan
from sweep.core.groups import Part, ShapedGroup, is_vision

# One batch's activations that the backward pass needs, over the x and g that one batch adds to the capture: attention,
# norms and products keep 1.7 times as much (16 GB for 2,048 tokens through the 36 layers of a 4B model, measured).
_GRAPH_SHARE: Final = 1.7
_PRODUCTS: Final = 3  # [rows, out] tensors: x dW^T, and at least two of dx Q(W)^T
_RESERVE: Final = 1.5e9  # a module's weight under two recipes, quantizers, workspaces of cuBLAS, fragments
T = TypeVar("T")

# Rows whose logits are held at once: 2,048 in fp32 with their gradient would be 2.5 GB for a vocabulary of 151,936. A
# GEMM's shape decides its bits, so another number is another score version.
HEAD_ROWS: Final = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The numbers that the memory of a capture and its scoring depends on."""

    n_tokens: int  # of all samples
    n_patches: int  # of all images
    batch_tokens: int  # of the longest batch
    batch_patches: int  # of the batch that has most
    itemsize: int  # bytes a value of the model's dtype
    model_bytes: int
    vocabulary: int
    n_inputs: int  # recipes of the inputs that are kept side by side, those of other sizes counted
    n_gradients: int = 1  # g of each linear: one, or as many as there are draws


def itemsize_of(dtype: str) -> int:
    """Bytes of a value in a model's dtype. Args: dtype: float32 or bfloat16."""
    return 2 if dtype == "bfloat16" else 4


def workload(
    plan: Plan,
    n_segments: int,
    *,
    n_inputs: int,
    dtype: str,
    model_bytes: int,
    vocabulary: int,
    draws: int | None = None,
) -> Workload:
    """The workload of scoring tasks of one model and data set together.

    Args:
        plan: of the data set.
        n_segments: leading segments of the plan that are captured.
        n_inputs: see Workload.
        dtype: of the model.
        model_bytes: of the weights.
        vocabulary: its size.
        draws: see Task.
    """
    batches = [batch for segment in plan.segments[:n_segments] for batch in segment]
    return Workload(
        n_tokens=sum(sum(batch.lengths) for batch in batches),
        n_patches=sum(sum(batch.patch_counts) for batch in batches),
        batch_tokens=max(sum(batch.lengths) for batch in batches),
        batch_patches=max(sum(batch.patch_counts) for batch in batches),
        itemsize=itemsize_of(dtype),
        model_bytes=model_bytes,
        vocabulary=vocabulary,
        n_inputs=n_inputs,
        n_gradients=draws or 1,
    )


def capture_bytes(groups: Sequence[ShapedGroup], work: Workload) -> int:
    """Bytes of x and g of layer groups, and of the autograd graph of one batch through them."""
    values = 0.0
    for group in groups:
        values += (group.n_inputs + work.n_gradients * group.n_outputs) * _rows(group, work)
        values += (group.n_inputs + group.n_outputs) * _GRAPH_SHARE * _batch_rows(group, work)
    return round(values * work.itemsize)


def fixed_bytes(groups: Sequence[ShapedGroup], work: Workload, *, reserve: float = _RESERVE) -> int:
    """Bytes of all else: the model, logits, and the operands of the widest layer group.

    Args:
        groups: that are scored.
        work: of scoring them.
        reserve: room that is left beside these for a model of 1 GB or more; 0 for an estimate of what is used.
    """
    logits = min(work.n_tokens, HEAD_ROWS) * work.vocabulary * (work.itemsize + 3 * 4)
    operands = max(
        _rows(group, work) * (group.n_inputs * (work.n_inputs + 1) + group.n_outputs * _PRODUCTS) for group in groups
    )
    return round(work.model_bytes + logits + operands * work.itemsize + reserve * min(1.0, work.model_bytes / 1e9))


def divergence_bytes(work: Workload, n_predictions: int, hidden: int) -> int:
    """Bytes of method=kl_div: the model, three hidden states a token, log-probabilities, and those of one batch twice.

    Args:
        work: of scoring.
        n_predictions: over all samples.
        hidden: values of a hidden state.
    """
    kept = 3 * work.n_tokens * hidden + n_predictions * work.vocabulary
    batch = min(n_predictions, work.batch_tokens) * work.vocabulary * (work.itemsize + 2 * 4)
    return work.model_bytes + kept * work.itemsize + batch


def n_rows(batches: Iterable[Batch]) -> int:
    """The most rows that a linear is called on over these batches: of their tokens or of their patches."""
    return sum(max(sum(batch.lengths), sum(batch.patch_counts)) for batch in batches)


def _rows(group: ShapedGroup, work: Workload) -> int:
    return work.n_patches if is_vision(group.name) else work.n_tokens


def _batch_rows(group: ShapedGroup, work: Workload) -> int:
    """The most rows that one batch calls a group on."""
    return work.batch_patches if is_vision(group.name) else min(work.n_tokens, work.batch_tokens)


def needed_bytes(parts: Sequence[Sequence[ShapedGroup]], work: Workload) -> int:
    """The fewest bytes that a sweep can run in: one part captured at a time."""
    groups = [group for part in parts for group in part]
    return fixed_bytes(groups, work) + max(capture_bytes(part, work) for part in parts)


def whole_bytes(groups: Sequence[ShapedGroup], work: Workload) -> int:
    """Bytes that a sweep takes that captures everything at once."""
    return fixed_bytes(groups, work) + capture_bytes(groups, work)


def part_windows(parts: Sequence[Part], work: Workload, n_bytes: float, n_halvings: int = 0) -> list[list[Part]]:
    """Parts that are captured together: in windows that leave room for all else that scoring takes.

    Args:
        parts: in the model's order.
        work: of scoring them.
        n_bytes: of memory.
        n_halvings: of what is left for x and g, after running out of memory.
    """
    groups = [group for part in parts for group in part.groups]
    room = (n_bytes - fixed_bytes(groups, work)) / 2**n_halvings
    sizes = [capture_bytes(part.groups, work) for part in parts]
    hidden = min((group.n_inputs for group in groups if not is_vision(group.name)), default=0)
    state_bytes = work.n_tokens * hidden * work.itemsize
    found = windows(parts, sizes, room)
    n_states = 0
    # Several windows start at a hidden state each, which the pass before the first keeps, and end at its gradients.
    while len(found) > 1 and n_states < len(found) + work.n_gradients:
        n_states = len(found) + work.n_gradients
        found = windows(parts, sizes, room - n_states * state_bytes)
    return found


def windows(parts: Sequence[T], sizes: Sequence[int], room: float) -> list[list[T]]:
    """Consecutive parts in windows of at most `room` bytes; a part that is larger gets one of its own.

    Args:
        parts: in the model's order.
        sizes: bytes of each.
        room: bytes.
    """
    found: list[list[T]] = []
    filled = 0.0
    for part, size in zip(parts, sizes, strict=True):
        if not found or filled + size > room:
            found.append([])
            filled = 0.0
        found[-1].append(part)
        filled += size
    return found
