"""Tokenizers of checkpoints, from a folder or from GGUF metadata; the stop tokens; prompts as token ids."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Prompt = str | Sequence[Mapping[str, Any]]

END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>")
_CONTROL, _USER_DEFINED = 3, 4  # GGUF's token types that are matched before splitting
_SENTINEL = "\ue000open-turn\ue000"  # private-use characters: in no prompt and no template


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """How text is split before byte-level BPE. `pattern` None: the pattern byte-level BPE brings along."""

    pattern: str | None = None
    single_digits: bool = False
    nfc: bool = False
    whole_words: bool = False  # a piece that is in the vocabulary is taken whole, merges or not
    add_bos: bool = False  # when the file does not say


_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    "smollm": PreTokenizer(single_digits=True),
    "qwen2": PreTokenizer(pattern=_LETTERS + r"|\p{N}" + _REST, nfc=True),
    "llama-bpe": PreTokenizer(pattern=_LETTERS + r"|\p{N}{1,3}" + _REST, whole_words=True, add_bos=True),
}


def from_folder(folder: Path) -> Any:
    """The tokenizer of a Hugging Face folder; never runs code from it. ValueError when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: no tokenizer could be read ({error}); add tokenizer.json to it") from error


def from_gguf_metadata(metadata: Mapping[str, Any]) -> Any:
    """The byte-level BPE tokenizer described by a GGUF file's metadata, as a transformers fast tokenizer.

    Raises ValueError for another kind of tokenizer or an unknown pre-tokenizer, by name.
    """
    from transformers import PreTrainedTokenizerFast

    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise ValueError(
            f"tokenizer.ggml.model = {kind!r} is not implemented (only 'gpt2', byte-level BPE, is); load the "
            "model's safetensors folder instead"
        )
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise ValueError(
            f"tokenizer.ggml.pre = {pre!r} is not implemented (known: {known}); load the model's safetensors "
            "folder instead"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    ids = {ours: metadata.get(f"tokenizer.ggml.{theirs}_token_id") for theirs, ours in names.items()}
    special = {name: tokens[i] for name, i in ids.items() if i is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=_bpe(metadata, PRE_TOKENIZERS[pre], ids["bos_token"], ids["eos_token"]),
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def stop_ids(tokenizer: Any, *eos: int | Iterable[int] | None) -> tuple[int, ...]:
    """Ids that end a turn, ascending: the tokenizer's EOS, those in `eos`, and well-known ends of turn."""
    found = {tokenizer.eos_token_id}
    for ids in eos:
        found |= {ids} if isinstance(ids, int) or ids is None else set(ids)
    vocabulary = tokenizer.get_vocab()
    found |= {vocabulary.get(token) for token in END_OF_TURN}
    return tuple(sorted(found - {None}))


def render(tokenizer: Any, prompt: Prompt) -> str:
    """The text the model is to continue. Plain text stays as it is; messages go through the chat template.

    Messages are {"role": …, "content": …}. After a last message of the user's the assistant's turn is opened;
    a last message of the assistant's is left open, its content kept to the last blank, for the model to
    continue. Raises ValueError for messages without a chat template, no messages, or a template that does not
    keep the open message.
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
    messages = [dict(message) for message in prompt]
    if messages[-1]["role"] != "assistant":
        return _templated(tokenizer, messages, add_generation_prompt=True)
    opening = messages[-1]["content"]
    messages[-1]["content"] = opening + _SENTINEL  # so that a template that trims cannot trim the opening
    text = _templated(tokenizer, messages, add_generation_prompt=False)
    rendered, found, _ = text.rpartition(_SENTINEL)
    if not found or not rendered.endswith(opening.lstrip()):
        raise ValueError(
            f"the chat template does not keep the open assistant message {opening!r}: end the messages with "
            "a user message, or give the prompt as plain text"
        )
    return rendered


def _templated(tokenizer: Any, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"the model's chat template refuses messages of the roles {roles} ({error}): change the prompt's roles, or "
            "give it as plain text"
        ) from None


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of `render`'s text. Plain text gets the special tokens its tokenizer adds (BOS, if any; never
    an EOS at the end); rendered messages get none, their template has written them."""
    ids = tokenizer.encode(render(tokenizer, prompt), add_special_tokens=isinstance(prompt, str))
    if isinstance(prompt, str) and ids and ids[-1] == tokenizer.eos_token_id:
        plain = tokenizer.encode(prompt, add_special_tokens=False)
        if not plain or plain[-1] != ids[-1]:
            ids = ids[:-1]
    return list(ids)


def _bpe(metadata: Mapping[str, Any], pre: PreTokenizer, bos: int | None, eos: int | None) -> Any:
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre.whole_words))
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.pattern is None)
    splits: list[Any] = []
    if pre.single_digits:
        splits.append(pre_tokenizers.Digits(individual_digits=True))
    if pre.pattern is not None:
        splits.append(pre_tokenizers.Split(Regex(pre.pattern), behavior="isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True):
        if kind in (_CONTROL, _USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=kind == _CONTROL, normalized=False)])
    before = bos if metadata.get("tokenizer.ggml.add_bos_token", pre.add_bos) else None
    after = eos if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    around = [i for i in (before, after) if i is not None]
    if around:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*(tokens[i] for i in (before,) if i is not None), "$A"]
            + [tokens[i] for i in (after,) if i is not None],
            special_tokens=[(tokens[i], i) for i in dict.fromkeys(around)],
        )
    return tokenizer
