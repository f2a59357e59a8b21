# SPDX-License-Identifier: Apache-2.0
"""The command `vitkern`. Only the running subcommand is imported: `doctor` has to work where nothing else does."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vitkern.bench import command as bench
from vitkern.check import command as check
from vitkern.commands.errors import INTERRUPTED, CommandError


def _doctor(arguments: argparse.Namespace) -> int:
    if arguments.model is not None:
        from vitkern.commands.doctor_model import main as examine_model

        return examine_model(arguments.model, as_json=arguments.json)

    from vitkern.commands.doctor import main

    return main(as_json=arguments.json)


def _demo(arguments: argparse.Namespace) -> int:
    from vitkern.commands.demo import main

    return main(output=arguments.output, threads=arguments.threads, quick=arguments.quick)


def _models(arguments: argparse.Namespace) -> int:
    from vitkern.models.table import main

    return main(pattern=arguments.pattern)


def _run(arguments: argparse.Namespace) -> int:
    from vitkern.compat.run import main

    module = ["-m"] if arguments.module else []
    return main([*module, arguments.program, *arguments.arguments], override=arguments.override)


class _Version(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        import importlib.metadata

        print(f"vitkern {importlib.metadata.version('vitkern')}")
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vitkern", description="Kernels for the ViT-Adapter family of vision models"
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    doctor = commands.add_parser(
        "doctor", help="show what is installed, which backends run here, and why others cannot"
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.add_argument(
        "--model",
        metavar="NAME",
        help="list the layers that vitkern.patch replaces in package.module:model, file.py:model or a config",
    )
    doctor.set_defaults(run=_doctor)

    demo = commands.add_parser(
        "demo", help="check and time a transformer layer against plain torch, and draw a picture"
    )
    demo.add_argument("--output", type=Path, default=Path("vitkern-demo"), help="folder for the picture")
    demo.add_argument("--threads", type=int, help="default: torch's own number")
    demo.add_argument("--quick", action="store_true", help="the smallest size only")
    demo.set_defaults(run=_demo)

    models = commands.add_parser(
        "models", help="list names, parameters, operations and input sizes of the models"
    )
    models.add_argument("pattern", nargs="?", default="*", help="such as 'vit_adapter_*'")
    models.set_defaults(run=_models)

    run = commands.add_parser(
        "run",
        help="run an unmodified script with vitkern's kernels in place of compiled modules that it imports",
        usage="vitkern run [-h] [--override] (SCRIPT | -m MODULE) [ARGUMENTS ...]",
    )
    run.add_argument("--override", action="store_true", help="also replace installed compiled modules")
    run.add_argument("-m", dest="module", action="store_true", help="run a module, like python -m")
    run.add_argument("program", metavar="SCRIPT", help="the script, or with -m the module")
    run.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENTS", help="for the script")
    run.set_defaults(run=_run)
    bench.add_to(commands)
    check.add_to(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2 if a request cannot be met."""
    arguments = make_parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except CommandError as error:
        print(f"vitkern {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if arguments.run is _run:
            raise  # from the script, with its own traceback
        print(f"vitkern {arguments.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return status
