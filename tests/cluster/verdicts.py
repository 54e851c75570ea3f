"""The verdict tables of `labkit cluster check`: 300 mutants of the operator's samples before a real API server and
operator, and Serve configurations before Ray's own model.

    python tests/cluster/verdicts.py --out data/measurements/check_verdicts.json

Needs the test node, up, and Ray. About three minutes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import secrets
import sys
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mutants as of_samples
from mutants import CATEGORIES, SEED, Mutant, Sample
from referee import Referee, Ruling

from labkit.cluster import structural
from labkit.cluster.check import Verdict, check
from labkit.cluster.context import Context, current
from labkit.files import whole_file
from labkit.settings import settings

COUNT = 300
RAY_KINDS = ("RayCluster", "RayJob", "RayService")


@dataclass(frozen=True)
class Case:
    """One object before both. ruling is None where the server does not know the kind."""

    source: str
    category: str
    what: str
    manifest: dict[str, Any]
    verdict: Verdict
    ruling: Ruling | None

    @property
    def agrees(self) -> bool:
        return self.ruling is not None and (self.verdict.state == "valid") == self.ruling.accepted

    def row(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "kind": self.manifest["kind"],
            "category": self.category,
            "what": self.what,
            "check": self.verdict.state,
            "check_says": [f"{error.path}: {error.message}" for error in self.verdict.errors],
            "cluster": asdict(self.ruling) if self.ruling else None,
        }


def samples() -> list[Sample]:
    return of_samples.samples(settings().node / "share" / "kuberay" / "samples")


def judged(objects: list[Mutant], context: Context) -> list[Case]:
    """Each object before `check`, the API server, and, if that accepts it and the kind is Ray's, the operator.

    Objects of one name come into different namespaces.
    """
    referee = Referee(context.client())
    seen: Counter[tuple[str, str]] = Counter()
    places, rulings, applied = [], [], []
    prefix = f"verdicts-{secrets.token_hex(3)}"
    for found in objects:
        metadata = found.manifest.get("metadata")  # a mutant's may be anything
        key = (found.manifest["kind"], str(metadata.get("name") if isinstance(metadata, dict) else ""))
        places.append(f"{prefix}-{seen[key]}")
        seen[key] += 1
    with referee.namespaces(f"{prefix}-dry", set(places)):
        for namespace, found in zip(places, objects, strict=True):
            ruling = referee.create(found.manifest, f"{prefix}-dry")
            if ruling and ruling.accepted and found.manifest["kind"] in RAY_KINDS:
                real = referee.create(found.manifest, namespace, dry_run=False)
                assert real and real.accepted, f"accepted dry, refused wet: {found} {real}"
                applied.append((len(rulings), namespace, found.manifest))
            rulings.append(ruling)
        for (i, _, _), ruling in zip(
            applied, referee.operator([(n, m) for _, n, m in applied]), strict=True
        ):
            rulings[i] = ruling
    verdicts = check([found.manifest for found in objects])
    return [
        Case(found.source, found.category, found.what, found.manifest, verdict, ruling)
        for found, verdict, ruling in zip(objects, verdicts, rulings, strict=True)
    ]


def unmutated(context: Context) -> list[Case]:
    return judged([Mutant(s.source, "as it is", "", s.manifest) for s in samples()], context)


def table(cases: list[Case]) -> dict[str, dict[str, int]]:
    """Counts for each category: what both accept, what both refuse, what only one of them refuses."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for case in cases:
        assert case.ruling is not None
        ours = case.verdict.state == "valid"
        both = "both accept" if ours else "both refuse"
        one = "only the cluster refuses" if ours else "only check refuses"
        counts[case.category][both if case.agrees else one] += 1
        counts[case.category][f"decided by the {case.ruling.by}"] += 1
    return {category: dict(counts[category]) for category in CATEGORIES if category in counts}


def show(cases: list[Case]) -> str:
    """The table and what differs, to read."""
    lines = []
    for category, counts in table(cases).items():
        lines.append(f"{category:14} " + ", ".join(f"{word} {n}" for word, n in sorted(counts.items())))
    agree = sum(case.agrees for case in cases)
    lines.append(f"equal: {agree} of {len(cases)} ({100 * agree / len(cases):.1f} %)")
    for case in cases:
        if not case.agrees:
            lines.append(json.dumps(case.row(), indent=1))
    return "\n".join(lines)


def serve_table() -> dict[str, Any]:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "cluster"))
    import serve_mutants

    counts, differing = serve_mutants.table(serve_mutants.mutants(each=40))
    return {
        "seed": serve_mutants.SEED,
        "table": {category: dict(who) for category, who in counts.items()},
        "differing": differing,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    context = current()
    cases = judged(of_samples.mutants(samples(), COUNT), context)
    print(show(cases))
    good = unmutated(context)
    serve = serve_table()
    for category, counts in serve["table"].items():
        print(f"Serve, {category:14} {counts}")
    content = {
        "what": "verdicts of `labkit cluster check` on mutants, beside those of a real cluster and of Ray's own model",
        "command": f"python tests/cluster/verdicts.py --out {out}",
        "date": datetime.now(UTC).date().isoformat(),
        "licence": "CC0-1.0",
        "versions": {
            **{name: structural.load(name)["version"] for name in ("kubernetes", "kuberay")},
            **{
                name: importlib.metadata.version(name)
                for name in ("ray", "common-expression-language", "labkit")
            },
        },
        "cluster": {
            "referee": "create, dryRun=All, fieldValidation=Strict; then the operator's Invalid events, "
            "in namespaces with a quota of no pods",
            "seed": SEED,
            "mutants": len(cases),
            "equal": sum(case.agrees for case in cases),
            "table": table(cases),
            "differing": [case.row() for case in cases if not case.agrees],
            "samples": {
                "objects": len(good),
                "accepted by the cluster": sum(case.ruling.accepted for case in good if case.ruling),
                "valid": sum(case.verdict.state == "valid" for case in good),
                "differing": [case.row() for case in good if not case.agrees],
            },
        },
        "serve": {"referee": "ray.serve.schema.ServeDeploySchema", **serve},
    }
    with whole_file(out) as part:
        part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
