"""The Triton kernels, run by Pallas's interpreter: no GPU is needed to know that they compute a layer norm."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_core.config import ModelConfig
from gpt2_core.errors import UserError
from gpt2_jax import norm_kernels
from gpt2_jax.definition import define
from gpt2_jax.layers import _layer_norm
from gpt2_jax.model import Execution
from gpt2_jax.norm_kernels import add_layer_norm, choose_norm_kernel

EPSILON = 1e-5


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(norm_kernels, "INTERPRET", True)
    monkeypatch.setattr(norm_kernels, "BACKWARD_PROGRAMS", 3)  # 10 rows: the last program has fewer


def plain(x, branch, w, b):
    x = x if branch is None else x + branch
    return x, _layer_norm(x, w, b, EPSILON, jnp.float32)


def kernels(x, branch, w, b):
    return add_layer_norm(x, branch, w, b, EPSILON, jnp.float32)


@pytest.mark.long
@pytest.mark.parametrize("has_branch", [True, False])
@pytest.mark.parametrize(("D", "has_bias"), [(16, True), (20, False)])  # a power of two, and one that is padded to it
def test_the_kernels_give_the_sum_the_norm_and_all_gradients(D, has_branch, has_bias):
    generator = np.random.default_rng(0)
    x, branch = 30 + generator.standard_normal((2, 2, 5, D))  # far from zero, where a careless variance is wrong
    w, b = generator.standard_normal((2, D))
    arguments = [x, branch if has_branch else None, w, b if has_bias else None]
    arguments = [None if a is None else jnp.asarray(a, jnp.float32) for a in arguments]
    given = tuple(number for number, a in enumerate(arguments) if a is not None)

    def results(function):
        def loss(*arguments):
            total, normalized = function(*arguments)
            return jnp.sum(jnp.sin(total)) + jnp.sum(normalized**3), (total, normalized)

        return jax.value_and_grad(loss, argnums=given, has_aux=True)(*arguments)

    (_, ours), our_grads = results(kernels)
    (_, theirs), their_grads = results(plain)
    for a, b in zip((*ours, *our_grads), (*theirs, *their_grads), strict=True):
        assert a.dtype == b.dtype
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


def test_a_bfloat16_branch_gets_its_gradient_in_bfloat16_and_the_stream_in_float32():
    x, branch = jnp.ones((4, 16), jnp.float32), jnp.ones((4, 16), jnp.bfloat16)
    w = jnp.arange(16.0)
    outs, pullback = jax.vjp(lambda *a: add_layer_norm(*a, None, EPSILON, jnp.bfloat16), x, branch, w)
    assert [o.dtype for o in outs] == [jnp.float32, jnp.bfloat16]
    dx, dbranch, dw = pullback((jnp.arange(64.0).reshape(4, 16), jnp.ones((4, 16), jnp.bfloat16)))
    assert (dx.dtype, dbranch.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    assert (dbranch == dx.astype(jnp.bfloat16)).all()


@pytest.mark.long
def test_a_model_with_the_kernels_has_the_loss_and_gradients_of_one_without():
    config = ModelConfig(n_layer=2, n_head=2, n_embd=24, block_size=8, vocab_size=31)
    tokens = np.random.default_rng(0).integers(31, size=(2, 8))
    found = {}
    for kernel in ("xla", "triton"):
        definition = define(config, Execution("float32", norm=kernel))
        params = jax.jit(definition.initialize)(jax.random.key(0))
        loss = jax.value_and_grad(lambda p, definition=definition: definition.merge(p).loss(tokens, tokens))
        found[kernel] = jax.jit(loss)(params)
    assert float(found["triton"][0]) == pytest.approx(float(found["xla"][0]), rel=1e-6)
    for name, expected in found["xla"][1].items():
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found["triton"][1][name], expected, rtol=0, atol=2e-5 * scale, err_msg=name)


def test_a_kernel_that_is_not_here_is_an_error_and_auto_takes_another():
    assert choose_norm_kernel("auto", precision="bfloat16", norm="layernorm") == "xla"
    with pytest.raises(UserError, match="--norm_kernel triton: needs an NVIDIA GPU.* use --norm_kernel xla or auto"):
        choose_norm_kernel("triton", precision="bfloat16", norm="layernorm")


def test_triton_is_taken_where_it_can_do_the_work_and_only_there(monkeypatch):
    @dataclasses.dataclass
    class Gpu:
        device_kind: str = "NVIDIA H200"
        compute_capability: str = "9.0"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Gpu()])
    assert choose_norm_kernel("auto", precision="bfloat16", norm="layernorm") == "triton"
    assert choose_norm_kernel("auto", precision="float64", norm="layernorm") == "xla"
    assert choose_norm_kernel("auto", precision="bfloat16", norm="rmsnorm") == "xla"
    with pytest.raises(UserError, match="computes layer norms, and model.norm is rmsnorm"):
        choose_norm_kernel("triton", precision="bfloat16", norm="rmsnorm")
    monkeypatch.setattr(jax, "devices", lambda: [Gpu("NVIDIA T4", "7.5")])
    with pytest.raises(UserError, match="needs compute capability 8.0"):
        choose_norm_kernel("triton", precision="bfloat16", norm="layernorm")
