"""The same work, written with torch and transformers as a user would today: the other side of the comparisons.

Weights are perturbed in place from a seed, tensor by tensor, scored with `generate`, and restored with the same noise.
The update draws all members' noise again. It uses the well-known optimizations and no others: `torch.inference_mode`,
one generator, in-place `add_`, a batch of left-padded prompts.
"""

import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch


def shapes_to_torch(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Parameters of those shapes."""
    return [torch.zeros(shape, dtype=dtype) for shape in shapes]


@torch.inference_mode()
def perturb(params: Sequence[torch.Tensor], seed: int, scale: float) -> None:
    """θ += scale · ε(seed), in place; with −scale it restores θ."""
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.add_(torch.randn(param.shape, generator=generator, dtype=param.dtype), alpha=scale)


@torch.inference_mode()
def update(
    params: Sequence[torch.Tensor],
    anchor: Sequence[torch.Tensor],
    seeds: Sequence[int],
    weights: Sequence[float],
    *,
    rate: float,
    decay: float,
) -> None:
    """θ += α/N Σ zₙ εₙ, then the l2 pull toward the anchor, in place."""
    for seed, weight in zip(seeds, weights, strict=True):
        perturb(params, seed, rate / len(seeds) * weight)
    for param, start in zip(params, anchor, strict=True):
        param.sub_(param - start, alpha=decay)


@torch.inference_mode()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    stop: int,
    lengths: Sequence[int] | None = None,
) -> np.ndarray:
    """Greedy completions [B, L].

    With `lengths` each row is stopped at its own length, as if the model had ended it there: a logits processor gives
    the stop token to a row that has its length, so that `generate` ends with the last row.
    """
    ids, mask = _padded(prompts, stop)
    width, ends = ids.shape[1], torch.tensor(lengths or 0)

    def force(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        done = tokens.shape[1] - width + 1 >= ends
        scores[~done, stop] = -torch.inf
        scores[done] = -torch.inf
        scores[done, stop] = 0
        return scores

    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        logits_processor=[] if lengths is None else [force],
        eos_token_id=stop,
        pad_token_id=stop,
    )
    return out[:, width:].numpy()


@torch.inference_mode()
def by_hand(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, stop: int) -> np.ndarray:
    """The same in a hand-written loop: one forward pass per token, until all rows have stopped."""
    ids, mask = _padded(prompts, stop)
    positions, cache, tokens = (mask.cumsum(1) - 1).clamp(min=0), None, []
    done = torch.zeros(len(ids), dtype=torch.bool)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    for _ in range(max_new_tokens):
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, name: cache}
        out = model(**inputs, use_cache=True)
        token = out.logits[:, -1].argmax(-1).masked_fill(done, stop)
        tokens.append(token)
        done |= token == stop
        if done.all():
            break
        ids, cache, positions = token[:, None], out[name], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    return torch.stack(tokens, dim=1).numpy()


def _padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [B, P], padded on the left."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :], mask[i, width - len(prompt) :] = torch.tensor(prompt), 1
    return ids, mask


def iteration(
    model: Any,
    anchor: Sequence[torch.Tensor],
    prompts: Sequence[Sequence[Sequence[int]]],
    lengths: Sequence[Sequence[int]],
    score: Callable[[int, np.ndarray], float],
    *,
    step: int,
    sigma: float,
    rate: float,
    decay: float,
    stop: int,
) -> dict[str, float]:
    """One ES iteration, with a list of prompts and one of lengths for each member; `score` gets a member's number and
    tokens. Returns seconds by part."""
    params, seconds = list(model.parameters()), {"perturb": 0.0, "generate": 0.0, "grade": 0.0, "update": 0.0}
    seeds, rewards = [1000 * step + i for i in range(len(lengths))], []

    def timed(part: str, function: Callable, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = function(*args, **kwargs)
        seconds[part] += time.perf_counter() - began
        return result

    for i, (seed, asked, own) in enumerate(zip(seeds, prompts, lengths, strict=True)):
        timed("perturb", perturb, params, seed, sigma)
        tokens = timed("generate", generate, model, asked, max(own), stop=stop, lengths=own)
        rewards.append(timed("grade", score, i, tokens))
        timed("perturb", perturb, params, seed, -sigma)
    z = np.array(rewards)
    z = (z - z.mean()) / (z.std() + 1e-8)
    timed("update", update, params, anchor, seeds, z.tolist(), rate=rate, decay=decay)
    return seconds
