"""``labkit course ...``"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="The notebooks: copies to work on, progress, publishing.", no_args_is_help=True)

Number = Annotated[str, typer.Argument(help="a notebook's number or name: 6, 06 or 06_gptq")]


@app.command("list")
def list_() -> None:
    """The notebooks, and how far you are in each."""
    from labkit.course import copies, progress_file
    from labkit.course.lessons import lesson, names

    kept = progress_file.read()
    lessons = {name[1:3] for name in names()}
    for number in copies.numbers():
        exercises = lesson(number).EXERCISES if number in lessons else []
        solved = sum(kept.get(e.id, {}).get("state") == "right" for e in exercises)
        typer.echo(f"{copies.find(number).stem:<36} {solved} of {len(exercises)} exercises solved")


@app.command()
def progress() -> None:
    """Every exercise and how far you are."""
    from labkit.course.progress_file import progress as table

    typer.echo(repr(table()))


@app.command()
def refresh() -> None:
    """After an update: renew the copies you did not change, leave those you did, and name them."""
    from labkit.course import copies

    done = copies.refresh()
    for word, names in (("new", done.new), ("renewed", done.renewed)):
        for name in names:
            typer.echo(f"{word}: {name}")
    for name in done.left:
        typer.echo(
            f"left as you changed it: {name}; the course has a newer one, `labkit course reset {name[:2]}` takes it"
        )
    typer.echo(f"{len(done.kept)} up to date")


@app.command()
def reset(number: Number) -> None:
    """Make a fresh copy of one notebook; the old one is kept under a number."""
    from labkit.course import copies

    copy, kept = _or_exit(copies.reset, number)
    typer.echo(f"fresh copy: {copy}")
    if kept is not None:
        typer.echo(f"the old one is kept as {kept}")


@app.command("open")
def open_(
    number: Number = "00",
    browser: Annotated[bool, typer.Option(help="open a browser; without it the address is printed")] = True,
) -> None:
    """Open your copy of a notebook in JupyterLab."""
    from labkit.course import copies

    copy = _or_exit(copies.ready, number)
    flags = [] if browser else ["--no-browser"]
    os.execv(sys.executable, [sys.executable, "-m", "jupyter", "lab", *flags, str(copy)])


@app.command()
def publish(
    target: Annotated[
        Path, typer.Argument(help="the notebook to write, for example notebooks/06_gptq.ipynb")
    ],
    source: Annotated[
        Path | None, typer.Option(help="take the cells from this notebook or py:percent script")
    ] = None,
    timeout: Annotated[int, typer.Option(help="seconds for one cell")] = 300,
    execute: Annotated[
        bool, typer.Option(help="run the cells; without it only the stored form is put right")
    ] = True,
) -> None:
    """For maintainers: run a notebook, store its outputs in the project's form, name what departs from the form."""
    from nbclient.exceptions import CellExecutionError

    from labkit.course.form import faults
    from labkit.course.publish import publish as run

    try:
        seconds = run(target, source=source, timeout=timeout, execute=execute)
    except CellExecutionError as error:
        typer.echo(f"{target} was not written, a cell failed:\n{error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"wrote {target}, {target.stat().st_size} bytes, ran {seconds:.0f} s")
    found = faults(target)
    for fault in found:
        typer.echo(f"form: {fault}")
    raise typer.Exit(1 if found else 0)


def _or_exit(function, number: str):  # type: ignore[no-untyped-def]
    try:
        return function(number)
    except (KeyError, FileNotFoundError) as error:
        typer.echo(error.args[0] if isinstance(error, KeyError) else str(error), err=True)
        raise typer.Exit(2) from None
