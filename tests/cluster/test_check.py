"""Does `labkit cluster check` say what a real cluster says?"""

from __future__ import annotations

from collections import Counter

import pytest
import verdicts
from mutants import mutants
from node import Node
from referee import SILENCE

from labkit.cluster.context import Context, current


@pytest.fixture(scope="module")
def context(node: Node) -> Context:
    return current()


def test_three_hundred_mutants_are_judged_as_the_cluster_judges_them(context: Context) -> None:
    cases = verdicts.judged(mutants(verdicts.samples(), verdicts.COUNT), context)
    print(verdicts.show(cases))
    assert len(cases) == verdicts.COUNT
    heard = Counter(case.ruling.by for case in cases if case.ruling)
    assert heard["operator"] > 60
    assert heard[SILENCE] < 5  # it does not look at what Kueue manages
    equal = sum(case.agrees for case in cases)
    assert equal >= 0.98 * verdicts.COUNT, verdicts.show(cases)


def test_every_sample_that_the_cluster_accepts_is_valid(context: Context) -> None:
    cases = verdicts.unmutated(context)
    accepted = [case for case in cases if case.ruling is not None and case.ruling.accepted]
    assert len(accepted) > 100
    assert [case.row() for case in accepted if case.verdict.state != "valid"] == []
