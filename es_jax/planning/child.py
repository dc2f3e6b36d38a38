"""The process that compiles plans for `es_jax.planning.compiler`: python -m es_jax.planning.child."""

import dataclasses
import functools
import json
import os
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from es_jax.core.chips import Chip
from es_jax.models.config import RopeScaling, TransformerConfig
from es_jax.planning.plan import plan_here
from es_jax.planning.topology import topology
from es_jax.training.config import freeze


def main() -> None:
    """Answer each request, a line of standard input."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # keeps the compiler's output out of the answers

    def send(kind: str, value: Any) -> None:
        answers.write(json.dumps({kind: value}, default=sorted) + "\n")  # JSON lacks only the sets of a plan

    compiled: dict[Any, Any] = {}
    for line in sys.stdin:
        try:
            send("plan", _plan(json.loads(line), compiled, send))
        except (ValueError, OSError) as error:
            send("OSError" if isinstance(error, OSError) else "ValueError", str(error))
        except Exception as error:
            traceback.print_exc()
            send("RuntimeError", f"{type(error).__name__}: {error}")


def _plan(request: Mapping[str, Any], compiled: dict[Any, Any], send: Any) -> dict[str, Any]:
    devices = topology(request["topology"], slices=request["slices"])
    plan = plan_here(
        freeze(request["config"], begun=True),
        _model(request["model"]),
        dataclasses.replace(devices, chip=Chip(**request["chip"])),
        say=functools.partial(send, "said"),
        only=None if request["only"] is None else set(request["only"]),
        compiled=compiled,
        begin=functools.partial(send, "compiling"),
    )
    kept = ("mesh", "slots", "members_at_once", "programs")
    return {name: getattr(plan, name) for name in kept} | {"config": dataclasses.asdict(plan.config)}


def _model(fields: Mapping[str, Any]) -> TransformerConfig:
    """The shape, read back from the dicts and lists of JSON."""
    scaling = fields["rope_scaling"] and RopeScaling(**fields["rope_scaling"])
    patterns = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return TransformerConfig(**{**fields, **patterns, "rope_scaling": scaling})


if __name__ == "__main__":
    main()
