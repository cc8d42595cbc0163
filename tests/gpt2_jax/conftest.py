"""JAX's side: float64 for the tests that ask for it, and trainings in this process."""

import jax
import pytest

from gpt2_core.config import resolved
from gpt2_jax.mesh import format_mesh, parse_mesh


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def mesh_config(make_config):
    """A configuration as gpt2_jax.train.resolve leaves it."""

    def make(name="run", mesh=1, precision="float32", **overrides):
        settings = {"mesh": format_mesh(parse_mesh(mesh)), "attention": "xla", "norm_kernel": "xla"}
        return resolved(make_config(name, precision=precision, **settings | overrides))

    return make
