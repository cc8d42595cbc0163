import dataclasses

import ml_dtypes
import numpy as np
import pytest

from gpt2_core.config import DataConfig, ModelConfig, TrainConfig
from gpt2_core.errors import UserError
from parity.formats import read_initial_weights, read_weights, write_weights
from parity.subjects import random_weights

CONFIG = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=300)


@pytest.mark.parametrize("first", ["jax", "torch", "safetensors"])
@pytest.mark.parametrize("second", ["jax", "torch", "safetensors"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_weights_go_through_any_two_formats_bit_for_bit(tmp_path, first, second, dtype):
    weights = random_weights(CONFIG).astype(dtype)
    write_weights(weights, tmp_path / "a.safetensors", first)
    write_weights(read_weights(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", second)
    back = read_weights(tmp_path / "b.safetensors")
    assert (back.config, back.tokenizer) == (weights.config, weights.tokenizer)
    assert all(
        back.arrays[n].dtype == a.dtype and back.arrays[n].tobytes() == a.tobytes() for n, a in weights.arrays.items()
    )


def test_what_holds_no_weights_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    for path, words in (
        ("nowhere", "no such file"),
        ("empty", "neither a run folder"),
        ("notes.txt", "expected a run"),
    ):
        with pytest.raises(UserError, match=words):
            read_weights(tmp_path / path)


def test_starting_from_another_models_weights_is_refused_with_the_option_to_give(tmp_path):
    write_weights(random_weights(CONFIG), tmp_path / "w.safetensors", "safetensors")
    data, where = DataConfig(tokenizer="bytes"), str(tmp_path / "w.safetensors")
    same = TrainConfig(model=ModelConfig(1, 2, 16, 16, 300, dropout=0.1), data=data, init_from=where)
    assert read_initial_weights(same) is not None  # dropout is a way of training
    with pytest.raises(UserError, match="the tokenizer bytes, this run has gpt2; use --data.tokenizer bytes"):
        read_initial_weights(dataclasses.replace(same, data=DataConfig()))
    other = TrainConfig(model=ModelConfig(1, 2, 16, 32, 300), init_from=str(tmp_path / "w.safetensors"))
    with pytest.raises(UserError, match="those weights have block_size 16, this run 32; add --model.block_size 16"):
        read_initial_weights(other)
