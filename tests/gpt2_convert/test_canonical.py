import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from gpt2_convert.canonical import read, write
from gpt2_convert.source import Source
from gpt2_core.config import ModelConfig
from gpt2_core.errors import UserError
from gpt2_core.weights import Weights

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=8, block_size=4, vocab_size=11)


def make(dtype=np.float32, **changes) -> Weights:
    generator = np.random.default_rng(0)
    arrays = {n: generator.standard_normal(s).astype(dtype) for n, s in CONFIG.parameter_shapes.items()}
    return Weights(CONFIG, arrays | changes, "these weights", "bytes")


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float64])
def test_a_file_gives_back_every_bit(tmp_path, dtype):
    before = make(dtype)
    write(before, tmp_path / "w.safetensors")
    after = read(Source(tmp_path / "w.safetensors"))
    assert (after.config, after.tokenizer) == (CONFIG, "bytes")
    for name, array in before.arrays.items():
        assert after.arrays[name].dtype == dtype and after.arrays[name].tobytes() == array.tobytes()


def test_other_files_are_refused(tmp_path):
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3)}, tmp_path / "foreign.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"not a file of tensors")
    for name in ("foreign", "broken"):
        with pytest.raises(UserError, match=name):
            read(Source(tmp_path / f"{name}.safetensors"))


def test_a_file_is_read_one_tensor_at_a_time(tmp_path):
    before = make()
    write(before, tmp_path / "w.safetensors")
    after = read(Source(tmp_path / "w.safetensors"))
    tracemalloc.start()
    for name in after.arrays:
        assert after.arrays[name].tobytes() == before.arrays[name].tobytes()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < before.nbytes / 2 + 10_000


def test_damaged_headers_are_refused_by_the_tensor_they_speak_of(tmp_path):
    path = tmp_path / "w.safetensors"
    write(make(), path)
    whole = path.read_bytes()
    for old, new, words in (
        (b'"ln_f.bias"', b'"ln_f.biax"', "ln_f.bias is missing"),
        (b'"ln_f.bias"', b'"ln_f.weight"', "ln_f.weight appears twice|not a complete safetensors file"),
        (b'"dtype": "F32", "shape": [8]', b'"dtype": "I32", "shape": [8]', "ln_1.weight is I32; expected float32"),
        (b'n_head\\": 2', b'n_head\\": 3', "not divisible by n_head 3"),
        (b'n_layer\\": 2', b'n_layer\\": 1e9', "n_layer"),
        (b'n_layer\\": 2', b'n_layer\\": 9999', "declares 9999 layers but has 28 tensors"),
    ):
        assert old in whole, old
        header = whole[8 : 8 + int.from_bytes(whole[:8], "little")].replace(old, new, 1)
        path.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + int.from_bytes(whole[:8], "little") :])
        with pytest.raises(UserError, match=words):
            read(Source(path))
