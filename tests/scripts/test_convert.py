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


def test_nothing_is_overwritten_without_force(run, tmp_path):
    write_safetensors(random_weights(MODEL), tmp_path / "w.safetensors")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").write_text("precious")
    code, _, err = run("convert.py", "w.safetensors", "there", "--to", "jax")
    assert code == 2 and "add --force" in err and (tmp_path / "there" / "x").read_text() == "precious"
    code, _, err = run("convert.py", "w.safetensors", "there", "--to", "jax", "--force")
    assert code == 0 and not (tmp_path / "there" / "x").exists(), err
    assert {p.name for p in tmp_path.iterdir()} == {"w.safetensors", "there"}
