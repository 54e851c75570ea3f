"""``labkit cluster ...``"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from labkit.cluster.pods import NAME as SERVICE
from labkit.cluster.pods import NAMESPACE

if TYPE_CHECKING:
    from labkit.cluster.deploy import Stage
    from labkit.cluster.kuberay import KubeRay
    from labkit.cluster.profiles import Profile
    from labkit.serving import Deployment

app = typer.Typer(
    help="Kubernetes: write manifests, check them, serve a model, see how it is. The cluster is the one that "
    "LABKIT_KUBE_CONTEXT names, else the project's own test node; never the default context.",
    no_args_is_help=True,
)

Json = Annotated[bool, typer.Option("--json", help="JSON instead of lines.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask before the first write to a cluster.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Ask the cluster whether it would take it; change nothing.")
]
Force = Annotated[bool, typer.Option("--force", help="Take over fields that somebody else set.")]
Namespace = Annotated[str, typer.Option("--namespace", "-n", help="Where everything stands.")]
Name = Annotated[str, typer.Option("--service", help="The RayService's name.")]
Checkpoint = Annotated[
    str | None,
    typer.Option(help="A folder made by `labkit quantize`, a model's name, or a path below /checkpoints."),
]
Model = Annotated[
    str,
    typer.Option(
        "--name", help="What requests call it: alias@checkpoint. Default: lab@ and the checkpoint's."
    ),
]
Replicas = Annotated[int, typer.Option(min=1, help="Engines, each with the whole model.")]
ProfileName = Annotated[
    str | None, typer.Option("--profile", help="base, node, kind or gpu. Default: what suits the context.")
]
Image = Annotated[str | None, typer.Option(help="The server's image, where it is not the profile's.")]
Redis = Annotated[
    bool, typer.Option("--redis", help="Keep Ray's state in a Redis, so that the head may die.")
]


@app.command()
def render(
    profile: Annotated[str, typer.Option(help="base, node, kind or gpu.")] = "base",
    out: Annotated[
        Path | None, typer.Option(help="A folder for a kustomization; default: the screen.")
    ] = None,
    checkpoint: Checkpoint = None,
    name: Model = "",
    replicas: Replicas = 1,
    image: Image = None,
    redis: Redis = False,
    service: Name = SERVICE,
    namespace: Namespace = NAMESPACE,
    as_json: Json = False,
) -> None:
    """Write the manifests, without a cluster."""
    from labkit.cluster import annotate
    from labkit.cluster import render as rendering

    chosen = _profile(profile, image)
    documents = rendering.manifests(
        [_deployment(checkpoint, name, replicas)], chosen, name=service, namespace=namespace, redis=redis
    )
    if out is not None:
        for path in annotate.write(out, documents):
            typer.echo(f"wrote {path}")
    elif as_json:
        typer.echo(json.dumps(documents, indent=2))
    else:
        typer.echo(annotate.to_yaml(documents), nl=False)


@app.command()
def check(
    paths: Annotated[list[Path], typer.Argument(help="Files, or folders with all their *.yaml.")],
    as_json: Json = False,
) -> None:
    """Would a cluster take these manifests? Without one; line and path of each error (exit 1)."""
    from labkit.cluster.check import check as judge

    verdicts = judge(paths)
    if as_json:
        typer.echo(json.dumps([asdict(verdict) for verdict in verdicts]))
    else:
        for verdict in verdicts:
            typer.echo(str(verdict))
        count = {
            state: sum(each.state == state for each in verdicts)
            for state in ("valid", "invalid", "no schema")
        }
        typer.echo(", ".join(f"{number} {state}" for state, number in count.items()))
    if any(verdict.state == "invalid" for verdict in verdicts):
        raise typer.Exit(1)


@app.command()
def up(
    checkpoint: Checkpoint = None,
    name: Model = "",
    replicas: Replicas = 1,
    profile: ProfileName = None,
    image: Image = None,
    redis: Redis = False,
    service: Name = SERVICE,
    namespace: Namespace = NAMESPACE,
    timeout: Annotated[float, typer.Option(help="Seconds for each stage.")] = 600,
    force: Force = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Serve a model on the cluster, stage by stage, until it answers. Run again, it changes what differs."""
    from labkit.cluster import deploy

    ray = _ray(namespace)
    plan = deploy.Plan(
        deployments=[_deployment(checkpoint, name, replicas)],
        profile=_profile(profile, image) if profile else _with(deploy.profile_for(ray.context), image),
        name=service,
        redis=redis,
        force=force,
        timeout=timeout,
    )
    if dry_run:
        _show(deploy.dry_run(ray, plan), ray, as_json)
        return
    _confirm(ray, yes)
    with _progress(as_json) as say:
        _show(deploy.up(ray, plan, say), ray, as_json, say)
    if not as_json:
        typer.echo('Ask it: labkit cluster query "Call me Ishmael."')


@app.command()
def apply(
    paths: Annotated[list[Path], typer.Argument(help="Files, or folders with all their *.yaml.")],
    namespace: Annotated[
        str | None, typer.Option("--namespace", "-n", help="For manifests that name none.")
    ] = None,
    force: Force = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Check manifests, then make the cluster so (server-side apply). For overlays: `kubectl apply -k`."""
    from labkit.cluster.deploy import apply as applying

    ray = _ray(namespace or NAMESPACE)
    if not dry_run:
        _confirm(ray, yes)
    _show(applying(ray, paths, dry_run=dry_run, force=force), ray, as_json)


@app.command()
def status(
    namespace: Namespace = NAMESPACE,
    as_json: Json = False,
) -> None:
    """What is there, what is not ready and why, and what to do (exit 1 where something is to be done)."""
    from labkit.cluster import status as state
    from labkit.cluster.context import Unreachable, reachable

    ray = _ray(namespace)
    if (why_not := reachable(ray.context)) is not None:
        raise Unreachable(why_not)
    lines = state.judge(state.gather(ray))
    if as_json:
        found = {"context": ray.context.name, "namespace": namespace, "ready": state.is_well(lines)}
        typer.echo(json.dumps({**found, "lines": [asdict(line) for line in lines]}))
    else:
        from rich.console import Console
        from rich.text import Text

        typer.echo(f"{ray.context}, namespace {namespace}")
        colours = {"ok": "green", "wait": "yellow", "problem": "red"}
        for line in lines:
            text = Text(f"{line.state:8}", style=colours[line.state])
            text.append(f"{line.what}: {line.found}", style="default")
            if line.todo:
                text.append(f" -> {line.todo}", style="bold")
            Console().print(text, soft_wrap=True)
    if any(line.state == "problem" for line in lines):
        raise typer.Exit(1)


@app.command()
def logs(
    name: Annotated[
        str | None, typer.Argument(help="A pod, a RayJob or a RayService. Default: say which there are.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until it ends.")] = False,
    previous: Annotated[
        bool, typer.Option("--previous", help="What it said before its last restart.")
    ] = False,
    tail: Annotated[int | None, typer.Option(help="So many last lines.")] = None,
    container: Annotated[str | None, typer.Option(help="Of a pod with several.")] = None,
    namespace: Namespace = NAMESPACE,
    as_json: Annotated[bool, typer.Option("--json", help="An object for each line.")] = False,
) -> None:
    """What a pod, a job or the replicas of a service have printed."""
    ray = _ray(namespace)

    def show(line: dict[str, str], text: str) -> None:
        typer.echo(json.dumps(line) if as_json else text)

    if name is None:
        for kind in ("RayService", "RayJob", "Pod"):
            for each in ray.list(kind):
                found = each["metadata"]["name"]
                show({"kind": kind, "name": found}, f"{found:<50} {kind}")
        return
    kinds = [each for each in ("Pod", "RayJob", "RayService") if ray.exists(each, name)]
    if not kinds:
        raise LookupError(
            f"no pod, RayJob or RayService {name} in namespace {namespace}; `labkit cluster logs` lists them"
        )
    if kinds[0] == "RayService":
        from labkit.cluster.logs import replica_output

        pieces = replica_output(ray, name, lines=tail or 200)
    else:
        pieces = ray.logs(name, kinds[0], follow=follow, previous=previous, tail=tail, container=container)
    for piece in pieces:
        for line in piece.splitlines():
            show({"kind": kinds[0], "name": name, "line": line}, line)


@app.command()
def query(
    prompt: Annotated[str | None, typer.Argument(help="The question; none with --forward.")] = None,
    model: Annotated[str, typer.Option(help="Default: the first that is served.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 64,
    forward: Annotated[
        int | None,
        typer.Option(help="Keep this port of 127.0.0.1 open for a client of your own, until Ctrl-C."),
    ] = None,
    service: Name = SERVICE,
    namespace: Namespace = NAMESPACE,
    as_json: Json = False,
) -> None:
    """Ask the served model, through a port-forward to the cluster's service; the answer streams."""
    from labkit.cluster import client
    from labkit.cluster.deploy import serving_service
    from labkit.cluster.pods import PORT
    from labkit.serving.deployment import alias

    if prompt is None and forward is None:
        raise ValueError("nothing to do: give a question, or --forward PORT")
    ray = _ray(namespace)
    with ray.port_forward(serving_service(service), PORT, forward) as port:
        try:
            names = client.models(port.url)
        except RuntimeError as error:
            raise RuntimeError(f"{error}{f' ({port.trouble})' if port.trouble else ''}") from error
        if prompt is not None:
            # By its alias: during an update the name behind it changes between two requests.
            _ask(port.url, model or alias(names[0]), prompt, max_tokens, as_json)
        if forward is not None:
            typer.echo(f"ready {port.url}/v1 ({', '.join(names)})")
            with contextlib.suppress(KeyboardInterrupt):
                _until_stopped()


@app.command()
def down(
    everything: Annotated[
        bool, typer.Option("--all", help="The namespace with all in it, checkpoints too.")
    ] = False,
    service: Name = SERVICE,
    namespace: Namespace = NAMESPACE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Remove what `up` made; checkpoints stay, unless --all is given."""
    from labkit.cluster import deploy

    ray = _ray(namespace)
    if not dry_run:
        _confirm(ray, yes)
        if everything and not yes and sys.stdin.isatty():
            typer.confirm(f"Remove namespace {namespace} of {ray.context} with all in it?", abort=True)
    with _progress(as_json) as say:
        _show(deploy.down(ray, service, everything=everything, dry_run=dry_run), ray, as_json, say)


def _ray(namespace: str) -> KubeRay:
    from labkit.cluster.kuberay import KubeRay

    return KubeRay(namespace=namespace)


def _confirm(ray: KubeRay, yes: bool) -> None:
    from labkit.cluster.context import confirm

    typer.echo(f"{ray.context}, namespace {ray.namespace}", err=True)
    confirm(ray.context, ray.namespace, yes)


def _deployment(checkpoint: str | None, name: str, replicas: int) -> Deployment:
    from labkit.cluster.render import DEFAULT
    from labkit.serving import Deployment

    if checkpoint is None:
        return DEFAULT.model_copy(update={"replicas": replicas, **({"name": name} if name else {})})
    called = name or f"lab@{Path(checkpoint).expanduser().name}"
    fields = {"checkpoint": checkpoint, "name": called, "replicas": replicas, "threads": DEFAULT.threads}
    return Deployment.model_validate(fields)


def _profile(name: str, image: str | None) -> Profile:
    from labkit.cluster.profiles import profile_named

    return _with(profile_named(name), image)


def _with(profile: Profile, image: str | None) -> Profile:
    return replace(profile, image=image) if image else profile


def _show(
    stages: Iterable[Stage], ray: KubeRay, as_json: bool, say: Callable[[str], None] = lambda text: None
) -> None:
    done = []
    for stage in stages:
        done.append(stage)
        if not as_json:
            say("")
            typer.echo(f"{stage.name:<11} {stage.seconds:6.1f} s  {stage.found}")
    if as_json:
        found = {"context": ray.context.name, "namespace": ray.namespace}
        typer.echo(json.dumps({**found, "stages": [asdict(stage) for stage in done]}))


@contextlib.contextmanager
def _progress(as_json: bool) -> Iterator[Callable[[str], None]]:
    """A line that changes on a terminal, lines of their own elsewhere; none beside JSON."""
    if as_json:
        yield lambda text: None
        return
    if not sys.stderr.isatty():
        yield lambda text: typer.echo(f"  ... {text}", err=True) if text else None
        return
    from rich.console import Console

    with Console(stderr=True).status("") as line:
        yield lambda text: line.update(text)


def _ask(url: str, model: str, prompt: str, max_tokens: int, as_json: bool) -> None:
    from labkit.cluster import client

    answer = client.Answer()
    for piece, answer in client.ask(url, model, prompt, max_tokens=max_tokens):  # noqa: B007
        if not as_json:
            typer.echo(piece, nl=False)
    if as_json:
        typer.echo(json.dumps(asdict(answer)))
    else:
        typer.echo(
            f"\n\n{answer.model}: first token after {answer.first_s:.2f} s, {answer.whole_s:.2f} s in all"
        )


def _until_stopped() -> None:
    import signal
    import threading

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    stop.wait()
