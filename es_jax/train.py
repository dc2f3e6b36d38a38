"""python -m es_jax.train --config=configs/countdown.py[:args] --workdir=DIR [--config.group.field=value …]

Trains, or resumes the run that is in the directory. --config=countdown[:args] is the same file, without a checkout too.
With --branch_from=RUN@STEP a new run starts from a step of another one, with that run's fields where --config is left
out (docs/resume.md). A mistake in the input ends it with one sentence; add --traceback to see where it was noticed.
SIGTERM ends it with a checkpoint and status 0. With -v it tells where each parameter lives on the devices.

On several hosts the same command runs on all, with one --workdir on a file system that they share, and --distributed
where the environment says who they are (Cloud TPU, GKE, SLURM, Open MPI), or --coordinator_address=HOST:PORT,
--num_processes and --process_id where it does not. See docs/launch.md.
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
        from jax.errors import JaxRuntimeError  # JAX starts only when the flags are good

        from es_jax.core import processes
        from es_jax.training.loop import run

        try:
            result = run(values.config, str(values.workdir), branch_from=values.branch_from)
        except JaxRuntimeError as error:
            if values.traceback or "RESOURCE_EXHAUSTED" not in str(error):
                raise
            sys.exit(
                f"es_jax.train: out of memory ({str(error).splitlines()[0]}): lower decode.slots or "
                "decode.members_at_once, with which the same run goes on, or in another --workdir "
                "decode.max_new_tokens, or use more devices; finished steps stay"
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


def _with_config(argv: list[str]) -> list[str]:
    """The command line, with the config of the run to branch from where it names that run and no config; where that
    is gone, of the branch that goes on."""
    try:
        named = dict(
            re.findall(r"^--?(config|branch_from|workdir)[=\n](.*)$", "\n".join(arguments_of(argv)), flags=re.M)
        )
    except flags.Error:  # which the parser says
        return argv
    if "branch_from" not in named or "config" in named:
        return argv
    parent = re.sub(r"@[0-9]+$", "", named["branch_from"])
    runs = (Path(parent).expanduser(), Path(named.get("workdir", parent)))  # its own config, where its parent is gone
    run = next(filter(is_run, runs), None)
    if run is None:
        sys.exit(
            f"es_jax.train: --branch_from is {named['branch_from']!r}: {parent} is not a run's directory; give RUN@STEP"
        )
    return [*argv, f"--config={run}"]


def _config_of_run(text: str) -> ConfigDict | None:
    """The fields of the run whose directory a --config names; None where it names something else."""
    from es_jax.training.start import config_of

    return config_of(path) if is_run(path := Path(text).expanduser()) else None


def entry() -> None:
    from es_jax.training.config import FIELDS

    define_config(FIELDS, of_run=_config_of_run)
    flags.DEFINE_string("workdir", None, "The run's directory; a run that is there is resumed.")
    flags.DEFINE_string("branch_from", None, "RUN@STEP, or RUN for its last step: start a new run from its weights.")
    define_processes()
    flags.DEFINE_bool("json", False, "Print the result as one line of JSON.")
    flags.DEFINE_bool("traceback", False, "Show where an error came from.")
    parse = parser("es_jax.train", required=("config", "workdir"), fields=FIELDS)
    app.run(main, flags_parser=lambda argv: parse(_with_config(argv)))


if __name__ == "__main__":
    entry()
