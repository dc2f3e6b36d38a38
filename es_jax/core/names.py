"""Names that are not known, and names that were: errors say what the writer may have meant."""

import difflib
from collections.abc import Iterable

# Fields of a run, and short names after the colon of --config: old → new. Only a run's config.json may have old ones.
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


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """One sentence: what was not known, the nearest names to it, and all that are; or what it is called now.

    >>> unknown("task", "countdwon", ["countdown", "gsm8k"])
    "unknown task 'countdwon': did you mean 'countdown'? Known: countdown, gsm8k"
    """
    known = sorted(known)
    if (new := RENAMED.get(str(name))) in known:
        return f"{kind} {name!r} is called {new!r} now: use that name"
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f": did you mean {' or '.join(map(repr, near))}?" if near else "."
    return f"unknown {kind} {name!r}{hint} Known: {', '.join(known)}"
