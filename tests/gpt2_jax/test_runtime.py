import os
import subprocess
import sys

from jaxlib import xla_client

from gpt2_jax import runtime

PROGRAM = """
import jax, jax.numpy as jnp
from gpt2_jax.runtime import configure
configure("float32")
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None)
step = jax.jit(lambda x: jnp.tanh(x @ x.T).sum(axis=0))
print(step(jnp.linspace(-3, 3, 900).reshape(30, 30)).tobytes().hex(), bool(hits))
"""


def run(**env) -> tuple[str, bool]:
    """What the program computes, and whether a part of it came from the cache."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    inherited |= {"JAX_PLATFORMS": "cpu", "JAX_LOGGING_LEVEL": "WARNING"} | env
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=inherited, check=True)
    assert done.stderr == ""
    bits, from_cache = done.stdout.split()
    return bits, from_cache == "True"


def test_a_program_from_the_cache_computes_the_very_bits_of_one_just_compiled(tmp_path):
    (compiled, hit), (loaded, hit_again) = (run(XDG_CACHE_HOME=str(tmp_path)) for _ in range(2))
    assert (hit, hit_again) == (False, True)
    assert compiled == loaded


def test_the_users_own_cache_wins_and_a_home_that_cant_be_written_is_none(tmp_path):
    (tmp_path / "file").touch()
    run(XDG_CACHE_HOME=str(tmp_path / "home"), JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))
    assert not (tmp_path / "home").exists()
    run(XDG_CACHE_HOME=str(tmp_path / "file"))


def test_jax_gets_most_of_a_gpus_memory_unless_the_user_says_how_much(monkeypatch):
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    for theirs in (None, *names):
        for name in names:
            monkeypatch.setenv(name, "0.5")  # restored at the end, which what configure sets wouldn't be
            if name != theirs:
                monkeypatch.delenv(name)
        runtime._take_gpu_memory()
        found = xla_client.generate_pjrt_gpu_plugin_options()["memory_fraction"]
        assert found == (0.92 if theirs is None else 0.5)
