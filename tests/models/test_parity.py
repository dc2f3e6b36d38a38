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
    ours, theirs = parity.greedy(reference, model)
    assert ours.shape == (parity.BATCH, parity.NEW)
    np.testing.assert_array_equal(ours, theirs)


def test_every_family_is_tried_tied_and_untied_with_odd_heads_and_heads_of_their_own_size():
    for family in FAMILIES:
        fields = [case.fields for case in CASES if case.family == family]
        assert {f["tie_word_embeddings"] for f in fields} == {True, False}
        assert any(f["num_attention_heads"] % 2 for f in fields)
        assert any(f["num_key_value_heads"] < f["num_attention_heads"] for f in fields)
        assert any(f.get("head_dim", 0) * f["num_attention_heads"] not in (0, f["hidden_size"]) for f in fields)


def _assert_read_back(case, reference, config):
    """transformers computes the same from the config.json that we write."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {**to_hf(config), "pad_token_id": 0, "attn_implementation": "eager"}
    again = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).eval()
    again.load_state_dict(reference.state_dict(), strict=True)
    tokens, positions = parity.batch("left", start=case.start)
    logits = [parity.reference_logits(m, tokens, positions, cached=False) for m in (reference, again)]
    np.testing.assert_array_equal(*logits)
