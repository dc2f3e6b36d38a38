"""Logits and greedy tokens equal transformers', by the script that prints the table of docs/models.md."""

import numpy as np
import pytest

pytest.importorskip("torch")

from benchmarks import parity
from es_jax.models.families import FAMILIES

CASES = [case for family in FAMILIES for case in parity.cases(family, 2)]


@pytest.mark.filterwarnings("ignore")  # of transformers: sizes it finds unusual
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.family}-{case.index}")
def test_parity(case):
    reference = parity.reference_model(case)
    model = parity.our_model(reference)
    rows = list(parity.differences(case, reference, model))
    assert len(rows) == 6
    assert max(row["difference"] for row in rows) < 1e-4
    assert min(row["largest_logit"] for row in rows) > 0.5
    if case.index == 0:
        ours, theirs = parity.greedy(reference, model)
        assert ours.shape == (parity.BATCH, parity.NEW)
        np.testing.assert_array_equal(ours, theirs)
