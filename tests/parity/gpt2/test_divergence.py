"""What a failing comparison says: the first value that differs, the usual mistake, and the check that explains it."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpt2_jax.model
import gpt2_jax.train_step
from gpt2_core.config import ModelConfig, OptimizerConfig, TrainConfig
from gpt2_core.data.batches import Batch
from parity.engine import divergence
from parity.engine.results import relative_norm, relative_to_largest
from parity.gpt2 import diagnosis
from parity.gpt2.adapters import both
from parity.gpt2.adapters.jax_adapter import JaxAdapter
from parity.gpt2.adapters.protocol import State, Step
from parity.gpt2.adapters.torch_adapter import TorchAdapter
from parity.gpt2.cases import random_weights
from parity.gpt2.checks import generation
from parity.gpt2.steps import first_divergence, in_step, side_by_side
from parity.gpt2.suite import CHECKS, RESTS_ON

pytestmark = pytest.mark.usefixtures("x64")

NAMES = ("JAX", "PyTorch")
TINY = ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=257)


# --- which check explains the others


def test_every_check_says_what_it_rests_on_and_runs_after_it():
    assert set(RESTS_ON) == set(CHECKS)
    for number, name in enumerate(CHECKS):
        assert set(RESTS_ON[name]) <= set(CHECKS[:number]), name


# --- hints


@functools.cache
def _values(**options):
    weights = random_weights(dataclasses.replace(TINY, **options)).astype(np.float64)
    tokens_BT = np.arange(16).reshape(2, 8)
    with jax.enable_x64(True):
        return weights, tokens_BT, TorchAdapter(weights).intermediates(tokens_BT)


_CONFIGURATIONS = (
    {},
    {"mlp": "gelu_exact", "qk_norm": True, "position": "rope", "bias": False, "tie_embeddings": False},
    {"mlp": "swiglu", "mlp_width": 8, "norm": "rmsnorm", "position": "rope", "rope_pairs": "interleaved"},
    {"layer_norm_epsilon": 1e-3, "rope_theta": 500.0, "position": "rope"},
    {"position": "alibi", "n_head": 3, "n_embd": 18},
)


@pytest.mark.parametrize("options", _CONFIGURATIONS, ids=str)
def test_every_formula_is_what_the_configuration_asks_for(options):
    weights, tokens_BT, values = _values(**options)
    for name, value in values.items():
        kind = name.removeprefix("h.0.")
        site = diagnosis.Site(values, name.removesuffix(kind), kind, weights, tokens_BT)
        assert relative_to_largest(diagnosis.FORMULAS[kind].formula(site), value) < 1e-14, name


@pytest.mark.parametrize("options", _CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("side", ["JAX", "PyTorch"])
def test_the_side_that_departs_from_the_configuration_is_named_with_its_mistake(options, side):
    weights, tokens_BT, values = _values(**options)
    tried = 0
    for name in values:
        kind = name.removeprefix("h.0.")
        site = diagnosis.Site(values, name.removesuffix(kind), kind, weights, tokens_BT)
        for mistake, formula in diagnosis.FORMULAS[kind].mistakes.items():
            try:
                wrong = formula(site)
            except (KeyError, ValueError):
                continue  # there is no such weight, or it isn't square
            if relative_to_largest(wrong, values[name]) < 1e-6:
                continue  # with this configuration it is no mistake
            changed = values | {name: wrong}
            ours, theirs = (changed, values) if side == "JAX" else (values, changed)
            found = divergence.compare(ours, theirs, NAMES)
            words = diagnosis.hint(found, 1e-12, ours, theirs, NAMES, weights, tokens_BT)
            # Two mistakes may be one in this configuration; the side is never in doubt.
            assert words.startswith(f"; {side} looks like "), (name, mistake, words)
            assert ("the configuration asks for" in words) is bool(diagnosis.FORMULAS[kind].asks)
            tried += 1
    assert tried > 40


def hint(ours, theirs, weights, tokens_BT):
    found = divergence.compare(ours, theirs, NAMES)
    return diagnosis.hint(found, 1e-12, ours, theirs, NAMES, weights, tokens_BT)


def test_a_setting_that_jax_ignores_is_not_blamed_on_pytorch():
    weights, tokens_BT, values = _values(mlp="gelu_exact")
    tanh = diagnosis.gelu_tanh(values["h.0.mlp.c_fc"])
    ours = values | {"h.0.mlp.activation": tanh}
    words = hint(ours, values, weights, tokens_BT)
    assert words == "; JAX looks like tanh GELU, and the configuration asks for mlp gelu_exact"


def test_an_unknown_mistake_and_two_wrong_sides_are_said_as_they_are():
    weights, tokens_BT, values = _values()
    odd = values | {"h.0.ln_2": values["h.0.ln_2"] + 0.1}
    words = hint(values, odd, weights, tokens_BT)
    assert words.startswith("; PyTorch departs from what the configuration asks for (norm layernorm")
    odder = values | {"h.0.ln_2": values["h.0.ln_2"] + 0.2}
    words = hint(odder, odd, weights, tokens_BT)
    assert words.startswith("; neither JAX nor PyTorch has what the configuration asks for")


# --- the backward pass


def _batch():
    tokens = np.arange(36).reshape(4, 9)
    targets = tokens[:, 1:].copy()
    targets[1, :3] = targets[3, :5] = -1
    return Batch(np.ascontiguousarray(tokens[:, :-1]), targets)


@pytest.mark.long
def test_gradients_of_values_are_summed_over_the_parts_of_a_batch():
    weights, batch = random_weights(TINY), _batch()
    ours, theirs = (side(weights).activation_grads(batch, accumulation=2) for side in (JaxAdapter, TorchAdapter))
    assert len(ours["ln_f"]) == len(batch.inputs) // 2
    assert (
        list(ours)[-1] == "ln_f" and divergence.worst_of(divergence.compare(ours, theirs, NAMES, relative_norm)) < 1e-13
    )


# --- steps of training


def _step(loss=1.0, norm=2.0, parameter=1.0, first=1.0, second=1.0):
    def state():
        return State({"w": np.array([parameter])}, {"w": np.array([first])}, {"w": np.array([second])})

    return Step(loss, norm, state, lambda: np.zeros(1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss": 1.1, "norm": 3.0, "first": 2.0}, "loss: relative difference 1.0e-01"),
        ({"norm": 2.2, "parameter": 5.0}, "gradient norm: relative difference 1.0e-01; everything before agrees"),
        ({"second": 1.1, "parameter": 1.1}, "second moment of w: relative difference 1.0e-01"),
        ({"parameter": 1.1}, "parameter of w: relative difference 1.0e-01"),
        ({"loss": math.nan}, "loss: JAX has nan at [0]"),
    ],
)
def test_the_first_value_of_a_step_is_named_and_not_the_largest(change, words):
    ((found, _),) = side_by_side([_step(**change)], [_step()], NAMES)
    assert in_step(found).startswith(words)


def _training(model=TINY, **settings):
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=0)
    return TrainConfig(model=model, optimizer=optimizer, batch_size=4, precision="float64", **{"mesh": 1} | settings)


def _explained(config):
    weights, batches = random_weights(TINY), [_batch()] * 3
    return first_divergence(weights, *both(weights), config, _training(steps=3), batches)


@pytest.mark.long
def test_a_difference_that_begins_later_is_explained_at_the_weights_before_it(monkeypatch):
    # A formula that is right while the weights are as they were: the first step agrees.
    start = random_weights(TINY).arrays["h.0.mlp.c_fc.bias"].astype(np.float64)
    right = gpt2_jax.model.MLP.__call__

    def wrong(self, x_BTD, *, key):
        moved = jnp.abs(self.c_fc.bias[...].ravel() - start).max() > 1e-9
        return right(self, x_BTD, key=key) * jnp.where(moved, 1.001, 1.0)

    monkeypatch.setattr(gpt2_jax.model.MLP, "__call__", wrong)
    words = _explained(_training(steps=3))
    assert words.startswith("step 1: loss: relative difference") and "the steps before agree to" in words
    assert "forward at the weights before it: block 0, residual_2" in words


@pytest.mark.slow
def test_what_no_single_pass_shows_is_put_down_to_the_step(monkeypatch):
    right = gpt2_jax.train_step.clip_by_global_norm
    monkeypatch.setattr(gpt2_jax.train_step, "clip_by_global_norm", lambda g, c: (right(g, c / 2)[0], right(g, c)[1]))
    words = _explained(_training(steps=3))
    assert words.startswith("step 0: first moment of wte weight") and "first moments differ" in words
    assert "look at clipping and at the first moment's update" in words


@pytest.mark.long
def test_two_trainings_that_agree_when_run_again_are_said_to():
    assert _explained(_training(steps=3)).startswith("in a second run losses, norms, moments and parameters agree to")


# --- generation


def test_the_first_token_in_time_is_named():
    a, b = np.zeros((2, 3), int), np.zeros((2, 3), int)
    b[0, 2], b[1, 1] = 7, 9
    result = generation.compare_tokens("case", a, b, lambda row, number: f"why {row} {number}")
    assert result.measured == 2 and result.where == "first at prompt 1, token 1: 0 against 9; why 1 1"
    assert not generation.compare_tokens("case", a, b[:1], lambda row, number: "").passed


@pytest.mark.long
def test_a_token_is_explained_by_logits_or_sampler_or_cache(monkeypatch):
    weights = random_weights(TINY)
    ours, theirs = JaxAdapter(weights), TorchAdapter(weights)
    asked = ([1, 2, 3, 4], 2, 0.3, generation.SETTINGS["greedy"])
    monkeypatch.setattr(ours, "sample", lambda *given: np.array([5]))
    assert generation.why(ours, theirs, *asked).startswith("the samplers differ: from equal logits")
    monkeypatch.undo()
    write = gpt2_jax.model._write
    monkeypatch.setattr(gpt2_jax.model, "_write", lambda *given: given[0] if given[1].shape[2] == 1 else write(*given))
    words = generation.why(JaxAdapter(weights), theirs, *asked)
    assert words.startswith(
        "the KV cache differs from recomputation: position 2; block 0, attn out: relative difference"
    )
    # A context without generated tokens, which the cache holds: nothing of the one token differs.
    words = generation.why(JaxAdapter(weights), theirs, [1, 2], *asked[1:])
    assert words.startswith("logits, KV cache and samplers agree for this context of 2 tokens")
    other = dataclasses.replace(weights, arrays={n: 1.1 * a for n, a in weights.arrays.items()})
    assert generation.why(JaxAdapter(other), theirs, *asked).startswith("the logits differ: embeddings")
