"""The layout of each format against what is known of each format from elsewhere."""

import dataclasses

import numpy as np
import pytest

from gpt2_convert import FORMATS
from gpt2_core.config import ModelConfig
from gpt2_core.errors import UserError
from gpt2_core.weights import Stored, Weights

JAX, TORCH, HUGGING_FACE, NANOGPT, LLMC = (FORMATS[n].layout for n in ("jax", "torch", "hf", "nanogpt", "llmc"))
CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=8, block_size=4, vocab_size=11)


def make(config=CONFIG) -> Weights:
    generator = np.random.default_rng(0)
    arrays = {n: generator.standard_normal(s).astype(np.float32) for n, s in config.parameter_shapes.items()}
    return Weights(config, arrays, "these weights")


def encoded(layout, weights) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in layout.encode(weights.stored, weights.config).items()}


def test_linear_weights_are_in_out_for_conv1d_and_out_in_for_nn_linear():
    weights = make()
    canonical = weights.arrays["h.0.mlp.c_fc.weight"]
    assert canonical.shape == (8, 32)
    assert (encoded(HUGGING_FACE, weights)["transformer.h.0.mlp.c_fc.weight"] == canonical).all()
    for layout, prefix in ((TORCH, ""), (NANOGPT, "transformer."), (LLMC, "")):
        assert (encoded(layout, weights)[f"{prefix}h.0.mlp.c_fc.weight"] == canonical.T).all()


def test_flax_stores_every_matrix_transposed_and_calls_it_kernel():
    weights = make(dataclasses.replace(CONFIG, tie_embeddings=False))
    found = encoded(FORMATS["msgpack"].layout, weights)
    for name in ("h.0.attn.c_attn", "h.1.attn.c_proj", "h.0.mlp.c_fc", "h.1.mlp.c_proj"):
        assert (found[f"transformer/{name.replace('.', '/')}/kernel"] == weights.arrays[f"{name}.weight"].T).all()
    assert (found["lm_head/kernel"] == weights.arrays["lm_head.weight"].T).all()
    assert (found["transformer/wpe/embedding"] == weights.arrays["wpe.weight"]).all()


def test_the_jax_layout_keeps_query_key_and_value_apart():
    weights = make()
    fused, apart = weights.arrays["h.1.attn.c_attn.weight"], encoded(JAX, weights)["h.1.attn.c_attn.weight"]
    assert apart.shape == (8, 3, 8)
    for i in range(3):
        assert (apart[:, i] == fused[:, 8 * i : 8 * (i + 1)]).all()


@pytest.mark.parametrize("layout", [JAX, LLMC])
def test_vocabularies_are_filled_up_with_zeros_and_cut_again(layout):
    weights = make()
    found = layout.encode(weights.stored, CONFIG)
    rows = found["wte.weight"].read()
    assert rows.shape == (128, 8) and not rows[11:].any()
    back = layout.decode(found, CONFIG, "x")
    assert (back["wte.weight"].read() == weights.arrays["wte.weight"]).all()


def test_nanogpt_stores_the_tied_head_again_and_refuses_another():
    weights = make()
    found = NANOGPT.encode(weights.stored, CONFIG)
    assert found["lm_head.weight"] is found["transformer.wte.weight"]
    changed = weights.arrays["wte.weight"].copy()
    changed[3, 3] += 1
    for name in ("lm_head.weight", "transformer.wte.weight"):
        with pytest.raises(UserError, match="lm_head.weight differs from transformer.wte.weight"):
            NANOGPT.decode(found | {name: Stored(changed.shape, changed.dtype, lambda: changed)}, CONFIG, "x")


def test_missing_surplus_and_misshapen_tensors_are_named_as_the_file_names_them():
    found = NANOGPT.encode(make().stored, CONFIG)
    name = "transformer.h.1.mlp.c_fc.weight"
    odd = found[name].map((8, 32), np.transpose)
    for change, words in (
        ({k: t for k, t in found.items() if k != name}, f"x: {name} is missing"),
        (found | {"transformer.h.2.ln_1.weight": found[name]}, "h.2.ln_1.weight is not part of this GPT-2"),
        (found | {name: odd}, rf"{name} has the shape \(8, 32\); this configuration needs \(32, 8\)"),
        (found | {name: found[name].astype(np.dtype(np.float16))}, f"{name} is float16; expected float32, bfloat16"),
    ):
        with pytest.raises(UserError, match=words):
            NANOGPT.decode(change, CONFIG, "x")
    masks = {"transformer.h.0.attn.bias": odd, "transformer.h.0.attn.masked_bias": odd}
    assert NANOGPT.decode(found | masks, CONFIG, "x").keys() == CONFIG.parameter_shapes.keys()


@pytest.mark.parametrize(
    ("changes", "holders"),
    [
        ({}, {"safetensors", "jax", "torch", "hf", "msgpack", "nanogpt", "llmc"}),
        ({"mlp": "gelu_exact"}, {"safetensors", "jax", "torch", "hf", "msgpack", "nanogpt"}),
        ({"bias": False}, {"safetensors", "jax", "torch", "nanogpt"}),
        ({"tie_embeddings": False}, {"safetensors", "jax", "torch", "hf", "msgpack"}),
        ({"mlp_width": 20}, {"safetensors", "jax", "torch", "hf", "msgpack"}),
        ({"mlp_width": 32}, {"safetensors", "jax", "torch", "hf", "msgpack", "nanogpt", "llmc"}),
        ({"layer_norm_epsilon": 1e-6}, {"safetensors", "jax", "torch", "hf", "msgpack"}),
        ({"position": "rope"}, {"safetensors", "jax", "torch"}),
        ({"position": "alibi"}, {"safetensors", "jax", "torch"}),
        ({"mlp": "swiglu"}, {"safetensors", "jax", "torch"}),
        ({"norm": "rmsnorm"}, {"safetensors", "jax", "torch"}),
        ({"qk_norm": True}, {"safetensors", "jax", "torch"}),
    ],
)
def test_each_format_holds_the_architectures_it_can_say_and_names_the_setting_it_cant(changes, holders):
    config = ModelConfig(n_layer=2, n_head=2, n_embd=8, block_size=4, vocab_size=11, **changes)
    weights = make(config)
    for layout in (form.layout for form in FORMATS.values()):
        if layout.format in holders:
            back = layout.decode(layout.encode(weights.stored, config), config, "x")
            assert all((back[name].read() == array).all() for name, array in weights.arrays.items())
        else:
            (option,) = changes
            with pytest.raises(UserError, match=f"--to {layout.format}: can't hold {option} "):
                layout.encode(weights.stored, config)
