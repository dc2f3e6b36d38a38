"""Tokenizers of the kinds the families come with, and their chat templates: with a system role, without, open turns."""

import pytest
from test_model import tiny_metadata

from es_jax.weights.gguf_tokenizer import from_gguf_metadata
from es_jax.weights.tokenizer import encode_prompt, from_folder, render

SYSTEM, USER, ANSWER = ({"role": role, "content": f"{role[0]} text"} for role in ("system", "user", "assistant"))
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (  # as Gemma 2's: a system message is refused, the assistant is called model
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
FOLDED = (  # as Mistral's: the system text goes into the user's turn
    "{% set first = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}{{ bos_token }}"
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}"
    "[INST] {{ first + m.content if loop.first else m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def byte_level():
    return from_gguf_metadata(tiny_metadata())


def sentencepiece_like(folder):
    """BPE over ▁-marked words with single bytes to fall back on, saved and read as a folder's tokenizer is."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"]
    words += [f"<0x{byte:02X}>" for byte in range(256)] + list("▁abcdefghijklmnopqrstuvwxyz") + ["he", "▁t", "▁the"]
    merges = [("h", "e"), ("▁", "t"), ("▁t", "he")]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)
    fast.add_special_tokens({"additional_special_tokens": words[4:8]})
    fast.save_pretrained(str(folder))
    return from_folder(folder)


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def tokenizer(request, tmp_path_factory):
    return byte_level() if request.param == "byte-level" else sentencepiece_like(tmp_path_factory.mktemp("words"))


@pytest.fixture(autouse=True)
def no_template(tokenizer):
    tokenizer.chat_template = None


@pytest.mark.parametrize("text", ["the other  hen", " the\n\tend . , don 't", "naïve 你好 🙂 12", "the"])
def test_decode_undoes_encode(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(encode_prompt(tokenizer, text), skip_special_tokens=True) == text


def test_a_template_with_a_system_role(tokenizer):
    tokenizer.chat_template = CHATML
    expected = "<|im_start|>system\ns text<|im_end|>\n<|im_start|>user\nu text<|im_end|>\n<|im_start|>assistant\n"
    assert render(tokenizer, [SYSTEM, USER]) == expected
    assert render(tokenizer, [SYSTEM, USER, ANSWER, USER]).count("a text<|im_end|>") == 1


def test_a_template_without_a_system_role(tokenizer):
    tokenizer.chat_template = NO_SYSTEM
    bos = tokenizer.bos_token or ""
    turn = f"{bos}<start_of_turn>user\nu text<end_of_turn>\n<start_of_turn>model\n"
    assert render(tokenizer, [USER]) == turn
    with pytest.raises(
        ValueError, match=r"roles system, user \(System role not supported\): change the prompt's roles"
    ):
        render(tokenizer, [SYSTEM, USER])
    tokenizer.chat_template = FOLDED
    assert "[INST] s text\n\nu text[/INST]" in render(tokenizer, [SYSTEM, USER])


@pytest.mark.parametrize("template", [CHATML, NO_SYSTEM, FOLDED])
@pytest.mark.parametrize("opening", ["<think>\n", "a text", "a text  "])
def test_an_open_assistant_turn_is_not_closed(tokenizer, template, opening):
    tokenizer.chat_template = template
    text = render(tokenizer, [USER, {"role": "assistant", "content": opening}])
    assert text.endswith(opening)
    assert text.startswith(render(tokenizer, [USER]))


def test_a_template_writes_the_special_tokens_itself(tokenizer):
    tokenizer.chat_template = NO_SYSTEM
    ids = encode_prompt(tokenizer, [USER])
    assert ids.count(tokenizer.bos_token_id) == (tokenizer.bos_token is not None)


def test_a_missing_template_names_the_two_ways_out(tokenizer):
    with pytest.raises(ValueError, match=r"no chat template: use an instruction-tuned model .* or give the prompt"):
        render(tokenizer, [USER])
