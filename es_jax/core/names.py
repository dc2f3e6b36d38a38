"""Unknown, short and former names; errors suggest what the user may have meant."""

import difflib
from collections.abc import Iterable, Sequence

# Fields of a run and short names after the colon of --config: old → new. Only a run's config.json may use old names.
RENAMED = {
    "optim.anchor.drift": "optim.anchor.kappa",
    "optim.anchor.average": "optim.anchor.ema_decay",
    "mesh.pop": "mesh.groups",
    "decode.max_new": "decode.max_new_tokens",
    "decode.max_prompt": "decode.max_prompt_tokens",
    "train.keep": "train.keep_checkpoints",
    "evals.size": "evals.rows",
    "grpo.kl": "grpo.kl_coef",
    "pop": "population",
    "drift": "kappa",
}
# The value of a field in a config.json that was written before the field existed.
ADDED = {
    "es.generator": "threefry", "es.rank": 1, "es.vectors": "gaussian", "task.options": {}, "decode.temperature": 0.0,
}  # fmt: skip

SHORT = {  # names of fields after the colon of --config
    "method": "method",
    "target": "task.name",
    "population": "es.population",
    "sigma": "es.sigma",
    "noise": "es.noise",
    "rank": "es.rank",
    "prompts_per_member": "es.prompts_per_member",
    "antithetic": "es.antithetic",
    "rewards": "es.rewards",
    "n": "grpo.rollouts",
    "lr": "optim.learning_rate",
    "anchor": "optim.anchor.penalty",
    "kappa": "optim.anchor.kappa",
    "strength": "optim.anchor.strength",
    "steps": "train.steps",
    "seed": "train.seed",
    "data": "task.data_dir",
    "prompts": "task.train_size",
}
ALIASES = SHORT | {  # names of fields in other libraries
    "alpha": "optim.learning_rate",
    "lambda": "optim.anchor.strength",
    "epochs": "train.steps",
    "iterations": "train.steps",
    "batch_size": "task.prompts_per_step",
}


def unknown(kind: str, name: object, known: Iterable[str], *, near: Sequence[str] = ()) -> str:
    """One sentence about an unknown name: the nearest names (`near`, if the caller has them) and all known ones; or its
    new name.

    >>> unknown("task", "countdwon", ["countdown", "gsm8k"])
    "unknown task 'countdwon': did you mean 'countdown'? Known: countdown, gsm8k"
    """
    known = sorted(known)
    if (new := RENAMED.get(str(name))) in known:
        return f"{kind} {name!r} was renamed to {new!r}: use the new name"
    near = near or difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f": did you mean {' or '.join(map(repr, near))}?" if near else "."
    return f"unknown {kind} {name!r}{hint} Known: {', '.join(known)}"
