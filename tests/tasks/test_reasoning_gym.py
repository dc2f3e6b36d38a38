"""Tasks of reasoning-gym: which are taken, what their scorers are trusted with, their rows, and what errors say."""

import importlib
import importlib.metadata
import importlib.util
import logging
import pickle
import sys
from pathlib import Path

import pytest

from es_jax.core import extras
from es_jax.tasks import TASKS, Example, check_name, get_task, name_and_options, options_of, outside, reasoning_gym
from es_jax.tasks.reasoning_gym import ReasoningGym, fits, split_of
from es_jax.tasks.reasoning_gym_scorers import ALLOWED, REFUSED, VERSION
from tests import reasoning_gym_stub

REAL = reasoning_gym_stub.REAL
needs_library = pytest.mark.skipif(
    not REAL, reason="reasoning-gym is not installed: pip install 'es_jax[reasoning_gym]'"
)
DOCS = (Path(__file__).resolve().parents[2] / "docs/tasks.md").read_text()
SLOW = ("futoshiki", "sokoban", "zebra_puzzles")  # a tenth of a second a row, or more
SEVERAL = {
    "decimal_arithmetic",
    "polynomial_equations",
    "power_function",
    "sokoban",
}  # other texts may be right answers too
ENDLESS = ("kakurasu", "knights_knaves", "sokoban", "survo")  # find the answer within a longer text


@pytest.fixture
def library(tmp_path, monkeypatch):
    """The library, or the stub in its place."""
    if not REAL:
        monkeypatch.syspath_prepend(str(reasoning_gym_stub.write(tmp_path / "site", VERSION)))
    forget(monkeypatch)


def forget(monkeypatch):
    """Let the package be looked for anew, now and after the test."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "reasoning_gym"] if not REAL else ():
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()
    reasoning_gym._told.clear()
    for function in (extras.require, reasoning_gym._scorer, reasoning_gym._drawn):
        function.cache_clear()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_task_is_named_with_its_reason(name):
    with pytest.raises(ValueError, match=f"reasoning_gym:{name}' is not taken: {REFUSED[name]}"):
        check_name(f"reasoning_gym:{name}")
    with pytest.raises(ValueError, match=f"reasoning_gym:{name}' is not taken"):
        get_task(f"reasoning_gym:{name}")


def test_the_lists_are_apart_and_in_the_docs():
    assert not set(ALLOWED) & set(REFUSED) and not {f"reasoning_gym:{name}" for name in ALLOWED} & set(TASKS)
    section = DOCS.partition("## Tasks of reasoning-gym")[2].partition("\n## ")[0]
    for name, rule in ALLOWED.items():
        assert f"`{name}`" in section and (not rule.why or f"\n- `{name}`: {rule.why}.\n" in section)
        assert bool(rule.why) == bool(rule.form or rule.longest)
    for name, why in REFUSED.items():
        assert f"\n- `{name}`: {why}.\n" in section


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("reasoning_gym:chainsum", "unknown task of reasoning-gym 'chainsum': did you mean 'chain_sum'"),
        ("reasoning_gym:", "unknown task of reasoning-gym ''"),
        ("reasoning_gym:games.Maze", r"unknown task of reasoning-gym 'games\.Maze'"),
    ],
)
def test_an_unknown_name(name, says):
    with pytest.raises(ValueError, match=says):
        check_name(name)


def test_names_in_files_and_that_no_module_is_looked_for():
    assert outside.label("reasoning_gym:chain_sum") == "reasoning_gym.chain_sum"
    check_name("reasoning_gym:chain_sum")
    assert not reasoning_gym.is_name("reasoning_gym.games:Maze") and not reasoning_gym.is_name("countdown")


def test_a_package_that_is_not_there(monkeypatch):
    forget(monkeypatch)
    monkeypatch.setitem(extras._PACKAGES, "reasoning_gym", ("no_such_package_at_all",))
    with pytest.raises(ImportError, match=r"no_such_package_at_all is not installed: .*es_jax\[reasoning_gym\]"):
        get_task("reasoning_gym:chain_sum")
    extras.require.cache_clear()


@pytest.mark.parametrize("version", ["0.1.24", "0.1.26", "0.2.0"])
def test_another_version_is_refused(tmp_path, monkeypatch, version):
    monkeypatch.syspath_prepend(str(reasoning_gym_stub.write(tmp_path / "site", version)))
    forget(monkeypatch)
    with pytest.raises(ValueError, match=f"is {version} here, and its scorers were read in {VERSION}: pip install"):
        get_task("reasoning_gym:chain_sum")
    extras.require.cache_clear()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"min_term": 3}, "unknown option of task 'reasoning_gym:chain_sum' 'min_term': did you mean 'min_terms'"),
        ({"data_dir": "rows"}, "unknown option of task 'reasoning_gym:chain_sum' 'data_dir'"),
        ({"size": 3}, "unknown option of task 'reasoning_gym:chain_sum' 'size'"),
        ({"min_terms": 9}, "with min_terms=9: max_terms must be >= min_terms"),
        ({"min_terms": "a"}, "with min_terms='a': '>"),
        ({"seed": -1}, "seed of the task 'reasoning_gym:chain_sum' is -1: set it to 0 to 42948"),
        ({"seed": 42949}, "is 42949: set it to 0 to 42948"),
        ({"seed": True}, "is True: set it to 0 to 42948"),
        ({"grader": "strict"}, "unknown grader of the task 'reasoning_gym:chain_sum' 'strict'. Known: tags, whole"),
        ({"prompt": "{q}"}, r"prompt of the task 'reasoning_gym:chain_sum' has \{q\}: it can have \{question\} alone"),
        ({"prompt": "Go"}, r"prompt is 'Go': no \{column\} is in it"),
    ],
)
def test_a_wrong_option_is_named(library, options, says):
    with pytest.raises(ValueError, match=says):
        get_task("reasoning_gym:chain_sum", **options)


def test_options_name_and_pickle(library):
    task = get_task("reasoning_gym:chain_sum", seed=3, grader="whole", max_terms=3)
    assert name_and_options(task) == ("reasoning_gym:chain_sum", {"seed": 3, "grader": "whole", "max_terms": 3})
    assert pickle.loads(pickle.dumps(task)) == task and get_task(*[task.name], **name_and_options(task)[1]) == task
    assert {"seed", "prompt", "grader", "min_terms", "max_terms"} <= set(options_of(task.name))
    assert task.workers == 1 and task.timeout_seconds == 10


@pytest.mark.parametrize(
    ("grader", "completion", "answer"),
    [
        ("tags", "so <answer> 5 </answer>", "5"),
        ("tags", "<answer>4</answer> or <answer>5</answer>.", "5"),
        ("tags", "<think><answer>4</answer></think>5", None),
        ("tags", "<answer></answer>", ""),
        ("tags", "<answer>5", None),
        ("tags", "5", None),
        ("tags", f"<answer>{'5' * 10_001}</answer>", None),
        ("whole", "<think>4</think>\n5\n", "5"),
        ("whole", "", ""),
        ("whole", "5" * 10_001, None),
    ],
)
def test_what_counts_as_the_answer(library, grader, completion, answer):
    task = ReasoningGym("chain_sum", grader=grader)
    example = Example("0", "?", "5")
    assert task.answer(example, completion) == answer
    score = task.score(example, completion)
    assert score.reward == float(answer == "5") and score.parts["format"] == float(answer is not None)


def test_an_open_turn_is_part_of_the_answer(library):
    prompt = [{"role": "user", "content": "{question} {{"}, {"role": "assistant", "content": "<answer>"}]
    task = get_task("reasoning_gym:chain_sum", prompt=prompt)
    (example,) = task.train(1)
    assert example.prompt[0]["content"].endswith("= {") and example.prompt[1]["content"] == "<answer>"
    assert task.score(example, f"{example.answer}</answer> so").reward == 1
    assert get_task("reasoning_gym:chain_sum", prompt="{question} Go").train(1)[0].prompt.endswith("= Go")


HOSTILE = [
    "",
    "I do not know.",
    "nan",
    "inf",
    "-inf",
    "1e999",
    "1" * 400,
    "1" * 5000,
    "[" * 3000,
    "{}",
    "\0",
    "½²٣",
    "B+9999999",
]


@pytest.mark.parametrize("name", sorted(name for name, rule in ALLOWED.items() if rule.form))
@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_what_is_no_answer_is_not_given_to_a_scorer_that_errs(name, text):
    takes = {"polynomial_equations": [""], "pool_matrix": ["1" * 400, "1" * 5000]}  # right where no number is; numbers
    assert fits(name, text, "reference") == (text in takes.get(name, []))


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("complex_arithmetic", ["9.00", "-10.0 + 6.0i", "7-3j", "5i", "-i", "2 - i"], ["1e308+1e308i", "1 + nani"]),
        ("fraction_simplification", ["440/797", r"$\dfrac{16}{61}$", r"\frac{1}{2}"], ["1/2 or 3/4", "½", "1/2/3"]),
        ("gsm_symbolic", ["6", "6.5", "$6"], ["-6", "6 apples", "1,200"]),
        ("prime_factorization", ["2 × 3 × 7", "13"], ["2 x 3", "× 2", "2 ×"]),
        ("quantum_lock", ["B → A → C", "B", "A,B,C", "A->B"], ["a cab", "It is A", "→"]),
        ("rush_hour", ["F+1 K+1 M-1", "A+9"], ["A+10", "A+0", "AA+1"]),
        ("time_intervals", ["12 days", "-3 days", "02:38", "01:29:27.345", "32 days, 01:46"], ["12 days or so", "::"]),
        ("polynomial_equations", ["", '""', "-0.3773, 0.4006", "0.0"], ["None", "0.1, nan", "1;2"]),
        ("spell_backward", ["cba", "ab"], ["cbaa"]),
        ("letter_jumble", ["a b"], ["cba and more"]),
    ],
)  # fmt: skip
def test_the_form_of_an_answer(name, right, wrong):
    assert [fits(name, text, "cba") for text in (*right, *wrong)] == [True] * len(right) + [False] * len(wrong)


def test_a_scorer_that_raises_gives_0_and_is_told_once(library, monkeypatch, caplog):
    class Raising:
        def score_answer(self, answer, entry):
            print("noise")
            raise ValueError(f"{answer} and \x1b[2J")

    task = ReasoningGym("chain_sum")
    monkeypatch.setattr(reasoning_gym, "_scorer", lambda dataset, options: Raising())
    with caplog.at_level(logging.WARNING):
        scores = [task.score(Example("0", "?", "5"), f"<answer>{n}</answer>") for n in range(3)]
    assert [score.reward for score in scores] == [0, 0, 0]
    assert caplog.messages == [
        r"the scorer of task 'reasoning_gym:chain_sum' raised ValueError('0 and \x1b[2J'): such answers earn 0"
    ]


@pytest.mark.parametrize(("given", "reward"), [(2.5, 1.0), (-1.0, 0.0), (0.25, 0.25), (float("nan"), 0.0)])
def test_rewards_are_0_to_1(library, monkeypatch, given, reward):
    class Fixed:
        def score_answer(self, answer, entry):
            return given

    monkeypatch.setattr(reasoning_gym, "_scorer", lambda dataset, options: Fixed())
    score = ReasoningGym("chain_sum").score(Example("0", "?", "5"), "<answer>5</answer>")
    assert score.reward == reward and score.parts["answer"] == (reward == 1)


def test_rows_are_the_same_anywhere_and_no_question_is_in_both_splits(library):
    """Also where the seed differs by one, or more rows are asked for."""
    tasks = [get_task("reasoning_gym:word_sorting", seed=seed) for seed in (0, 1)]
    train, test = tasks[0].train(30), tasks[0].test(30)
    reasoning_gym._drawn.cache_clear()
    assert tasks[0].train(60)[:30] == train
    other = tasks[1].train(30), tasks[1].test(30)
    questions = [{one.prompt[0]["content"] for one in rows} for rows in (train, test, *other)]
    assert all(len(one) == 30 for one in questions)
    assert not (questions[0] | questions[2]) & (questions[1] | questions[3])
    assert len(questions[0] & questions[2]) < 3  # the library's seeds 0 and 1 share all rows but one
    assert {one.id for one in train}.isdisjoint(one.id for one in test)
    assert all(tasks[0].score(one, f"<answer>{one.answer}</answer>").reward == 1 for one in train)


def test_more_rows_than_there_are(library):
    task = get_task("reasoning_gym:chain_sum", min_terms=2, max_terms=2)
    with pytest.raises(ValueError, match=r"n is 6000, but task 'reasoning_gym:chain_sum' has \d+ different train rows"):
        task.train(6000)


def test_what_goes_wrong_with_rows_is_told(library, monkeypatch):
    monkeypatch.setattr(reasoning_gym, "VERSION", "0.0.1")  # of the process that makes them it is not
    monkeypatch.setattr(reasoning_gym.importlib.metadata, "version", lambda name: "0.0.1")
    task = ReasoningGym("chain_sum")
    monkeypatch.setattr(reasoning_gym.sys, "executable", "/bin/false")
    with pytest.raises(ValueError, match="the rows of task 'reasoning_gym:chain_sum' could not be made: nothing"):
        task.train(3)


def test_a_reference_that_its_own_scorer_refuses(library, monkeypatch):
    task = ReasoningGym("chain_sum")
    monkeypatch.setattr(reasoning_gym, "fits", lambda *args: False)
    with pytest.raises(ValueError, match="row '7' of task 'reasoning_gym:chain_sum': its own reference 'x' does not"):
        task.check(Example("7", "?", "x"))
    task.check(Example("7", "?", None))


@needs_library
def test_the_installed_version_is_the_one_that_was_read():
    """Where this fails, read the scorers again: which are new, which changed, and what each gives to `JUNK`."""
    from reasoning_gym.factory import DATASETS

    assert importlib.metadata.version("reasoning-gym") == VERSION
    assert set(DATASETS) == {*ALLOWED, *REFUSED}


JUNK = [
    *HOSTILE,
    *("the answer is unclear, and so on", "None", "No", "True", "0", "1", "-1", "[]", "[[]]", '["a"]', "[1]"),
    *('{"a": "b"}', "1/0", "a cab back", "word " * 1900, "," * 50, "1 " * 3000, "×" * 3000),
]


@needs_library
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_a_scorer_gives_full_marks_to_its_reference_alone(name, caplog):
    """To nothing that answers nothing, nor to other rows' references, unless these are as right; none raises."""
    task, made = ReasoningGym(name), reasoning_gym._made(name, {}, seed=123_000, size=300)
    count = 2 if name in SLOW else 6
    examples = [task.example(reasoning_gym._row(made[i], i, entry=ALLOWED[name].entry)) for i in range(count)]
    references = {one.answer.strip() for one in examples if one.answer is not None}
    for example in examples:
        task.check(example)
        right = None if example.answer is None else example.answer.strip()
        longer = [f"{right} and more", f"{right}\nx"] if right and name not in ENDLESS else []
        for text in {*JUNK, *references, *longer} - {right}:
            score = task.score(example, f"<answer>{text}</answer>")
            assert 0 <= score.reward <= 1
            assert score.reward < 1 or (name in SEVERAL and text in {"0", "1", *references}), (text, right)
    assert "raised" not in caplog.text


def test_the_split_is_about_half():
    assert 400 < sum(split_of(f"question {i}") == "train" for i in range(1000)) < 600
