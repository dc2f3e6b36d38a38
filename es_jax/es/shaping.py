"""From rewards to the weights of the members, on the host: N numbers a step."""

import logging

import numpy as np
from jaxtyping import Array, Float, Integer

logger = logging.getLogger(__name__)
Rewards = Float[np.ndarray | Array, " n"]


def finite_rewards(rewards: Rewards, *, nan_rewards: str = "error") -> Float[np.ndarray, " n"]:
    """The rewards [N] as float64, none of them NaN or infinite.

    Such a reward is refused, its members named, where `nan_rewards` is "error" or no reward is finite; where it is
    "worst" it counts as the lowest finite reward of the step.
    """
    if nan_rewards not in ("error", "worst"):
        raise ValueError(f"nan_rewards is {nan_rewards!r}: it must be 'error' or 'worst'")
    rewards = np.asarray(rewards, np.float64)
    if rewards.ndim != 1:
        raise ValueError(f"rewards have shape {rewards.shape}: give one number a member")
    bad = np.flatnonzero(~np.isfinite(rewards))
    if not bad.size:
        return rewards
    who = f"member{'s' if len(bad) > 1 else ''} {', '.join(f'{i} ({rewards[i]})' for i in bad)} of {len(rewards)}"
    if nan_rewards == "error" or len(bad) == len(rewards):
        raise ValueError(
            f"rewards are not finite for {who}: correct the task's score, lower es.sigma, or set "
            "es.nan_rewards='worst' to count such a member as the worst of its step"
        )
    logger.warning("rewards are not finite for %s: they count as the worst of the step", who)
    return np.where(np.isfinite(rewards), rewards, rewards[np.isfinite(rewards)].min())


def centred_on_prompts(rewards: Float[np.ndarray, "n k"], seen: Integer[np.ndarray, "n k"]) -> Float[np.ndarray, " n"]:
    """sₙ = (1/k) Σⱼ (rₙⱼ − μⱼ) of members that saw different prompts, with μⱼ the mean over the G members that saw
    prompt j: how much better a member was than others on the same prompts.

    Σ sₙ = 0. A step made of s is in expectation (1 − 1/G) of the step made of r, since μⱼ holds a G-th of the member's
    own reward; it is all of that step where members are antithetic pairs, for a pair adds μⱼ to nothing. z-scores hide
    a common factor. Members that did equally well are equal: what rounding alone
    tells apart is not told apart. A member with a reward that is not finite has its mean, which is not finite either,
    and is in no μⱼ.

    >>> centred_on_prompts(np.array([[1.0], [3.0], [10.0], [10.0]]), np.array([[0], [0], [1], [1]])).tolist()
    [-1.0, 1.0, 0.0, 0.0]
    """
    rewards = np.asarray(rewards, np.float64)
    out, whole = rewards.mean(axis=1), np.isfinite(rewards).all(axis=1)
    rewards, prompts = rewards[whole], seen[whole]
    low = np.full(seen.max() + 1, np.inf)
    np.minimum.at(low, prompts, rewards)
    above = rewards - low[prompts]  # for prompts of any difficulty, of the size of their spread
    sums, counts = (np.bincount(prompts.ravel(), x, minlength=len(low)) for x in (above.ravel(), None))
    out[whole] = (above - (sums / np.maximum(counts, 1))[prompts]).mean(axis=1)
    digit = 1e-12 * above.max(initial=0.0) or 1.0
    out[whole] = np.round(out[whole] / digit) * digit
    return out


def z_score(rewards: Rewards, *, eps: float = 1e-8, nan_rewards: str = "error") -> np.ndarray:
    """(r − mean) / (std + eps) with the population's std (ddof 0), float32 [N] (arXiv 2509.24372, section 3).

    Equal rewards carry no information: their weights are exactly zero, and a warning is logged.

    >>> z_score(np.array([1.0, 3.0])).round(4).tolist()
    [-1.0, 1.0]
    """
    rewards = finite_rewards(rewards, nan_rewards=nan_rewards)
    if rewards.max() == rewards.min():
        logger.warning("all %d rewards are %g: this step does not move the weights", len(rewards), rewards[0])
        return np.zeros(len(rewards), np.float32)
    return ((rewards - rewards.mean()) / (rewards.std() + eps)).astype(np.float32)


def centered_rank(rewards: Rewards, *, nan_rewards: str = "error") -> np.ndarray:
    """Ranks scaled to [−0.5, 0.5], float32 [N]; equal rewards share their mean rank.

    >>> centered_rank(np.array([10.0, -5.0, 10.0])).tolist()
    [0.25, -0.5, 0.25]
    """
    rewards = finite_rewards(rewards, nan_rewards=nan_rewards)
    below, equal = ((rewards[:, None] > rewards).sum(1), (rewards[:, None] == rewards).sum(1))
    return ((below + (equal - 1) / 2) / max(len(rewards) - 1, 1) - 0.5).astype(np.float32)


SHAPINGS = {"z_score": z_score, "centered_rank": centered_rank}
