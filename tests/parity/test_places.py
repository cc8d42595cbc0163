"""What a failing comparison says: the first value that differs, the check that explains it, and never a traceback."""

import dataclasses
import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpt2_jax.model
import gpt2_jax.train_step
from gpt2_core.batches import Batch
from gpt2_core.config import ModelConfig, OptimizerConfig, TrainConfig
from gpt2_core.errors import RunError, UserError
from parity import diagnosis, generation, places, report, suite
from parity.faults import subject_of
from parity.places import Place
from parity.sides import JaxSide, State, Step, TorchSide
from parity.steps import first_divergence, in_step, side_by_side
from parity.subjects import random_weights
from parity.suite import CHECKS, RESTS_ON, Result, explanation, guarded, relative_norm, relative_to_largest

pytestmark = pytest.mark.usefixtures("x64")

TINY = ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=257)


# --- exceptions


def _raising(error):
    def check(subject):
        yield Result("forward", "before it", 0.0, 1e-12)
        raise error

    return check


@pytest.mark.parametrize(
    "error", [ValueError("a shape [/of] (2, 3)"), IndexError(), RunError("loss is nan"), KeyError("x")]
)
def test_an_exception_is_a_failed_case_after_those_that_were_compared(error):
    first, last = guarded("forward", _raising(error))(None)
    assert first.passed and first.case == "before it"
    assert not last.passed and last.check == "forward" and math.isfinite(last.measured)
    assert type(error).__name__ in last.where and str(error) in last.where and "after before it" in last.where


def test_the_innermost_line_of_this_repository_is_named():
    def singular(*arrays):
        return np.linalg.inv(np.zeros((2, 2)))  # raised in numpy, called from here, called from parity/places.py

    x = {"x": np.ones(2)}
    (result,) = guarded("forward", lambda subject: iter(places.compare(x, x, singular)))(None)
    assert re.fullmatch(r"LinAlgError: Singular matrix \(parity/places.py:\d+\)", result.where)
    (result,) = guarded("against", lambda subject: iter(singular()), typed=f"{__name__}:f")(None)
    assert re.search(r"\(tests/parity/test_places.py:\d+\)$", result.where)
    assert len(suite.in_words(ValueError("long " * 1000))) < 400


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interruption_passes(stop):
    with pytest.raises(stop):
        list(guarded("forward", _raising(stop()))(None))


def test_what_the_user_typed_is_refused_and_what_a_check_does_by_itself_fails():
    with pytest.raises(UserError):
        list(guarded("against", _raising(UserError("no such function")), typed="my_port")(None))
    assert not list(guarded("mesh", _raising(UserError("refused")))(None))[-1].passed


def test_a_check_that_compares_nothing_fails():
    (result,) = guarded("mesh", lambda subject: iter(()))(None)
    assert not result.passed and "nothing" in result.where


def test_the_report_of_a_run_with_nan_and_exceptions_is_strict_json_and_a_page(tmp_path):
    subject = dataclasses.replace(subject_of(), evidence={})
    subject.evidence["forward"] = [("embeddings", math.nan), ("ln_f", math.inf)]
    subject.evidence["gradients"] = [("ln_f", math.nan)]
    subject.evidence["loss_curve"] = {name: np.full(3, math.nan) for name in ("JAX", "PyTorch", "nudged")}
    results = [Result("forward", "values", math.nan, 1e-12, "[/x]"), Result("gradients", "values", math.inf, 1e-10)]
    results += guarded("mesh", _raising(ValueError("[bold] of [/a]")))(subject)
    report.write(tmp_path, report.Report(subject, "python", results))

    def refuse(constant):
        raise AssertionError(constant)

    written = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert written["passed"] is False and len(written["checks"]) == 4
    for check, result in zip(written["checks"], results, strict=True):
        assert check["measured"] == (result.measured if math.isfinite(result.measured) else None)
        assert check["passed"] is result.passed and check["where"] == result.where
    assert written["explanation"].startswith("look first at forward")
    page = (tmp_path / "index.html").read_text()
    assert "look first at forward" in page and "ValueError: [bold] of [/a]" in page


# --- which check explains the others


def test_every_check_says_what_it_rests_on_and_runs_after_it():
    assert set(RESTS_ON) == set(CHECKS)
    for number, name in enumerate(CHECKS):
        assert set(RESTS_ON[name]) <= set(CHECKS[:number]), name


def _failing(*names):
    return [Result(name, "a case", 1.0 if name in names else 0.0, 0.0, f"place of {name}") for name in CHECKS]


@pytest.mark.parametrize(
    ("failing", "first", "resting"),
    [
        (("forward", "gradients", "loss_curve", "generation"), "forward", ("gradients", "loss_curve", "generation")),
        (("optimizer", "loss_curve", "mesh"), "optimizer", ("loss_curve", "mesh")),
        (("schedule", "loss_curve"), "schedule", ("loss_curve",)),
        (("mesh",), "mesh", ()),
    ],
)
def test_the_check_on_which_the_other_failures_rest_is_named_first(failing, first, resting):
    sentence = explanation(_failing(*failing))
    assert sentence.startswith(f"look first at {first}, a case: place of {first}")
    assert all(name in sentence.partition("what failed in")[2] for name in resting)
    assert ("rests on it" in sentence) is bool(resting)


def test_failures_that_do_not_rest_on_each_other_are_both_named_and_no_failure_says_nothing():
    sentence = explanation(_failing("initialization", "generation"))
    assert "look first at initialization" in sentence and "look first at generation" in sentence
    assert "rests on it" not in sentence
    assert explanation(_failing()) == ""


# --- values that can't be compared


@pytest.mark.parametrize("measure", [relative_to_largest, relative_norm])
def test_values_that_are_not_finite_or_not_of_one_shape_and_dtype_never_pass(measure):
    x = np.arange(1.0, 5.0)
    for value in (math.nan, math.inf, -math.inf):
        bad = np.where(x == 2.0, value, x)
        assert math.isnan(measure(bad, bad)) and not measure(bad, x) <= 1.0 and not measure(x, bad) <= 1.0
    ones = np.ones((2, 4))
    for other in (np.ones(4), np.ones((1, 4)), np.ones(1), np.ones((2, 4), np.float32)):
        assert measure(ones, other) == measure(other, ones) == math.inf
    assert measure(ones, ones) == 0.0


def test_a_value_of_one_side_only_and_a_value_that_cannot_be_compared_are_named():
    x = {"a": np.ones(3), "h.1.ln_1": np.ones((2, 3)), "c": np.array([1.0, math.nan])}
    assert places.compare(x, {n: x[n] for n in ("a", "c")})[1] == Place("h.1.ln_1", math.inf, "missing in PyTorch")
    assert places.compare({"a": x["a"]}, x)[1] == Place("h.1.ln_1", math.inf, "missing in JAX")
    found = places.compare({"h.1.ln_1": np.ones((1, 3))}, {"h.1.ln_1": x["h.1.ln_1"]})
    assert places.first_beyond(found, 1.0) == "block 1, ln_1: shape (1, 3) in JAX, (2, 3) in PyTorch"
    found = places.compare({"c": x["c"]}, {"c": x["c"]})
    assert not places.worst_of(found) <= 1.0
    words = "c: JAX has nan at [1], 1 of 2 values aren't finite; PyTorch has nan at [1], 1 of 2 values aren't finite"
    assert places.first_beyond(found, 1.0) == words


def test_a_constant_factor_is_named_and_rounding_is_not_one():
    x = np.random.default_rng(0).standard_normal((3, 4))
    (found,) = places.compare({"x": 1.25 * x}, {"x": x})
    assert found.note == "1.25 times as large in JAX as in PyTorch"
    for other in (x * (1 + 1e-15), x + np.eye(3, 4)):
        assert places.compare({"x": other}, {"x": x})[0].note == ""


# --- hints


@functools.cache
def _values(**options):
    weights = random_weights(dataclasses.replace(TINY, **options)).astype(np.float64)
    tokens_BT = np.arange(16).reshape(2, 8)
    with jax.enable_x64(True):
        return weights, tokens_BT, TorchSide(weights).intermediates(tokens_BT)


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
            found = places.compare(ours, theirs)
            words = diagnosis.hint(found, 1e-12, ours, theirs, weights, tokens_BT)
            # Two mistakes may be one in this configuration; the side is never in doubt.
            assert words.startswith(f"; {side} looks like "), (name, mistake, words)
            assert ("the configuration asks for" in words) is bool(diagnosis.FORMULAS[kind].asks)
            tried += 1
    assert tried > 40


def test_a_setting_that_jax_ignores_is_not_blamed_on_pytorch():
    weights, tokens_BT, values = _values(mlp="gelu_exact")
    tanh = diagnosis.gelu_tanh(values["h.0.mlp.c_fc"])
    ours = values | {"h.0.mlp.activation": tanh}
    words = diagnosis.hint(places.compare(ours, values), 1e-12, ours, values, weights, tokens_BT)
    assert words == "; JAX looks like tanh GELU, and the configuration asks for mlp gelu_exact"


def test_an_unknown_mistake_and_two_wrong_sides_are_said_as_they_are():
    weights, tokens_BT, values = _values()
    odd = values | {"h.0.ln_2": values["h.0.ln_2"] + 0.1}
    words = diagnosis.hint(places.compare(values, odd), 1e-12, values, odd, weights, tokens_BT)
    assert words.startswith("; PyTorch departs from what the configuration asks for (norm layernorm")
    odder = values | {"h.0.ln_2": values["h.0.ln_2"] + 0.2}
    words = diagnosis.hint(places.compare(odder, odd), 1e-12, odder, odd, weights, tokens_BT)
    assert words.startswith("; neither JAX nor PyTorch has what the configuration asks for")


# --- the backward pass


def _batch():
    tokens = np.arange(36).reshape(4, 9)
    targets = tokens[:, 1:].copy()
    targets[1, :3] = targets[3, :5] = -1
    return Batch(np.ascontiguousarray(tokens[:, :-1]), targets)


def test_gradients_of_values_are_summed_over_the_parts_of_a_batch():
    weights, batch = random_weights(TINY), _batch()
    ours, theirs = (side(weights).activation_grads(batch, accumulation=2) for side in (JaxSide, TorchSide))
    assert len(ours["ln_f"]) == len(batch.inputs) // 2
    assert list(ours)[-1] == "ln_f" and places.worst_of(places.compare(ours, theirs, relative_norm)) < 1e-13


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
    ((found, _),) = side_by_side([_step(**change)], [_step()])
    assert in_step(found).startswith(words)


def _training(model=TINY, **settings):
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=0)
    return TrainConfig(model=model, optimizer=optimizer, batch_size=4, precision="float64", **{"mesh": 1} | settings)


def _explained(config):
    weights, batches = random_weights(TINY), [_batch()] * 3
    steps = JaxSide(weights).steps(config, batches), TorchSide(weights).steps(_training(steps=3), batches)
    return first_divergence(weights, *steps, config, batches)


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


def test_two_trainings_that_agree_when_run_again_are_said_to():
    assert _explained(_training(steps=3)).startswith("in a second run losses, norms, moments and parameters agree to")


# --- generation


def test_the_first_token_in_time_is_named():
    a, b = np.zeros((2, 3), int), np.zeros((2, 3), int)
    b[0, 2], b[1, 1] = 7, 9
    result = generation.compare_tokens("case", a, b, lambda row, number: f"why {row} {number}")
    assert result.measured == 2 and result.where == "first at prompt 1, token 1: 0 against 9; why 1 1"
    assert not generation.compare_tokens("case", a, b[:1], lambda row, number: "").passed


def test_a_token_is_explained_by_logits_or_sampler_or_cache(monkeypatch):
    weights = random_weights(TINY)
    ours, theirs = JaxSide(weights), TorchSide(weights)
    asked = ([1, 2, 3, 4], 2, 0.3, generation.SETTINGS["greedy"])
    monkeypatch.setattr(ours, "sample", lambda *given: np.array([5]))
    assert generation.why(ours, theirs, *asked).startswith("the samplers differ: from equal logits")
    monkeypatch.undo()
    write = gpt2_jax.model._write
    monkeypatch.setattr(gpt2_jax.model, "_write", lambda *given: given[0] if given[1].shape[2] == 1 else write(*given))
    words = generation.why(JaxSide(weights), theirs, *asked)
    assert words.startswith(
        "the KV cache differs from recomputation: position 2; block 0, attn out: relative difference"
    )
    # A context without generated tokens, which the cache holds: nothing of the one token differs.
    words = generation.why(JaxSide(weights), theirs, [1, 2], *asked[1:])
    assert words.startswith("logits, KV cache and samplers agree for this context of 2 tokens")
    other = dataclasses.replace(weights, arrays={n: 1.1 * a for n, a in weights.arrays.items()})
    assert generation.why(JaxSide(other), theirs, *asked).startswith("the logits differ: embeddings")
