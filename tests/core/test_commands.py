"""The command es_jax, and what --help says of each: from the dataclasses, their docstrings and their checks."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

import es_jax
from es_jax import __main__ as command
from es_jax.core import help_text
from es_jax.core.flags import define_config, parser
from es_jax.core.names import SHORT
from es_jax.training.config import FIELDS, default_config, freeze

ROOT = Path(__file__).resolve().parents[2]
CHOICES = sorted(name for name, rules in FIELDS.rules.items() if rules[0].startswith("one of "))
BOUNDED = sorted(name for name, rules in FIELDS.rules.items() if rules[0].startswith(("at least ", "finite and a")))
BOUNDED = [name for name in BOUNDED if "anchor" not in name]  # which need a penalty first


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["es_jax", *arguments])
    command.main()


@pytest.mark.parametrize("argument", ["--help", "-h", "help"])
def test_help_lists_the_commands(argument, monkeypatch, capsys):
    run(monkeypatch, argument)
    listed = re.findall(r"^  (\w+) +\w", capsys.readouterr().out, flags=re.MULTILINE)
    assert listed == command.names() and {"train", "evaluate", "export", "report", "plan", "sweep"} <= set(listed)


def test_the_version(monkeypatch, capsys):
    run(monkeypatch, "--version")
    assert capsys.readouterr().out == f"es_jax {es_jax.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "es_jax COMMAND [FLAGS]"),
        (["trian", "--config=lab"], "es_jax: unknown command 'trian': did you mean 'train'? Known: evaluate, export, "),
        (["--config=lab"], "es_jax: unknown command '--config=lab'. Known: evaluate, export, "),
    ],
)
def test_without_a_command_the_status_is_two(arguments, says, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *arguments)
    assert end.value.code == 2 and capsys.readouterr().err.startswith(says)


def test_a_command_that_is_not_here_leaves_the_others_alone(monkeypatch, capsys):
    monkeypatch.setitem(command.COMMANDS, "ghost", ("es_jax.ghost:entry", "haunt"))
    run(monkeypatch, "--help")
    assert "haunt" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(monkeypatch, "ghost")
    assert "unknown command 'ghost'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"es_jax\.report: .*nowhere is not a run's directory"):
        run(monkeypatch, "report", "nowhere", "--out=x")


def test_a_package_that_is_missing_is_named_and_help_comes_all_the_same(monkeypatch, tmp_path, capsys):
    sentence = "install the extra [half]"
    (tmp_path / "half_command.py").write_text(f'"""What half does."""\nraise ImportError("{sentence}")\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(command.COMMANDS, "half", ("half_command:entry", "half"))
    with pytest.raises(SystemExit, match=r"^half_command: install the extra \[half\]$"):
        run(monkeypatch, "half")
    run(monkeypatch, "half", "--help")
    assert capsys.readouterr().out == f"What half does.\n\n{sentence}\n"


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("--out=x", 1)])
def test_a_module_whose_extra_is_missing_explains_itself(argument, status):
    """As if matplotlib were not installed."""
    code = f"""
import importlib.util, runpy, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "matplotlib" else find(name, *more)
sys.argv[1:] = [{argument!r}]
runpy.run_module("es_jax.report", run_name="__main__", alter_sys=True)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    sentence = "matplotlib is not installed: install the extra [report] by pip install 'es_jax[report]'\n"
    assert out.returncode == status
    if status:
        assert out.stderr == f"es_jax.report: {sentence}"
    else:
        assert out.stdout.startswith("python -m es_jax.report ") and out.stdout.endswith(f"\n{sentence}")


def test_all_flags_that_are_missing_are_named_in_one_sentence(tmp_path):
    line = [sys.executable, "-m", "es_jax", "train", "--json"]
    out = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert (out.returncode, out.stderr) == (1, "es_jax.train: --config and --workdir are missing: give them\n")


@pytest.fixture
def read():
    """The parser of a command with --config, a required flag and a flag of its own."""
    before = set(flags.FLAGS)
    define_config(FIELDS)
    flags.DEFINE_integer("breadth", 7, "How broad.", lower_bound=1)
    yield parser("es_jax.train", required=("config",), fields=FIELDS)
    flags.FLAGS.unparse_flags()
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)


def shown(read, capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        read(["es_jax.train", *arguments])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("form", ["--help", "-h", "--helpfull"])
def test_help_has_every_field_with_its_default(read, capsys, form):
    text = shown(read, capsys, form)
    defaults = default_config()
    for name in FIELDS:
        value = defaults
        for part in name.split("."):
            value = value[part]
        value = value.to_dict() if name == "task.options" else value
        assert f"\n  --config.{name}={value}  " in text
    assert (
        "  --breadth=7  " in text and "How broad." in text and "conciseness, countdown, gsm8k" in " ".join(text.split())
    )


@pytest.mark.parametrize(
    "given", [["--config=lab:population=6"], ["--config", "lab:population=6"], ["-config=lab:population=6"]]
)
def test_help_has_the_values_of_a_config_and_the_defaults_that_it_changes(read, capsys, given):
    text = shown(read, capsys, *given, "--help")
    assert "\n  --config.es.population=6  int, default 30\n" in text and "Fields with the values of --config" in text
    assert "\n  --config.es.sigma=0.01  float, default 0.001\n" in text
    assert "\n  --config.es.shaping=z_score  str\n" in text


def test_help_of_a_config_that_is_not_there_says_so(read):
    with pytest.raises(SystemExit, match="--config: unknown config 'lob': did you mean 'lab'"):
        read(["es_jax.train", "--config=lob", "--help"])


def test_short_help_has_no_fields_and_full_help_has_the_flags_of_absl(read, capsys):
    short, full = (shown(read, capsys, form) for form in ("--helpshort", "--helpfull"))
    assert "--breadth=7" in short and "--config.es" not in short and "--verbosity" not in short
    assert "--verbosity" in full


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_every_field_is_explained(name):
    kind = FIELDS.kind
    for part in name.split(".")[:-1]:
        kind = type(getattr(kind(), part))
    assert len(help_text.abouts(kind)[name.rpartition(".")[2]]) > 5


@pytest.mark.parametrize("name", sorted(SHORT))
def test_help_has_the_short_names(name, read, capsys):
    part = shown(read, capsys, "--help").partition(f"--config.{SHORT[name]}=")[2].partition("--config.")[0]
    assert f"short: {name}]" in " ".join(part.split())


def fields_with(name: str, value: object) -> dict:
    for part in reversed(name.split(".")):
        value = {part: value}
    return value  # type: ignore[return-value]


@pytest.mark.parametrize("name", CHOICES)
def test_choices_are_what_the_checks_take(name):
    choices = FIELDS.rules[name][0].removeprefix("one of ").split(", ")
    default = default_config()
    for part in name.split("."):
        default = default[part]
    assert default in (None, *choices)
    with pytest.raises(ValueError, match=rf"{name} 'nonsense'.* Known: {', '.join(sorted(choices))}"):
        freeze(fields_with(name, "nonsense"))


@pytest.mark.parametrize("name", BOUNDED)
def test_bounds_are_what_the_checks_say(name):
    number = -1 if "int" in str(FIELDS[name]) else -1.0
    with pytest.raises(ValueError, match=rf"{name} is -1(\.0)?: it must be {FIELDS.rules[name][0]}"):
        freeze(fields_with(name, number))
