"""``labkit`` on the command line. Each command imports only what it needs."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from labkit.course.commands import app as course

app = typer.Typer(
    name="labkit",
    help="From a bit pattern to a quantized language model behind an endpoint.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(course, name="course")


@app.callback()
def _root() -> None:
    """Keep sub-commands named even while there is only one of them."""


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
) -> None:
    """What is well on this machine, what hurts, and what is missing (exit 1), with the remedy."""
    import json

    from rich.console import Console
    from rich.text import Text

    from labkit import doctor

    verdicts = doctor.judge(doctor.gather())
    report = doctor.as_json(verdicts)
    if as_json:
        typer.echo(json.dumps(report))
    else:
        colours = {"ok": "green", "note": "yellow", "missing": "red"}
        for verdict in verdicts:
            line = Text(f"{verdict.state:8}", style=colours[verdict.state])
            line.append(f"{verdict.check:9} {verdict.found}", style="default")
            if verdict.remedy:
                line.append(f" -> {verdict.remedy}", style="bold")
            Console().print(line, soft_wrap=True)
    if not report["ok"]:
        raise typer.Exit(1)


def main() -> None:
    """The entry point: an error that a person can act on is one line on stderr, a defect is a traceback."""
    try:
        app()
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("labkit"):
            raise
        _stop(f'{error.name} is not installed; run `make setup`, or pip install "labkit[all]"')
    except Exception as error:
        if not _can_be_acted_on(error):
            raise
        _stop(str(error))


def _can_be_acted_on(error: Exception) -> bool:
    """What the operating system or labkit itself refuses, as opposed to what breaks inside a library."""
    if isinstance(error, OSError):
        return True
    if not isinstance(error, ValueError | RuntimeError | TypeError | LookupError):
        return False
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(last.filename).is_relative_to(Path(__file__).parent)
    return ours and (last.line or "").startswith("raise ")


def _stop(message: str) -> None:
    print(f"labkit: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
