"""The extras of pip that parts of es_jax need: one that is not installed is told in a sentence that names it."""

import contextlib
import functools
import importlib.util
import os
import sys
from collections.abc import Iterator

# What each extra brings, by the names that Python imports.
_PACKAGES = {
    "llm": (
        "absl", "datasets", "flax", "gguf", "huggingface_hub", "jinja2", "ml_collections", "ml_dtypes", "orbax",
        "pyarrow", "safetensors", "tensorboardX", "tokenizers", "tqdm", "transformers",
    ),
    "report": ("jinja2", "matplotlib"),
    "reasoning_gym": ("reasoning_gym",),
    "wandb": ("wandb",),
}  # fmt: skip


def missing(extra: str) -> str | None:
    """A sentence about the first package of the extra that is not installed; None where all are."""
    name = next((name for name in _PACKAGES[extra] if importlib.util.find_spec(name) is None), None)
    return name and f"{name} is not installed: this needs the extra [{extra}], pip install 'es_jax[{extra}]'"


@functools.cache
def require(extra: str) -> None:
    """Raises ImportError where a package of the extra is not installed; SystemExit in a command of es_jax, whose --help
    is then its docstring."""
    if (sentence := missing(extra)) is None:
        return
    main = sys.modules["__main__"]
    command = getattr(main, "__spec__", None)
    if command is not None and command.name.startswith("es_jax.") and command.name != "es_jax.__main__":
        if {"--help", "-h"} & set(sys.argv):
            print(f"{main.__doc__}\n{sentence}")
            sys.exit(0)
        sys.exit(f"{command.name}: {sentence}")
    raise ImportError(sentence)


@contextlib.contextmanager
def without_advice() -> Iterator[None]:
    """Around the first import of transformers, which advises to install PyTorch: nothing here needs it."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    own = name not in os.environ
    os.environ.setdefault(name, "1")
    try:
        yield
    finally:
        if own:
            del os.environ[name]
