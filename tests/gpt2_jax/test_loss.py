import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gpt2_jax.loss
from gpt2_core.config import IGNORE_INDEX
from gpt2_jax.loss import log_probabilities, summed_cross_entropy
from gpt2_jax.mesh import parse_mesh
from gpt2_jax.sharding import make_mesh, sharding

B, T, D, V, PADDED = 8, 13, 16, 100, 128


def inputs(dtype=np.float64):
    generator = np.random.default_rng(0)
    x_BTD = generator.standard_normal((B, T, D)).astype(dtype)
    head_VD = generator.standard_normal((PADDED, D)).astype(dtype)  # padding rows that aren't zero must not matter
    targets_BT = generator.integers(0, V, (B, T))
    targets_BT[0, 3:] = IGNORE_INDEX
    targets_BT[5] = IGNORE_INDEX
    return x_BTD, head_VD, targets_BT


def by_torch(x_BTD, head_VD, targets_BT):
    """The loss and both gradients, by PyTorch's own cross-entropy over the real vocabulary."""
    x, head = (torch.from_numpy(a).requires_grad_() for a in (x_BTD, head_VD))
    logits = (x @ head[:V].T).flatten(0, 1)
    loss = F.cross_entropy(logits, torch.from_numpy(targets_BT).flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    (loss / 7).backward()
    return loss.item() / 7, x.grad.numpy(), head.grad.numpy()


@pytest.mark.parametrize("mesh", ["1", "8", "fsdp=8", "tensor=2", "data=2,fsdp=2,tensor=2"])
@pytest.mark.parametrize("chunk_bytes", [1 << 30, 4 * 128 * 8 * 5, 1], ids=["one chunk", "a few", "one place each"])
def test_loss_and_gradients_are_pytorchs_in_any_chunks_on_any_mesh(monkeypatch, mesh, chunk_bytes):
    monkeypatch.setattr(gpt2_jax.loss, "CHUNK_BYTES", chunk_bytes)
    x_BTD, head_VD, targets_BT = inputs()
    with jax.enable_x64(True):
        devices = make_mesh(parse_mesh(mesh))
        places = [sharding(devices, axes) for axes in (("batch", None, None), ("vocab", "embed"), ("batch", None))]
        with jax.set_mesh(devices):
            x, head, targets = map(jax.device_put, (x_BTD, head_VD, targets_BT), places)
            of_both = jax.jit(
                jax.value_and_grad(lambda x, head: summed_cross_entropy(x, head, targets, V) / 7, argnums=(0, 1))
            )
            loss, (by_x, by_head) = jax.tree.map(np.asarray, of_both(x, head))
            alone = float(jax.jit(lambda x, head: summed_cross_entropy(x, head, targets, V) / 7)(x, head))
    expected_loss, expected_by_x, expected_by_head = by_torch(x_BTD, head_VD, targets_BT)
    assert abs(loss - expected_loss) <= 1e-13 * expected_loss and abs(alone - expected_loss) <= 1e-13 * expected_loss
    assert np.abs(by_x - expected_by_x).max() <= 1e-13 * np.abs(expected_by_x).max()
    assert np.abs(by_head - expected_by_head).max() <= 1e-13 * np.abs(expected_by_head).max()


def test_bfloat16_products_add_up_in_float32():
    """The loss is float32, the head's gradient has the head's dtype, and neither is off by more than bfloat16 operands
    make it."""
    x_BTD, head_VD, targets_BT = inputs(np.float32)
    x = jnp.asarray(x_BTD, jnp.bfloat16)
    loss, (by_x, by_head) = jax.value_and_grad(
        lambda x, head: summed_cross_entropy(x, head, targets_BT, V) / 7, argnums=(0, 1)
    )(x, jnp.asarray(head_VD))
    assert (loss.dtype, by_x.dtype, by_head.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    rounded = np.asarray(x, np.float32), np.asarray(jnp.asarray(head_VD, jnp.bfloat16), np.float32)
    expected = by_torch(*rounded, targets_BT)
    assert abs(loss - expected[0]) < 1e-5 * expected[0]
    for ours, theirs in ((by_x, expected[1]), (by_head, expected[2])):
        assert np.linalg.norm(np.asarray(ours, np.float32) - theirs) < 4e-3 * np.linalg.norm(theirs)


def test_small_probabilities_are_not_lost_after_the_targets_minus_one():
    """As in a trained model: rows of the head that are much alike, and tokens that hardly ever come. Each row of
    dlogits loses next to nothing, but always in one direction, and a bias's gradient is the sum over them."""
    rows, width, common = 512, 128, 90
    generator = np.random.default_rng(0)
    alike = 0.13 * generator.choice([-1, 1], width)
    head_VD = (0.06 * generator.standard_normal((384, width)) + alike).astype(np.float32)
    p_RV = 1e-7 * generator.lognormal(size=(rows, 384))
    p_RV[:, 257:] = 0
    p_RV[:, 32 : 32 + common] = generator.dirichlet(np.full(common, 0.3), rows)
    p_RV[np.arange(rows), 32 + generator.integers(0, common, rows)] -= p_RV.sum(axis=1)
    dlogits_RV = p_RV.astype(np.float32)
    dx = jax.jit(gpt2_jax.loss._times_head)(dlogits_RV[None], head_VD)[0]
    expected = dlogits_RV.astype(np.float64) @ head_VD
    error = np.linalg.norm(np.asarray(dx, np.float64).sum(0) - expected.sum(0)) / np.linalg.norm(expected.sum(0))
    assert error < 1e-6


def test_a_gpu_is_given_the_heads_gradient_as_one_product(monkeypatch):
    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (((2, 8, D), jnp.bfloat16), ((PADDED * 2, D), jnp.float32))]
    targets = jnp.zeros((2, 8), jnp.int32)

    def lowered(platform):
        grads = jax.jit(jax.grad(lambda x, head: summed_cross_entropy(x, head, targets, V), argnums=(0, 1)))
        return grads.trace(*shapes).lower(lowering_platforms=(platform,)).as_text()

    on_gpu, on_cpu = lowered("cuda"), lowered("cpu")
    monkeypatch.setattr(gpt2_jax.loss, "_times_head", gpt2_jax.loss._at_once)
    assert lowered("cuda").count("dot_general") == on_gpu.count("dot_general") == 3
    assert lowered("cuda").count("while") == on_gpu.count("while") < on_cpu.count("while")


def test_one_pass_over_the_logits_gives_what_two_give(x64):
    """The form that only a GPU is given."""
    generator = np.random.default_rng(0)
    logits = generator.standard_normal((3, 5, 300)) * 40
    logits[0, 0, :] = -700.0  # exp(-700) is next to nothing, exp(700) overflows
    logits[0, 1, 7] = 700.0
    logits[..., 257:] = -np.inf  # padding of the vocabulary
    is_target = np.arange(300) == generator.integers(0, 257, (3, 5, 1))
    is_target[2, 4] = False  # an ignored target
    one, two = (jax.jit(f)(logits, is_target) for f in (gpt2_jax.loss._in_one_pass, gpt2_jax.loss._in_two_passes))
    for a, b in zip(one, two, strict=True):
        assert a.shape == (3, 5, 1)
        np.testing.assert_allclose(a, b, rtol=1e-14)


@pytest.mark.parametrize(("T", "expected"), [(1024, 64), (96, 48), (100, 50), (7, 7), (1, 1)])
def test_chunks_have_one_length_and_a_power_of_two_where_that_divides(monkeypatch, T, expected):
    monkeypatch.setattr(gpt2_jax.loss, "CHUNK_BYTES", 4 * 1000 * 8 * (64 if T > 7 else 1000))
    assert gpt2_jax.loss._chunk_length(8, T, 4 * 1000) == expected


def test_in_bfloat16_a_count_of_tokens_divides_the_gradient_in_float32():
    """1 / 12,288 rounded to bfloat16 would scale every gradient below the head by 1.002."""
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.standard_normal((2, 8, D)), jnp.bfloat16)
    head = jnp.asarray(generator.standard_normal((PADDED, D)), jnp.float32)
    targets = generator.integers(0, V, (2, 8))

    def scale(count):
        dx = jax.grad(lambda x: summed_cross_entropy(x, head, targets, V) / count)(x).astype(jnp.float32)
        whole = jax.grad(lambda x: summed_cross_entropy(x, head, targets, V))(x).astype(jnp.float32)
        return float(jnp.vdot(dx, whole) / jnp.vdot(whole, whole)) * count

    assert abs(scale(12_288) - 1) < 5e-4


def unfused(x_BTD, head_VD, targets_BT, vocab_size):
    logits_BTV = jnp.einsum("btd,vd->btv", x_BTD, head_VD)
    logits_BTV = jnp.where(jnp.arange(head_VD.shape[0]) < vocab_size, logits_BTV, -jnp.inf)
    losses_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - jnp.take_along_axis(
        logits_BTV, targets_BT[..., None], axis=-1
    ).squeeze(-1)
    return jnp.sum(jnp.where(targets_BT == IGNORE_INDEX, 0.0, losses_BT))


def compiled(loss, batch=8, block=1024, width=768, rows=50304):
    shapes = (
        jax.ShapeDtypeStruct((batch, block, width), jnp.float32),
        jax.ShapeDtypeStruct((rows, width), jnp.float32),
        jax.ShapeDtypeStruct((batch, block), jnp.int32),
    )
    of_both = jax.value_and_grad(lambda x, head, targets: loss(x, head, targets, 50257), argnums=(0, 1))
    return jax.jit(of_both).lower(*shapes).compile()


def test_memory_is_a_third_of_the_unfused_losss_at_most():
    """Nothing is run: the compiler says what the two would take, at GPT-2's own sizes."""
    fused, plain = (compiled(loss).memory_analysis().temp_size_in_bytes for loss in (summed_cross_entropy, unfused))
    assert fused <= plain / 3


def test_no_array_holds_all_logits():
    program = compiled(summed_cross_entropy).as_text()
    sizes = [int(np.prod([int(n) for n in dims.split(",")])) for dims in re.findall(r"\w+\[([\d,]+)\]", program)]
    assert max(sizes) < 8 * 1024 * 50304 / 3


@pytest.mark.parametrize("mesh", ["1", "fsdp=8", "data=2,fsdp=2,tensor=2"])
@pytest.mark.parametrize("chunk_bytes", [1 << 30, 4 * 128 * 8 * 5, 1], ids=["one chunk", "a few", "one place each"])
def test_log_probabilities_are_pytorchs_in_any_chunks_on_any_mesh(monkeypatch, mesh, chunk_bytes):
    monkeypatch.setattr(gpt2_jax.loss, "CHUNK_BYTES", chunk_bytes)
    x_BTD, head_VD, targets_BT = inputs()
    head_VD[7] = head_VD[3]  # of equally likely tokens the first counts
    logits_BTV = torch.from_numpy(x_BTD @ head_VD[:V].T)
    likeliest_BT = logits_BTV.argmax(dim=-1).numpy()
    counts_BT = targets_BT != IGNORE_INDEX
    targets_BT[1::2] = np.where(counts_BT[1::2], likeliest_BT[1::2], targets_BT[1::2])
    x_BTD[2, 4] = 20 * head_VD[3]
    targets_BT[2, 4:6] = 3, 7
    x_BTD[2, 5] = x_BTD[2, 4]
    logits_BTV = torch.from_numpy(x_BTD @ head_VD[:V].T)
    ids_BT1 = torch.from_numpy(np.where(counts_BT, targets_BT, 0))[..., None]
    expected_BT = logits_BTV.log_softmax(dim=-1).gather(-1, ids_BT1)[..., 0].numpy()
    with jax.enable_x64(True):
        devices = make_mesh(parse_mesh(mesh))
        places = [sharding(devices, axes) for axes in (("batch", None, None), ("vocab", "embed"), ("batch", None))]
        with jax.set_mesh(devices):
            given = map(jax.device_put, (x_BTD, head_VD, targets_BT), places)
            both = jax.jit(log_probabilities, static_argnums=3)(*given, V)
            log_probs_BT, is_likeliest_BT = map(np.asarray, both)
    assert np.abs(log_probs_BT - expected_BT)[counts_BT].max() <= 1e-12
    assert (is_likeliest_BT == (logits_BTV.argmax(dim=-1).numpy() == targets_BT))[counts_BT].all()
    assert is_likeliest_BT[2, 4] and not is_likeliest_BT[2, 5]
