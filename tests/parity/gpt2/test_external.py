"""A user's own implementation against the reference."""

import shutil
import sys
from pathlib import Path

import pytest

from gpt2_convert.canonical import write
from gpt2_core.config import ModelConfig
from parity.gpt2 import external
from parity.gpt2.adapters.torch_adapter import TorchAdapter
from parity.gpt2.cases import Case, random_weights, real_text

MY_PORT = Path(__file__).parents[1] / "my_port.py"


@pytest.mark.long
@pytest.mark.parametrize(
    ("function", "passes"), [("logits", True), ("without_positions", False), ("in_float64_with_erf", False)]
)
def test_it_is_judged_by_its_dtype(tmp_path, monkeypatch, function, passes):
    weights = random_weights(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=300))
    write(weights, tmp_path / "w.safetensors")
    shutil.copy(MY_PORT, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_port", raising=False)
    results = list(
        external.implementation(Case(weights, real_text(weights)), TorchAdapter(weights), f"my_port:{function}")
    )
    assert len(results) == 3 and any(not result.passed for result in results) is not passes, results
    wrong = [result.where for result in results if not result.passed]
    # The first value that differs is named, with the line that computes it.
    assert passes or all("differs from" in where and ".py:" in where for where in wrong[1:]), wrong


@pytest.mark.long
def test_a_module_is_compared_with_its_weights_and_its_place_named(tmp_path, monkeypatch):
    weights = random_weights(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=300))
    write(weights, tmp_path / "w.safetensors")
    shutil.copy(MY_PORT, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_port", raising=False)
    case, reference = Case(weights, real_text(weights)), TorchAdapter(weights)
    results = list(external.implementation(case, reference, "my_port:make_model"))
    assert results and all(result.passed for result in results), results
    results = list(external.implementation(case, reference, "my_port:jax_model_with_another_epsilon"))
    failed = {result.case: result.where for result in results if not result.passed}
    assert any("epsilon is 0.001" in where and "my_port.py:" in where for where in failed.values()), failed
