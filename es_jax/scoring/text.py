"""Text in, text out: what a model writes after prompts, and how well it predicts texts."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from es_jax.core import rng
from es_jax.core.chunked_map import power_of_two
from es_jax.generate.decode_spec import SHORTEST
from es_jax.generate.engine import Engine, check_context
from es_jax.generate.prompts import Packing
from es_jax.generate.sampling import sampler_of
from es_jax.generate.score import score_tokens
from es_jax.weights.model import Model
from es_jax.weights.tokenizer import Prompt

NEW_TOKENS = 256  # of a completion at most, by default
WINDOW = 2048  # tokens that perplexity reads at once, by default
BATCH_TOKENS = 2**12  # of one forward pass


def complete(
    model: Model,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    slots: int = 64,
) -> Any:
    """What a model writes after prompts: text, or messages, in; text out.

    It is not called `generate`, since `es_jax.generate` is the package of the engine, which takes and gives token ids.

    Args:
      model: of `load_model` or `load_step`. It computes in the dtype of its parameters.
      prompts: one prompt, or a list of them. A prompt is plain text, or messages for the chat template, each with
        "role" and "content"; a last message of the assistant's is continued. `Model.encode` makes its tokens.
      max_new_tokens: tokens after which a completion is cut; by default 256, or what the context leaves if it is less.
      temperature: 0 takes the likeliest token each time, as training and evaluation do. Above 0, tokens are drawn from
        softmax(logits / temperature).
      seed: of what is drawn, 0 to 2³² − 1. Prompt i of a seed has the same completion whatever prompts are beside it.
      slots: prompts decoded at once.

    Returns:
      The completion of one prompt, text; or a list of texts, one for each prompt. A program is compiled for each
      number of prompts and each width: a single prompt's is a power of two, so that a chat soon compiles nothing.

    Raises:
      ValueError: a prompt that is empty, leaves no room in the model's context, or that the chat template does not
        take, named by its place; a number out of range.

    >>> from es_jax.weights.model import load_model
    >>> lab = load_model("lab")
    >>> complete(lab, "A37+48=", max_new_tokens=6)
    '85'
    >>> complete(lab, ["A37+48=", "C37<48="], max_new_tokens=6)
    ['85', 'y']
    """
    if not (isinstance(temperature, int | float) and 0 <= temperature < math.inf):
        raise ValueError(f"temperature is {temperature!r}: it must be at least 0, which is greedy")
    several: list[Any] = [prompts] if _is_one(prompts) else list(prompts)
    tokens = [_encode(model, prompt, place) for place, prompt in enumerate(several)]
    longest = max(map(len, tokens), default=1)
    room = model.config.max_positions - longest
    new = min(NEW_TOKENS, max(room, 1)) if max_new_tokens is None else max_new_tokens
    check_context(model.config, longest, new)
    width = max(SHORTEST // 4, power_of_two(longest))
    engine = Engine(
        model.config,
        slots=min(slots, max(len(tokens), 1)),
        max_prompt_tokens=min(width, model.config.max_positions - new),
        max_new_tokens=new,
        stop_token_ids=model.stop_token_ids,
        sampler=sampler_of(temperature),
        in_place=False if _is_cut(model.params) else None,  # its kernel is not cut over devices
    )
    key = rng.sampling_key(seed, 0) if temperature else None
    packing = Packing((), engine.max_prompt_tokens) if len(tokens) == 1 else None
    out = engine.generate(model.params, tokens, key=key, packing=packing)
    lengths = np.asarray(out.length).tolist()
    rows = zip(tokens, np.asarray(out.tokens).tolist(), lengths, strict=True)
    texts = [model.decode(prompt, row[:length]) for prompt, row, length in rows]
    return texts[0] if _is_one(prompts) else texts


def _is_one(prompts: Any) -> bool:
    """Whether it is one prompt: text, or messages."""
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Mapping))


def _encode(model: Model, prompt: Prompt, place: int) -> list[int]:
    if not (isinstance(prompt, str) or (isinstance(prompt, Sequence) and all(isinstance(m, Mapping) for m in prompt))):
        raise ValueError(f"prompt {place} is {prompt!r:.60}: give text, or messages with role and content")
    try:
        ids = model.encode(prompt)
    except ValueError as error:
        raise ValueError(f"prompt {place}: {error}") from None
    if not 1 <= len(ids) < model.config.max_positions:
        raise ValueError(
            f"prompt {place} has {len(ids)} tokens: it must have at least 1, and leave room for a completion in the "
            f"model's context of {model.config.max_positions}"
        )
    return ids


def _is_cut(params: Any) -> bool:
    """Whether parameters are on several devices."""
    return any(len(leaf.sharding.device_set) > 1 for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array))


def perplexity(
    model: Model, texts: str | Sequence[str], *, window: int | None = None, stride: int | None = None
) -> Any:
    """exp(−mean of log p(token | the tokens before it)) of a text, or of each of several: 1 is certainty.

    The first token has nothing before it and is not scored, unless the tokenizer begins a text with BOS, which then is
    the first. A text of more than `window` tokens is read in windows that begin `stride` tokens apart. Each token
    is scored once, in the first window that holds it, with at least window − stride tokens before it (fewer only at the
    beginning of the text). The mean is over all tokens of the text alike. Nothing is cut off.

    Args:
      model: of `load_model` or `load_step`. It computes in the dtype of its parameters; the mean is in float64.
      texts: plain text; no chat template is used.
      window: tokens that the model reads at once, 2 to its context; by default 2048, or its context if that is less.
      stride: 1 to window − 1; by default half of the window. A smaller one gives tokens more context, and takes longer.

    Returns:
      A number for one text, a list of numbers for several.

    Raises:
      ValueError: a text of fewer than 2 tokens, named by its place; sizes out of range; log-probabilities that are not
        finite.

    >>> from es_jax.weights.model import load_model
    >>> lab = load_model("lab")
    >>> right, wrong = perplexity(lab, ["A37+48=85", "A37+48=19"])
    >>> right < wrong
    True
    """
    context, several = model.config.max_positions, [texts] if isinstance(texts, str) else list(texts)
    window = min(WINDOW, context) if window is None else window
    if not 2 <= window <= context:
        raise ValueError(f"window is {window}: it must be 2 to the model's context of {context}")
    stride = max(window // 2, 1) if stride is None else stride
    if not 1 <= stride < window:
        raise ValueError(f"stride is {stride}: it must be 1 to window - 1 = {window - 1}")
    tokens = [model.encode(text) for text in several]
    for place, ids in enumerate(tokens):
        if len(ids) < 2:
            raise ValueError(f"text {place} has {len(ids)} tokens: it needs at least 2, the first is not scored")
    pieces = [_Piece(place, *piece) for place, ids in enumerate(tokens) for piece in _windows(len(ids), window, stride)]
    total = np.zeros(len(several))
    for piece, logprob in _scored(model, tokens, pieces, window):
        total[piece.text] += logprob
    for place, value in enumerate(total):
        if not math.isfinite(value):
            raise ValueError(
                f"the log-probability of text {place} is {value}: compute in float32, or take other weights"
            )
    results = [math.exp(-value / (len(ids) - 1)) for value, ids in zip(total.tolist(), tokens, strict=True)]
    return results[0] if isinstance(texts, str) else results


class _Piece(NamedTuple):
    """A window on a text: its tokens start..end, of which those from `scored` on are scored in it."""

    text: int
    start: int
    end: int
    scored: int


def _windows(n: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, scored) of the windows on n ≥ 2 tokens.

    >>> list(_windows(9, 4, 2))
    [(0, 4, 1), (2, 6, 4), (4, 8, 6), (6, 9, 8)]
    """
    scored = 1
    for start in range(0, n, stride):
        end = min(start + window, n)
        yield start, end, scored
        if end == n:
            return
        scored = end


def _scored(
    model: Model, tokens: Sequence[Sequence[int]], pieces: Sequence[_Piece], window: int
) -> Iterator[tuple[_Piece, float]]:
    """Each piece with the sum of its log-probabilities. Pieces of about one length are read together."""
    alike = defaultdict(list)  # by the width that they are padded to
    for piece in pieces:
        length = piece.end - piece.start
        alike[min(max(power_of_two(length), SHORTEST // 4), window)].append(piece)
    for width, members in alike.items():
        count = min(max(BATCH_TOKENS // width, 1), power_of_two(len(members)))
        for first in range(0, len(members), count):
            batch = members[first : first + count]
            rows, mask = np.zeros((count, width), np.int32), np.zeros((count, width), bool)
            for row, piece in enumerate(batch):
                length = piece.end - piece.start
                rows[row, :length], mask[row, :length] = tokens[piece.text][piece.start : piece.end], True
            logprobs = np.asarray(score_tokens(model.config, model.params, rows, mask), np.float64)
            for row, piece in enumerate(batch):
                yield piece, float(logprobs[row, piece.scored - piece.start : piece.end - piece.start].sum())
