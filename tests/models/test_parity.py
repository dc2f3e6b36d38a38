"""Logits and greedy tokens equal transformers', by the script that prints the table of docs/models.md."""

import numpy as np
import pytest

pytest.importorskip("torch")

from benchmarks import parity
from es_jax.models.families import FAMILIES
from es_jax.models.hf_config import to_hf

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
    _assert_read_back(case, reference, model[0])
    if case.index == 0:
        ours, theirs = parity.greedy(reference, model)
        assert ours.shape == (parity.BATCH, parity.NEW)
        np.testing.assert_array_equal(ours, theirs)


def _assert_read_back(case, reference, config):
    """transformers computes the same from the config.json that we write."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {**to_hf(config), "pad_token_id": 0, "attn_implementation": "eager"}
    again = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).eval()
    again.load_state_dict(reference.state_dict(), strict=True)
    tokens, positions = parity.batch("left", start=case.start)
    logits = [parity.reference_logits(m, tokens, positions, cached=False) for m in (reference, again)]
    np.testing.assert_array_equal(*logits)
