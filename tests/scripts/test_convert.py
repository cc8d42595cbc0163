import dataclasses
import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import gpt2_core.cli
from gpt2_convert import FORMATS, open_weights
from gpt2_convert.canonical import write as write_safetensors
from gpt2_core.config import ModelConfig
from gpt2_core.weights import DTYPES, Weights
from parity.gpt2.cases import random_weights

MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=300)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def convert(tmp_path, monkeypatch, capsys):
    """The command in this process (each start of one would take seconds), in an empty folder."""
    spec = importlib.util.spec_from_file_location("convert", ROOT / "scripts" / "convert.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)

    def convert(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["convert.py", *arguments])
        code = 0
        try:
            gpt2_core.cli.run(module.main)
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    yield convert
    signal.signal(signal.SIGTERM, before)


@pytest.mark.long
def test_weights_come_back_bit_for_bit_through_every_format(convert, tmp_path):
    weights = random_weights(MODEL)
    write_safetensors(weights, tmp_path / "0.safetensors")
    for number, to in enumerate(FORMATS):
        code, out, err = convert(f"{number}.safetensors", f"{number + 1}.safetensors", "--to", to, "--verify")
        assert code == 0 and err == "", err
        assert f"({to}): 8,368 parameters" in out
        assert "verified: 16 tensors read back bit for bit" in out and "logits differ by" in out
    back = open_weights(tmp_path / f"{len(FORMATS)}.safetensors")
    assert all(back.arrays[n].tobytes() == a.tobytes() for n, a in weights.arrays.items())


def test_a_dtype_rounds_and_widens(convert, tmp_path):
    weights = random_weights(MODEL)
    write_safetensors(weights, tmp_path / "w.safetensors")
    for to in ("llmc", "jax", "hf"):
        code, out, err = convert("w.safetensors", to, "--to", to, "--dtype", "bfloat16", "--verify")
        assert code == 0 and err == "", err
        assert ("CPU program reads version 3" in out) == (to == "llmc")
        assert convert(to, f"{to}32", "--to", to, "--dtype", "float32")[0] == 0
        for name, array in weights.arrays.items():
            rounded = array.astype(DTYPES["bfloat16"])
            assert open_weights(tmp_path / to).arrays[name].tobytes() == rounded.tobytes()
            assert open_weights(tmp_path / f"{to}32").arrays[name].tobytes() == rounded.astype(np.float32).tobytes()
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_gelu_of_a_nanogpt_checkpoint_is_said(convert, tmp_path):
    write_safetensors(random_weights(MODEL), tmp_path / "w.safetensors")
    code, out, _ = convert("w.safetensors", "ckpt.pt", "--to", "nanogpt")
    assert code == 0 and "nanoGPT's model.py computes the exact GELU" in out
    contents = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    del contents["gpt2_jax"]
    torch.save(contents, tmp_path / "theirs.pt")
    code, out, _ = convert("theirs.pt", "a", "--to", "torch")
    assert code == 0 and "read as a model with mlp gelu_exact, which is what nanoGPT's model computes" in out
    code, out, _ = convert("theirs.pt", "b", "--to", "torch", "--mlp", "gelu_tanh")
    assert code == 0 and "note:" not in out
    assert [open_weights(tmp_path / n).config.mlp for n in ("a", "b")] == ["gelu_exact", "gelu_tanh"]
    code, _, err = convert("a", "c", "--to", "torch", "--mlp", "gelu_tanh")
    assert code == 2 and "--mlp gelu_tanh: a is in the format torch, which records its MLP" in err


def test_values_that_are_no_numbers_are_kept_and_named(convert, tmp_path):
    arrays = dict(random_weights(MODEL).arrays)
    arrays["h.0.ln_1.bias"][:2] = np.nan, np.inf
    write_safetensors(Weights(MODEL, arrays), tmp_path / "w.safetensors")
    code, out, _ = convert("w.safetensors", "a", "--to", "jax", "--verify")
    assert code == 0 and "warning: h.0.ln_1.bias has 2 values that are NaN or infinite; kept as they are" in out
    assert "no forward pass" in out
    assert open_weights(tmp_path / "a").arrays["h.0.ln_1.bias"].tobytes() == arrays["h.0.ln_1.bias"].tobytes()


def test_verify_finds_a_bit_that_changed(convert, tmp_path, monkeypatch):
    import gpt2_convert as formats

    write = formats.FORMATS["llmc"].write

    def careless(weights, path):
        write(weights, path)
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)

    monkeypatch.setitem(formats.FORMATS, "llmc", dataclasses.replace(formats.FORMATS["llmc"], write=careless))
    write_safetensors(random_weights(MODEL), tmp_path / "w.safetensors")
    code, _, err = convert("w.safetensors", "m.bin", "--to", "llmc", "--verify")
    assert code == 1 and "m.bin: ln_f.bias was read back with other values than were written" in err


def test_force_replaces_weights_and_nothing_else(convert, tmp_path):
    write_safetensors(random_weights(MODEL), tmp_path / "w.safetensors")
    assert convert("w.safetensors", "a", "--to", "torch")[0] == 0
    code, _, err = convert("w.safetensors", "a", "--to", "jax")
    assert code == 2 and "add --force" in err
    assert convert("w.safetensors", "a", "--to", "jax", "--force")[0] == 0
    assert convert("w.safetensors", "a", "--to", "hf", "--force")[0] == 0
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").write_text("precious")
    (tmp_path / "a" / "README.md").write_text("precious too")
    (tmp_path / "notes.txt").write_text("precious as well")
    for source, target, to, words in (
        ("w.safetensors", "papers", "jax", "holds no weights, so --force doesn't replace it"),
        ("w.safetensors", "a", "torch", "a: also holds README.md, which --force would delete"),
        ("w.safetensors", "notes.txt", "llmc", "holds no weights, so --force doesn't replace it"),
        ("w.safetensors", "w.safetensors", "llmc", "contains the source itself"),
        ("w.safetensors", ".", "jax", "contains the source itself"),
        ("w.safetensors", "w.safetensors/x", "jax", "can't be written"),
        ("a", "w.safetensors", "torch", "is a file, and --to torch writes a folder"),
        ("w.safetensors", "a", "nanogpt", "is a folder, and --to nanogpt writes a file"),
        ("w.safetensors", "w.bin", "safetensors", "the name of a safetensors file must end in .safetensors"),
    ):
        code, _, err = convert(source, target, "--to", to, "--force")
        assert code == 2 and words in err and err.count("\n") == 1, (target, to, err)
    assert (tmp_path / "papers" / "thesis.tex").read_text() == "precious"
    assert {p.name for p in tmp_path.iterdir()} == {"w.safetensors", "a", "papers", "notes.txt"}


def test_a_format_that_cant_hold_the_model_says_which_setting(convert, tmp_path):
    write_safetensors(random_weights(dataclasses.replace(MODEL, position="rope")), tmp_path / "w.safetensors")
    code, _, err = convert("w.safetensors", "a", "--to", "hf")
    assert code == 2 and err == "error: --to hf: can't hold position rope; it can hold only position learned\n"


def test_terminated_it_leaves_nothing(tmp_path):
    """SIGTERM while the target is half written, which a reader that takes its time makes certain."""
    write_safetensors(random_weights(MODEL), tmp_path / "w.safetensors")
    slow = f"""
import sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "scripts")!r}]
import convert, gpt2_core.cli, gpt2_core.weights.safetensors as safetensors

def wait(file, tensors):
    print("writing", flush=True)
    time.sleep(60)

safetensors.write_values = wait
gpt2_core.cli.run(convert.main)
"""
    command = [sys.executable, "-c", slow, "w.safetensors", "out", "--to", "hf"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    assert len(list(tmp_path.iterdir())) == 2
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
