"""python -m es_jax.train --config=configs/countdown.py[:args] --workdir=DIR [--config.group.field=value …]

Trains, or resumes the run that is in the directory. --config=countdown[:args] is the same file, without a checkout too.
A mistake in the input ends it with one sentence; add --traceback to see where it was noticed. SIGTERM ends it with a
checkpoint and status 0. With -v it tells where each parameter lives on the devices.

On several hosts the same command runs on all, with one --workdir on a file system that they share, and --distributed
where the environment says who they are (Cloud TPU, GKE, SLURM, Open MPI), or --coordinator_address=HOST:PORT,
--num_processes and --process_id where it does not. See docs/launch.md.
"""

import json
import logging
import sys

from absl import app, flags

from es_jax.core.flags import command, define_config, define_processes, parser


def main(argv: list[str]) -> None:
    """Flags → config → run()."""
    logging.getLogger("es_jax").setLevel(logging.DEBUG if flags.FLAGS.verbosity > 0 else logging.INFO)
    with command("es_jax.train", argv) as values:
        from jax.errors import JaxRuntimeError  # JAX starts only when the flags are good

        from es_jax.core import processes
        from es_jax.training.loop import run

        try:
            result = run(values.config, str(values.workdir))
        except JaxRuntimeError as error:
            if values.traceback or "RESOURCE_EXHAUSTED" not in str(error):
                raise
            sys.exit(
                f"es_jax.train: out of memory ({str(error).splitlines()[0]}): lower decode.slots, "
                "decode.max_new_tokens or decode.members_at_once, or use more devices; finished steps stay"
            )
        except KeyboardInterrupt:
            text = "interrupted; the same command goes on from the last finished step of"
            sys.exit(f"es_jax.train: {text} {values.workdir}")
        except processes.Preempted as stop:
            processes.leave(f"es_jax.train: {stop}")
        if not processes.first():
            return
        if values.json:
            fields = {name: value for name, value in vars(result).items() if name != "params"}
            print(json.dumps(fields | {"workdir": str(result.workdir)}))
        else:
            print(f"finished step {result.step}, mean reward {result.reward:.4f}; the run is in {result.workdir}")


def entry() -> None:
    from es_jax.training.config import FIELDS

    define_config(FIELDS)
    flags.DEFINE_string("workdir", None, "The run's directory; a run that is there is resumed.")
    define_processes()
    flags.DEFINE_bool("json", False, "Print the result as one line of JSON.")
    flags.DEFINE_bool("traceback", False, "Show where an error came from.")
    app.run(main, flags_parser=parser("es_jax.train", required=("config", "workdir"), fields=FIELDS))


if __name__ == "__main__":
    entry()
