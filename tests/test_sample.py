"""es_jax.sample: what it answers, to whom, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from es_jax import complete, load_step
from es_jax.sample import answers, chat, named_step, open_models, opening_of, printable, read_lines
from es_jax.training.loop import run
from es_jax.weights.model import load_model
from tests.helpers import TWO_STEPS, config_of

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def workdir(tiny_model, tmp_path_factory):
    """A run of two steps on the tiny model, which has a chat template."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(config_of(tiny_model, TWO_STEPS, optim={"learning_rate": 0.5}, es={"rewards": "random"}), folder)
    return folder


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "es_jax.sample", *arguments], capture_output=True, text=True, cwd=ROOT, **options
    )


def test_the_command_answers_lines_of_its_input_beside_the_base_model(workdir):
    out = command(f"--workdir={workdir}", "--base", "--max_new_tokens=4", "--json", input="hello\nsecond\n\n")
    assert out.returncode == 0 and len(out.stdout.splitlines()) == 1, out.stderr
    found = json.loads(out.stdout)
    prompts = [[{"role": "user", "content": text}] for text in ("hello", "second")]
    rows = zip(*(complete(load_step(workdir, step), prompts, max_new_tokens=4) for step in (2, 0)), strict=True)
    samples = [
        {"prompt": text, "completion": now, "base": base}
        for text, (now, base) in zip(("hello", "second"), rows, strict=True)
    ]
    assert found == {"workdir": str(workdir), "step": 2, "samples": samples}
    assert samples[0]["completion"] != samples[0]["base"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step=9", "--prompt=x"], "step is 9, but {} holds steps 0 to 2"),
        (["--step=-1", "--prompt=x"], "--step is '-1': give a whole number from 0, last or best"),
        (["--step=best-of", "--prompt=x"], "--step is 'best-of': give a whole number from 0, last or best"),
        (
            ["--step=best", "--prompt=x"],
            "--step is 'best', but {} has no best.json, which a run with "
            "train.keep_best=METRIC writes: give a number, or go on with the run with that field",
        ),
        (["--step=0", "--base", "--prompt=x"], "step 0 is the base model: leave --base out, or choose a later --step"),
    ],
)
def test_a_step_that_cannot_be_is_named(arguments, message, workdir):
    options = {"step": "last", "base": False}
    for argument in arguments:
        name, _, value = argument.removeprefix("--").partition("=")
        options[name] = value or True
    with pytest.raises(ValueError) as error:
        open_models(str(workdir), options["step"], base=options["base"])
    assert str(error.value) == message.format(workdir)


@pytest.mark.parametrize(("suffix", "step", "named"), [("@1", "last", "1"), ("@02", "last", "2"), ("", "1", "1")])
def test_a_run_may_be_given_with_its_step(suffix, step, named, workdir):
    run, number = named_step(f"{workdir}{suffix}", step)
    assert (run, number) == (str(workdir), named)


@pytest.mark.parametrize(
    ("given", "step", "message"),
    [
        ("{}@1", "2", "--workdir is '{}@1' and --step is '2': give one step"),
        ("{}@1", "best", "--workdir is '{}@1' and --step is 'best': give one step"),
        ("{}x@1", "last", "source = '{}x@1': {}x is not a run's directory"),
    ],
)
def test_a_run_with_a_step_that_cannot_be_is_named(given, step, message, workdir):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        named_step(given.replace("{}", str(workdir)), step)
    assert str(error.value).startswith(message.replace("{}", str(workdir)))


def test_the_best_step_is_that_of_the_run(workdir):
    best = workdir / "best.json"
    best.write_text('{"step": 1}')
    try:
        number, models = open_models(str(workdir), "best", base=False)
    finally:
        best.unlink()
    assert number == 1 and list(models) == ["step 1"]


@pytest.mark.parametrize(
    ("workdir", "step", "base", "message"),
    [
        ("lab", "1", False, "--step is for a run, and lab has no config.json of one: leave it out"),
        ("lab", "last", True, "--base is for a run, and lab has no config.json of one: leave it out"),
        ("nowhere", "last", False, "--workdir is 'nowhere', no run's directory and no model: source = 'nowhere'"),
    ],
)
def test_what_a_model_does_not_have_is_refused(workdir, step, base, message):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        open_models(workdir, step, base=base)
    assert str(error.value).startswith(message)


def test_a_chat_has_turns_and_each_model_sees_its_own(workdir):
    _, models = open_models(str(workdir), "last", base=True)
    opening, said, asked = opening_of(models, "Be short.", plain=False), [], iter(["hello", "and then? ", "", "never"])
    chat(models, opening, ask=lambda: next(asked), say=said.append, max_new_tokens=4)
    assert [text.partition(": ")[0] for text in said] == ["step 2", "base", "step 2", "base"] and next(asked) == "never"
    for offset, (name, model) in enumerate(models.items()):
        turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "hello"}]
        first = complete(model, turns, max_new_tokens=4)
        turns += [{"role": "assistant", "content": first}, {"role": "user", "content": "and then?"}]
        assert said[offset] == f"{name}: {first}"
        assert said[offset + 2] == f"{name}: {complete(model, turns, max_new_tokens=4)}"


def test_without_a_template_a_prompt_is_plain_text():
    models = {"model": load_model("lab")}
    assert opening_of(models, None, plain=False) is None
    assert answers(models, None, ["A37+48=", "C37<48="], max_new_tokens=6) == [
        {"prompt": "A37+48=", "completion": "85"},
        {"prompt": "C37<48=", "completion": "y"},
    ]
    asked, said = iter(["A37+48=", "C37<48=", ""]), []
    chat(models, None, ask=lambda: next(asked), say=said.append, max_new_tokens=6)
    assert said == ["85", "y"]
    with pytest.raises(ValueError, match="--system is 'x', but this tokenizer has no chat template"):
        opening_of(models, "x", plain=False)


def test_plain_leaves_the_template_out(workdir):
    models = {"model": load_step(workdir, 0)}
    assert opening_of(models, None, plain=True) is None and opening_of(models, None, plain=False) == []
    with pytest.raises(ValueError, match="--system is 'x', but --plain is set"):
        opening_of(models, "x", plain=True)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07\x1b[2J", r"\x1b]0;title\x07\x1b[2J"),
        ("one\r\ntwo\tthree", "one\\r\ntwo\tthree"),
        ("\x9b31m\x7f\x00", r"\x9b31m\x7f\x00"),
        ("admin\u202etxt.exe\u2066", r"admin\u202etxt.exe\u2066"),
        ("é 你好 👩\u200d🚀 α\\x1b", "é 你好 👩\u200d🚀 α\\x1b"),
    ],
)
def test_a_terminal_is_not_given_control_characters(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize(
    ("text", "lines"), [("a\nb\n", ["a", "b"]), ("a\n\n\n", ["a"]), (" a b ", [" a b "]), ("a\x0bb\n", ["a\x0bb"])]
)
def test_prompts_are_the_lines_of_a_file(text, lines):
    assert read_lines(text.splitlines(keepends=True) if "\x0b" not in text else [text]) == lines


@pytest.mark.parametrize(("text", "number"), [("", 1), ("a\n\nb\n", 2), ("a\n  \nb", 2)])
def test_an_empty_line_among_prompts_is_named(text, number):
    with pytest.raises(ValueError, match=f"line {number} of the standard input is empty"):
        read_lines([text])
