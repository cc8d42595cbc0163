"""JAX's side: float64 for the tests that ask for it, and trainings in this process."""

import jax
import pytest

from gpt2_core.config import format_mesh, parse_mesh


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def mesh_config(make_config):
    """A configuration as gpt2_jax.train.resolve leaves it."""

    def make(name="run", mesh=1, precision="float32", **overrides):
        resolved = {"mesh": format_mesh(parse_mesh(mesh)), "precision": precision, "attention": "xla"}
        return make_config(name, **resolved | {"norm_kernel": "xla"} | overrides)

    return make
