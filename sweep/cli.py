"""The command line: verbs, exit codes, and errors as one clear message. Imports per verb, so that --help is instant."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, TypeVar

from sweep.core.errors import SweepError
from sweep.core.exits import EXIT_DONE, EXIT_INCOMPLETE, EXIT_WRONG_INPUT
from sweep.core.interrupts import ignore_signals, interruptible

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Request = TypeVar("_Request", bound="DataclassInstance")

_RUN_EPILOG = """\
examples:
  sweep run
      a small grid on the bundled model, on the CPU
  sweep run -m quant_pair=wfp8_afp8,wint4_aint8 quant_granularity=default,w_group64 dataset.size=small,medium
      a grid; the same command again resumes it
  sweep run -m target=vllm_sm100
      every recipe that vLLM on a B200 runs: grid=deployable, which any list narrows
  sweep run model=qwen3_vl_4b_instruct model.path=/models/Qwen3-VL-4B-Instruct quant_pair=wfp8_afp8 \
output_layout=publish
      one trial of the 4B model, published under models/

Overrides are Hydra's: group=option or key=value; with -m comma lists, glob(*) and range() span a grid.
exit codes: 0 done, 2 wrong input, 3 some trials failed, 75 interrupted (run again to resume)
"""


class Options(argparse.Namespace):
    """Typed options, each of the verbs that have it."""

    verb: str
    overrides: list[str]
    multirun: bool
    cfg: str | None
    watch: bool
    cluster: bool
    store: bool
    overwrite: bool
    as_json: bool
    recipe_path: str
    format: str
    out: str


@dataclass(frozen=True, slots=True)
class _Verb:
    """A verb: its line in the help, its command, and the options that it adds."""

    summary: str
    command: Callable[[Options], int]  # returns the exit code
    add_options: Callable[[argparse.ArgumentParser], None]
    epilog: str | None = None
    takes_recipe: bool = False


def script() -> int:
    """The console script: `main`, whose exit code stands whatever signal arrives while Python ends."""
    code = main()
    ignore_signals()
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code; wrong input prints one message to standard error."""
    parser = _parser()
    # parse_args itself refuses overrides after an option.
    options, rest = parser.parse_known_args(arguments, namespace=Options())
    if unknown := [word for word in rest if word.startswith("-")]:
        parser.error(f"unknown option {unknown[0]}; try: sweep {options.verb} --help")
    options.overrides += rest
    try:
        with interruptible():
            return _VERBS[options.verb].command(options)
    except SweepError as error:
        print(f"sweep {options.verb}: {error}", file=sys.stderr)  # noqa: T201 -- the one place that prints errors
        return EXIT_WRONG_INPUT
    except KeyboardInterrupt:  # while a command prepares; a run that scores says more
        print(f"sweep {options.verb}: interrupted", file=sys.stderr)  # noqa: T201 -- as above
        return EXIT_INCOMPLETE
    except BrokenPipeError:  # `sweep status | head`
        sys.stderr.close()
        return EXIT_DONE


def _run(options: Options) -> int:
    from rich.console import Console

    if options.cfg:
        from sweep.commands.cfg import print_config

        return print_config(options.overrides, multirun=options.multirun)
    from sweep.commands.run import run

    demo = not options.overrides and not options.multirun
    return run(
        ["grid=demo"] if demo else options.overrides,
        multirun=options.multirun or demo,
        console=Console(markup=False, soft_wrap=True),
    )


def _status(options: Options) -> int:
    from sweep.commands.status import print_status

    return print_status(options.overrides, as_json=options.as_json, watch=options.watch, ask_ray=options.cluster)


def _publish(options: Options) -> int:
    from sweep.commands.publish import publish_store

    return publish_store(options.overrides, overwrite=options.overwrite, as_json=options.as_json)


def _doctor(options: Options) -> int:
    from sweep.commands.doctor import examine, examine_store

    if options.store:
        return examine_store(options.overrides, as_json=options.as_json)
    return examine(options.overrides, multirun=options.multirun, as_json=options.as_json)


def _export(options: Options) -> int:
    from sweep.commands.export import export

    return export(
        options.recipe_path, options.overrides, file_format=options.format, out=options.out, overwrite=options.overwrite
    )


def _solve(options: Options) -> int:
    from sweep.commands.solve import Request, solve_command

    return solve_command(_request(Request, options))


def _validate(options: Options) -> int:
    from sweep.commands.validate import Request, validate_command

    return validate_command(_request(Request, options))


def _recommend(options: Options) -> int:
    from rich.console import Console

    from sweep.commands.recommend import Request, recommend

    return recommend(_request(Request, options), Console(markup=False, soft_wrap=True, quiet=options.as_json))


def _request(kind: type[_Request], options: Options) -> _Request:
    """The typed options as a verb's own request type, whose fields are called as the options' destinations."""
    return kind(**{field.name: getattr(options, field.name) for field in fields(kind)})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sweep", description="Which layers of a vision-language model suffer under which number format."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in _VERBS.items():
        added = verbs.add_parser(
            name,
            help=verb.summary,
            description=verb.summary[0].upper() + verb.summary[1:] + ".",
            epilog=verb.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if verb.takes_recipe:
            added.add_argument("recipe_path", metavar="RECIPE.yaml", help="what sweep solve wrote")
        override = "Hydra override, e.g. quant_pair=wfp8_afp8 or dataset.size=small"
        added.add_argument("overrides", nargs="*", metavar="OVERRIDE", help=override)
        verb.add_options(added)
    return parser


def _run_options(run: argparse.ArgumentParser) -> None:
    _add_multirun(run)
    run.add_argument("--cfg", choices=["job"], help="print the composed config and stop")


def _status_options(status: argparse.ArgumentParser) -> None:
    status.add_argument("--watch", action="store_true", help="again every few seconds, while a run is under way")
    status.add_argument("--cluster", action="store_true", help="ask Ray as well: nodes, GPUs, workers of every sweep")
    _add_json(status)


def _publish_options(publish: argparse.ArgumentParser) -> None:
    replaced = "replace folders that another model revision or data set content left; files of others stay"
    publish.add_argument("--overwrite", action="store_true", help=replaced)
    _add_json(publish)


def _doctor_options(doctor: argparse.ArgumentParser) -> None:
    _add_multirun(doctor)
    verified = "verify every file of the store, repair what can be, name the rest"
    doctor.add_argument("--store", action="store_true", help=verified)
    _add_json(doctor)


def _export_options(export: argparse.ArgumentParser) -> None:
    formats = ["compressed-tensors", "modelopt-checkpoint", "modelopt", "csv"]
    written = "a checkpoint in one of two formats, ModelOpt's recipe YAML, or a table"
    export.add_argument("--format", required=True, choices=formats, help=written)
    place = "a directory for checkpoints, else a file"
    export.add_argument("--out", required=True, metavar="DIR|FILE", help=place)
    replaced = "replace what an earlier export has put there; files of others stay"
    export.add_argument("--overwrite", action="store_true", help=replaced)


def _solve_options(solve: argparse.ArgumentParser) -> None:
    rules = {
        "--pin": ("pins", "PATTERN=FORMAT", "layer groups that get this format; 16: none"),
        "--exclude": ("excludes", "PATTERN", "layer groups that stay in 16 bits"),
    }
    for option, (name, metavar, text) in rules.items():
        solve.add_argument(option, dest=name, action="append", default=[], metavar=metavar, help=text)
    solve.add_argument("--uniform-layer", action="store_true", help="one format for all groups of a decoder layer")
    again = "apply the recipe, capture and score again, solve again; N times"
    solve.add_argument("--recapture", type=int, default=0, metavar="N", help=again)
    linear = "the sum of each layer group's KL alone, without the interactions that method=fisher knows"
    solve.add_argument("--linear", action="store_true", help=linear)
    front = "the Pareto front at N budgets, as table and picture"
    solve.add_argument("--front", dest="n_front", type=int, nargs="?", const=24, metavar="N", help=front)
    ranks = "layer groups by predicted KL, and by predicted KL per GB saved"
    solve.add_argument("--rank", action="store_true", help=ranks)
    solve.add_argument("--out", metavar="FILE", help="the recipe file; default outputs/recipes/NAME.yaml")
    _add_tokens(solve)
    _add_budget(solve)
    _add_json(solve)


def _validate_options(validate: argparse.ArgumentParser) -> None:
    mixes = "measure N random mixes of the store's formats as well"
    validate.add_argument("--random", dest="n_random", type=int, default=0, metavar="N", help=mixes)
    uniform = "measure one format for all groups, those no larger than the recipe, as well"
    validate.add_argument("--uniform", action="store_true", help=uniform)
    alone = "measure these layer groups alone, under each format, as well"
    validate.add_argument("--groups", metavar="PATTERN", help=alone)
    served = "measure what an OpenAI-compatible server serves, `vllm serve DIR`, as well"
    validate.add_argument("--served", dest="served_url", metavar="URL", help=served)
    name = "its name on the server, where there are several"
    validate.add_argument("--served-model", metavar="NAME", help=name)
    top = "likeliest tokens that the server gives, default 20; more need `vllm serve --max-logprobs K`"
    validate.add_argument("--logprobs", dest="n_top", type=int, metavar="K", help=top)
    decode = "have the server write texts, too, and measure these"
    validate.add_argument("--decode", action="store_true", help=decode)
    _add_json(validate)


def _recommend_options(recommend: argparse.ArgumentParser) -> None:
    place = "where everything goes, beside files of others; default outputs/recommended/NAME"
    recommend.add_argument("--out", metavar="DIR", help=place)
    _add_tokens(recommend)
    _add_budget(recommend)
    _add_json(recommend)


def _add_multirun(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("-m", "--multirun", action="store_true", help="comma lists span a grid")


def _add_budget(verb: argparse.ArgumentParser) -> None:
    bits = "mean bits a weight of the covered layers, block scales counted"
    verb.add_argument("--bits", type=float, metavar="B", help=bits)
    gb = "GB (1e9 bytes) of all weights, embeddings and lm_head included"
    verb.add_argument("--gb", type=float, metavar="G", help=gb)


def _add_tokens(verb: argparse.ArgumentParser) -> None:
    kinds = "decide by the scores at these kinds of token alone: first_token, image, prompt, answer"
    verb.add_argument("--tokens", metavar="KIND,KIND", help=kinds)


def _add_json(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", dest="as_json", action="store_true", help="print JSON instead of text")


_VERBS = {
    "run": _Verb(
        "score one trial, or with -m a grid; the same command again resumes", _run, _run_options, epilog=_RUN_EPILOG
    ),
    "status": _Verb("trials, layer groups done, workers, ETA and failures, from the store", _status, _status_options),
    "publish": _Verb("sync finished results into the models directory", _publish, _publish_options),
    "doctor": _Verb("check machine, config, model and data before hours are spent", _doctor, _doctor_options),
    "export": _Verb(
        "files that runtimes read, from a recipe that sweep solve wrote", _export, _export_options, takes_recipe=True
    ),
    "solve": _Verb(
        "the mixed-precision recipe of least predicted KL under a budget, from the store alone", _solve, _solve_options
    ),
    "validate": _Verb(
        "a recipe's KL measured on samples that it has not seen, beside the predicted one",
        _validate,
        _validate_options,
        takes_recipe=True,
    ),
    "recommend": _Verb(
        "doctor, the target's grid, recipes under a budget, their measured KL, files and a page, in one command",
        _recommend,
        _recommend_options,
    ),
}
