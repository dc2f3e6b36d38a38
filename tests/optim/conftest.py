import jax
import pytest


@pytest.fixture(autouse=True)
def promotion():
    """optax's own transformations need implicit promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield
