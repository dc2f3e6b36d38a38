"""How the commands read their flags, and those of a command that may be one of several processes."""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

from absl import flags

from es_jax.core.extras import require
from es_jax.core.names import RENAMED

require("llm")

_NAMES = ("coordinator_address", "num_processes", "process_id")


def parser(command: str, *, required: tuple[str, ...] = ()) -> Callable[[list[str]], list[str]]:
    """absl's parser for a command with a --config file: it ends a mistake in the file or its arguments with a sentence.

    Args:
      command: what the sentence begins with, "es_jax.train".
      required: flags that must be given, which a config file cannot say of itself.
    """

    def parse(argv: list[str]) -> list[str]:
        flags.mark_flags_as_required(required)
        for name, _, value in (argument.partition("=") for argument in argv):
            if name == "--config":  # a config file imports its neighbours: configs.common
                sys.path.append(str(Path(value.partition(":")[0]).resolve().parent.parent))
            elif new := name.startswith("--config.") and RENAMED.get(name.removeprefix("--config.")):
                sys.exit(f"{command}: {name} is called --config.{new} now: use that name")
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            sys.exit(f"{command}: {str(error).splitlines()[-1].strip() or error}")
        except (AttributeError, ImportError, KeyError, SyntaxError, TypeError, ValueError) as error:
            sys.exit(f"{command}: --config: {error}")

    return parse


def define_config() -> flags.FlagHolder:
    """Define --config, a config file."""
    from ml_collections import config_flags

    return config_flags.DEFINE_config_file("config", None, "A config file, and after a colon its arguments.")


def define_processes() -> None:
    """Define --distributed, --coordinator_address, --num_processes, --process_id and --heartbeat_timeout."""
    flags.DEFINE_bool("distributed", False, "One of several processes, which the environment describes.")
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0; implies --distributed.")
    flags.DEFINE_integer("num_processes", None, "How many processes there are; implies --distributed.")
    flags.DEFINE_integer("process_id", None, "Which one this is, from 0; implies --distributed.")
    flags.DEFINE_integer("heartbeat_timeout", 60, "Seconds after which a silent process counts as dead.")


def joined_processes(name: str) -> contextlib.AbstractContextManager:
    """Inside, the processes of the command `name` are together: as the flags say, the rest as the environment does."""
    from es_jax.core import processes  # JAX starts only when the flags are good

    options = {flag: flags.FLAGS[flag].value for flag in _NAMES if flags.FLAGS[flag].value is not None}
    if not (options or flags.FLAGS["distributed"].value):
        return contextlib.nullcontext()
    return processes.joined(name, heartbeat_timeout_seconds=flags.FLAGS["heartbeat_timeout"].value, **options)
