"""From rewards to the weights of the members: N numbers a step, computed on the host."""

import logging

import numpy as np
from jaxtyping import Array, Float, Integer

logger = logging.getLogger(__name__)
Rewards = Float[np.ndarray | Array, " n"]


def finite_rewards(rewards: Rewards, *, nan_rewards: str = "error") -> Float[np.ndarray, " n"]:
    """Returns the rewards as float64, none of them NaN or infinite.

    Args:
      rewards: [N], one reward for each member.
      nan_rewards: what to do with a reward that is not finite. "error" refuses it. "worst" counts it as the lowest
        finite reward of the step, and logs a warning.

    Returns:
      float64 [N].

    Raises:
      ValueError: `rewards` is not one number for each member; a reward is not finite and `nan_rewards` is "error"; no
        reward is finite; or `nan_rewards` is neither "error" nor "worst".
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
    """Compares members that saw different prompts: sₙ = (1/k) Σⱼ (rₙⱼ − μⱼ).

    μⱼ is the mean over the G members that saw prompt j. So sₙ says how much better a member did than others on the same
    prompts, and Σ sₙ = 0.

    In expectation a step made of s is (1 − 1/G) of the step made of r, since μⱼ holds a G-th of the member's own
    reward. With antithetic pairs it is all of that step, because μⱼ cancels in a pair. z-scores hide a common factor.
    Differences that are only rounding count as none. A member with a reward that is not finite gets its own mean, which
    is not finite either, and counts in no μⱼ.

    Args:
      rewards: [N, k], the reward of every member on each prompt that it saw.
      seen: int [N, k], which prompts these were.

    Returns:
      float64 [N].

    Examples:
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
    """Scales rewards to mean 0 and variance 1: (r − mean) / (std + eps), with the population's std (ddof 0).

    Equal rewards carry no information. Their weights are exactly zero, and a warning is logged. Source: arXiv
    2509.24372, section 3.

    Args:
      rewards: [N], one reward for each member.
      eps: a small number above 0 that is added to the standard deviation.
      nan_rewards: what to do with a reward that is not finite. "error" refuses it. "worst" counts it as the lowest
        finite reward of the step.

    Returns:
      float32 [N].

    Raises:
      ValueError: `rewards` is not one number for each member; a reward is not finite and `nan_rewards` is "error"; no
        reward is finite; or `nan_rewards` is neither "error" nor "worst".

    Examples:
      >>> z_score(np.array([1.0, 3.0])).round(4).tolist()
      [-1.0, 1.0]
    """
    rewards = finite_rewards(rewards, nan_rewards=nan_rewards)
    if rewards.max() == rewards.min():
        logger.warning("all %d rewards are equal: this step does not move the weights", len(rewards))
        return np.zeros(len(rewards), np.float32)
    return ((rewards - rewards.mean()) / (rewards.std() + eps)).astype(np.float32)


def centered_rank(rewards: Rewards, *, nan_rewards: str = "error") -> np.ndarray:
    """Replaces rewards by their ranks, scaled to [−0.5, 0.5]. Equal rewards share their mean rank.

    Args:
      rewards: [N], one reward for each member.
      nan_rewards: what to do with a reward that is not finite. "error" refuses it. "worst" counts it as the lowest
        finite reward of the step.

    Returns:
      float32 [N].

    Raises:
      ValueError: `rewards` is not one number for each member; a reward is not finite and `nan_rewards` is "error"; no
        reward is finite; or `nan_rewards` is neither "error" nor "worst".

    Examples:
      >>> centered_rank(np.array([10.0, -5.0, 10.0])).tolist()
      [0.25, -0.5, 0.25]
    """
    rewards = finite_rewards(rewards, nan_rewards=nan_rewards)
    below, equal = ((rewards[:, None] > rewards).sum(1), (rewards[:, None] == rewards).sum(1))
    return ((below + (equal - 1) / 2) / max(len(rewards) - 1, 1) - 0.5).astype(np.float32)


SHAPINGS = {"z_score": z_score, "centered_rank": centered_rank}
