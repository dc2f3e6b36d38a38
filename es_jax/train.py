"""python -m es_jax.train --config=configs/countdown.py[:args] --workdir=DIR [--config.group.field=value …]

Trains a new run, or resumes the run in the directory. --config=countdown[:args] names the same file and works without a
checkout. With --branch_from=RUN@STEP a new run starts from a step of another run; without --config it takes that run's
fields (docs/resume.md). An error in the input ends it with one sentence; add --traceback to see where it was raised.
SIGTERM ends it with a checkpoint and status 0. With -v it logs how each parameter is sharded.

On several hosts, start the same command on each of them, with one --workdir on a shared file system. Add --distributed
if the environment describes the processes (Cloud TPU, GKE, SLURM, Open MPI); otherwise add
--coordinator_address=HOST:PORT, --num_processes and --process_id. See docs/launch.md.
"""

import json
import logging
import re
import sys
from pathlib import Path

from absl import app, flags
from ml_collections.config_dict import ConfigDict

from es_jax.core.flags import arguments_of, command, define_config, define_processes, parser
from es_jax.rundir.places import is_run


def main(argv: list[str]) -> None:
    """Flags → config → run()."""
    logging.getLogger("es_jax").setLevel(logging.DEBUG if flags.FLAGS.verbosity > 0 else logging.INFO)
    with command("es_jax.train", argv) as values:
        from jax.errors import JaxRuntimeError  # JAX starts only when the flags are valid

        from es_jax.core import processes
        from es_jax.training.loop import run

        try:
            result = run(values.config, str(values.workdir), branch_from=values.branch_from)
        except JaxRuntimeError as error:
            if values.traceback or "RESOURCE_EXHAUSTED" not in str(error):
                raise
            sys.exit(
                f"es_jax.train: out of memory ({str(error).splitlines()[0]}): lower decode.slots or "
                "decode.members_at_once and the same run continues; or lower decode.max_new_tokens in another "
                "--workdir; or use more devices. Finished steps are kept"
            )
        except KeyboardInterrupt:
            text = "interrupted; the same command continues from the last finished step of"
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


def _with_config(argv: list[str]) -> list[str]:
    """The command line. If it names a run to branch from and no config, that run's config is added; if that run is
    gone, the config of the resumed branch is added."""
    try:
        named = dict(
            re.findall(r"^--?(config|branch_from|workdir)[=\n](.*)$", "\n".join(arguments_of(argv)), flags=re.M)
        )
    except flags.Error:  # which the parser reports
        return argv
    if "branch_from" not in named or "config" in named:
        return argv
    parent = re.sub(r"@[0-9]+$", "", named["branch_from"])
    runs = (Path(parent).expanduser(), Path(named.get("workdir", parent)))  # its own config, since its parent is gone
    run = next(filter(is_run, runs), None)
    if run is None:
        sys.exit(
            f"es_jax.train: --branch_from is {named['branch_from']!r}: {parent} is not a run's directory; give RUN@STEP"
        )
    return [*argv, f"--config={run}"]


def _config_of_run(text: str) -> ConfigDict | None:
    """The fields of the run whose directory --config names; None if it names something else."""
    from es_jax.training.start import config_of

    return config_of(path) if is_run(path := Path(text).expanduser()) else None


def entry() -> None:
    from es_jax.training.config import FIELDS

    define_config(FIELDS, of_run=_config_of_run)
    flags.DEFINE_string("workdir", None, "The run's directory; a run in it is resumed.")
    flags.DEFINE_string("branch_from", None, "Start a new run from the weights of RUN@STEP, or of RUN's last step.")
    define_processes()
    flags.DEFINE_bool("json", False, "Print the result as one line of JSON.")
    flags.DEFINE_bool("traceback", False, "Show the traceback of an error.")
    parse = parser("es_jax.train", required=("config", "workdir"), fields=FIELDS)
    app.run(main, flags_parser=lambda argv: parse(_with_config(argv)))


if __name__ == "__main__":
    entry()
