"""`sweep validate`: a recipe's KL, measured on samples that neither calibrated nor scored, beside the predicted one."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from rich.console import Console

from sweep.config.targets import LIKELIEST, target_called
from sweep.core.errors import SweepError
from sweep.core.exits import EXIT_DONE
from sweep.core.sample_kl import TRUSTED_KL
from sweep.core.screen import say, show_table
from sweep.formats.mixed import MixedRecipe, counted, is_called
from sweep.mixed_precision.candidates import Candidates, read_candidates
from sweep.mixed_precision.measured import (
    Measured,
    counts,
    markdown_table,
    random_mixes,
    table,
    uniform_recipes,
    validate,
    warning,
)
from sweep.mixed_precision.recipe import recipe_of_choice
from sweep.mixed_precision.recipe_context import RecipeContext, load_context
from sweep.mixed_precision.served import (
    Served,
    ServedOptions,
    describe,
    find_server,
    measure_served,
    served_page,
    served_table,
)
from sweep.run.resources import own_device
from sweep.store.outputs import OutputFile
from sweep.store.store import Store

_TITLE: Final = "# Predicted and measured: "
# The beginnings of the files that `validate_command` writes, by which an earlier command's are recognized.
_PAGE_BEGINS: Final = re.compile(_TITLE.encode())
_DOCUMENT_BEGINS: Final = re.compile(rb'\[\n \{\n  "name": .*\n  "kind": .*\n  "effective_bits": ')
_WAY_OUT: Final = "Copy the recipe to another place, and validate it there."


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Options of one `sweep validate` command."""

    recipe_path: str
    overrides: Sequence[str]
    n_random: int
    uniform: bool
    groups: str | None  # pattern of groups to quantize alone
    served_url: str | None
    served_model: str | None
    n_top: int | None  # None: 20, as many as a server gives unless it is told otherwise
    decode: bool
    as_json: bool

    @property
    def served(self) -> ServedOptions | None:
        """What to ask a server; None: there is none to ask. Raises: SweepError: an option needs one."""
        if self.served_url is None:
            options = {"--served-model": self.served_model, "--logprobs": self.n_top, "--decode": self.decode or None}
            if given := [name for name, value in options.items() if value is not None]:
                raise SweepError(f"{given[0]} is about a served model. Type --served http://HOST:8000 as well.")
            return None
        n_top = LIKELIEST if self.n_top is None else self.n_top
        return ServedOptions(url=self.served_url, model=self.served_model, n_top=n_top, decode=self.decode)


def validate_command(request: Request) -> int:
    """Measure a recipe, write a page and a JSON file beside it, and print a table. Returns the exit code.

    Raises: SweepError: a recipe that is not of this model, no samples that it has not seen, or a server that does not
        serve the recipe.
    """
    context = load_context(request.recipe_path, request.overrides)
    path = Path(request.recipe_path)
    page = OutputFile(path=path.with_suffix(".validation.md"), begins=_PAGE_BEGINS, way_out=_WAY_OUT)
    document = OutputFile(path=path.with_suffix(".validation.json"), begins=_DOCUMENT_BEGINS, way_out=_WAY_OUT)
    for file in (page, document):
        file.check()
    device, options = own_device(context.config.cluster), request.served
    server = find_server(context, options) if options is not None else None
    rows = validate(context, wanted(context, request), device)
    served = None
    if server is not None and options is not None:
        served = measure_served(context, server, options, device)
    records = [asdict(row) for row in rows]
    if served is not None:
        records[0]["served"] = asdict(served)  # the first row is the recipe's
    if (warned := warning(rows)) is not None:
        records[0]["warning"] = warned
    text = json.dumps(records, indent=1)
    document.put(f"{text}\n".encode())
    page.put(render(context, rows, context.config.model.dtype_on(device), served).encode())
    if request.as_json:
        print(text)  # noqa: T201 -- machine-readable output, not for rich to wrap
        return EXIT_DONE
    console, (heading, *cells) = Console(), table(rows)
    show_table(console, heading, cells, figures=[name for name in heading if name not in ("recipe", "measured on")])
    say(console, f"Neither calibrated nor scored: {counts(rows)}. Nats per prediction. Page: {page.path}")
    for line in remarks(context, rows):
        say(console, line)
    if served is not None:
        say(console, describe(served))
        heading, *cells = served_table(served)
        show_table(console, heading, cells, figures=heading[2:])
    return EXIT_DONE


def wanted(context: RecipeContext, request: Request) -> list[tuple[str, MixedRecipe]]:
    """The recipes to measure: the recipe itself and those asked for beside it, each with its kind.

    Raises: SweepError: what is asked for needs finished cells that the store lacks, or the pattern matches no group.
    """
    recipe = context.recipe
    found = [("recipe", recipe)]
    alone = [
        choice
        for choice in recipe.groups
        if request.groups is not None and is_called([choice.group.name], request.groups)
    ]
    if request.groups is not None and not alone:
        raise SweepError(
            f"--groups {request.groups!r} matches no layer group. "
            f"They are called like {recipe.groups[0].group.name!r}; * stands for anything."
        )
    if not (request.uniform or request.n_random or alone):
        return found
    candidates = _candidates_of(context, request.overrides)
    if request.uniform:
        found += [
            ("uniform", each)
            for each in uniform_recipes(candidates)
            if each.effective_bits <= recipe.effective_bits + 1e-9
        ]
    found += [("random", each) for each in random_mixes(candidates, request.n_random)]
    for choice in alone:
        index = [group.name for group in candidates.groups].index(choice.group.name)
        for number, candidate in enumerate(candidates.formats):
            only = np.full(len(candidates.groups), len(candidates.formats))
            only[index] = number
            name = f"{choice.group.short_name} alone, {candidate.format.label}"
            found.append(("group", recipe_of_choice(candidates, only, name, recipe.target)))
    return found


def render(context: RecipeContext, rows: Sequence[Measured], dtype: str, served: Served | None) -> str:
    """The page of a validation, as Markdown.

    Args:
        context: of the recipe that was validated.
        rows: its own and others'.
        dtype: that the model computed in.
        served: by a server; None: none was asked.
    """
    recipe = context.recipe
    scales = " and ".join(sorted({chosen.scales for chosen in recipe.formats.values()})) or "none"
    head = (
        f"{_TITLE}{recipe.name}, scales {scales}, dtype {dtype}\n\n"
        f"Model {recipe.model} ({recipe.model_revision[:12]}), "
        f"calibrated and scored on {recipe.dataset}, {recipe.size}; "
        f"measured on samples that did neither ({counts(rows)}). "
        "KL(unquantized || quantized) and change of the loss in nats per prediction, "
        "with 90 % bootstrap intervals over samples.\n\n"
    )
    head += "".join(f"{line}\n\n" for line in remarks(context, rows))
    return head + markdown_table(rows) + "\n" + ("" if served is None else served_page(served))


def remarks(context: RecipeContext, rows: Sequence[Measured]) -> list[str]:
    """What to know of the figures.

    Of weights that were FP8, predicted of some tokens or beyond the estimate's range, measured on what calibrated.
    """
    tokens = context.recipe.tokens
    of_some = f"Predicted KL counts {counted(tokens)}; measured KL counts all." if tokens else None
    is_large = any(row.predicted_kl > TRUSTED_KL for row in rows)
    beyond = (
        f"Predicted KL above {TRUSTED_KL:g} is beyond what an estimate of small changes tells." if is_large else None
    )
    return [line for line in (context.model.source_note, of_some, beyond, warning(rows)) if line is not None]


def _candidates_of(context: RecipeContext, overrides: Sequence[str]) -> Candidates:
    """The store's candidates for the recipe's model and samples, predicted as the recipe is.

    Args:
        context: of the recipe.
        overrides: that were typed; those about the method of the scores select, where no cell is the recipe's own.

    Raises: SweepError: there are none.
    """
    config, recipe, target = context.config, context.recipe, target_called(context.recipe.target)
    typed = [
        f"store.uri={config.store.uri}",
        f"model.name={recipe.model}",
        f"dataset.name={recipe.dataset}",
        f"dataset.size={recipe.size}",
        f"sensitivity.coverage={recipe.coverage}",
        *{f"sensitivity.scales={each.scales}" for each in recipe.formats.values()},  # of one kind: one store's cells
        f"target.tp={target.tp if target is not None else 1}",
    ]
    typed += [each for each in overrides if each.startswith(("sensitivity.method=", "sensitivity.draws="))]
    found = read_candidates(Store(config.store.uri), typed, tokens=recipe.tokens, beside=recipe)
    return found if recipe.joint_kl is not None else replace(found, interaction_weight=None)
