"""gpt2_jax.load and gpt2_torch.load: a trained model from Python."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gpt2_jax
import gpt2_torch
from gpt2_convert.canonical import write
from gpt2_core.config import ModelConfig
from gpt2_core.errors import UserError
from parity.gpt2.cases import random_weights

ROOT = Path(__file__).parent.parent
MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=300)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    write(random_weights(MODEL), path)
    return path


LOADS = {"jax": gpt2_jax.load, "torch": gpt2_torch.load}


def test_both_give_the_logits_of_the_same_model(weights):
    ids = np.arange(24).reshape(2, 12)
    exact = gpt2_torch.load(weights, precision="float64").logits(ids)
    assert exact.shape == (2, 12, 300) and exact.dtype == np.float64
    for load in LOADS.values():
        model = load(weights)
        found = model.logits(ids)
        assert found.dtype == np.float32
        assert np.abs(found - exact).max() <= 1e-5 * np.abs(exact).max()
        # A list of ids is one row, and what follows an id doesn't change its logits.
        assert np.allclose(model.logits(ids[1, :5].tolist()), found[1, :5], atol=1e-4 * np.abs(exact).max())


@pytest.mark.long
def test_both_write_the_text_that_the_command_writes(weights, tmp_path):
    options = {"max_new_tokens": 30, "temperature": 0.9, "top_k": 50, "seed": 3}
    texts = {name: load(weights).generate("def ", **options) for name, load in LOADS.items()}
    assert texts["jax"] == texts["torch"] and texts["jax"].startswith("def ")
    line = ["--prompt", "def ", "--weights", str(weights), *(f"--{name}={value}" for name, value in options.items())]
    done = subprocess.run(
        [sys.executable, "-m", "gpt2_commands", "generate", *line, "--backend", "torch"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == texts["torch"] + "\n", done.stderr


@pytest.mark.parametrize("name", LOADS)
def test_a_text_comes_in_pieces_and_is_a_function_of_seed_and_sample(weights, name):
    model = LOADS[name](weights)
    pieces = list(model.stream("a", max_new_tokens=20))
    assert len(pieces) >= 20 and "a" + "".join(pieces) == model.generate("a", max_new_tokens=20)
    others = [model.generate("a", max_new_tokens=20, **other) for other in ({"seed": 1}, {"sample": 1})]
    assert len({"a" + "".join(pieces), *others}) == 3
    assert model.generate("a", temperature=0, max_new_tokens=9) == model.generate("a", greedy=True, max_new_tokens=9)


@pytest.mark.parametrize("name", LOADS)
def test_what_is_wrong_is_said_in_a_sentence(weights, name):
    model = LOADS[name](weights)
    for call, words in (
        (lambda: model.logits([300]), "there is a 300, and this model knows 0 to 299"),
        (lambda: model.logits(range(17)), "17 are longer than this model's context of 16"),
        (lambda: model.logits([]), "expected token ids"),
        (lambda: model.logits("def"), "expected token ids"),
        (lambda: model.stream("a", max_new_tokens=0), "must be 1 or more"),
        (lambda: model.stream("\ud800"), "not UTF-8 text"),
        (lambda: LOADS[name]("nowhere"), "nowhere: no such file"),
        (lambda: LOADS[name](weights, tokenizer="gpt2"), "was trained with the tokenizer bytes"),
        (lambda: LOADS[name](weights, precision="half"), "precision half: expected one of auto, float32"),
    ):
        with pytest.raises(UserError, match=words):
            call()


def test_the_caller_of_a_stream_has_its_own_settings(weights):
    import jax
    import torch

    for _ in gpt2_torch.load(weights, precision="bfloat16", device="cpu").stream("a", max_new_tokens=3):
        assert not torch.is_autocast_enabled("cpu")
    before = jax.config.jax_default_matmul_precision
    for _ in gpt2_jax.load(weights, precision="float32").stream("a", max_new_tokens=3):
        assert jax.config.jax_default_matmul_precision == before


def test_float64_is_refused_where_jax_would_compute_in_float32(weights):
    import jax

    assert not jax.config.jax_enable_x64
    with pytest.raises(UserError, match="jax_enable_x64"):
        gpt2_jax.load(weights, precision="float64")


@pytest.mark.long
@pytest.mark.parametrize(("name", "other"), [("jax", "torch"), ("torch", "jax")])
def test_a_model_is_loaded_where_the_other_framework_cannot_be_imported(weights, name, other):
    path = os.pathsep.join([str(ROOT / "tests" / f"without_{other}"), str(ROOT)])
    code = f"import gpt2_{name}; print(gpt2_{name}.load({str(weights)!r}).generate('a', max_new_tokens=2))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("a"), done.stderr
    probe = subprocess.run(
        [sys.executable, "-c", f"import {other}"], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert "made unimportable" in probe.stderr


def test_importing_the_packages_imports_nothing_else():
    code = "import sys; before = set(sys.modules); import gpt2_jax, gpt2_torch; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name for name in done.stdout.split() if name.partition(".")[0] not in sys.stdlib_module_names}
    assert loaded == {"gpt2_jax", "gpt2_torch"}
