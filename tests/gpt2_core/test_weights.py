import dataclasses

import numpy as np
import pytest

from gpt2_core.config import ModelConfig
from gpt2_core.errors import UserError
from gpt2_core.weights import Weights

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=8, block_size=4, vocab_size=11)


def make(dtype=np.float32, **changes) -> Weights:
    generator = np.random.default_rng(0)
    arrays = {n: generator.standard_normal(s).astype(dtype) for n, s in CONFIG.parameter_shapes.items()}
    return Weights(CONFIG, arrays | changes, "these weights", "bytes")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"h.2.ln_1.bias": np.zeros(8, np.float32)}, "h.2.ln_1.bias is not part of this GPT-2"),
        ({"ln_f.bias": np.zeros(9, np.float32)}, r"ln_f.bias has the shape \(9,\); this configuration needs \(8,\)"),
        ({"ln_f.bias": np.zeros(8, np.int32)}, "ln_f.bias is int32"),
    ],
)
def test_wrong_tensors_are_refused_by_name(changes, words):
    with pytest.raises(UserError, match=words):
        make(**changes)


def test_a_missing_tensor_is_named():
    weights = make()
    with pytest.raises(UserError, match=r"wte.weight is missing; a GPT-2 of this size has 28 tensors"):
        dataclasses.replace(weights, arrays={n: a for n, a in weights.arrays.items() if n != "wte.weight"})


def test_weights_to_compute_with_are_finite():
    with pytest.raises(UserError, match="ln_f.bias has values that are not finite"):
        make(**{"ln_f.bias": np.full(8, np.nan, np.float32)}).in_memory()
