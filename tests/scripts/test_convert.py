from gpt2_core.config import ModelConfig
from gpt2_core.weights import write_safetensors
from parity.formats import read_weights
from parity.subjects import random_weights

MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=300)


def test_weights_come_back_bit_for_bit_from_the_other_framework(run, tmp_path):
    weights = random_weights(MODEL)
    write_safetensors(weights, tmp_path / "w.safetensors")
    for source, target, to in (
        ("w.safetensors", "a", "jax"),
        ("a", "b", "torch"),
        ("b", "c.safetensors", "safetensors"),
    ):
        code, _, err = run("convert.py", source, target, "--to", to)
        assert code == 0 and err == "", err
    back = read_weights(tmp_path / "c.safetensors")
    assert all(back.arrays[n].tobytes() == a.tobytes() for n, a in weights.arrays.items())


def test_force_replaces_weights_and_nothing_else(run, tmp_path):
    write_safetensors(random_weights(MODEL), tmp_path / "w.safetensors")
    assert run("convert.py", "w.safetensors", "a", "--to", "torch")[0] == 0
    code, _, err = run("convert.py", "w.safetensors", "a", "--to", "jax")
    assert code == 2 and "add --force" in err
    assert run("convert.py", "w.safetensors", "a", "--to", "jax", "--force")[0] == 0
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").write_text("precious")
    for source, target, words in (
        ("w.safetensors", "papers", "is neither empty nor a checkpoint"),
        ("w.safetensors", "w.safetensors", "holds the source itself"),
        ("w.safetensors", ".", "holds the source itself"),
        ("w.safetensors", "w.safetensors/x", "can't be written"),
    ):
        code, _, err = run("convert.py", source, target, "--to", "jax", "--force")
        assert code == 2 and words in err and err.count("\n") == 1
    assert (tmp_path / "papers" / "thesis.tex").read_text() == "precious"
    assert {p.name for p in tmp_path.iterdir()} == {"w.safetensors", "a", "papers"}
