"""The machinery of the checks: what they compare, and that comparing changes nothing."""

import dataclasses
import importlib

import numpy as np
import pytest

from gpt2_core.config import ModelConfig
from parity.engine.divergence import Divergence
from parity.engine.results import Result
from parity.gpt2 import naming
from parity.gpt2.adapters import both
from parity.gpt2.adapters.jax_adapter import JaxAdapter
from parity.gpt2.adapters.torch_adapter import TorchAdapter
from parity.gpt2.cases import random_weights
from parity.gpt2.checks import variants
from parity.gpt2.checks.forward import check as forward
from parity.gpt2.checks.forward import compare
from parity.gpt2.faults import MODEL, case_of
from parity.gpt2.suite import CHECKS, load

pytestmark = pytest.mark.usefixtures("x64")


def test_every_tensor_of_the_random_weights_matters():
    # A bias of zero or a layer norm of one could be left out without being missed.
    for options in variants.OPTIONS.values():
        config = dataclasses.replace(MODEL, **options)
        weights = random_weights(config)
        assert all(array.std() > 0.01 for array in weights.arrays.values())
        assert all((random_weights(config).arrays[n] == a).all() for n, a in weights.arrays.items())


def test_every_option_of_the_model_has_its_variant():
    sizes = {"n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout"}
    numbers = {"layer_norm_epsilon", "rope_theta"}
    options = {field.name for field in dataclasses.fields(ModelConfig)} - sizes - numbers
    assert options == {name for chosen in variants.OPTIONS.values() for name in chosen} - sizes


# `forward` says so of each option alone as well.
@pytest.mark.long
@pytest.mark.parametrize("options", [{}, variants.OPTIONS["all at once"]], ids=["GPT-2", "all options at once"])
def test_capturing_changes_no_bit_of_the_logits(options):
    weights = random_weights(dataclasses.replace(case_of().weights.config, **options))
    adapter, tokens_BT = JaxAdapter(weights), case_of().tokens[:32].reshape(2, 16)
    assert (adapter.intermediates(tokens_BT)["logits"] == adapter.plain_logits(tokens_BT)).all()


def test_both_sides_capture_the_same_values_in_the_order_of_computation():
    weights = random_weights(dataclasses.replace(case_of().weights.config, **variants.OPTIONS["all at once"]))
    tokens_BT = np.arange(16)[None]
    ours, theirs = JaxAdapter(weights).intermediates(tokens_BT), TorchAdapter(weights).intermediates(tokens_BT)
    assert set(ours) == set(theirs)
    order = ["embeddings", "h.0.ln_1", "h.0.attn.q", "h.0.attn.out", "h.0.residual_1", "h.0.ln_2", "h.0.mlp.c_gate"]
    order += ["h.0.mlp.activation", "h.0.mlp.c_proj", "h.0.residual_2", "ln_f", "logits"]
    assert [name for name in ours if name in order] == order


def test_the_first_value_beyond_rounding_is_named_with_what_came_before():
    found = [
        Divergence("embeddings", 0.0),
        Divergence("h.2.ln_1", 2e-16),
        Divergence("h.2.mlp.activation", 3.1e-4),
        Divergence("ln_f", 1.0),
    ]
    words = "block 2, mlp activation: relative difference 3.1e-04; everything before agrees to 2e-16"
    assert naming.first_beyond(found, 1e-12) == words
    assert naming.first_beyond(found[:2], 1e-12) == "largest at block 2, ln_1"
    assert naming.first_beyond([Divergence("embeddings", float("nan"))], 1e-12).startswith(
        "embeddings: relative difference nan"
    )


def test_a_nan_fails():
    assert not Result("forward", "case", float("nan"), 1e-12).passed


@pytest.mark.long
def test_a_pass_that_is_not_watched_names_the_first_value_all_the_same():
    case = case_of()
    other = dict(case.weights.arrays) | {"h.0.mlp.c_fc.bias": case.weights.arrays["h.0.mlp.c_fc.bias"] + 1.0}
    candidate, reference = both(case.weights)
    wrong = candidate.make(dataclasses.replace(case.weights, arrays=other))
    results = [compare(wrong, reference, case.tokens[None, :16], "", watched=watched) for watched in (True, False)]
    assert results[0] == results[1] and not results[0].passed and "mlp c_fc" in results[0].where
    unwatched = compare(candidate, reference, case.tokens[None, :16], "", watched=False)
    assert unwatched.passed and unwatched.case.startswith("1 values")


@pytest.mark.long
def test_two_runs_give_the_same_figures():
    case = case_of()
    first, second = ([r.measured for r in forward(case, *both(case.weights))] for _ in range(2))
    assert first == second


def test_every_check_has_a_module():
    assert all(callable(importlib.import_module(f"parity.gpt2.checks.{name}").check) for name in CHECKS)


def test_the_part_of_a_check_that_was_asked_for_runs_by_itself():
    case = dataclasses.replace(case_of(), part="decay")
    names = [result.case for result in load("optimizer")(case, *both(case.weights))]
    assert names == ["JAX: decay of each of 16 tensors", "PyTorch: decay of each of 16 tensors"]
    (nothing,) = load("optimizer")(dataclasses.replace(case, part="a part it doesn't have"), *both(case.weights))
    assert not nothing.passed and nothing.where == "the check compared nothing"
