"""python -m es_jax.plan --config=configs/countdown.py:qwen2.5-7b --topology=v5e:4x4 [--config.group.field=value …]

Compiles the programs of a run for devices that are not here, and says whether it fits them: memory of a device and what
it is made of, what devices send each other, and a bound on the time of an iteration. Nothing is run, no chip and no
weights are needed; the shape of a model comes from its files, the hub, or a table of published shapes. The prompts are
taken to be as long as decode.max_prompt_tokens allows.

  --topology  v5e:4x4, v5p:4x4x4, v6e:8x8, tpu7x:2x2x1, v4:2x2x1; GPUs as slices × hosts × GPUs: h100:1x1x8, a100:1x2x8
  --slices    TPU slices of that shape, joined by the data-centre network
  --search    try meshes, members at once (with es.noise=low_rank) and slot counts, and print the best that fits
  --json      print one line of JSON

TPUs need libtpu (pip install 'es_jax[plan]'). For GPUs: pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt, in the
version of jax. The exit code is 0 when it fits, 1 when not, and 2 when the question has a mistake, or the compiler,
which has a process of its own, raises an error or ends without an answer.

With --json: fits, verdict, topology, devices, memory_bytes (of a device), mesh {groups, model}, slots, members_at_once,
bound_seconds (of an iteration), compile_seconds (of all), shape ("files" or "published"), and programs {name:
{peak_bytes (of a device, with what the run holds beside the program), own_bytes (of these the program's), host_bytes
(pinned, for one device), parts {name: bytes of a device}, collectives [{op, bytes, times, axes, groups, group_size}],
compile_seconds, runs (in an iteration), flops, memory_traffic_bytes, sent_bytes, bound_seconds (of one run, on one
device), error}}. What a program reads and writes in a device's memory, as it is compiled: perturb and update have
bytes, bytes_least (what must be moved), ratio (of the two), kernels and unknown_calls; decode has the same of a step of
all slots at all places (step_bytes, step_bytes_least, …), of one whose slots' lengths are spread evenly
(even_step_bytes, …), of a chunk of steps beside these, where it has a cache of its own (chunk_bytes, …), and of a
prefill (prefill_bytes, …). An unknown call is listed, and makes bytes and ratio null.
"""

import functools
import json
import logging
import os
import sys
from collections.abc import Callable

from absl import app, flags

from es_jax.core.flags import define_config, parser


def main(argv: list[str]) -> None:
    """Flags → plan."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: fields are set with --config.group.field=value", 2)
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("absl").setLevel(logging.WARNING)
    from es_jax.planning.plan import fields, make_plan, search, words
    from es_jax.planning.programs import find_shape
    from es_jax.planning.topology import topology
    from es_jax.training.config import freeze

    options = flags.FLAGS
    say = functools.partial(print, file=sys.stderr, flush=True)
    try:
        config = freeze(options.config)
        model, origin = find_shape(config)
        devices = topology(options.topology, slices=options.slices)
        plan = (search if options.search else make_plan)(config, model, devices, say=say)
    except (ValueError, OSError, RuntimeError) as error:  # the last is of the compiler
        if options.traceback:
            raise
        say(f"es_jax.plan: {error}")
        sys.exit(2)
    print(json.dumps(fields(plan) | {"shape": origin}) if options.json else words(plan))
    sys.exit(0 if plan.fits else 1)


def _with_status(parse: Callable[[list[str]], list[str]], argv: list[str]) -> list[str]:
    """As `parse`, with status 2 after a mistake: 1 is of a plan that does not fit."""
    try:
        return parse(argv)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            sys.exit(2)
        raise


def entry() -> None:
    """Define the flags, and run `main` with them."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX starts: chips that are here are left alone
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from es_jax.training.config import FIELDS

    define_config(FIELDS)
    flags.DEFINE_string("topology", None, "What to compile for: v5e:4x4, v5p:4x4x4, h100:1x1x8, …")
    flags.DEFINE_integer("slices", 1, "TPU slices of that shape.", lower_bound=1)
    flags.DEFINE_bool("search", False, "Try meshes, members at once and slot counts, print the best that fits.")
    flags.DEFINE_bool("json", False, "Print the plan as one line of JSON.")
    flags.DEFINE_bool("traceback", False, "Show where an error came from.")
    parse = parser("es_jax.plan", required=("config", "topology"), fields=FIELDS)
    app.run(main, flags_parser=lambda argv: _with_status(parse, argv))


if __name__ == "__main__":
    entry()
