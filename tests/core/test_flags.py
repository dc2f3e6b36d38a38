"""The flags of the commands: every form that absl takes, and what is said of mistakes."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from es_jax import report, train
from es_jax.core.flags import define_config, parser
from es_jax.training.config import FIELDS, RunConfig, freeze

ROOT = Path(__file__).resolve().parents[2]
LAB = str(ROOT / "configs/lab.py")
OPTIONAL = sorted(name for name, kind in FIELDS.items() if type(None) in getattr(kind, "__args__", ()))
SAMPLES = {"task.data_dir": "rows", "task.grader": "paper", "evals.data_dir": "rows", "optim.anchor.source": "lab"}


@pytest.fixture
def parse():
    """Arguments of a command with --config → the config."""
    before = set(flags.FLAGS)
    define_config(FIELDS)
    flags.DEFINE_string("workdir", None, "")
    read = parser("es_jax.train", required=("config",), fields=FIELDS, renamed={"dir": "workdir"})

    def config(*arguments: str) -> RunConfig:
        for name in set(flags.FLAGS) - before:
            flags.FLAGS[name].unparse()
        assert read(["es_jax.train", *arguments]) == ["es_jax.train"]
        return freeze(flags.FLAGS.config)

    yield config
    flags.FLAGS.unparse_flags()
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)


def refuse(parse, *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        parse(*arguments)
    assert str(end.value).startswith("es_jax.train: ") and "\n" not in str(end.value)
    return str(end.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", LAB, "--config.es.population", "12"],
        ["-config", LAB, "-config.es.population=12"],
        [f"-config={LAB}", "--config.es.population=4", "--config.es.population=12"],
        ["--config.es.population=12", f"--config={LAB}"],
        [f"--config={LAB}:population=4", f"--config={LAB}:population=12"],
        ["--workdir", "runs/x", "--config", f"{LAB}:population=12"],
    ],
)
def test_a_flag_has_every_form_that_absl_takes(parse, arguments):
    assert parse(*arguments).es.population == 12


@pytest.mark.parametrize(
    "text",
    [
        f"# a comment\n--config={LAB}\n\n--config.es.population=12\n",
        f"--config {LAB}\n--config.es.population   12",
        f"--config\n{LAB}\n--config.es.population\n12\n",
        f"// a comment\r\n-config={LAB}:population=12\r\n",
        f"--flagfile=inner\n--config={LAB}:population=4\n",
    ],
)
@pytest.mark.parametrize("form", ["--flagfile={}", "--flagfile {}", "-flagfile={}"])
def test_a_file_of_flags(parse, text, form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("flags").write_text(text)
    Path("inner").write_text("--config.es.population=12")
    assert parse(*form.format("flags").split()).es.population == 12
    assert parse(*form.format("flags").split(), "--config.es.population=6").es.population == 6


@pytest.mark.parametrize("value", ["Q: {question}\nA:", "-5 + 3 = ?", "a  b\n\n--config c", "\n"])
def test_a_value_of_the_command_line_may_have_lines_and_blanks(parse, value):
    assert parse("--config", LAB, f"--config.task.prompt={value}").task.prompt == value
    assert parse("--config", LAB, "--config.task.prompt", value).task.prompt == value


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_file_of_flags_that_cannot_be_read(parse, content, tmp_path):
    if content:
        (tmp_path / "flags").write_bytes(content)
    assert "--flagfile: " in refuse(parse, f"--flagfile={tmp_path / 'flags'}")


def test_a_flag_that_is_missing_is_named(parse):
    assert refuse(parse, "--workdir=x", "--config.es.population=4") == "es_jax.train: --config is missing: give it"
    assert refuse(parse, "--config") == "es_jax.train: Missing value for flag --config"


def test_flags_of_booleans_and_of_several_values(parse):
    config = parse(
        "--config", LAB, "--config.es.antithetic", "--noconfig.grpo.scale_by_std", "--config.train.profile=3,5"
    )
    assert config.es.antithetic and not config.grpo.scale_by_std and config.train.profile == (3, 5)
    assert parse("--config", LAB, "--config.evals.tasks=gsm8k,piqa").evals.tasks == ("gsm8k", "piqa")
    assert parse("--config", LAB, "--config.evals.tasks=", "--config.es.antithetic=false").evals.tasks == ()


def test_tuples_of_repeated_flags(parse):
    arguments = ["--config.evals.tasks=gsm8k", "--config.evals.tasks", "('piqa',)"]
    assert parse("--config", LAB, *arguments).evals.tasks == ("gsm8k", "piqa")


def test_options_of_a_task_have_any_name(parse, tmp_path):
    arguments = [
        "--config.task.options.size=3",
        "--config.task.options.word",
        "a word",
        "-config.task.options.rate=1e-3",
    ]
    arguments += [
        "--config.task.options.flag=true",
        "--config.task.options.none=None",
        '--config.task.options.text="3"',
    ]
    wanted = {"size": 3, "word": "a word", "rate": 1e-3, "flag": True, "none": None, "text": "3"}
    assert parse("--config", LAB, *arguments).task.options == wanted
    assert parse("--config", LAB).task.options == {}
    whole = '--config.task.options={"more": {"a": [1, 2]}, "size": 4}'
    assert parse("--config", LAB, whole).task.options == {"more": {"a": [1, 2]}, "size": 4}
    both = parse("--config", LAB, "--config.task.options.size=5", whole).task.options
    assert both == {"more": {"a": [1, 2]}, "size": 5}
    (tmp_path / "flags").write_text("--config.task.options.other 7\n--config.task.options.size=8")
    assert parse("--config", LAB, f"--flagfile={tmp_path / 'flags'}").task.options == {"other": 7, "size": 8}


def test_a_config_file_may_set_options_and_a_prompt_of_messages(parse, tmp_path):
    messages = [{"role": "user", "content": "{question}"}]
    for number, line in enumerate(("config.task.options = {'size': 3}", "config.task.options.size = 3")):
        (tmp_path / f"file{number}.py").write_text(
            "from configs.lab import get_config as lab\n"
            f"def get_config():\n    config = lab()\n    {line}\n    config.task.prompt = {messages!r}\n"
            "    return config\n"
        )
        task = parse("--config", str(tmp_path / f"file{number}.py")).task
        assert task.options == {"size": 3} and task.prompt == messages
    task = parse(
        "--config", str(tmp_path / "file1.py"), "--config.task.options.word=x", "--config.task.prompt={q}"
    ).task
    assert task.options == {"size": 3, "word": "x"} and task.prompt == "{q}"


@pytest.mark.parametrize("name", OPTIONAL)
def test_every_field_that_may_be_none_can_be_set_back(parse, name):
    parse("--config", LAB, f"--config.{name}={SAMPLES.get(name, '1')}", f"--config.{name}=None")
    config = flags.FLAGS.config
    for part in name.split("."):
        config = config[part]
    assert config is None


def test_none_takes_back_what_the_file_or_a_short_name_set(parse):
    assert parse("--config", f"{LAB}:grpo", "--config.optim.b1=None").optim.b1 is None
    anchor = parse(
        "--config", f"{LAB}:anchor=l2", "--config.optim.anchor.kappa=1", "--config.optim.anchor.strength=None"
    )
    assert anchor.optim.anchor.kappa == 1 and anchor.optim.anchor.strength is None
    assert parse("--config", f"{LAB}:anchor=l2,kappa=None").optim.anchor.strength == 2.0


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("--config.learnin_rate=1", "unknown config field 'learnin_rate': did you mean 'optim.learning_rate'?"),
        ("--config.es.lr=1", "unknown config field 'es.lr': did you mean 'optim.learning_rate'?"),
        ("--config.optm.learning_rate=1", "'optm.learning_rate': did you mean 'optim.learning_rate'?"),
        ("--config.optm.x=1", "unknown config field 'optm.x': did you mean 'optim' or "),
        ("--config.optim.anchor.alpha=1", "did you mean 'optim.learning_rate'?"),
        ("--config.kapa=1", "did you mean 'optim.anchor.kappa'?"),
        ("--config.seed=1", "unknown config field 'seed': did you mean 'train.seed' or 'task.seed'?"),
        ("--noconfig.es.mirrored", "Unknown command line flag 'noconfig.es.mirrored'"),
        ("--config.zzzz=1", "unknown config field 'zzzz'. Known: decode, es, evals, grpo,"),
        ("--config.train=1", "train is a group of fields: set train.steps or train.seed or "),
        ("--config.optim.anchor={'kappa': 1}", "optim.anchor is a group of fields: set optim.anchor.penalty or "),
        ("--config.decode.max_new=4", "--config.decode.max_new is called --config.decode.max_new_tokens now"),
        ("--dir=x", "--dir is called --workdir now"),
        ("--config.es.population=3.5", "es.population is '3.5': it must be int"),
        ("--config.es.sigma=small", "es.sigma is 'small': it must be float"),
        ("--config.optim.b1=high", "optim.b1 is 'high': it must be float or None"),
        ("--config.es.antithetic=maybe", "es.antithetic is 'maybe': it must be true or false"),
        ("--config.train.profile=(3, x)", "train.profile is '(3, x)': it must be a tuple of whole numbers"),
        ("--config.decode.max_new_tokens=None", "decode.max_new_tokens is 'None': it must be int"),
        (
            "--config.task.options=3",
            "task.options is '3': it must be an object of JSON, or set task.options.NAME=VALUE",
        ),
        ("--config.task.option.size=3", "unknown config field 'task.option.size': did you mean 'task.options'"),
    ],
)
def test_a_mistake_in_a_field_is_one_sentence(parse, argument, says):
    assert says in refuse(parse, "--config", LAB, argument)


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("xyz=1", "unknown argument 'xyz'. Known: anchor, antithetic, data,"),
        ("learning_rate=1", "unknown argument 'learning_rate': did you mean 'lr'?"),
        ("es.sigma=1", "unknown argument 'es.sigma': did you mean 'sigma'?"),
        ("max_new_tokens=9", "or set --config.decode.max_new_tokens=…"),
        ("steps=many", "train.steps is 'many': it must be int"),
        ("anchor", "argument 'anchor' has no value: write anchor=…"),
        ("lab,smollm2", "the models 'lab' and 'smollm2' are given: a run has one"),
    ],
)
def test_a_mistake_after_the_colon_is_one_sentence(parse, argument, says):
    assert says in refuse(parse, f"--config={LAB}:{argument}")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "is not a file: give a config file"),
        ("def get_config(", "--config: '(' was never closed"),
        ("x = 1", "has no function get_config"),
        ("def get_config(): return None", "returned None: it must return a ConfigDict"),
        ("def get_config(): raise ValueError('too\\n warm')", "--config: too warm"),
        ("def get_config(): return {}['es']", "--config: es"),
        ("import nowhere_at_all", "--config: No module named 'nowhere_at_all'"),
    ],
)
def test_a_mistake_in_a_config_file_is_one_sentence(parse, content, says, tmp_path):
    if content:
        (tmp_path / "mine.py").write_text(content)
    assert says in refuse(parse, "--config", str(tmp_path / "mine.py"))


@pytest.mark.parametrize("form", ["--config={}", "--config {}", "-config={}", "--flagfile=flags"])
def test_a_config_file_finds_its_neighbours(parse, form, tmp_path, monkeypatch):
    """Its folder may lie anywhere, and its config may be a mapping of some fields."""
    folder = tmp_path / f"own_{abs(hash(form))}"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    (folder / "shared.py").write_text("SIGMA = 0.5")
    (folder / "mine.py").write_text(
        f"from {folder.name}.shared import SIGMA\ndef get_config(): return {{'es': {{'sigma': SIGMA}}}}"
    )
    Path("flags").write_text(f"--config={folder / 'mine.py'}")
    config = parse(*form.format(folder / "mine.py").split(), "--config.train.steps=7")
    assert (config.es.sigma, config.train.steps) == (0.5, 7)


def test_the_report_takes_a_file_of_flags(tmp_path, monkeypatch):
    (tmp_path / "flags").write_text(f"--out={tmp_path / 'out'}\n--mark\n")
    for arguments, says in (
        (["nowhere", f"--flagfile={tmp_path / 'flags'}"], "nowhere is not a run's directory"),
        (["nowhere", "--flagfile=absent"], "es_jax.report: --flagfile: "),
    ):
        monkeypatch.setattr(sys, "argv", ["es_jax.report", *arguments])
        with pytest.raises(SystemExit, match=says):
            report.main()


@pytest.mark.parametrize(
    ("command", "text", "says"),
    [
        ("evaluate", "--workdir nowhere/run\n--rows=3", "nowhere/run"),
        ("export", "--workdir=nowhere/run\n--out\nnowhere/out", "nowhere/run"),
        ("plan", f"--config {LAB}\n--config.es.population 4\n--topology=v5f:4x4", "v5f"),
    ],
)
def test_other_commands_take_a_file_of_flags(command, text, says, tmp_path):
    (tmp_path / "flags").write_text(text)
    line = [sys.executable, "-m", f"es_jax.{command}", "--flagfile", str(tmp_path / "flags")]
    out = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert out.returncode > 0 and out.stderr.startswith(f"es_jax.{command}: ") and says in out.stderr


@pytest.mark.parametrize(
    ("given", "config"),
    [
        (["--branch_from=runs/a@40"], "runs/a"),
        (["--branch_from", "runs/a@40", "--config.es.sigma=1"], "runs/a"),
        (["-branch_from=runs/a"], "runs/a"),
        (["--branch_from=runs/a@40", "--config=mine.py"], None),
        (["--workdir=runs/branch_from"], None),
        (["--branch_from=~/runs/a@40"], "{home}/runs/a"),
        (["--branch_from=runs/gone@40", "--workdir=runs/a"], "runs/a"),
        (["--workdir", "runs/b", "--branch_from=runs/a@40"], "runs/a"),
    ],
)
def test_a_branch_has_its_parents_config(given, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/config.json").write_text('{"digest": "0"}')
    monkeypatch.setenv("HOME", str(tmp_path))
    added = [f"--config={config.format(home=tmp_path)}"] if config else []
    assert train._with_config(["es_jax.train", *given]) == ["es_jax.train", *given, *added]


def test_a_branch_of_no_run_is_named():
    with pytest.raises(SystemExit, match=r"--branch_from is 'runs/none@4': runs/none is not a run's directory"):
        train._with_config(["es_jax.train", "--branch_from=runs/none@4"])


def test_a_config_may_be_that_of_a_run(tmp_path):
    content = {"digest": "0", "config": dataclasses.asdict(freeze({"es": {"sigma": 0.25}}))}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert train._config_of_run(str(tmp_path)).es.sigma == 0.25 and train._config_of_run(LAB) is None
