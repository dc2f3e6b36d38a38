"""Loads tasks and graders from outside the package, by FILE.py:NAME, package.module:NAME, or the name of an entry
point."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import re
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

GROUP = "es_jax.tasks"  # group of entry points
REFERENCE = re.compile(r"(?P<place>.+):(?P<name>[^\W\d]\w*(?:\.[^\W\d]\w*)*)")
PACKAGE = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*")
LABEL = re.compile(r"[\w.-]+")
OWN = ("es_jax", "__future__", *sys.stdlib_module_names)
HOW = "give your own task as FILE.py:NAME or package.module:NAME, or as an object to run and evaluate_run"

# Modules loaded from files, by name, with path and source, so that a worker process can load the same ones.
loaded: dict[str, tuple[str, bytes]] = {}


class _Loader(SourceFileLoader):
    """Loads a file from source that was read before; it leaves no compiled file."""

    def __init__(self, name: str, path: str, source: bytes):
        super().__init__(name, path)
        self._source = source

    def get_data(self, path: str) -> bytes:
        return self._source

    def path_stats(self, path: str) -> Mapping[str, Any]:
        raise OSError("compiled files are not read")


def is_reference(name: str) -> bool:
    """Whether a name is FILE.py:NAME or package.module:NAME.

    >>> [is_reference(name) for name in ("tasks/mine.py:Mine", "my_package.tasks:Mine", "countdown", "mine.py")]
    [True, True, False, False]
    """
    match = REFERENCE.fullmatch(name)
    return match is not None and (match["place"].endswith(".py") or PACKAGE.fullmatch(match["place"]) is not None)


def label(name: str) -> str:
    """The name of such a task in files and figures.

    >>> label("tasks/mine.py:Mine"), label("my_package.tasks:Mine"), label("countdown")
    ('mine.Mine', 'my_package.tasks.Mine', 'countdown')
    """
    if not is_reference(name):
        return name
    place, _, thing = name.rpartition(":")
    return f"{Path(place).stem if place.endswith('.py') else place}.{thing}"


def entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    """The entry points that installed packages register as tasks, by name."""
    return {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}


def load(name: str) -> Any:
    """The object that FILE.py:NAME or package.module:NAME names. Files and modules are run once, when they are loaded.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: there is no such module, loading it raised an error, or it has no such name.
    """
    place, _, thing = name.rpartition(":")
    path = Path(place).expanduser().resolve() if place.endswith(".py") else None
    if path and not path.is_file():
        raise FileNotFoundError(
            f"{name!r} cannot be loaded, since {path} does not exist: give the path relative to {Path.cwd()}, or an "
            "absolute path"
        )
    try:
        module = load_file(path) if path else _import(place)
    except Exception as error:
        raise ValueError(f"{name!r} cannot be loaded, since {place} raised {type(error).__name__}: {error}") from error
    try:
        return functools.reduce(getattr, thing.split("."), module)
    except AttributeError:
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        raise ValueError(
            f"{name!r}: {place} has no {thing!r}: choose a name that it defines, "
            f"{', '.join(own) or 'of which there is none'}"
        ) from None


def load_file(path: Path, source: bytes | None = None) -> types.ModuleType:
    """The module of a file, which may import files next to it. A changed file becomes a new module."""
    source = path.read_bytes() if source is None else source
    name = f"{path.stem}_{hashlib.sha256(str(path).encode() + source).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_loader(name, _Loader(name, str(path), source))
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    loaded[name] = str(path), source
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name], loaded[name]
        raise
    return module


def _import(name: str) -> types.ModuleType:
    if (here := os.getcwd()) not in sys.path:  # the path of a console script lacks the working directory
        sys.path.append(here)
    return importlib.import_module(name)


def source_digest(things: Iterable[Any]) -> str | None:
    """sha256 of the source of classes and functions from outside the package, and of the files next to theirs that they
    use; None if there are none."""
    sources: dict[str, str] = {}
    for thing in things:
        for one in thing.__mro__ if inspect.isclass(thing) else [thing]:
            for name, source in _sources(sys.modules.get(one.__module__)):
                sources[name] = hashlib.sha256(source).hexdigest()
    return hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest() if sources else None


def _sources(module: types.ModuleType | None) -> Iterator[tuple[str, bytes]]:
    """The name and source of a module's file, and of the files in its folder and below that it uses."""
    todo, seen, folder = [module], set(), None
    while todo:
        module = todo.pop()
        file = getattr(module, "__file__", None)
        if module is None or file is None or file in seen or not file.endswith(".py"):
            continue
        folder = folder or Path(file).parent
        beside = Path(file).is_relative_to(folder) and "site-packages" not in Path(file).relative_to(folder).parts
        if module.__name__.partition(".")[0] in OWN or not beside:
            continue
        seen.add(file)
        _, source = loaded.get(module.__name__) or (file, Path(file).read_bytes())
        yield str(Path(file).relative_to(folder)), source
        for value in list(vars(module).values()):
            name = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None)
            todo.append(sys.modules.get(name) if isinstance(name, str) else None)


def described(task: Any) -> tuple[str, dict[str, Any]]:
    """The name and the options by which an object can be made again: those of its class, if it holds nothing else;
    otherwise only a descriptive name."""
    kind = type(task)
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    plain, values = getattr(task, "name", kind.__name__), {}
    whole = set(getattr(task, "__dict__", {})) <= {field.name for field in fields}
    try:
        for field in fields:
            value = getattr(task, field.name)
            value = str(value) if isinstance(value, Path) else value
            if field.init and value != field.default:
                whole, values[field.name] = whole and json.loads(json.dumps(value)) == value, value
    except (TypeError, ValueError):  # a value that JSON lacks, or an array
        whole = False
    place = kind.__module__
    if place in loaded or place == "__main__":
        path = Path(loaded[place][0] if place in loaded else getattr(sys.modules[place], "__file__", None) or "")
        place = str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
    name = f"{place}:{kind.__qualname__}"
    if whole and is_reference(name) and place.partition(".")[0] not in sys.stdlib_module_names:
        return name, values
    if not LABEL.fullmatch(str(plain)):
        raise ValueError(
            f"task {plain!r} gives its name to files of the run: use only letters, digits, '-', '_' and '.' in it"
        )
    return str(plain), {}
