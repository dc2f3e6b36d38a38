"""From tokens to texts and scores: boundaries, special tokens, and what ends a completion."""

import re

import jax
import numpy as np
import pytest

from es_jax.generate.score import score_options, score_tokens
from es_jax.models.config import TransformerConfig
from es_jax.models.transformer import Transformer
from es_jax.scoring.grading import Grader
from es_jax.scoring.heldout import HeldOut
from es_jax.scoring.workers import at_once
from es_jax.tasks import Example, get_task
from es_jax.tasks.task import Choices, Score, messages
from es_jax.weights.boundary import encode_options
from es_jax.weights.model import Model
from es_jax.weights.tokenizer import encode_prompt
from tests.tokenizer_kinds import BLANKS, KINDS, VOCABULARY

CONFIG = TransformerConfig(
    family="llama", vocab_size=512, width=8, layers=1, heads=1, kv_heads=1, head_dim=8, mlp_dim=8, max_positions=64
)


class Echo:
    """A task whose reward is the length of the text."""

    name = "echo"

    def score(self, example, completion):
        return Score(float(len(completion)), {})


def model_of(kind, stop=(2,)):
    return Model(CONFIG, {}, KINDS[kind](), "", stop)


def graded(model, task, examples, completions, **more):
    """The completions of the examples, as an engine hands them over, with rows of padding."""
    width = max(map(len, completions)) + 2
    tokens = np.array([[*ids, *[0] * (width - len(ids))] for ids in [*completions, []]], np.int32)
    grade = Grader(model, examples, at_once(task), **more)
    lengths = np.array([*map(len, completions), 0])
    return [wait() for wait in grade(range(len(completions)), tokens, lengths)]


def ids_after(tokenizer, prompt, text):
    """The tokens of a text that follows the prompt's."""
    prompt, (ids,) = encode_options(tokenizer, prompt, [text])
    return ids


@pytest.mark.parametrize("kind", BLANKS)
@pytest.mark.parametrize(
    ("task", "opening", "text", "answer", "reward"),
    [
        ("gsm8k", "7 # 2 is\n####", " 72", "72", 1.1),
        ("arc-challenge", "The answer is", " (B).", "B", 1.0),
        ("mmlu-pro", "so the answer is", " B", "B", 1.0),
        ("hellaswag", "the one that fits is", " 2", "2", 1.0),
    ],
)
def test_a_blank_after_an_open_turn_counts(kind, task, opening, text, answer, reward):
    model = model_of(kind)
    example = Example("0", messages(user="is?", assistant=opening), answer)
    (one,) = graded(model, get_task(task), [example], [[*ids_after(model.tokenizer, example.prompt, text), 2]])
    assert (one.text, one.score.reward, one.truncated) == (text, pytest.approx(reward), False)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_prompts_are_those_that_are_given_or_the_examples(kind):
    model = model_of(kind)
    examples = [Example("0", "the", None), Example("1", messages(user="is", assistant="a"), None)]
    rows = [ids_after(model.tokenizer, example.prompt, " 72") for example in examples]
    prompts = [encode_prompt(model.tokenizer, example.prompt) for example in examples]
    texts = [one.text for one in graded(model, Echo(), examples, rows)]
    assert texts == [one.text for one in graded(model, Echo(), examples, rows, prompts=prompts)]
    if kind != "word_ends":
        assert texts == [" 72", " 72"]


@pytest.mark.parametrize(
    ("kind", "tokens", "text", "truncated"),
    [
        ("llama2", [], "", True),
        ("llama2", ["</s>"], "", False),
        ("gguf_llama", ["▁72", "</s>"], " 72", False),
        ("llama_class", ["▁72", "▁is"], " 72 is", True),
        ("llama2", ["<pad>", "▁72", "<s>", "▁is", "<pad>"], " 72 is", True),
        ("metaspace_first", ["▁72", "[/INST]", "</s>"], " 72[/INST]", False),  # it ends no turn
        ("llama2", ["▁72", "</think>", "<answer>", "▁is", "</s>"], " 72</think><answer> is", False),
        ("llama2", ["<unk>", "is"], "<unk>is", True),
        ("llama2", ["▁72", "<0xE4>", "<0xBD>"], " 72\ufffd\ufffd", True),  # a character cut by the limit
    ],
)
def test_only_what_ends_a_turn_or_pads_is_left_out(kind, tokens, text, truncated):
    model, example = model_of(kind), Example("0", "is", None)
    (one,) = graded(model, Echo(), [example], [[VOCABULARY[token] for token in tokens]])
    assert (one.text, one.length, one.truncated) == (text, len(tokens), truncated)


def test_every_stop_token_is_left_out():
    """Also one that is no special token of the tokenizer's."""
    word, model = VOCABULARY["is"], model_of("llama2", stop=(2, VOCABULARY["is"]))
    (one,) = graded(model, Echo(), [Example("0", "the", None)], [[VOCABULARY["▁72"], word]])
    assert (one.text, one.length, one.truncated) == (" 72", 2, False)


@pytest.mark.parametrize("kind", ["llama2", "llama_class", "gguf_llama"])
@pytest.mark.parametrize(
    ("task", "opening", "text", "answer", "reward"),
    [
        ("gsm8k", "", "I think of #### 5</think>\n#### 72", "72", 1.1),
        ("countdown", "", "so</think>\n<answer>7+2</answer>", None, 1.0),
        ("countdown", "a</think>\n<answer>", "7+2</answer>", None, 1.0),
        ("conciseness", "", "<answer>is</answer>", "<answer>is</answer>", 0.0),
    ],
)
def test_special_tokens_reach_the_grader(kind, task, opening, text, answer, reward):
    """`</think>`, `<answer>` and `</answer>` are special tokens here, as some models have them."""
    model, task = model_of(kind), get_task(task)
    example = Example("0", messages(user="is", assistant=opening), answer, {"numbers": (7, 2), "target": 9})
    ids = [
        VOCABULARY[piece]
        for piece in re.findall(r"</?[a-z]+>|<0x..>|.", text.translate({32: "▁", 10: "<0x0A>", 43: "<0x2B>"}))
    ]
    assert model.tokenizer.decode(ids, skip_special_tokens=True) != text
    (one,) = graded(model, task, [example], [[*ids, 2]])
    assert (one.text, one.score) == (text, task.score(example, text)) and one.score.reward >= reward


class Menu:
    """A task with options."""

    name = "menu"

    def train(self, n=None):
        return []

    def test(self, n=None):
        return []

    def score(self, example, completion):
        return Score(0.0, {"answer": 0.0})

    def choices(self, example):
        return Choices(example.prompt, example.meta["options"], 0)


def test_held_out_options_have_the_tokens_of_the_whole():
    model = model_of("llama2")
    example = Example("0", "ais", None, {"options": (":", " 72")})
    (row,) = HeldOut.of(Menu(), [example], model, max_prompt_tokens=9).options
    tokens = lambda ids: model.tokenizer.convert_ids_to_tokens(ids)  # noqa: E731
    assert tokens(row[0])[-1] == "a" and list(map(tokens, row[1])) == [["is:"], ["is", "▁72"]]


@pytest.mark.parametrize("options", [("", " 72"), (" 72", "")])
def test_an_option_without_text_is_refused(options):
    model, example = model_of("llama2"), Example("7", "ais", None, {"options": (*options, ":")})
    with pytest.raises(
        ValueError, match="row '7' of task 'menu' has an option or a prompt without tokens: take the row out"
    ):
        HeldOut.of(Menu(), [example], model, max_prompt_tokens=9)


@pytest.mark.parametrize("options", [(":", " 72"), (" the", " the is"), ("s", "\n")])
def test_options_compare_as_the_whole_texts_do(options):
    tokenizer, params = KINDS["llama2"](), Transformer(CONFIG).init(jax.random.key(0))
    prompt, parts = encode_options(tokenizer, "ais", options)
    (found,) = score_options(CONFIG, params, [(prompt, parts)])
    wholes = [encode_prompt(tokenizer, "ais" + option) for option in options]
    width = max(map(len, wholes))
    tokens = np.array([[*ids, *[0] * (width - len(ids))] for ids in wholes], np.int32)
    total = score_tokens(CONFIG, params, tokens, np.arange(width) < np.array([[len(ids)] for ids in wholes])).sum(
        axis=1
    )
    assert found[0] - found[1] == pytest.approx(float(total[0] - total[1]), abs=1e-4)


def test_a_completion_is_scored_once_for_each_example():
    calls = []

    class Counting(Echo):
        def score(self, example, completion):
            calls.append((example.id, completion))
            return super().score(example, completion)

    model = model_of(sorted(KINDS)[0])
    examples = [Example("a", "the", None), Example("b", "the", None)]
    ids = ids_after(model.tokenizer, "the", " 72")
    tokens = np.array([[*ids, 2, 9], [*ids, 2, 0], [*ids, 2, 0], [*ids, 9, 9]], np.int32)
    lengths = np.array([len(ids) + 1] * 3 + [len(ids) + 2])
    grade = Grader(model, examples, at_once(Counting()))
    first = [wait() for wait in grade([0, 0, 1, 0], tokens, lengths)]
    again = [wait() for wait in grade([0], tokens[:1], lengths[:1])]
    assert [id for id, _ in calls] == ["a", "b", "a"]  # what stands after a completion's end is none of it
    assert first[0] == first[1] == again[0] and first[2].example is examples[1]
    assert (first[0].truncated, first[3].truncated, first[3].length) == (False, True, len(ids) + 2)
