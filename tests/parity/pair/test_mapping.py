"""The mapping of weights that is inferred, and what it does not hide."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from squares import Square, X, failed, parameters, square

import parity


@pytest.mark.long
def test_every_weight_is_mapped_by_values_to_its_counterpart(right):
    found = {m.candidate: (m.reference, m.transform, m.verified) for m in right.mapping}
    expected = {"wte.embedding": "embed.weight", "wpe.embedding": "pos.weight", "head.kernel": "lm_head.weight"}
    expected |= {f"ln_f.{a}": f"norm.{b}" for a, b in (("scale", "weight"), ("bias", "bias"))}
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj", "up": "fc1", "down": "fc2"}
    for i in (0, 1):
        for ours, theirs in names.items():
            expected |= {f"blocks.{i}.{ours}.kernel": f"layers.{i}.{theirs}.weight"}
            expected |= {f"blocks.{i}.{ours}.bias": f"layers.{i}.{theirs}.bias"}
        for n in (1, 2):
            expected |= {f"blocks.{i}.ln{n}.scale": f"layers.{i}.ln_{n}.weight"}
            expected |= {f"blocks.{i}.ln{n}.bias": f"layers.{i}.ln_{n}.bias"}
    assert {name: reference for name, (reference, _, _) in found.items()} == expected
    assert all(t == ("transpose" if n.endswith("kernel") else "identity") for n, (_, t, _) in found.items())
    assert all(verified for _, _, verified in found.values()) and not right.unmapped


def test_a_mapping_does_not_absorb_an_untransposed_square_kernel():
    """With b's kernel untransposed the models agree; that it is unlike its siblings is a failure until confirmed."""
    wrong = (lambda p, x: square(p, x, "b")), parameters()
    report = parity.compare(Square(), wrong, inputs=X)
    assert failed(report) == {"weights"} and "b.kernel" in next(r.where for r in report.results if not r.passed)
    assert any("transposed kernel" in h for h in report.hints)
    assert parity.compare(Square(), wrong, inputs=X, mapping=report.mapping_yaml()).verdict == "same"
    assert parity.compare(Square(), (square, parameters()), inputs=X).verdict == "same"


def test_a_weight_without_counterpart_fails_by_name_unless_ignored():
    class Adapted(Square):
        def __init__(self):
            super().__init__()
            self.lora_a = torch.nn.Parameter(torch.zeros(6, 2))

    report = parity.compare(Adapted(), (square, parameters()), inputs=X)
    assert report.unmapped == ["lora_a"] and failed(report) == {"weights"} and not report.passed
    assert parity.compare(Adapted(), (square, parameters()), inputs=X, ignore=["lora_a"]).passed


@pytest.mark.long
def test_scanned_layers_and_fused_projections_are_mapped():
    class Reference(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(3))
            self.gate, self.up = torch.nn.Linear(6, 8), torch.nn.Linear(6, 8)

        def forward(self, x):
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return torch.sigmoid(self.gate(x)) * self.up(x)

    def port(p, x):
        x, _ = jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer["w"] + layer["b"]), None), x, p["layers"])
        gate, up = jnp.split(x @ p["fused"] + p["bias"], 2, axis=-1)
        return jax.nn.sigmoid(gate) * up

    empty = {
        "layers": {"w": jnp.zeros((3, 6, 6)), "b": jnp.zeros((3, 6))},
        "fused": jnp.zeros((6, 16)),
        "bias": jnp.zeros(16),
    }
    report = parity.compare(Reference(), (port, empty), inputs=X)
    assert report.passed, report.in_words()
    found = {m.candidate: (m.reference, m.transform) for m in report.mapping}
    assert found["layers.w"] == ("layers.0.weight + layers.1.weight + layers.2.weight", "each | transpose")
    assert found["fused"] == ("gate.weight + up.weight", "concat(0) | transpose")


@pytest.mark.long
def test_a_transposed_convolution_is_mapped_with_its_flip_and_another_order_of_axes():
    class Reference(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = torch.nn.Conv2d(3, 5, 3, padding=1), torch.nn.ConvTranspose2d(5, 4, 2, stride=2)

        def forward(self, x):
            return self.up(torch.relu(self.down(x)))

    class Port(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.down = nnx.Conv(3, 5, (3, 3), padding=1, rngs=rngs)
            self.up = nnx.ConvTranspose(5, 4, (2, 2), strides=(2, 2), padding="VALID", rngs=rngs)

        def __call__(self, x):
            return self.up(jax.nn.relu(self.down(x)))

    images = np.random.RandomState(0).standard_normal((2, 3, 6, 4))
    report = parity.compare(Reference, Port, inputs=images, to_candidate=lambda x: x.transpose(0, 2, 3, 1))
    assert report.passed, report.in_words()
    found = {m.candidate: m.transform for m in report.mapping}
    # With a stride of the kernel's size a kernel the other way round has the same products, elsewhere.
    assert found["down.kernel"] == "permute(2, 3, 1, 0)" and found["up.kernel"] == "permute(2, 3, 0, 1) | flip(0, 1)"


class Renamed(torch.nn.Module):
    """`Square` with names that say nothing, declared in another order, one kernel the other way round."""

    def __init__(self):
        super().__init__()
        self.last, self.first = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
        self.table, self.shift = torch.nn.Parameter(torch.zeros(6, 6)), torch.nn.Parameter(torch.zeros(6))

    def forward(self, x):
        h = torch.tanh(torch.tanh(self.first(x)) @ self.table + self.shift)
        return self.last(h)


def test_two_pytorch_models_with_other_names_are_mapped_by_values():
    report = parity.compare(Square(), Renamed(), inputs=X)
    found = {m.candidate: (m.reference, m.transform) for m in report.mapping}
    assert found == {
        "first.weight": ("a.weight", "identity"),
        "first.bias": ("a.bias", "identity"),
        "table": ("b.weight", "transpose"),
        "shift": ("b.bias", "identity"),
        "last.weight": ("c.weight", "identity"),
        "last.bias": ("c.bias", "identity"),
    }
    assert all(m.verified for m in report.mapping) and report.passed, report.in_words()


class Fused(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.fused = torch.nn.Linear(6, 6), torch.nn.Linear(6, 18, bias=False)

    def forward(self, x):
        return self.fused(torch.tanh(self.first(x))).softmax(-1)


@pytest.mark.parametrize("seed", range(3))
def test_a_maximum_that_lies_in_another_part_does_not_decide_on_a_weight(seed):
    """The maximum in the softmax is the right one with any tensor in place of the parts that it doesn't lie in."""

    def port(parameters, x):
        x = jnp.tanh(x @ parameters["first"]["kernel"] + parameters["first"]["bias"])
        return jax.nn.softmax(jnp.concatenate([x @ parameters[f"part{i}"] for i in range(3)], -1))

    zeros = {"first": {"kernel": jnp.zeros((6, 6)), "bias": jnp.zeros(6)}} | dict.fromkeys(
        ("part0", "part1", "part2"), jnp.zeros((6, 6))
    )
    torch.manual_seed(seed)
    report = parity.compare(Fused(), (port, zeros), inputs=X[:2], seed=seed, checks=("forward",), generate=False)
    found = {m.candidate: m.transform for m in report.mapping if m.candidate.startswith("part")}
    assert found == {f"part{i}": f"chunk({i}, 3, 0) | transpose" for i in range(3)}
    assert report.passed
