"""Comparisons of two ways to compute a model whose inputs are quantized, which no order of sums can turn.

A processor, a library and a product's shape each have their own order of sums, and a sum's last bits with it. A
quantizer of inputs sends a value that lies within these of a tie to the other side, and all that reads it drifts. Left
alone, two right ways are as far apart as the model is from itself when its embeddings move by 1e-7, and how far that
is is another number on every processor. So they are compared by the first of these that will do:

* `sample_logits`: in the batches that the other way computes. Equal products have equal sums.
* `given_our_inputs`: every linear is given what the same one of our model reads. Nothing can flip, what is left is
  float32.
* `floor`: with how far our model is from itself, measured in the same run. Only where much flips, so that it is much
  the same each time: of MXFP4 with MXFP8 inputs seven of eight moves flip nothing in the bundled model, and the eighth
  gives a KL of 2e-4.
"""

from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn

from sweep.core.batches import Plan
from workers.model.forward import batch_to

SUMS: Final = 1e-5  # relative; sums of up to 512 products in float32, in another order: 3e-7 measured
_MOVE: Final = 1e-7  # of each embedding: the last bit of float32
_SEEDS: Final = range(8)
T = TypeVar("T")


@torch.no_grad()
def sample_logits(model: nn.Module, plan: Plan) -> list[Tensor]:
    """Each sample's logits in data set order, from plain forward passes of a plan's batches.

    Args:
        model: in float32, on the CPU.
        plan: packed.

    Returns: [tokens, vocabulary] of each sample.
    """
    found: dict[int, Tensor] = {}
    for batch in (batch for segment in plan.segments for batch in segment):
        inputs = batch_to(batch, torch.device("cpu"), torch.float32)
        rows = model(**inputs, use_cache=False).logits[0]
        found |= zip(batch.order, rows.split(batch.lengths), strict=True)
    return [found[index] for index in sorted(found)]


@torch.no_grad()
def given_our_inputs(
    ours: nn.Module,
    theirs: nn.Module,
    token_ids: Tensor,
    linears: Collection[str],
    input_scales: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, float], Tensor, Tensor]:
    """Run two models, of which the second's linears get what the first's read.

    Args:
        ours: runs as it is.
        theirs: gets our inputs.
        token_ids: [1, tokens].
        linears: the names of those that get them, equal in both.
        input_scales: what a linear of ours multiplies its inputs by, where theirs must find them multiplied.

    Returns: by linear, how far what it would have read is from what it was given, relative; our logits; theirs. A
        fault of one linear shows in those that read what it gives, and in no other.
    """
    given: dict[str, Tensor] = {}
    strays: dict[str, float] = {}

    def keep(name: str) -> Any:
        scale = (input_scales or {}).get(name, torch.ones(()))
        return lambda _, args: given.__setitem__(name, args[0] * scale)

    def give(name: str) -> Any:
        def put(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            strays[name] = float((args[0] - given[name]).norm() / given[name].norm())
            return (given[name],)

        return put

    expected = _hooked(ours, {name: keep(name) for name in linears}, token_ids)
    found = _hooked(theirs, {name: give(name) for name in linears}, token_ids)
    assert strays.keys() == given.keys() == set(linears)
    return strays, expected, found


def floor(model: nn.Module, measure: Callable[[], T], distance: Callable[[T, T], float]) -> float:
    """The largest distance of what is measured from itself with the model's embeddings moved in their last bit.

    Args:
        model: what `measure` runs.
        measure: the figures that two ways are compared by.
        distance: of two such figures, as the two ways are compared.
    """
    expected = measure()
    distances: list[float] = []
    for seed in _SEEDS:
        with _moved(model, seed):
            distances.append(distance(measure(), expected))
    return max(distances)


@contextmanager
def _moved(model: Any, seed: int) -> Generator[None]:
    generator = torch.Generator().manual_seed(seed)

    def move(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        return output * (1 + _MOVE * torch.randn(output.shape, generator=generator)).to(output)

    handle = model.get_input_embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()


def _hooked(model: Any, hooks: Mapping[str, Any], token_ids: Tensor) -> Tensor:
    handles = [model.get_submodule(name).register_forward_pre_hook(hook) for name, hook in hooks.items()]
    try:
        return model(input_ids=token_ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
