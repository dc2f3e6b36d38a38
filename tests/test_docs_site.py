"""The site and the notebook: every page has a place in the navigation, and links lead somewhere. No build is needed."""

import json
import re
from pathlib import Path

import pytest

import es_jax

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {path.stem for path in DOCS.glob("*.md")}
NOTEBOOK = json.loads((ROOT / "notebooks/demo.ipynb").read_text())


def test_every_page_is_in_the_navigation_once():
    trees = re.findall(r"```\{toctree\}\n(?::[^\n]*\n)*\n(.*?)```", (DOCS / "index.md").read_text(), flags=re.S)
    listed = sorted(line for tree in trees for line in tree.split())
    assert len(listed) == len({*listed})
    missing = "docs/index.md lists the pages, each in the group in which a reader looks for it"
    assert {*listed} == PAGES - {"index"}, missing


def test_the_reference_has_every_public_name():
    """docs/conf.py takes the names from this list, under its headings."""
    groups = dict(re.findall(r"^    (\w+)  +(\S.*)$", es_jax.__doc__, flags=re.M))
    assert sorted(", ".join(groups.values()).split(", ")) == es_jax.__all__


@pytest.mark.parametrize("page", sorted(PAGES))
def test_a_page_has_one_title_and_links_to_what_is_there(page):
    text = re.sub(r"^```.*?^```", "", (DOCS / f"{page}.md").read_text(), flags=re.M | re.S)
    assert len(re.findall(r"^# ", text, flags=re.M)) == 1
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert link.startswith("https://") or (DOCS / link).exists(), link


def test_the_notebook_installs_this_version_and_keeps_no_outputs():
    code = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert code[0] is NOTEBOOK["cells"][0]
    assert code[0]["source"][0].startswith(f'WHEEL = "../dist/es_jax-{es_jax.__version__}-py3-none-any.whl"')
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
