"""How the commands read their flags, and the flags of commands that may run as several processes."""

import contextlib
import functools
import itertools
import logging
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import app, flags
from ml_collections import config_dict

from es_jax.core import config_files, help_text
from es_jax.core.extras import require
from es_jax.core.fields import Fields
from es_jax.core.names import RENAMED

require("llm")
_REQUIRED = "must have a value other than None."  # absl's text for a flag that is not given
_BLANK = re.compile(r"(--?[\w.]+)\s+(\S.*)")  # between a flag and its value


def arguments_of(argv: Sequence[str], *, gnu: bool = False) -> list[str]:
    """The arguments after the program's name, with --flagfile replaced by the lines of that file. Such a line may have
    a space between a flag and its value. With `gnu`, flags may follow positional arguments. Raises flags.Error."""
    try:
        arguments = flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=gnu)
    except (flags.Error, OSError, ValueError) as error:
        raise flags.Error(f"--flagfile: {str(error).rpartition('flagfile: ')[2]}") from error
    lines = (None if text in argv else _BLANK.fullmatch(text) for text in arguments)  # the shell's own are whole
    parts = [part for line, text in zip(lines, arguments, strict=True) for part in (line.groups() if line else [text])]
    pairs = zip(parts, [*parts[1:], ""], strict=True)  # absl's -v takes a number; alone it is 1
    return ["-v=1" if part == "-v" and not re.fullmatch(r"-?\d", after) else part for part, after in pairs]


def parser(
    command: str,
    *,
    required: tuple[str, ...] = (),
    renamed: Mapping[str, str] | None = None,
    fields: Fields | None = None,
) -> Callable[[list[str]], list[str]]:
    """absl's flag parser for a command; an error in the flags or in a config file ends it with one sentence.

    The sentence begins with `command`, "es_jax.train". `required` are required flags, `renamed` maps flags of earlier
    versions to their current names, and `fields` are the fields of --config.
    """
    old_flags = {f"config.{old}": f"config.{new}" for old, new in RENAMED.items()} | dict(renamed or {})

    def parse(argv: list[str]) -> list[str]:
        flags.mark_flags_as_required(required)
        try:
            arguments = arguments_of(argv)
            if form := help_text.asked(arguments):
                print(help_text.text(command, fields, form, _config_in(arguments) if fields else None))
                sys.exit(0)
            options = _define_options(fields, arguments) if fields else []
            rest = flags.FLAGS([argv[0], *arguments])
            if fields:
                _set_fields(fields, options)
            return rest
        except flags.UnrecognizedFlagError as error:
            name = error.flagname
            if name in old_flags:
                sys.exit(f"{command}: --{name} was renamed to --{old_flags[name]}: use the new name")
            if fields and name.startswith("config."):
                sys.exit(f"{command}: {fields.unknown(name.removeprefix('config.'))}")
            sys.exit(f"{command}: {error}")
        except flags.Error as error:
            if "--traceback" in argv:
                raise
            missing = [f"--{flag}" for flag in flags.FLAGS if _is_missing(flags.FLAGS[flag])]
            if missing and str(error).endswith(_REQUIRED):
                verb, them = ("are", "them") if missing[1:] else ("is", "it")
                sys.exit(f"{command}: {' and '.join(missing)} {verb} missing: give {them}")
            sys.exit(f"{command}: {' '.join(str(error).split())}")

    return parse


def _config_in(arguments: Sequence[str]) -> Any:
    """The config that the last --config of the arguments names, or None."""
    named = re.findall(r"^--?config[=\n](.*)$", "\n".join(arguments), flags=re.MULTILINE)
    return flags.FLAGS["config"].parser.parse(named[-1]) if named else None


def _is_missing(flag: flags.Flag) -> bool:
    return flag.value is None and any(check.message.endswith(_REQUIRED) for check in flag.validators)


class _Reader(flags.ArgumentParser):
    """A flag's parser that calls a function; its errors become a sentence that begins with `prefix`."""

    def __init__(self, read: Callable[[str], Any], prefix: str = ""):
        self._read, self._prefix = read, prefix

    def parse(self, argument: str) -> Any:
        try:
            return self._read(argument)
        except Exception as error:  # a config file may raise anything
            text = error.args[0] if isinstance(error, KeyError) else str(error) or type(error).__name__
            raise flags.Error(f"{self._prefix}{text}") from error


def define_config(
    fields: Fields, *, of_run: Callable[[str], config_dict.ConfigDict | None] = lambda text: None
) -> None:
    """Define --config, a config file, and --config.FIELD for every field. If --config names a run's directory, `of_run`
    returns the config of that run, and otherwise None."""
    about = (
        f"A config file, or the name of an included one: {', '.join(config_files.names())}. Arguments follow a colon."
    )
    reader = _Reader(lambda text: of_run(text) or config_files.load(text), "--config: ")
    flags.DEFINE_flag(flags.Flag(reader, None, "config", None, about))
    for name, kind in fields.items():
        make = flags.MultiFlag if typing.get_origin(kind) is tuple else flags.Flag
        reader = _Reader(functools.partial(fields.parse, name))
        flags.DEFINE_flag(make(reader, None, f"config.{name}", None, "A field.", boolean=kind is bool))


def _define_options(fields: Fields, arguments: Sequence[str]) -> list[str]:
    """Define --config.task.options.NAME for every such name in the arguments, and return the defined ones."""
    for argument in arguments:
        flag = argument.lstrip("-").partition("=")[0]
        name = flag.removeprefix("config.")
        if argument.startswith("-") and flag != name and fields.of_option(name) and flag not in flags.FLAGS:
            reader = _Reader(functools.partial(fields.parse, name))
            flags.DEFINE_flag(flags.Flag(reader, None, flag, None, "An option."))
    defined = (flag.removeprefix("config.") for flag in flags.FLAGS if flag.startswith("config."))
    return [name for name in defined if fields.of_option(name)]


def _set_fields(fields: Fields, options: Sequence[str]) -> None:
    """Write the fields and options from the command line into the config of --config."""
    config, values = flags.FLAGS.config, {}
    for name in (*fields, *options):
        if (flag := flags.FLAGS[f"config.{name}"]).present:
            is_tuple = typing.get_origin(fields.get(name)) is tuple
            values[name] = tuple(itertools.chain(*flag.value)) if is_tuple else flag.value  # type: ignore[misc]
    with config.unlocked():
        for name, value in values.items():
            group, (*groups, last) = config, name.split(".")
            for part in groups:
                if part not in group:
                    group[part] = config_dict.ConfigDict()
                group = group[part]
            group[last] = value


def define_processes() -> None:
    """Define --distributed, --coordinator_address, --num_processes, --process_id and --heartbeat_timeout."""
    flags.DEFINE_bool("distributed", False, "This is one of several processes; the environment describes them.")
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0; implies --distributed.")
    flags.DEFINE_integer("num_processes", None, "The number of processes; implies --distributed.")
    flags.DEFINE_integer("process_id", None, "The number of this process, from 0; implies --distributed.")
    flags.DEFINE_integer(
        "heartbeat_timeout", 60, "Seconds without a sign of life after which a process counts as dead."
    )


@contextlib.contextmanager
def command(name: str, argv: list[str]) -> Iterator[flags.FlagValues]:
    """The context of a command's work. Inside it the processes are connected as the flags say, and for the rest as the
    environment says. A ValueError or OSError ends the command with one sentence that begins with `name`,
    "es_jax.train", unless --traceback asks for the traceback. `argv` is what absl leaves of the command line.
    """
    values = flags.FLAGS
    if len(argv) > 1:
        hint = ": fields are set with --config.group.field=value" if "config" in values else ""
        raise app.UsageError(f"unexpected arguments {argv[1:]}{hint}")
    logging.getLogger().setLevel(logging.WARNING)
    from es_jax.core import processes  # JAX starts only when the flags are valid

    names = [flag for flag in ("coordinator_address", "num_processes", "process_id") if flag in values]
    options = {flag: values[flag].value for flag in names if values[flag].value is not None}
    joined: contextlib.AbstractContextManager = contextlib.nullcontext()
    if options or (names and values["distributed"].value):
        joined = processes.joined(name, heartbeat_timeout_seconds=values["heartbeat_timeout"].value, **options)
    with joined:
        try:
            yield values
        except (ValueError, OSError) as error:
            if values["traceback"].value:
                raise
            sys.exit(f"{name}: {error}")
