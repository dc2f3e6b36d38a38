"""The shape of a model, without its weights."""

from es_jax.models.config import TransformerConfig
from es_jax.models.known_configs import PUBLISHED, published
from es_jax.weights.model import config_only


def find_shape(source: str) -> tuple[TransformerConfig, str]:
    """The config of a model, and where it was found: "files" (a folder with a config.json, a .gguf, the hub or its
    cache), or "published" (`es_jax.models.known_configs`) where a hub name cannot be had.

    Raises:
      ValueError: an empty source, or a config that asks for what is not implemented.
      FileNotFoundError, PermissionError: it is not here, not on the hub or not to be had, and not in the table.
    """
    if not source:
        raise ValueError("model.source is empty: set it to a Hugging Face folder, a .gguf file or a hub name")
    try:
        return config_only(source), "files"
    except (FileNotFoundError, PermissionError) as error:
        found = published(source)
        if found is None:
            raise type(error)(f"{error}; shapes known without it: {', '.join(PUBLISHED)}") from error
        return found, "published"
