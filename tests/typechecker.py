"""What checks every annotation of es_jax as the tests run: tests/conftest.py installs it."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # a whole number is a float
