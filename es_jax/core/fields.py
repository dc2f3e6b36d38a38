"""The fields of a config, a dataclass of dataclasses: their full names, their types, and values for them."""

import dataclasses
import difflib
import json
import typing
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from es_jax.core.names import ALIASES, unknown

TUPLES: dict[type, str] = {str: "names", int: "whole numbers"}
TYPES: dict[type, str] = {type(None): "None", bool: "true or false", list: "a list"}
BOOLS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


class Fields(dict[str, Any]):
    """The types of all fields by their full names, "optim.anchor.kappa".

    Attributes:
      kind: the dataclass that has these fields.
      rules: full name → what its checks require of a value, for --help.
    """

    kind: Any = None
    rules: Mapping[str, Sequence[str]] = MappingProxyType({})

    @classmethod
    def of(cls, kind: Any, prefix: str = "", *, rules: Mapping[str, Sequence[str]] = MappingProxyType({})) -> "Fields":
        fields = cls()
        fields.kind, fields.rules = kind, rules
        for name, hint in typing.get_type_hints(kind).items():
            group = dataclasses.is_dataclass(hint)
            fields.update(cls.of(hint, f"{prefix}{name}.") if group else {prefix + name: hint})
        return fields

    def of_option(self, name: str) -> str | None:
        """The field of free options to which a name belongs: "task.options" for "task.options.size"."""
        field = next((f for f in self if name.startswith(f"{f}.")), None)
        return field if field and typing.get_origin(self[field]) is Mapping else None

    @property
    def groups(self) -> list[str]:
        return sorted({name[:at] for name in self for at, letter in enumerate(name) if letter == "."})

    def near(self, name: str) -> list[str]:
        """Up to three fields that a name may mean: fields with exactly that last part, else similar fields and
        groups."""

        def likeness(field: str) -> float:
            pairs = ((name, field), (last, field.rpartition(".")[2]))
            return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

        last = name.rpartition(".")[2]
        same = [field for field in self if last == field.rpartition(".")[2]]
        if ALIASES.get(last) in self:
            same = [ALIASES[last], *same]
        like = sorted((field for field in (*self.groups, *self) if likeness(field) >= 0.6), key=likeness, reverse=True)
        return list(dict.fromkeys(same or like))[:3]

    def unknown(self, name: str) -> str:
        """One sentence about an unknown field: the nearest fields of all groups, and all fields of its own group."""
        if inside := [field for field in self if field.startswith(f"{name}.")]:
            return f"{name} is a group of fields: set {' or '.join(inside)}"
        start = max((f"{group}." for group in self.groups if name.startswith(f"{group}.")), key=len, default="")
        known = {start + field[len(start) :].partition(".")[0] for field in self if field.startswith(start)}
        return unknown("config field", name, known, near=self.near(name))

    def parse(self, name: str, text: str) -> Any:
        """The text of a command line as a value of a field; "None" if the field may be None. Raises ValueError for text
        of another type.

        >>> fields = Fields({"rate": float | None, "steps": tuple[int, ...]})
        >>> fields.parse("rate", "0.9"), fields.parse("rate", "None"), fields.parse("steps", "(3, 5)")
        (0.9, None, (3, 5))
        """
        if self.of_option(name):
            return _json(text)
        hint = self[name]
        if typing.get_origin(hint) is Mapping:
            if not isinstance(value := {} if text == "None" else _json(text), dict):
                raise ValueError(f"{name} is {text!r}: it must be a JSON object; or set {name}.NAME=VALUE")
            return value
        kinds, is_tuple = typing.get_args(hint) or (hint,), typing.get_origin(hint) is tuple
        if text == "None" and (is_tuple or type(None) in kinds):
            return () if is_tuple else None
        try:
            if is_tuple:
                items = (item.strip(" '\"") for item in text.strip("()[] ").split(","))
                return tuple(kinds[0](item) for item in items if item)
            return BOOLS[text.lower()] if kinds[0] is bool else kinds[0](text)
        except (KeyError, ValueError):
            raise ValueError(f"{name} is {text!r}: it must be {type_names(hint)}") from None

    def build(self, kind: Any, values: Any) -> Any:
        """The dataclass made from nested dicts. Raises one ValueError that lists every unknown field and every value of
        another type, or what the dataclasses raise."""
        problems: list[str] = []
        build = self._checked(values, kind, "", problems)
        if problems:
            raise ValueError("; ".join(problems))
        return build()

    def _checked(self, value: Any, hint: Any, name: str, problems: list[str]) -> Callable[[], Any]:
        """A function that makes the field or group; call it only when no field has a problem."""
        allowed = typing.get_args(hint) or (hint,)
        if dataclasses.is_dataclass(hint):
            if isinstance(value, Mapping):
                return self._checked_group(value, hint, name and f"{name}.", problems)
            problems.append(f"{name or 'the config'} is {value!r}: it must be a group of fields")
        elif typing.get_origin(hint) is tuple:
            if not isinstance(value, list | tuple) or not all(type(item) is allowed[0] for item in value):
                problems.append(f"{name} is {value!r}: it must be {type_names(hint)}")
            return lambda: tuple(value)
        elif typing.get_origin(hint) is Mapping:
            return self._checked_options(value, name, problems)
        elif float in allowed and type(value) is int:
            value = float(value)
        elif not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            problems.append(f"{name} is {value!r}: it must be {type_names(hint)}")
        return lambda: value

    def _checked_options(self, value: Any, name: str, problems: list[str]) -> Callable[[], Any]:
        if not isinstance(value, Mapping):
            problems.append(f"{name} is {value!r}: it must be a group of options by name")
            return lambda: value
        for option, content in value.items():
            try:
                json.dumps(content)
            except (TypeError, ValueError):
                wanted = "text, a number, true or false, None, or a list or mapping of these"
                problems.append(f"{name}.{option} is {content!r}: it must be {wanted}")
        return lambda: json.loads(json.dumps(dict(value)))  # as read back from a run's config.json

    def _checked_group(self, values: Mapping, kind: Any, prefix: str, problems: list[str]) -> Callable[[], Any]:
        hints, fields = typing.get_type_hints(kind), {}
        for name, value in values.items():
            if name in hints:
                fields[name] = self._checked(value, hints[name], f"{prefix}{name}", problems)
            else:
                problems.append(self.unknown(f"{prefix}{name}"))
        return lambda: kind(**{name: make() for name, make in fields.items()})


def _json(text: str) -> Any:
    """A text parsed as JSON, or as True, False or None of Python; else the text itself."""
    try:
        return {"None": None, "True": True, "False": False}[text]
    except KeyError:
        pass
    try:
        return json.loads(text)
    except ValueError:
        return text


def type_names(hint: Any) -> str:
    """The name of a type in messages.

    >>> type_names(float | None)
    'float or None'
    """
    if typing.get_origin(hint) is Mapping:
        return "a JSON object"
    kinds = typing.get_args(hint) or (hint,)
    if typing.get_origin(hint) is tuple:
        return f"a tuple of {TUPLES[kinds[0]]}"
    return " or ".join(TYPES.get(kind, kind.__name__) for kind in kinds)
