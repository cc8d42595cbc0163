import ml_dtypes
import numpy as np
import pytest

from gpt2_convert.llmc import read, write
from gpt2_convert.source import Source
from gpt2_core.config import ModelConfig
from gpt2_core.errors import UserError
from gpt2_core.weights import Weights

C, L, T, V = 8, 2, 4, 11


def make(dtype=np.float32) -> Weights:
    generator = np.random.default_rng(0)
    config = ModelConfig(n_layer=L, n_head=2, n_embd=C, block_size=T, vocab_size=V)
    arrays = {n: generator.standard_normal(s).astype(dtype) for n, s in config.parameter_shapes.items()}
    return Weights(config, arrays, "these weights")


@pytest.mark.parametrize(("dtype", "version"), [(np.float32, 3), (ml_dtypes.bfloat16, 5)])
def test_the_file_is_what_llm_cs_own_reader_takes(tmp_path, dtype, version):
    """Written out here after llm.c's fill_in_parameter_sizes: every tensor for all layers before the next."""
    weights = make(dtype)
    write(weights, tmp_path / "m.bin")
    content = (tmp_path / "m.bin").read_bytes()
    header = np.frombuffer(content, "<i4", 256)
    assert header[:8].tolist() == [20240326, version, T, V, L, 2, C, 128] and not header[8:].any()
    a = weights.arrays
    parts = [np.pad(a["wte.weight"], ((0, 128 - V), (0, 0))), a["wpe.weight"]]
    for name, transposed in (
        *(("ln_1.weight", False), ("ln_1.bias", False), ("attn.c_attn.weight", True), ("attn.c_attn.bias", False)),
        *(("attn.c_proj.weight", True), ("attn.c_proj.bias", False), ("ln_2.weight", False), ("ln_2.bias", False)),
        *(("mlp.c_fc.weight", True), ("mlp.c_fc.bias", False), ("mlp.c_proj.weight", True), ("mlp.c_proj.bias", False)),
    ):
        parts += [a[f"h.{i}.{name}"].T if transposed else a[f"h.{i}.{name}"] for i in range(L)]
    parts += [a["ln_f.weight"], a["ln_f.bias"]]
    assert content[1024:] == b"".join(np.ascontiguousarray(part).tobytes() for part in parts)


def test_weights_of_two_dtypes_are_refused(tmp_path):
    weights = make()
    arrays = dict(weights.arrays) | {"ln_f.bias": np.zeros(C, ml_dtypes.bfloat16)}
    with pytest.raises(UserError, match="holds one dtype, and these weights has bfloat16 and float32; add --dtype"):
        write(Weights(weights.config, arrays, "these weights"), tmp_path / "m.bin")
    with pytest.raises(UserError, match="can't hold wte.weight in float64; add --dtype float32 or bfloat16"):
        write(weights.astype(np.float64), tmp_path / "m.bin")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (0, 20240520, "not a model file of llm.c"),
        (1, 1, "llm.c's version 1; only 3 .float32. and 5 .bfloat16. can be read"),
        (4, 2**31 - 1, "asks for .* bytes, and the file has"),
        (6, -8, "asks for"),
        (7, 64, "asks for"),
        (5, 3, "not divisible by n_head 3"),
        (3, 12, None),
    ],
)
def test_damaged_headers_are_refused(tmp_path, place, value, words):
    path = tmp_path / "m.bin"
    write(make(), path)
    content = np.fromfile(path, "<i4")
    content[place] = value
    content.tofile(path)
    if words is None:
        # One of the 128 rows more is in use: another model, and whole.
        assert read(Source(path)).config.vocab_size == 12
        return
    with pytest.raises(UserError, match=words):
        read(Source(path))


def test_truncated_and_lengthened_files_are_refused(tmp_path):
    path = tmp_path / "m.bin"
    write(make(), path)
    whole = path.read_bytes()
    for content in (whole[:-1], whole + b"x", whole[:1000], b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match="m.bin"):
            read(Source(path))
