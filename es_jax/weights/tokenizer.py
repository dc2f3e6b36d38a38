"""Tokenizers of folders; the stop tokens; prompts as token ids."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

Prompt = str | Sequence[Mapping[str, Any]]

END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>")
_SENTINEL = "\ue000open-turn\ue000"  # private-use characters: in no prompt and no template


def from_folder(folder: Path) -> Any:
    """The tokenizer of a Hugging Face folder; never runs code from it. ValueError when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever the library meets in damaged files
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{folder}: no tokenizer could be read ({reason}); add its tokenizer.json") from error


def stop_token_ids(tokenizer: Any, *eos: int | list[int] | None) -> tuple[int, ...]:
    """Ids that end a turn, ascending: the tokenizer's EOS, those in `eos`, and well-known ends of turn."""
    vocabulary = tokenizer.get_vocab()
    stops = {tokenizer.eos_token_id, *map(vocabulary.get, END_OF_TURN), *jax.tree.leaves(eos)}
    return tuple(sorted(stops - {None}))


def render(tokenizer: Any, prompt: Prompt) -> str:
    """The text the model is to continue. Plain text stays as it is; messages go through the chat template.

    After a last message of the user's the assistant's turn is opened; a last message of the assistant's is left open,
    its content kept to the last blank, for the model to continue.
    """
    if isinstance(prompt, str):
        return prompt
    if not prompt:
        raise ValueError("prompt = []: give plain text or at least one message")
    if tokenizer.chat_template is None:
        raise ValueError(
            "the prompt is a list of messages but this tokenizer has no chat template: use a model that has "
            "one (an instruction-tuned one), or give the prompt as plain text"
        )
    from jinja2 import TemplateError

    messages = [dict(message) for message in prompt]
    opening = messages[-1]["content"] if messages[-1]["role"] == "assistant" else None
    if opening is not None:
        messages[-1]["content"] = opening + _SENTINEL  # so that a template that trims cannot trim the opening
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opening is None)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"the model's chat template refuses messages of the roles {roles} ({error}): change the prompt's roles, or "
            "give it as plain text"
        ) from None
    if opening is None:
        return text
    rendered, sentinel, _ = text.rpartition(_SENTINEL)
    if not sentinel or not rendered.endswith(opening.lstrip()):
        raise ValueError(
            f"the chat template does not keep the open assistant message {opening!r}: end the messages with "
            "a user message, or give the prompt as plain text"
        )
    return rendered


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of `render`'s text. Plain text gets the special tokens its tokenizer adds (BOS, if any; never
    an EOS at the end); rendered messages get none, their template has written them."""
    return encode_texts(tokenizer, [render(tokenizer, prompt)], plain=isinstance(prompt, str))[0]


def encode_texts(tokenizer: Any, texts: Sequence[str], *, plain: bool) -> list[list[int]]:
    """Token ids of rendered prompts, or of what begins with one; `plain` says whether it was plain text."""
    rows = tokenizer(list(texts), add_special_tokens=plain)["input_ids"]
    for ids, text in zip(rows, texts, strict=True):
        if plain and ids[-1:] == [tokenizer.eos_token_id] != tokenizer.encode(text, add_special_tokens=False)[-1:]:
            ids.pop()
    return rows
