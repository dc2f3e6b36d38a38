"""How the commands read their flags, and those of a command that may be one of several processes."""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from absl import app, flags

from es_jax.core.extras import require
from es_jax.core.names import RENAMED

require("llm")


def parser(
    command: str, *, required: tuple[str, ...] = (), renamed: Mapping[str, str] | None = None
) -> Callable[[list[str]], list[str]]:
    """absl's parser for a command with a --config file: it ends a mistake in the file or its arguments with a sentence.

    The sentence begins with `command`, "es_jax.train". `required` are flags, `renamed` flags of earlier versions and
    what they are called now.
    """
    old_flags = {f"config.{old}": f"config.{new}" for old, new in RENAMED.items()} | dict(renamed or {})

    def parse(argv: list[str]) -> list[str]:
        flags.mark_flags_as_required(required)
        for name, _, value in (argument.partition("=") for argument in argv):
            if name == "--config":  # a config file imports its neighbours: configs.common
                sys.path.append(str(Path(value.partition(":")[0]).resolve().parent.parent))
            elif new := name.startswith("--") and old_flags.get(name.removeprefix("--")):
                sys.exit(f"{command}: {name} is called --{new} now: use that name")
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


@contextlib.contextmanager
def command(name: str, argv: list[str]) -> Iterator[flags.FlagValues]:
    """What is around the work of a command. Inside, its processes are together: as the flags say, the rest as the
    environment does. A ValueError or OSError ends it with one sentence that begins with `name`, "es_jax.train", unless
    --traceback asks for the whole. `argv` is what absl leaves of the command line.
    """
    values = flags.FLAGS
    if len(argv) > 1:
        hint = ": fields are set with --config.group.field=value" if "config" in values else ""
        raise app.UsageError(f"unexpected arguments {argv[1:]}{hint}")
    logging.getLogger().setLevel(logging.WARNING)
    from es_jax.core import processes  # JAX starts only when the flags are good

    names = ("coordinator_address", "num_processes", "process_id")
    options = {flag: values[flag].value for flag in names if values[flag].value is not None}
    joined: contextlib.AbstractContextManager = contextlib.nullcontext()
    if options or values["distributed"].value:
        joined = processes.joined(name, heartbeat_timeout_seconds=values["heartbeat_timeout"].value, **options)
    with joined:
        try:
            yield values
        except (ValueError, OSError) as error:
            if values["traceback"].value:
                raise
            sys.exit(f"{name}: {error}")
