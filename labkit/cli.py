"""``labkit`` on the command line. Each command imports only what it needs."""

from __future__ import annotations

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


def main() -> None:
    """The entry point: errors a person can act on are printed as one line, the rest as a traceback."""
    app()


if __name__ == "__main__":
    main()
