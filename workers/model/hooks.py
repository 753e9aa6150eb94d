"""Hooks on a model's modules, and other forward functions for them, that are removed again."""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def removed_after(handles: Sequence[RemovableHandle]) -> Generator[None]:
    """Remove hooks when the block ends, also by an exception.

    Args:
        handles: as `register_forward_hook` and its siblings return them.
    """
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def inputs_seen(model: nn.Module, modules: Iterable[str], see: Callable[[str, Tensor], None]) -> Generator[None]:
    """Call `see` with the name of each of these modules and its input, before it runs, until the block ends."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: see(name, args[0])

    with removed_after([model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in modules]):
        yield


@contextmanager
def replaced_forwards(model: nn.Module, forwards: Mapping[str, Callable[..., Tensor]]) -> Generator[None]:
    """Have modules of these names compute other functions of their arguments, until the block ends.

    Their weights stay, and their hooks get what they would have got.
    """
    modules = {name: model.get_submodule(name) for name in forwards}
    try:
        for name, module in modules.items():
            module.forward = forwards[name]
        yield
    finally:
        for module in modules.values():
            vars(module).pop("forward", None)  # the instance's attribute: the class's method is in force again
