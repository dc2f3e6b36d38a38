"""The grader "paper" against published verdicts on made-up completions, where this checkout has them beside it."""

import json
from pathlib import Path

import pytest

from es_jax.tasks import Example, get_task

VECTORS = Path(__file__).resolve().parents[2].parent / "shared/cases/grader_vectors.json"


@pytest.mark.skipif(not VECTORS.exists(), reason="../shared/cases/grader_vectors.json is not there")
def test_every_vector_agrees() -> None:
    vectors = json.loads(VECTORS.read_text(encoding="utf-8"))
    differing = []
    for vector in vectors:
        opened = [{"role": "assistant", "content": vector["prefill"]}] if vector["prefill"] else []
        meta = {"numbers": tuple(vector["numbers"]), "target": vector["target"]} if "numbers" in vector else {}
        example = Example("0", ({"role": "user", "content": "?"}, *opened), vector.get("gold"), meta)
        score = get_task(vector["task"]).score(example, vector["completion"])
        verdicts = (score.parts["answer"], score.parts["format"], score.reward)
        if verdicts != (vector["answer"], vector["format"], pytest.approx(vector["reward"])):
            differing.append((vector, score))
    assert not differing and len(vectors) >= 264
