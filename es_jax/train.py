"""python -m es_jax.train --config=configs/countdown.py[:args] --workdir=DIR [--config.group.field=value …]

Trains, or resumes the run that is in the directory. A mistake in the input ends it with one sentence; add
--traceback to see where it was noticed. SIGTERM ends it with a checkpoint and status 0.

On several hosts the same command runs on all, with one --workdir on a file system that they share, and --distributed
where the environment says who they are (Cloud TPU, GKE, SLURM, Open MPI), or --coordinator_address=HOST:PORT,
--num_processes and --process_id where it does not. See docs/launch.md.
"""

import json
import logging
import sys

from absl import app, flags

from es_jax.core.flags import command, define_config, define_processes, parser

_CONFIG = define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory; a run that is there is resumed.")
define_processes()
_JSON = flags.DEFINE_bool("json", False, "Print the result as one line of JSON.")
_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where an error came from.")


def main(argv: list[str]) -> None:
    """Flags → config → run()."""
    logging.getLogger("es_jax").setLevel(logging.INFO)
    from es_jax.core import processes  # JAX starts only when the flags are good

    with command("es_jax.train", argv):
        try:
            _train()
        except processes.Preempted as stop:
            processes.leave(f"es_jax.train: {stop}")


def _train() -> None:
    from jax.errors import JaxRuntimeError

    from es_jax.core import processes
    from es_jax.training.loop import run

    try:
        result = run(_CONFIG.value, str(_WORKDIR.value))
    except JaxRuntimeError as error:
        if _TRACEBACK.value or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.exit(
            f"es_jax.train: out of memory ({str(error).splitlines()[0]}): lower decode.slots, decode.max_new_tokens or "
            "decode.members_at_once, or use more devices; finished steps stay"
        )
    except KeyboardInterrupt:
        sys.exit(f"es_jax.train: interrupted; the same command goes on from the last finished step of {_WORKDIR.value}")
    if not processes.first():
        return
    if _JSON.value:
        fields = {name: value for name, value in vars(result).items() if name != "params"}
        print(json.dumps(fields | {"workdir": str(result.workdir)}))
    else:
        print(f"finished step {result.step}, mean reward {result.reward:.4f}; the run is in {result.workdir}")


def entry() -> None:
    app.run(main, flags_parser=parser("es_jax.train", required=("config", "workdir")))


if __name__ == "__main__":
    entry()
