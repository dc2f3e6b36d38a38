"""Prompts as token ids: chat templates, open turns, BOS, stop tokens."""

import pytest
from test_model import tiny_metadata

from es_jax.weights.gguf_tokenizer import PRE_TOKENIZERS, from_gguf_metadata
from es_jax.weights.tokenizer import encode_prompt, render, stop_token_ids

TRIMS = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}<|im_end|>{% endfor %}"
TRIMS += "{% if add_generation_prompt %}[assistant]{% endif %}"
USER = {"role": "user", "content": "hi"}


@pytest.fixture
def tokenizer():
    return from_gguf_metadata({**tiny_metadata(), "tokenizer.chat_template": TRIMS})


def test_plain_text_is_left_alone(tokenizer):
    assert render(tokenizer, " a\n") == " a\n"
    assert tokenizer.decode(encode_prompt(tokenizer, " a\n")) == " a\n"


def test_messages_open_the_assistants_turn(tokenizer):
    assert render(tokenizer, [USER]) == "[user]hi<|im_end|>[assistant]"
    assert 2 in encode_prompt(tokenizer, [USER])


@pytest.mark.parametrize("opening", ["<think>\n", "Let me", "a  ", ""])
def test_an_open_assistant_message_keeps_every_character(tokenizer, opening):
    rendered = render(tokenizer, [USER, {"role": "assistant", "content": opening}])
    assert rendered == "[user]hi<|im_end|>[assistant]" + opening


def test_a_template_that_drops_the_open_message_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ValueError, match="does not keep the open assistant message"):
        render(tokenizer, [USER, {"role": "assistant", "content": "x"}])


def test_messages_need_a_template():
    with pytest.raises(ValueError, match=r"instruction-tuned.*plain text"):
        render(from_gguf_metadata(tiny_metadata()), [USER])


def test_bos_is_added_to_plain_text_only_when_the_file_says_so():
    says = {**tiny_metadata(), "tokenizer.ggml.bos_token_id": 1, "tokenizer.chat_template": TRIMS}
    assert encode_prompt(from_gguf_metadata(says), "a")[0] != 1
    says["tokenizer.ggml.add_bos_token"] = says["tokenizer.ggml.add_eos_token"] = True
    adds = from_gguf_metadata(says)
    assert encode_prompt(adds, "a")[0] == 1 and len(encode_prompt(adds, "a")) == 2
    assert 1 not in encode_prompt(adds, [USER])


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
@pytest.mark.parametrize("text", ["1234 and 5\n\n  x = 'don't'\t", "naïve 你好 🙂", "<|im_start|>user\nhi<|im_end|>"])
def test_round_trip(pre, text):
    tokenizer = from_gguf_metadata({**tiny_metadata(), "tokenizer.ggml.pre": pre})
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_stop_ids_are_all_ends_of_turn(tokenizer):
    assert stop_token_ids(tokenizer) == (0, 2)
    assert stop_token_ids(tokenizer, 7, [9, 2], None) == (0, 2, 7, 9)


@pytest.mark.parametrize(
    "field, value, says",
    [
        ("pre", "qwen", r"unknown tokenizer\.ggml\.pre 'qwen': did you mean 'qwen2'\? Known: .*safetensors folder"),
        ("model", "bert", r"tokenizer\.ggml\.model = 'bert' is not implemented.*safetensors folder"),
    ],
)
def test_unknown_tokenizers_are_refused_by_name(field, value, says):
    with pytest.raises(ValueError, match=says):
        from_gguf_metadata({**tiny_metadata(), f"tokenizer.ggml.{field}": value})
