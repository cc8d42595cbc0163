"""The check `precision`: how often it errs, and which losses of precision it sees."""

import dataclasses
from unittest import mock

import jax
import numpy as np
import pytest

import gpt2_jax.layers
import gpt2_jax.loss
import gpt2_jax.model
import parity.engine.precision
from gpt2_core.config import ModelConfig, OptimizerConfig, TrainConfig
from gpt2_core.data.batches import TrainingBatches
from gpt2_core.weights import Weights
from parity.gpt2.adapters import both
from parity.gpt2.adapters.jax_adapter import JaxAdapter
from parity.gpt2.adapters.torch_adapter import TorchAdapter
from parity.gpt2.cases import Case, random_weights, real_text
from parity.gpt2.checks import precision
from parity.gpt2.faults import MODEL, case_of

pytestmark = pytest.mark.usefixtures("x64")

EVERY_OPTION = ModelConfig(
    **{"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 257},
    **{"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, "qk_norm": True, "tie_embeddings": False},
)
STATED = [f"{dtype} {what}" for dtype in ("float32", "bfloat16") for what in ("logits", "gradients", "loss")]


def trained(weights: Weights, steps: int) -> Weights:
    """Weights after so many steps on real text, and so fast that they are far from where they began."""
    config = TrainConfig(
        model=weights.config,
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=10),
        **{"steps": steps, "batch_size": 8, "precision": "float32", "mesh": 1},
    )
    tokens = real_text(weights, 40_000)
    stream = TrainingBatches(tokens, sequence_length=weights.config.block_size, batch_size=8, seed=steps)
    params = TorchAdapter(weights, "float32").train(config, [stream[step] for step in range(steps)]).params
    return dataclasses.replace(weights, arrays={name: array.astype(np.float32) for name, array in params.items()})


def measured(case: Case, weights: list[Weights], number: int = 8) -> list[list]:
    """The results of each of the weights, all of one architecture: JAX compiles once."""
    candidate, reference = both(case.weights)
    names = candidate.name, reference.name
    batches = precision.sequences(case, number)
    truths = precision.drawn(reference, weights, batches, "float64")
    found = [[] for _ in weights]
    for dtype in ("float32", "bfloat16"):
        ours, theirs = (precision.drawn(adapter, weights, batches, dtype) for adapter in (candidate, reference))
        for w in range(len(weights)):
            drawn = [side[w * number : (w + 1) * number] for side in (ours, theirs, truths)]
            found[w] += precision.compare(case, names, dtype, *drawn)
            found[w].append(precision.compare_losses(names, dtype, batches, *drawn))
    return found


def test_by_chance_alone_the_limit_is_exceeded_as_rarely_as_stated(monkeypatch):
    monkeypatch.setattr(parity.engine.precision, "FALSE_ALARMS", 0.05)
    generator = np.random.default_rng(0)
    runs = 4000
    alarms = sum(precision.at_least(0.3 + 0.2 * generator.standard_normal(8)) > np.exp(0.3) for _ in range(runs))
    assert 0.04 < alarms / runs < 0.06


@pytest.mark.long
def test_right_programs_raise_no_alarm_on_random_and_on_trained_weights():
    weights = random_weights(MODEL, 5)
    found = measured(case_of(), [weights, trained(weights, 150)])
    assert [r for results in found for r in results if not r.passed] == []
    assert all(any(r.case.startswith(what) for r in found[0]) for what in STATED)


@pytest.mark.slow
@pytest.mark.parametrize("width", [16, 64])
def test_fifty_right_programs_raise_no_alarm(width):
    """Twenty-five of each width: five seeds, each random, and after 25 to 400 steps."""
    model = dataclasses.replace(MODEL, n_layer=2, n_embd=width, n_head=width // 8, block_size=64)
    weights = []
    for seed in range(5):
        weights.append(random_weights(model, seed))
        weights += [trained(weights[-1], steps) for steps in (25, 100, 200, 400)]
    case = Case(weights[0], real_text(weights[0], 40_000), "quick")
    assert [r for results in measured(case, weights) for r in results if not r.passed] == []


@pytest.mark.long
@pytest.mark.parametrize("model", [MODEL, EVERY_OPTION], ids=["gpt2", "every option"])
def test_the_programs_are_as_precise_as_they_are_said_to_be(model):
    weights = random_weights(model)
    results = list(precision.programs(Case(weights, real_text(weights, 2_000)), JaxAdapter(weights)))
    assert len(results) == 2 + 8 * len(precision.EXECUTIONS) and [r for r in results if not r.passed] == []


def failed(case: Case) -> list[str]:
    return [r.case for r in precision.programs(case, JaxAdapter(case.weights)) if not r.passed]


def test_float64_in_the_float32_program_is_seen():
    normalize = gpt2_jax.layers._normalize

    def wide(x, epsilon):
        with jax.enable_x64(True):
            return tuple(part.astype(x.dtype) for part in normalize(x.astype("float64"), epsilon))

    with mock.patch.object(gpt2_jax.layers, "_normalize", wide):
        assert "float32 program: values in another dtype" in failed(case_of())


@pytest.mark.long
def test_a_count_of_targets_rounded_to_bfloat16_is_seen():
    def rounded(vocab_size, grads, g):
        dx_BTD, dhead_VD = grads
        return dx_BTD * g.astype(dx_BTD.dtype), (dhead_VD * g).astype(dhead_VD.dtype), None

    loss = jax.custom_vjp(gpt2_jax.loss.summed_cross_entropy.fun, nondiff_argnums=(3,))
    loss.defvjp(gpt2_jax.loss._forward, rounded)
    with mock.patch.object(gpt2_jax.model, "summed_cross_entropy", loss):
        assert "bfloat16 program, unrolled: numbers that scale whole arrays, in bfloat16" in failed(case_of())


@pytest.mark.long
def test_a_residual_stream_that_is_lost_from_sight_fails():
    """An addition by other means than `add`: the check must not pass because it has nothing to look at."""
    add_norm = gpt2_jax.model.add_norm

    def subtracted(norm, x, branch):
        return add_norm(norm, x if branch is None else x - (-branch), None)

    with mock.patch.object(gpt2_jax.model, "add_norm", subtracted):
        assert "bfloat16 program, unrolled: values of the residual stream in bfloat16, or lost" in failed(case_of())


def test_a_residual_stream_kept_in_bfloat16_is_seen_where_it_is_tapped():
    embed = gpt2_jax.model.GPT2._embed

    def narrow(self, *inputs):
        return embed(self, *inputs).astype(self.execution.dtype)

    with mock.patch.object(gpt2_jax.model.GPT2, "_embed", narrow):
        result = precision._residual_stream(case_of(), *both(case_of().weights))
    assert not result.passed and "JAX bfloat16 and float32" in result.where


@pytest.mark.long
def test_a_loss_made_of_bfloat16_logits_is_not_the_cross_entropy_of_the_logits():
    case = case_of()
    candidate, reference = both(case.weights)
    batches, weights = precision.sequences(case, 1), [case.weights]
    with mock.patch.object(gpt2_jax.loss, "_wide", lambda x: x.dtype):
        ours = precision.drawn(candidate, weights, batches, "bfloat16")
    theirs, truths = (precision.drawn(reference, weights, batches, dtype) for dtype in ("bfloat16", "float64"))
    result = precision.compare_losses(("JAX", "PyTorch"), "bfloat16", batches, ours, theirs, truths)
    assert result.measured > 100 * result.limit and result.where.startswith("JAX")
