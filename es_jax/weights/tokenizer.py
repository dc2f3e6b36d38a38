"""Tokenizers of model folders, their stop tokens, and prompts as token ids."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from es_jax.core.extras import without_advice
from es_jax.weights import chat_template

Prompt = str | Sequence[Mapping[str, Any]]

END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>")


def from_folder(folder: Path) -> Any:
    """The tokenizer of a Hugging Face folder; it never runs code from there. Raises ValueError if there is none."""
    with without_advice():
        from transformers import AutoTokenizer

    try:
        words = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the library raises many types for damaged files
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{folder}: no tokenizer could be read ({reason}); add its tokenizer.json") from error
    if not isinstance(words.model_max_length, int | float):  # transformers compares it at the first encoding
        raise ValueError(f"{folder}: model_max_length is {words.model_max_length!r}: it must be a number")
    return words


def stop_token_ids(tokenizer: Any, *eos: int | list[int] | None) -> tuple[int, ...]:
    """Token ids that end a turn, ascending: the tokenizer's EOS, those in `eos`, and well-known end-of-turn tokens."""
    vocabulary = tokenizer.get_vocab()
    stops = {tokenizer.eos_token_id, *map(vocabulary.get, END_OF_TURN), *jax.tree.leaves(eos)}
    return tuple(sorted(stops - {None}))


def check_token_ids(value: Any, name: str) -> Any:
    """The value of a field such as eos_token_id: a token id, a list of them, or None. ValueError for anything else."""
    for one in value if isinstance(value, list) else [] if value is None else [value]:
        if type(one) is not int or one < 0:
            text = f"; write the number that tokenizer.json has for {one!r}" if isinstance(one, str) else ""
            text = f"; write {one} without quotation marks" if text and one.isdecimal() else text
            raise ValueError(
                f"{name} is {value!r}: it must be a token id (a whole number from 0) or a list of them{text}"
            )
    return value


def render(tokenizer: Any, prompt: Prompt) -> str:
    """The text that the model continues. Plain text stays as it is; messages go through the chat template.

    If the last message is the user's, the assistant's turn is opened after it. If it is the assistant's, it is left
    open for the model to continue, with its trailing spaces. An empty thought that the template puts before that
    message is left out, unless the other messages turned thinking off. Raises ValueError if the template does not allow
    this.
    """
    return prompt if isinstance(prompt, str) else chat_template.apply(tokenizer, prompt)


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of `render`'s text. Plain text gets the special tokens its tokenizer adds (BOS, if any; never an EOS at
    the end); rendered messages get none, since the template has written them."""
    return encode_texts(tokenizer, [render(tokenizer, prompt)], plain=isinstance(prompt, str))[0]


def encode_texts(tokenizer: Any, texts: Sequence[str], *, plain: bool) -> list[list[int]]:
    """Token ids of rendered prompts, or of texts that begin with one; `plain` says whether they are plain text."""
    rows = tokenizer(list(texts), add_special_tokens=plain)["input_ids"]
    for ids, text in zip(rows, texts, strict=True):
        if plain and ids[-1:] == [tokenizer.eos_token_id] != tokenizer.encode(text, add_special_tokens=False)[-1:]:
            ids.pop()
    return rows
