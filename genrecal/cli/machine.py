"""Commands around this machine: doctor, demo."""

from pathlib import Path
from typing import Annotated

import typer

from genrecal.cli.options import Json, plain
from genrecal.cli.output import console, show
from genrecal.errors import UsageError


def doctor(
    out: Annotated[Path, plain("Folder on the disk that will hold caches and runs.")] = Path(),
    json_: Json = False,
) -> None:
    """Show what this machine has and what each command lacks; exit status 1 if every command lacks something."""
    from genrecal.doctor import examine, report_text

    if not out.is_dir():
        raise UsageError(f"--out {out}: expected a folder that exists")
    report = examine(out)
    show(report.to_json() if json_ else report_text(report), json_)
    if not report.healthy:
        raise typer.Exit(1)


def demo(
    out: Annotated[Path, plain("Folder for the caches, the runs and the report.")] = Path("demo-out"),
    seed: Annotated[int, plain("Seed of the data, the order and the Recalibrator.")] = 0,
) -> None:
    """Run the whole pipeline on bundled data and tiny models, on a CPU."""
    from genrecal.demo.pipeline import run_demo

    run_demo(out, seed=seed, say=console.print)
