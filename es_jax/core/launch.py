"""The flags of a command that may be one of several processes, and how these come together."""

import contextlib

from absl import flags

_NAMES = ("coordinator_address", "num_processes", "process_id")


def define_flags() -> None:
    """Define --distributed, --coordinator_address, --num_processes, --process_id and --heartbeat_timeout."""
    flags.DEFINE_bool("distributed", False, "One of several processes, which the environment describes.")
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0; implies --distributed.")
    flags.DEFINE_integer("num_processes", None, "How many processes there are; implies --distributed.")
    flags.DEFINE_integer("process_id", None, "Which one this is, from 0; implies --distributed.")
    flags.DEFINE_integer("heartbeat_timeout", 60, "Seconds after which a silent process counts as dead.")


def processes(name: str) -> contextlib.AbstractContextManager:
    """Inside, the processes of the command `name` are together: as the flags say, the rest as the environment does."""
    from es_jax.core import hosts  # JAX starts only when the flags are good

    given = {flag: flags.FLAGS[flag].value for flag in _NAMES if flags.FLAGS[flag].value is not None}
    if not (given or flags.FLAGS["distributed"].value):
        return contextlib.nullcontext()
    return hosts.joined(name, heartbeat_timeout_seconds=flags.FLAGS["heartbeat_timeout"].value, **given)
