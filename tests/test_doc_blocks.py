"""The programs in docs/own-models.md run as they are, and each is whole."""

import re
from pathlib import Path

import jax
import pytest

TEXT = (Path(__file__).resolve().parents[1] / "docs/own-models.md").read_text()
BLOCKS = re.findall(r"^## (.*?)$.*?```python\n(.*?)```", TEXT, flags=re.M | re.S)


@pytest.mark.parametrize(("title", "block"), BLOCKS, ids=[title for title, _ in BLOCKS])
def test_a_program_runs(title, block):
    assert "assert " in block, title
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(block, f"docs/own-models.md, {title}", "exec"), {"__name__": "block"})  # our own text


def test_every_block_belongs_to_a_title():
    assert len(BLOCKS) == TEXT.count("```python") == TEXT.count("\n## ") == 5
