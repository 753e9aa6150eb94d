"""The command line: verbs, exit codes, and errors as one clear message. Imports per verb, so that --help is instant."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from sweep.errors import SweepError

EXIT_WRONG_INPUT, EXIT_INTERRUPTED = 2, 75

_RUN_EPILOG = """\
examples:
  sweep run
      a small grid on the bundled model, on the CPU
  sweep run -m quant_pair=wfp8_afp8,wint4_aint8 quant_granularity=default,w_group64 dataset.size=small,medium
      a grid; the same command again resumes it
  sweep run model=qwen3_vl_4b_instruct model.path=/models/Qwen3-VL-4B-Instruct quant_pair=wfp8_afp8 output_layout=publish
      one trial of the 4B model, published under models/

Overrides are Hydra's: group=option or key=value; with -m comma lists, glob(*) and range() span a grid.
exit codes: 0 done, 2 wrong input, 3 some trials failed, 75 interrupted (run again to resume)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code; wrong input prints one message to standard error."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)  # argparse itself refuses overrides after an option
    if unknown := [word for word in rest if word.startswith("-")]:
        parser.error(f"unknown option {unknown[0]}; try: sweep {options.verb} --help")
    options.overrides += rest
    try:
        return _VERBS[options.verb](options)
    except SweepError as error:
        print(f"sweep {options.verb}: {error}", file=sys.stderr)  # noqa: T201 -- the one place where errors are said
        return EXIT_WRONG_INPUT
    except KeyboardInterrupt:  # while a command prepares; a run that scores says more
        print(f"sweep {options.verb}: interrupted", file=sys.stderr)  # noqa: T201 -- as above
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `sweep status | head`
        sys.stderr.close()
        return 0


def _run(options: argparse.Namespace) -> int:
    from rich.console import Console

    overrides: list[str] = options.overrides
    if options.cfg:
        from sweep.compose import expand, to_yaml

        grid = expand(overrides, multirun=options.multirun)
        sys.stdout.write("---\n".join(to_yaml(point) for point in grid.points))
        return 0
    from sweep.run import run

    demo = not overrides and not options.multirun
    return run(["grid=demo"] if demo else overrides, multirun=options.multirun or demo, console=Console(markup=False, soft_wrap=True))


def _status(options: argparse.Namespace) -> int:
    from sweep.status import print_status

    return print_status(options.overrides, as_json=options.json, watch=options.watch, ask_ray=options.cluster)


def _publish(options: argparse.Namespace) -> int:
    from sweep.sync import publish_store

    return publish_store(options.overrides, overwrite=options.overwrite, as_json=options.json)


def _doctor(options: argparse.Namespace) -> int:
    from sweep.doctor import examine

    return examine(options.overrides, multirun=options.multirun, as_json=options.json)


_VERBS = {"run": _run, "status": _status, "publish": _publish, "doctor": _doctor}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sweep", description="Which layers of a vision-language model suffer under which number format.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    run = _verb(verbs, "run", "score one trial, or with -m a grid; the same command again resumes", epilog=_RUN_EPILOG)
    run.add_argument("-m", "--multirun", action="store_true", help="comma lists span a grid")
    run.add_argument("--cfg", choices=["job"], help="print the composed config and stop")
    status = _verb(verbs, "status", "trials, layer groups done, workers, ETA and failures, from the store")
    status.add_argument("--watch", action="store_true", help="again every few seconds, while a run is under way")
    status.add_argument("--cluster", action="store_true", help="ask Ray as well: nodes, GPUs, workers of every sweep")
    publish = _verb(verbs, "publish", "sync finished results into the models directory")
    publish.add_argument("--overwrite", action="store_true", help="replace folders that another model revision or data set content left")
    doctor = _verb(verbs, "doctor", "check machine, config, model and data before hours are spent")
    doctor.add_argument("-m", "--multirun", action="store_true", help="comma lists span a grid")
    for verb in (status, publish, doctor):
        verb.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def _verb(verbs: Any, name: str, summary: str, epilog: str | None = None) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verb.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="Hydra override, e.g. quant_pair=wfp8_afp8 or dataset.size=small")
    return verb
