"""Check of an exported checkpoint: read back with the format's own library and compared with the recipe, all of it."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from sweep.core.errors import SweepError
from sweep.core.groups import Linear
from sweep.formats.mixed import MixedRecipe
from workers.export.checkpoint import COMPRESSED_TENSORS, largest_weight
from workers.export.compute import CPU, Compute
from workers.export.folding import output_scales, scaled_rows
from workers.export.layout import Inexpressible, Layout, Packing
from workers.export.schemes import as_written
from workers.model.tensors import HeldTensor, open_tensors, stored_tensors
from workers.quant.calibration import fake_quantized
from workers.quant.linear import LinearQuant

# Relative to the element: under float32 scales all but the last bits agree, of what decompresses to bfloat16 its 8.
_TOLERANCE: Final[Mapping[torch.dtype, float]] = {torch.float32: 1e-6, torch.bfloat16: 2**-8}

_POWER_OF_TWO: Final = 0.5  # its mantissa, by frexp


def check_export(
    directory: Path,
    source: Path,
    recipe: MixedRecipe,
    quants: Mapping[str, LinearQuant],
    linears: Sequence[Linear],
    compute: Compute = CPU,
    layout: Layout = COMPRESSED_TENSORS,
) -> None:
    """Read an export back with the reader's own library and compare all of it with the recipe.

    A linear whose inputs have a pre-quantization scale holds W / scale, quantized, and the module before must hold its
    own weight times that scale: each is compared for itself, so their product is the recipe's.

    Args: as for `write_checkpoint`.

    Raises: SweepError: names the module and the fault: another format, other numbers, a tensor too many or too few.
    """
    read = layout.read(directory, linears)
    _check_formats(read, recipe, linears, layout)
    scales = output_scales(recipe, quants, linears)
    with ExitStack() as stack:
        tensors, originals = stored_tensors(directory, stack), open_tensors(source, stack)
        written: dict[str, list[str]] = {}
        for name in tensors:
            written.setdefault(name.rpartition(".")[0], []).append(name)

        def checked(held: tuple[str, HeldTensor]) -> list[str]:
            """The names of the tensors that are written for one of the source, after they are compared with it."""
            name, original = held[0], held[1].read()
            module, _, local = name.rpartition(".")
            packing = read.get(module) if local == "weight" else None
            if packing is None:
                meant = scaled_rows(original, scales[module]) if module in scales else original
                found = tensors[name].read() if name in tensors else None
                if found is None or found.dtype != meant.dtype or not torch.equal(found, meant):
                    times = ", times the pre-quantization scale folded into it" if module in scales else ""
                    raise SweepError(
                        f"{directory}: {name} is not what {source} holds{times}, "
                        "though the recipe leaves it in 16 bits. Export again."
                    )
                return [name]
            names = [each for each in written.get(module, ()) if each != f"{module}.bias"]
            state = {each.rpartition(".")[2]: tensors[each].read() for each in names}
            weight_OI = compute.weight(original)
            _check_linear(f"{directory}: {module}", state, weight_OI, quants[module], packing, scales.get(module))
            return names

        expected = set(chain.from_iterable(compute.each(checked, originals.items(), largest_weight(linears))))
        if surplus := sorted(tensors.keys() - expected):
            raise SweepError(f"{directory} holds {surplus[0]}, which {source} does not. Export again.")


def _check_formats(read: Mapping[str, Packing], recipe: MixedRecipe, linears: Sequence[Linear], layout: Layout) -> None:
    meant = {module: choice for choice in recipe.groups for module in choice.group.modules}
    for name in (linear.name for linear in linears):
        choice = meant.get(name)
        chosen = None if choice is None else recipe.format_of(choice)
        packing = read.get(name)
        wanted = (None, None)
        if chosen is not None:
            wanted = tuple(each and as_written(each).id for each in (chosen.weight, chosen.inputs))
        quantizers = (None, None) if packing is None else (packing.weight, packing.inputs)
        found = tuple(each and each.id for each in quantizers)
        if found != wanted:
            raise Inexpressible(
                f"{name if choice is None else choice.group.name}: {layout.name} can't express this: "
                f"module {name} would be read as {found}, not {wanted}."
            )


def _check_linear(
    where: str,
    state: Mapping[str, Tensor],
    weight_OI: Tensor,
    linear: LinearQuant,
    packing: Packing,
    output_scale_O: Tensor | None,
) -> None:
    meant = fake_quantized(linear, weight_OI)
    if output_scale_O is not None:
        meant = scaled_rows(meant, output_scale_O)
    try:
        found = packing.unpacked({name: tensor.to(weight_OI.device) for name, tensor in state.items()})
    except (KeyError, RuntimeError, ValueError) as error:
        raise SweepError(
            f"{where} does not decompress: {type(error).__name__}: {str(error).splitlines()[0]}. Export again."
        ) from error
    tolerance = _TOLERANCE[found.dtype]
    off = (found.float() - meant).abs() - tolerance * meant.abs()
    if found.shape != meant.shape or not bool((off <= 0).all()):  # a NaN is not <= 0
        share = float((~(off <= 0)).float().mean()) if found.shape == meant.shape else 1.0
        raise SweepError(
            f"{where}: {share:.2%} of the weights that a reader would compute with are not the recipe's "
            f"(allowed: {tolerance:.1e} of each). A scale or a packed weight is damaged. Export again."
        )
    is_e8m0 = linear.weight is not None and linear.weight.has_e8m0_blocks
    if is_e8m0 and not bool((torch.frexp(state["weight_scale"].float()).mantissa == _POWER_OF_TWO).all()):
        raise SweepError(f"{where}: weight_scale is not of powers of two, as the recipe's. Export again.")
    for name, scale in packing.input_scales(linear).items():
        if name not in state or not torch.equal(state[name].float(), scale):
            raise SweepError(f"{where}: {name} is {state.get(name)}, calibrated was {scale}. Export again.")
