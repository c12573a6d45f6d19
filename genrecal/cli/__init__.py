"""The command line: parse, call one function, print what it returns. Commands import heavy libraries when they run."""

import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

import genrecal
from genrecal.cli import caches, machine, models, runs
from genrecal.cli.output import printable
from genrecal.errors import GenrecalError, OtherRankError, StoppedError, UsageError

INTERRUPTED = 130  # exit status after Ctrl-C, as in shells

app = typer.Typer(
    help="Cache a large vision-language model's outputs once, then distil it into small models from the shards.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for panel, commands in {
    "Caches": (caches.plan, caches.cache, caches.inspect, caches.verify),
    "Students": (runs.train, runs.export, runs.compare, runs.report),
    "Models": (models.pair, models.convert, models.evaluate),
    "This machine": (machine.doctor, machine.demo),
}.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"genrecal {genrecal.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Options of every command."""


def main(args: Sequence[str] | None = None) -> None:
    """Entry point. Exits with 0 if done, 1 if it failed or found damage, 2 for wrong usage.

    Args:
        args: the words after `genrecal`; None takes those of this process.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader processes are forked
    words = list(sys.argv[1:] if args is None else args)
    words = [word for word in words if not re.fullmatch(r"--local[-_]rank=\d+", word)]  # launchers also set LOCAL_RANK
    debug = "--debug" in words
    other_rank = os.environ.get("RANK", "0") != "0"  # every rank makes the same usage error; rank 0 prints it

    def print_error(message: str) -> None:
        if debug:
            traceback.print_exc()
        sys.stderr.write(f"genrecal: error: {printable(' '.join(message.split()))}\n")

    try:
        given = [word for word in words if word != "--debug"] or ["--help"]
        # The name under which shells complete it, also for `python -m genrecal`.
        status = app(args=given, prog_name="genrecal", standalone_mode=False)
    except OtherRankError as error:
        status = error.exit_status
    except StoppedError as error:
        status = error.exit_status
        sys.stderr.write(f"genrecal: {error}\n")
    except GenrecalError as error:
        status = error.exit_status
        if not (isinstance(error, UsageError) and other_rank):
            print_error(str(error))
    except OSError as error:
        status = 1
        print_error(_file_error(error))
    except typer.Abort:
        status = INTERRUPTED
    except Exception as error:
        if not hasattr(error, "format_message"):  # the parser's errors have it
            raise
        status = 2
        if not other_rank:
            print_error(f"{error.format_message()} (--help lists the options)")
    if status == INTERRUPTED and not other_rank:
        sys.stderr.write("genrecal: interrupted; run the same command again to resume\n")
    sys.exit(status or 0)


def _file_error(error: OSError) -> str:
    files = " and ".join(str(file) for file in (error.filename, error.filename2) if file is not None)
    what = f"{files}: {error.strerror}" if files and error.strerror else str(error) or type(error).__name__
    return f"{what}; check this path, its permissions and the free space on its disk, then run the same command again"
