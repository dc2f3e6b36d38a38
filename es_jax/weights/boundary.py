"""The boundary between a prompt and what follows it: the text of completions, and the tokens of options.

The text of a token depends on what comes before it. Tokenizers like SentencePiece drop the space of the first token
that they decode and add one before the first word that they encode, and a character may be several tokens. So the text
of a completion is the text of prompt and completion, minus the prompt's; and the tokens of an option are those of
prompt and option, after the prompt's own.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from es_jax.weights.tokenizer import Prompt, encode_texts, render

CONTEXT = 8  # tokens; a character has at most 4
_BROKEN = "\ufffd"  # what invalid bytes decode to


class PromptEnd(NamedTuple):
    """The last tokens of a prompt, as many as decoding a completion needs, and their text."""

    tokens: list[int]
    text: str


def prompt_end(tokenizer: Any, prompt: Sequence[int]) -> PromptEnd:
    """The end of a prompt of token ids. What follows decodes to the same text after it as after the whole prompt.

    It holds text as well as special tokens, since decoders treat the first text differently. It does not begin within
    the character, or the run of single bytes, in which it ends. `CONTEXT` tokens are nearly always enough; if not,
    their number is doubled until they are. After special tokens alone nothing is needed, because what follows is the
    first text.
    """
    length = CONTEXT
    while length < len(prompt):
        tokens = list(prompt[-length:])
        text = _decode(tokenizer, tokens)
        if _decode(tokenizer, tokens, special=False) and not text.endswith(_BROKEN):
            return PromptEnd(tokens, text)
        length *= 2
    tokens = list(prompt)
    if not _decode(tokenizer, tokens, special=False):
        tokens = [i for i in tokens if _decode(tokenizer, [i]) == _decode(tokenizer, [i], special=False)]
    return PromptEnd(tokens, _decode(tokenizer, tokens))


def silent_token_ids(tokenizer: Any, stop_token_ids: Sequence[int]) -> list[int]:
    """The tokens that are not part of a completion's text: stop tokens, EOS, BOS and padding. Other special tokens,
    such as `</think>` or `<answer>`, are part of it, because graders read them."""
    ids = {*stop_token_ids, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    return sorted(ids - {None})


def completion_texts(tokenizer: Any, ends: Sequence[PromptEnd], completions: Sequence[Sequence[int]]) -> list[str]:
    """The text of each completion (token ids) after the prompt with that end.

    A character that the prompt begins and the completion ends belongs to the completion.
    """
    return [_text(tokenizer, end, list(ids)) for end, ids in zip(ends, completions, strict=True)]


def _text(tokenizer: Any, end: PromptEnd, ids: list[int]) -> str:
    whole, cut = _decode(tokenizer, [*end.tokens, *ids]), end.text.endswith(_BROKEN)
    if whole.startswith(end.text):
        return whole[len(end.text) :]
    # Either the completion's first bytes continue a character that the prompt begins, or they are invalid and make the
    # bytes just before them unreadable too. So decode with more text than there is, or after a shorter prompt.
    for length in reversed(range(len(end.tokens))):
        before = _decode(tokenizer, end.tokens[:length])
        whole = whole if cut else _decode(tokenizer, [*end.tokens[:length], *ids])
        if whole.startswith(before):
            break
    return whole[len(before) :]


def encode_options(
    tokenizer: Any, prompt: Prompt, options: Sequence[str], *, plain: bool | None = None
) -> tuple[list[int], list[list[int]]]:
    """A prompt and its continuations as token ids: the ids of prompt + option, split where the prompt's own tokens end.

    If the beginning of an option merges with the prompt's last characters into one token, the prompt ends before that
    token for all options, so each option is scored on everything that differs. `plain` is as in `encode_texts`; by
    default it is whether the prompt is text.
    """
    text = render(tokenizer, prompt)
    texts = [text, *(text + option for option in options)]
    plain = isinstance(prompt, str) if plain is None else plain
    alone, *wholes = encode_texts(tokenizer, texts, plain=plain)
    shared = min(_shared(alone, whole) for whole in wholes)
    return alone[:shared], [whole[shared:] for whole in wholes]


def _decode(tokenizer: Any, ids: list[int], *, special: bool = True) -> str:
    return tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)


def _shared(a: list[int], b: list[int]) -> int:
    """The length of the common beginning of two lists."""
    if a == b[: len(a)]:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
