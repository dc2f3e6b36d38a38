"""Config files: Python files with a function get_config, either the user's or, by a short name, those that es_jax
includes."""

import contextlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import config_dict

from es_jax.core.names import unknown

_PACKAGE = Path(__file__).resolve().parents[1]


def folder() -> Path:
    """The folder of the included files: es_jax/configs in an installed wheel, or configs/ in the checkout."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def names() -> list[str]:
    """The short names of the included files: "countdown" is countdown.py."""
    return sorted(path.stem for path in folder().glob("*.py") if path.stem not in ("__init__", "common"))


def load(text: str) -> config_dict.ConfigDict:
    """What get_config of a config file returns, called with the text after a colon.

    Args:
      text: the path of a file or one of `names()`, optionally with a colon and get_config's argument.

    Raises:
      FileNotFoundError: there is no such file or name. ValueError: the file has no get_config, or that does not return
        a config. It also raises whatever the file raises.

    >>> load("lab:population=12").es.population
    12
    """
    name, colon, argument = text.partition(":")
    path = _find(name)
    with _neighbours(path):
        loader = importlib.machinery.SourceFileLoader("config_file", str(path))
        module = sys.modules[loader.name] = types.ModuleType(loader.name)
        module.__file__ = str(path)
        loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ValueError(f"{name} has no function get_config: add one that returns the config")
        config = module.get_config(argument) if colon else module.get_config()
    if not isinstance(config, Mapping | config_dict.ConfigDict):
        raise ValueError(f"get_config of {name} returned {config!r}: make it return a ConfigDict")
    return config if type(config) is config_dict.ConfigDict else config_dict.ConfigDict(config)


def _find(name: str) -> Path:
    """The file of a path or of a short name."""
    if name in names():
        return folder() / f"{name}.py"
    path = Path(name).expanduser().resolve()
    if path.is_file():
        return path
    if path.suffix != ".py" and path.name == name:
        raise FileNotFoundError(f"{unknown('config', name, names())}; or give a file, such as my_config.py")
    own = (
        f"--config={path.stem} is the one that es_jax includes"
        if path.stem in names()
        else f"Known: {', '.join(names())}"
    )
    raise FileNotFoundError(
        f"{name!r} is not a file: give a config file, or the name of one that es_jax includes. {own}"
    )


class _Finder:
    """Imports the package `configs` and its modules from one folder."""

    def __init__(self, folder: Path):
        self._folder = folder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        package, _, module = name.partition(".")
        file, inner = self._folder / f"{module or '__init__'}.py", None if module else [str(self._folder)]
        if package != "configs" or (module and not file.is_file()):
            return None
        if file.is_file():
            return importlib.util.spec_from_file_location(name, file, submodule_search_locations=inner)
        spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = inner
        return spec


@contextlib.contextmanager
def _neighbours(path: Path) -> Iterator[None]:
    """A context in which a config file can import other config files. It finds files of its own folder by the folder's
    name, and from everywhere the included files, as in `from configs.common import configure`; no wheel has a top-level
    package `configs`. In a user's folder named configs, its own files come first."""
    if path.parent != folder():
        sys.path.append(str(path.parent.parent))
    first = [_Finder(path.parent)] if path.parent.name == "configs" else []
    before = sys.meta_path[:]
    sys.meta_path[:] = [*first, *before, _Finder(folder())]  # type: ignore[list-item]
    try:
        yield
    finally:
        sys.meta_path[:] = before
