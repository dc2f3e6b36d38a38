"""The text of a command's --help: its docstring, its flags, and each config field with its default and range."""

import dataclasses
import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from absl import flags

from es_jax.core.fields import Fields, type_names
from es_jax.core.names import SHORT

FORMS = {
    "--help": "help", "-help": "help", "-h": "help", "-?": "help", "--helpshort": "short", "-helpshort": "short",
    "--helpfull": "full", "-helpfull": "full",
}  # fmt: skip


def asked(arguments: Iterable[str]) -> str | None:
    """The kind of help that the arguments ask for: "help", "short" (without fields) or "full" (with absl's own
    flags)."""
    return next((FORMS[argument] for argument in arguments if argument in FORMS), None)


def text(command: str, fields: Fields | None, form: str, config: Any = None) -> str:
    """The help of a command, "es_jax.train", in one of the forms that `asked` returns. With a config, fields have its
    values."""
    module = sys.modules.get(command) or sys.modules["__main__"]
    parts = [inspect.cleandoc(module.__doc__ or command), "", *_flags(lambda name: not name.startswith("absl."))]
    if form == "full":
        parts += ["", "Flags of absl:", *_flags(lambda name: name.startswith("absl."))]
    if fields and form == "short":
        parts += ["", "--help also lists the fields of --config, --helpfull also the flags of absl."]
    elif fields:
        values = "their defaults" if config is None else "the values of --config, and the default where it differs"
        about = (
            f"Fields with {values}. Brackets give the allowed values, and the short name for use after the colon of "
            "--config:"
        )
        parts += ["", about, *_group(fields, fields.kind, "", config or {})]
    return "\n".join(parts)


def abouts(kind: type) -> dict[str, str]:
    """The texts about attributes in the docstring of a dataclass, by name; "" holds its first sentence.

    >>> class Pair:
    ...     '''Two numbers. They differ.
    ...
    ...     Attributes:
    ...       low, high: the numbers,
    ...         in order.
    ...     '''
    >>> abouts(Pair)
    {'': 'Two numbers.', 'low': 'the numbers, in order.', 'high': 'the numbers, in order.'}
    """
    head, _, tail = (inspect.getdoc(kind) or "").partition("\nAttributes:\n")
    _, *parts = re.split(r"^  (\w+(?:, \w+)*): ", tail, flags=re.MULTILINE)
    found = {"": " ".join(head.split("\n\n")[0].split()).partition(". ")[0].rstrip(".") + "."}
    for listed, about in zip(parts[::2], parts[1::2], strict=True):
        found |= dict.fromkeys(listed.split(", "), " ".join(about.split()))
    return found


def _group(fields: Fields, kind: Any, prefix: str, config: Any) -> Iterator[str]:
    """The lines of help for a group of fields and the groups in it. `config` has values of the group."""
    about, groups, short = abouts(kind), [], {field: name for name, field in SHORT.items()}
    yield from ("", f"{prefix.rstrip('.')}: {about['']}" if prefix else about[""])
    for field in dataclasses.fields(kind):
        name = prefix + field.name
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if dataclasses.is_dataclass(default):
            groups.append((type(default), f"{name}.", config.get(field.name) or {}))
            continue
        value = config.get(field.name, default)
        usual = "" if value == default else f", default {default}"
        rules = [*fields.rules.get(name, ()), *([f"short: {short[name]}"] if name in short else [])]
        ranges = f" [{'; '.join(rules)}]" if rules else ""
        yield f"  --config.{name}={value}  {type_names(fields[name])}{usual}"
        yield _wrapped(about.get(field.name, "") + ranges)
    for inner in groups:
        yield from _group(fields, *inner)


def _flags(keep: Any) -> Iterator[str]:
    """The lines of help for flags whose module passes `keep`."""
    modules = flags.FLAGS.flags_by_module_dict()
    own: Sequence[flags.Flag] = [flag for name in sorted(modules, key=_own) if keep(name) for flag in modules[name]]
    for flag in own:
        if flag.name.startswith("config."):
            continue
        if flag.boolean:
            yield f"  --[no]{flag.name}"
        else:
            default = "" if flag.default is None else f"={flag.default}"
            kind = getattr(flag.parser, "syntactic_help", "")
            yield f"  --{flag.name}{default}{kind and f'  {kind}'}"
        yield _wrapped(flag.help or "")


def _own(module: str) -> bool:
    """A sorting key: False, which comes first, for the flags of the command itself."""
    return module.startswith("es_jax.core.")


def _wrapped(line: str) -> str:
    width = min(shutil.get_terminal_size().columns, 120)
    return textwrap.fill(
        " ".join(line.split()), width, initial_indent=" " * 8, subsequent_indent=" " * 8, break_long_words=False
    )
