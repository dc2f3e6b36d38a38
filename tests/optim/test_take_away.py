"""anchored.py and its tests work in another project, copied there by the commands of docs/awd.md."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import optax

from es_jax.optim.anchored import anchored_weight_decay

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/awd.md").read_text()
TABLE = PAGE.split("## Where to put it")[1].split("\n## ")[0]
ALONE = """
import sys
sys.modules |= dict.fromkeys(["es_jax", "flax", "jaxtyping", "ml_collections", "transformers"])  # as if not installed
import pytest
some = "definition or l1_reaches or schedule_counts or booleans or (fixed_point and lookahead) or every_name"
some += " or anchored_weight_decay"  # the example in the docstring
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--doctest-modules", "theirs", "-k", some]))
"""


def test_both_files_work_under_another_name_without_es_jax(tmp_path):
    copy = re.search(r"```sh\n(into=.*?)```", PAGE, flags=re.S)[1]
    first, rest = copy.split("\n", 1)
    assert first.startswith("into=../yourproject/yourpackage name=yourpackage.anchored")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/__init__.py").touch()
    subprocess.run(["bash", "-euc", f"into={tmp_path}/theirs name=theirs.anchored\n{rest}"], cwd=ROOT, check=True)
    assert {path.name for path in (tmp_path / "theirs").glob("[!_]*")} == {
        "anchored.py", "test_anchored.py", "LICENSE.es_jax",
    }  # fmt: skip
    for name in ("anchored.py", "test_anchored.py"):
        text = (tmp_path / "theirs" / name).read_text()
        assert "SPDX-License-Identifier: Apache-2.0" in text and "from es_jax." not in text
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 passed" in done.stdout


def test_the_table_of_the_page_has_every_name_of_the_docstring_s():
    rows = re.split(r"^=+ +=+$", inspect.getdoc(anchored_weight_decay), flags=re.M)[2]
    first = " ".join(line[:50] for line in rows.splitlines())
    names = set(re.findall(r"\w{3,}", first)) - {"contrib", "nnx", "line", "searches", "and", "Flax"}
    assert len(names) > 35 and not {name for name in names if f"{name}`" not in TABLE}


def test_every_name_of_optax_in_the_table_is_there():
    first = " ".join(re.findall(r"^\| ([^|]*) \|", TABLE, flags=re.M))
    names = set(re.findall(r"`(?:contrib\.)?(\w+)`", first)) - {"TrainState"}
    names -= {"madgrad"}  # which the lowest optax that is allowed has not
    assert len(names) > 35 and not {name for name in names if not hasattr(optax, name) | hasattr(optax.contrib, name)}


def test_the_programs_of_the_page_run():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    assert len(blocks) == 2
    for block in blocks:
        with jax.numpy_rank_promotion("allow"):
            exec(compile(block, "docs/awd.md", "exec"), {})  # our own text
