"""The programs in docs/own-models.md run as they are, each by itself; those of docs/python.md one after another."""

import re
from pathlib import Path

import jax
import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
TEXT = (DOCS / "own-models.md").read_text()
BLOCKS = re.findall(r"^## (.*?)$.*?```python\n(.*?)```", TEXT, flags=re.M | re.S)


@pytest.mark.parametrize(("title", "block"), BLOCKS, ids=[title for title, _ in BLOCKS])
def test_a_program_runs(title, block):
    assert "assert " in block, title
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(block, f"docs/own-models.md, {title}", "exec"), {"__name__": "block"})  # our own text


def test_every_block_belongs_to_a_title():
    assert len(BLOCKS) == TEXT.count("```python") == TEXT.count("\n## ") == 5


def test_the_blocks_of_the_page_on_python_run_in_one_program():
    code = "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), flags=re.S))
    assert all(f"{name}(" in code for name in ("complete", "perplexity", "run", "load_step"))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(code, "docs/python.md", "exec"), {"__name__": "block"})  # our own text


def test_the_page_on_python_has_every_flag_of_sample():
    page, source = (DOCS / "python.md").read_text(), (DOCS.parent / "es_jax/sample.py").read_text()
    flags = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source)) - {"traceback"}
    assert len(flags) == 10 and not {flag for flag in flags if f"`--{flag}`" not in page}
