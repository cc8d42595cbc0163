import os
import re
import subprocess
import sys

import jax
import pytest
from jaxlib import xla_client

from gpt2_core.config import ModelConfig, dtype_of
from gpt2_core.errors import UserError
from gpt2_jax import runtime
from gpt2_jax.definition import define
from gpt2_jax.model import Execution

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


@pytest.mark.long
def test_a_program_from_the_cache_computes_the_very_bits_of_one_just_compiled(tmp_path):
    (compiled, hit), (loaded, hit_again) = (run(XDG_CACHE_HOME=str(tmp_path)) for _ in range(2))
    assert (hit, hit_again) == (False, True)
    assert compiled == loaded


def damaged(content: bytes, how: str) -> bytes:
    place = len(content) // 2
    return {
        "a flipped bit": content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :],
        "cut short": content[:place],
        "empty": b"",
    }[how]


@pytest.mark.long
@pytest.mark.parametrize("how", ["a flipped bit", "cut short", "empty"])
def test_a_damaged_program_is_compiled_again_and_replaced(tmp_path, how):
    compiled, _ = run(XDG_CACHE_HOME=str(tmp_path))
    files = sorted(tmp_path.rglob("*-cache"))
    assert files and not list(tmp_path.rglob("*.tmp"))
    for file in files:
        file.write_bytes(damaged(file.read_bytes(), how))
    assert run(XDG_CACHE_HOME=str(tmp_path)) == (compiled, False)
    assert run(XDG_CACHE_HOME=str(tmp_path)) == (compiled, True)


@pytest.mark.long
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


def test_deterministic_kernels_are_asked_of_xla_beside_the_users_flags(monkeypatch):
    code = (
        "import os, jax\nfrom gpt2_jax.runtime import configure\nconfigure('float32', deterministic=True)\n"
        "print(jax.jit(lambda x: x + 1)(1), os.environ['XLA_FLAGS'])"  # XLA ends at a flag that it doesn't know
    )
    env = os.environ | {"XLA_FLAGS": "--xla_cpu_enable_fast_math=false"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout == "2 --xla_cpu_enable_fast_math=false --xla_gpu_exclude_nondeterministic_ops=true\n", (
        done.stderr
    )


@pytest.mark.parametrize(("precision", "of_dots"), [("tf32", "HIGH"), ("float32", "HIGHEST"), ("bfloat16", "DEFAULT")])
def test_every_product_of_a_step_lowered_for_a_gpu_has_the_precision_asked_for(precision, of_dots):
    definition = define(ModelConfig(1, 2, 16, 16, 31), Execution(dtype_of(precision), "recompute"))
    tokens = jax.ShapeDtypeStruct((2, 16), "int32")
    loss_and_grads = jax.value_and_grad(lambda params, tokens: definition.merge(params).loss(tokens, tokens))
    with jax.default_matmul_precision(runtime.matmul_precision(precision)):
        traced = jax.jit(loss_and_grads).trace(dict(definition.abstract), tokens)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    found = [re.search(r"precision = \[(\w+), (\w+)\]", line) for line in text.splitlines() if "dot_general" in line]
    assert len(found) > 10
    assert {match.groups() if match else ("DEFAULT", "DEFAULT") for match in found} == {(of_dots, of_dots)}


def test_tf32_is_refused_on_older_gpus_too(monkeypatch):
    class Gpu:
        device_kind, compute_capability = "NVIDIA Tesla T4", "7.5"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Gpu])
    with pytest.raises(UserError, match="--precision tf32: .* JAX computes on NVIDIA Tesla T4 here; use float32"):
        runtime.resolve_precision("tf32")
    Gpu.compute_capability = "8.0"
    assert runtime.resolve_precision("tf32") == "tf32"
