"""What a comparison holds in memory: models are large, so weights are shared."""

import functools
import gc
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import parity
from parity.models.model import Inputs
from parity.models.opening import open_model
from parity.pair import checks
from parity.pair.comparison import opened

X = np.random.default_rng(0).standard_normal((2, 6))


def port(parameters, x):
    return jnp.tanh(x @ parameters["kernel"]) @ parameters["kernel"]


class Twice(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = torch.nn.Linear(6, 6, bias=False)

    def forward(self, x):
        return self.kernel(torch.tanh(self.kernel(x)))


def test_weights_of_both_models_are_the_same_memory():
    c = opened(Twice(), (port, {"kernel": jnp.zeros((6, 6))}), inputs=X)
    (theirs,), (ours,) = c.weights["reference"].values(), c.weights["candidate"].values()
    assert np.array_equal(ours, theirs.T) and np.shares_memory(ours, theirs)
    c.reference.run(c.weights["reference"], c.cases[0][0])
    (inside,) = c.reference._tensors.values()
    assert np.shares_memory(inside.detach().numpy(), theirs)


def test_outputs_are_those_of_a_program_that_keeps_every_value():
    model = open_model((port, {"kernel": jnp.zeros((6, 6))}), "model")
    kernel = np.random.default_rng(1).standard_normal((6, 6))
    program = model.program(Inputs.of(X))
    every = program.run([kernel], [X], lifted=True)
    (output,) = model.run_lifted({"kernel": kernel}, Inputs.of(X))
    assert np.array_equal(output, every[program.outputs[0]])


def test_training_leaves_the_given_weights_as_they_are():
    """The module computes on the arrays themselves, unless it changes them."""
    model = open_model(torch.nn.Linear(3, 2), "model")
    weights = {w.name: w.value for w in model.weights()}
    before = {name: x.copy() for name, x in weights.items()}
    given = Inputs.of(np.ones((4, 3)))
    (untrained,) = model.run(weights, given)
    trained = model.train(weights, given, None, lambda p: torch.optim.SGD(p, lr=0.1), 2)
    assert trained.losses[1] < trained.losses[0]
    assert all(np.array_equal(weights[name], x) for name, x in before.items())
    assert np.array_equal(model.run(weights, given)[0], untrained)


class Module(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.ones((6, 6)))

    def __call__(self, x):
        return port({"kernel": self.kernel[...]}, x)


@pytest.mark.parametrize("make", [Module, lambda: (port, {"kernel": jnp.ones((6, 6))})], ids=["nnx", "function"])
def test_values_that_a_jax_model_was_made_with_are_released_when_others_are_drawn(make):
    c = opened(Twice(), make, inputs=X)
    (weight,) = c.candidate.weights()
    assert weight.own.strides == (0, 0), "the values are still there"
    gc.collect()
    assert not [x for x in jax.live_arrays() if x.shape == (6, 6) and (np.asarray(x) == 1).all()]
    assert np.isfinite(c.candidate.run(c.weights["candidate"], c.cases[0][1])[0]).all()


def test_releasing_a_module_leaves_the_users_as_it_is():
    module = Twice()
    before = module.kernel.weight.detach().clone()
    opened(module, (port, {"kernel": jnp.zeros((6, 6))}), inputs=X)
    assert torch.equal(module.kernel.weight, before)


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
        self.rows = torch.nn.Linear(6, 18, bias=False)

    def forward(self, x):
        return self.rows(self.b(torch.tanh(self.a(x)))).softmax(-1)


def layers(parameters, x, stopped=False):
    x = jnp.tanh(x @ parameters["a"]["kernel"] + parameters["a"]["bias"])
    x = x @ parameters["b"]["kernel"] + parameters["b"]["bias"]
    parts = [x @ parameters[n] for n in ("rows1", "rows2", "rows3")]
    parts[1] = jax.lax.stop_gradient(parts[1]) if stopped else parts[1]
    return jax.nn.softmax(jnp.concatenate(parts, -1))


@pytest.mark.parametrize("stopped", [False, True])
def test_gradients_in_parts_are_those_in_one(monkeypatch, stopped):
    linear = {"kernel": jnp.zeros((6, 6)), "bias": jnp.zeros(6)}
    zeros = {"a": linear, "b": linear} | {f"rows{i}": jnp.zeros((6, 6)) for i in (1, 2, 3)}

    table = [{"source": f"{n}.bias", "target": f"{n}.bias"} for n in "ab"]
    table += [{"source": f"{n}.weight", "target": f"{n}.kernel", "transform": "transpose"} for n in "ab"]
    chunks = [f"chunk({i}, 3, 0) | transpose" for i in range(3)]
    table += [{"source": "rows.weight", "target": f"rows{i + 1}", "transform": t} for i, t in enumerate(chunks)]

    def gradients():
        torch.manual_seed(0)
        candidate = (functools.partial(layers, stopped=stopped), zeros)
        report = parity.compare(Layers(), candidate, inputs=X, checks=("gradients",), mapping=table)
        return [(r.case, r.measured, r.where) for r in report.results]

    whole = gradients()
    monkeypatch.setattr(checks, "PART", 1)
    calls = []
    monkeypatch.setattr(checks, "give_back_memory", lambda: calls.append(None))
    in_parts = gradients()
    assert len(calls) == 3 * len(["a.kernel", "a.bias", "b.kernel", "b.bias", "rows"])
    names = [[(case, where.partition(":")[0] * stopped) for case, _, where in found] for found in (in_parts, whole)]
    assert names[0] == names[1]
    assert np.allclose([m for _, m, _ in in_parts], [m for _, m, _ in whole], rtol=1e-6, atol=1e-13)
    assert (whole[0][1] > checks.GRADIENTS) == stopped


class InPlace(Twice):
    def forward(self, x):
        h = self.kernel(x)
        turned = h.T
        h.mul_(2.0)
        torch.add(h, 1.0, out=x)
        return turned, x


def test_a_recording_has_every_value_once_and_as_it_was_before_something_wrote_into_it():
    model = open_model(InPlace(), "model")
    weights = {w.name: w.value for w in model.weights()}
    recording = model.record(weights, Inputs.of(X))
    mm, permute, mul, add = (recording.values[s.number] for s in recording.steps if s.primitive != "t")
    product = X @ weights["kernel.weight"].T
    (given,) = (recording.values[n] for n in recording.inputs)
    assert np.array_equal(given, X)
    assert np.allclose(mm, product) and np.allclose(permute, product.T)
    assert np.allclose(mul, 2 * product) and np.allclose(add, 2 * product + 1)


def test_a_recording_has_moved_numbers_in_the_memory_that_they_came_from():
    model = open_model(Layers(), "model")
    recording = model.record({w.name: w.value for w in model.weights()}, Inputs.of(X))
    casts = [s for s in recording.steps if s.primitive == "to" and s.number in recording.values]
    assert len(casts) > 5
    assert all(np.shares_memory(recording.values[s.number], recording.values[s.sources[0]]) for s in casts)


LARGE = """
import numpy, parity, resource, tiny
tiny.WIDTH, tiny.HEADS, tiny.DEPTH, tiny.VOCABULARY, tiny.LENGTH = 768, 12, 12, 10_000, 64
tokens = numpy.random.default_rng(0).integers(0, tiny.VOCABULARY, (2, tiny.LENGTH))
report = parity.compare(tiny.make_torch, tiny.make_jax, inputs=tokens)
peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(report.verdict, sum(p.numel() for p in tiny.make_torch().parameters()), peak)
"""


@pytest.mark.slow
def test_a_pair_of_100_million_parameters_takes_four_times_the_memory_of_its_weights_in_float64():
    """Everything that the process has is counted, the two frameworks too."""
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parents[2])])}
    done = subprocess.run([sys.executable, "-c", LARGE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    verdict, parameters, peak = done.stdout.split()
    assert verdict == "same" and int(parameters) > 100e6
    assert int(peak) <= 4 * 8 * int(parameters)
