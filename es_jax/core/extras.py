"""The pip extras that parts of es_jax need; a missing one is reported in a sentence that names it."""

import contextlib
import functools
import importlib.util
import os
import sys
from collections.abc import Iterator

# The import names of the packages in each extra.
_PACKAGES = {
    "llm": (
        "absl", "datasets", "flax", "gguf", "huggingface_hub", "jinja2", "ml_collections", "ml_dtypes", "orbax",
        "pyarrow", "safetensors", "tensorboardX", "tokenizers", "tqdm", "transformers",
    ),
    "lm_eval": ("lm_eval",),
    "report": ("jinja2", "matplotlib"),
    "reasoning_gym": ("reasoning_gym",),
    "wandb": ("wandb",),
}  # fmt: skip


def missing(extra: str) -> str | None:
    """A sentence about the first package of the extra that is not installed; None if all are."""
    name = next((name for name in _PACKAGES[extra] if importlib.util.find_spec(name) is None), None)
    return name and f"{name} is not installed: install the extra [{extra}] by pip install 'es_jax[{extra}]'"


@functools.cache
def require(extra: str) -> None:
    """Raises ImportError if a package of the extra is not installed. In a command of es_jax it raises SystemExit, and
    --help prints the docstring."""
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
    """A context around the first import of transformers: it hides the advice to install PyTorch, which is not needed
    here."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    own = name not in os.environ
    os.environ.setdefault(name, "1")
    try:
        yield
    finally:
        if own:
            del os.environ[name]
