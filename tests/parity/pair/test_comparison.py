"""parity.compare on pairs without a GPT-2: verdicts, mapping, place, hints, state, training, odd models."""

import inspect
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import torch
from flax import linen, nnx

import parity
from parity.engine.errors import EngineError
from parity.models.jax_model import JaxModel, of_tree
from parity.models.model import Inputs


def failed(report) -> set[str]:
    return {r.check for r in report.results if not r.passed}


@pytest.fixture(scope="module")
def right():
    return parity.compare(
        tiny.make_torch(),
        tiny.make_jax(),
        inputs=tiny.TOKENS,
        checks=("weights", "forward", "gradients", "optimizer", "loss_curve"),
        optimizer=(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), optax.sgd(0.1, momentum=0.9)),
        steps=5,
        mutants=60,
    )


@pytest.mark.long
def test_two_right_ports_are_the_same_in_every_check(right):
    assert right.passed and right.verdict == "same" and right.first_divergence is None
    assert {r.check for r in right.results} == {"weights", "forward", "gradients", "optimizer", "loss_curve"}
    # Embeddings of Flax round to float32, and the report says where.
    assert any("tiny.py" in r.where and "float32" in r.where for r in right.results)
    right.assert_same()


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


@pytest.mark.long
def test_the_mutation_score_names_what_the_inputs_miss(right):
    score = right.mutation_score
    assert score.score > 0.8 and score.noticed + len(score.survivors) + score.equivalent + score.failed == 60
    # Seven positions show every change of the attention; what is left is named with its line.
    assert all("tiny.py:" in s.place or not s.place for s in score.survivors)


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "line", "hint"),
    [
        ({"approximate": True}, "jax.nn.gelu(h", "GELU by tanh"),
        ({"epsilon": 1e-3}, "self.ln1(x)", "epsilon is 0.001 in the candidate and 1e-05"),
    ],
)
def test_a_wrong_port_is_named_at_its_line_with_a_hint(options, line, hint, tmp_path):
    report = parity.compare(
        tiny.make_torch(), tiny.Decoder(**options), inputs=tiny.TOKENS, checks=("weights", "forward")
    )
    assert report.verdict == "different" and failed(report) == {"forward"}
    source = Path(tiny.__file__).read_text(encoding="utf-8").splitlines()
    number = int(report.first_divergence.lines[0].rpartition(":")[2])
    assert line in source[number - 1]
    assert any(hint in h for h in report.hints)
    with pytest.raises(AssertionError, match="first divergence"):
        report.assert_same()
    report.write(tmp_path / "report")
    written = json.loads((tmp_path / "report" / "report.json").read_text())
    assert written["first_divergence"]["lines"] == report.first_divergence.lines and written["hints"] == report.hints
    page = (tmp_path / "report" / "index.html").read_text()
    assert "Where they part" in page and "Mapping of the weights" in page
    with pytest.raises(EngineError, match="exists and is not a report"):
        parity.compare(tiny.make_torch(), tiny.make_torch(), inputs=tiny.TOKENS).write(tmp_path)


class Square(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def square(parameters, x, untransposed=""):
    for name in ("a", "b", "c"):
        kernel = parameters[name]["kernel"]
        x = x @ (kernel.T if name == untransposed else kernel) + parameters[name]["bias"]
        x = jnp.tanh(x) if name != "c" else x
    return x


def parameters(size: int = 6) -> dict:
    return {n: {"kernel": jnp.zeros((size, size)), "bias": jnp.zeros(size)} for n in ("a", "b", "c")}


X = np.random.RandomState(1).standard_normal((5, 6))


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


def test_own_weights_are_compared_and_transfer_makes_them_equal():
    reference = Square()
    _, written = parity.transfer(reference, (square, parameters()), inputs=X)
    assert parity.compare(reference, (square, written), inputs=X, weights="own").passed
    written["c"]["bias"] = written["c"]["bias"] + 1e-3
    report = parity.compare(reference, (square, written), inputs=X, weights="own")
    assert failed(report) == {"weights", "forward"}
    assert next(r.where for r in report.results if "own weights" in r.case).startswith("c.bias: relative difference")


def test_transfer_works_the_other_way_and_converter_for_checkpoints():
    drawn = jax.tree.map(lambda x: jnp.asarray(np.random.RandomState(2).standard_normal(x.shape)), parameters())
    module = parity.transfer((square, drawn), Square(), inputs=X)
    np.testing.assert_allclose(module(torch.tensor(X, dtype=torch.float32)).detach(), square(drawn, X), atol=1e-5)
    report = parity.compare(Square(), (square, parameters()), inputs=X, checks=("weights",))
    made = parity.converter(report.table)({n: t.numpy() for n, t in module.state_dict().items()})
    np.testing.assert_allclose(made["a.kernel"], drawn["a"]["kernel"], rtol=1e-6)


@pytest.mark.long
def test_each_kind_of_jax_model_is_compared():
    import equinox
    import haiku

    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = jnp.tanh(linen.Dense(6)(x))
            return linen.Dense(6)(jnp.tanh(linen.Dense(6)(x)))

    linen_model = Linen()
    equinox_model = equinox.nn.MLP(6, 6, 6, 2, activation=jnp.tanh, key=jax.random.key(0))
    transformed = haiku.transform(lambda x: haiku.nets.MLP([6, 6, 6], activation=jnp.tanh)(x))
    for candidate in (
        (linen_model, linen_model.init(jax.random.key(0), X)),
        (lambda m, x: jax.vmap(m)(x), equinox_model),
        (transformed, transformed.init(jax.random.key(0), X)),
        nnx.Sequential(*(nnx.Linear(6, 6, rngs=nnx.Rngs(0)) if i % 2 == 0 else jnp.tanh for i in range(5))),
    ):
        report = parity.compare(Square(), candidate, inputs=X)
        assert report.passed, report.in_words()


@pytest.mark.long
def test_running_statistics_are_compared_after_a_training_step():
    class Reference(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = torch.nn.Linear(6, 6), torch.nn.BatchNorm1d(6)

        def forward(self, x):
            return self.norm(self.first(x))

    class Port(nnx.Module):
        def __init__(self, momentum):
            self.first = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(6, momentum=momentum, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.norm(self.first(x))

    checks = ("weights", "forward", "state")
    report = parity.compare(Reference(), Port(0.1), inputs=X, mode="train", checks=checks)
    assert failed(report) == {"state"} and any("momentum" in h for h in report.hints)
    report = parity.compare(Reference(), Port(0.9), inputs=X, mode="train", checks=checks)
    # PyTorch keeps the unbiased variance, Flax the biased one: the mean is right, and the variance is named.
    assert [r.case for r in report.results if not r.passed] == ["norm.var"]
    assert any("Bessel" in h for h in report.hints)


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
def test_the_gates_of_an_lstm_and_its_two_biases_are_mapped():
    class Reference(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.cells, self.out = torch.nn.LSTM(6, 4, batch_first=True), torch.nn.Linear(4, 3)

        def forward(self, x):
            return self.out(self.cells(x)[0])

    class Port(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(3)(linen.RNN(linen.OptimizedLSTMCell(4))(x))

    x = X[None, :, :].repeat(2, 0)
    shapes = jax.eval_shape(lambda: Port().init(jax.random.key(0), jnp.asarray(x, jnp.float32)))
    report = parity.compare(Reference, (Port(), jax.tree.map(lambda s: jnp.zeros(s.shape), shapes)), inputs=x)
    assert report.passed, report.in_words()
    found = {m.candidate: (m.reference, m.transform) for m in report.mapping}
    for number, gate in enumerate("ifgo"):
        cell = f"OptimizedLSTMCell_0.h{gate}"
        assert found[f"{cell}.kernel"] == ("cells.weight_hh_l0", f"chunk({number}, 4, 0) | transpose")
        assert found[f"{cell}.bias"] == ("cells.bias_ih_l0 + cells.bias_hh_l0", f"add | chunk({number}, 4, 0)")


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


def test_pairs_within_one_framework_are_compared_with_roles():
    assert parity.compare(Square(), Square(), inputs=X).passed
    report = parity.compare((square, parameters()), (lambda p, x: square(p, x) * 2, parameters()), inputs=X)
    assert report.verdict == "different" and any("2" in h for h in report.hints), report.in_words()


@pytest.mark.parametrize(
    ("candidate", "options", "words"),
    [
        (lambda: 3, {}, "the candidate is a builtins.int; expected a torch.nn.Module"),
        (lambda: square, {}, "the function square without its parameters"),
        (lambda: makes_nothing, {}, "makes_nothing() makes no model: ValueError: no weights (tests/parity/pair/"),
        (lambda: (square, parameters()), {"checks": ("forwards",)}, "no check is called 'forwards'"),
        (lambda: (square, parameters()), {"weights": "mine"}, "expected 'random' or 'own'"),
        (lambda: (square, parameters()), {"ignore": ["d.kernel"]}, "d.kernel is a weight of neither model"),
        (
            lambda: (square, parameters()),
            {"mapping": "- source: a.weigth\n  target: a.kernel\n"},
            "did you mean a.weight",
        ),
        (lambda: (square, parameters()), {"mapping": "- source: a.bias\n  target: a.kernel\n"}, "has shape (6, 6)"),
        (lambda: (lambda p, x: square(p, x) * jnp.nan, parameters()), {}, "the candidate returns NaN"),
        (lambda: (lambda p, x: square(p, x) + 1j, parameters()), {}, "complex numbers"),
        (lambda: (square, parameters(5)), {}, "can't be traced with these inputs"),
        (lambda: Noisy(), {}, "other outputs when it is called again"),
    ],
)
def test_what_cannot_be_compared_is_a_sentence(candidate, options, words):
    with pytest.raises(EngineError) as error:
        parity.compare(Square(), candidate(), inputs=X, **options)
    assert words in str(error.value) and "\n" not in str(error.value)


def makes_nothing():
    raise ValueError("no weights")


class Noisy(Square):
    def forward(self, x):
        return super().forward(x) + torch.randn(())


def test_importing_parity_imports_no_framework():
    import subprocess

    code = "import parity, sys; sys.exit(bool({'jax', 'torch', 'flax'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


class Linear(torch.nn.Module):
    def __init__(self, function=lambda y: y):
        super().__init__()
        self.l, self.function = torch.nn.Linear(6, 3), function

    def forward(self, x):
        return self.function(self.l(x))


def linear(parameters, x):
    return x @ parameters["w"] + parameters["b"]


EMPTY = {"w": jnp.zeros((6, 3)), "b": jnp.zeros(3)}


def test_an_output_that_only_the_reference_has_is_a_difference():
    reference = Linear(lambda y: (y, torch.tanh(y).sum(-1)))
    assert failed(parity.compare(reference, (linear, EMPTY), inputs=X)) == {"forward"}
    both = (lambda p, x: (linear(p, x), jnp.tanh(linear(p, x)).sum(-1))), EMPTY
    assert parity.compare(reference, both, inputs=X).passed


def test_another_shape_for_a_generated_input_is_a_difference():
    report = parity.compare(Linear(), (lambda p, x: linear(p, x)[: len(X)], EMPTY), inputs=X)
    assert failed(report) == {"forward"} and any("generated input: an odd batch" in r.case for r in report.results)


def test_an_output_that_is_one_number_shows_nothing():
    """Both are zero everywhere, whatever comes before."""
    reference = Linear(lambda y: torch.relu(y - 1e6))
    report = parity.compare(reference, (lambda p, x: jnp.maximum(jnp.tanh(linear(p, x)) - 1e6, 0.0), EMPTY), inputs=X)
    assert report.verdict == "inconclusive" and not report.passed and "one number" in report.doubts[0]


@pytest.mark.parametrize("checks", [("weights",), ("optimizer",)])
def test_nan_in_one_tensor_is_not_hidden_by_the_next(checks):
    """The tensor that is compared first is NaN in the candidate; the other one is right."""
    reference = Linear()
    if checks == ("weights",):
        _, written = parity.transfer(reference, (linear, EMPTY), inputs=X)
        candidate = linear, {"b": written["b"], "w": written["w"].at[0, 0].set(jnp.nan)}
        table = [{"source": "l.weight", "transform": "transpose", "target": "w"}, {"source": "l.bias", "target": "b"}]
        report = parity.compare(reference, candidate, inputs=X, weights="own", checks=checks, mapping=table)
    else:
        wrong = optax.chain(optax.sgd(0.1), optax.stateless(lambda u, p: {**u, "b": u["b"] * jnp.nan}))
        optimizers = (lambda p: torch.optim.SGD(p, lr=0.1)), wrong
        report = parity.compare(reference, (linear, EMPTY), inputs=X, checks=checks, optimizer=optimizers)
    named = {"weights": "w:", "optimizer": "b:"}[checks[0]]
    assert failed(report) == set(checks) and any(r.where.startswith(named) for r in report.results if not r.passed)


def test_inputs_that_the_reference_does_not_take_are_a_sentence():
    with pytest.raises(EngineError, match="the PyTorch model can't be called with these inputs: RuntimeError"):
        parity.compare(Linear(), (linear, EMPTY), inputs=np.zeros((4, 7)))


class Branches(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d, self.out = (torch.nn.Linear(6, 6) for _ in range(5))

    def forward(self, x):
        left = self.b(torch.nn.functional.gelu(self.a(x)))
        right = self.d(torch.tanh(self.c(x)))
        return self.out(left + right)


def branches(parameters, x):
    def layer(name, x):
        return x @ parameters[name]["kernel"] + parameters[name]["bias"]

    left = layer("b", jax.nn.gelu(layer("a", x), approximate=True))
    right = layer("d", jnp.tanh(1.1 * layer("c", x)))
    return layer("out", left + right)


def test_a_difference_in_another_branch_is_a_cause_by_itself():
    """Behind the sum of both branches one substitution would hide both."""
    empty = {n: {"kernel": jnp.zeros((6, 6)), "bias": jnp.zeros(6)} for n in ("a", "b", "c", "d", "out")}
    report = parity.compare(Branches(), (branches, empty), inputs=X, checks=("weights", "forward"))
    lines, first = inspect.getsourcelines(branches)
    expected = [first + i for i, line in enumerate(lines) if "approximate=True" in line or "1.1" in line]
    assert len(report.causes) == len(expected) == 2
    assert all(f":{number})" in cause for number, cause in zip(expected, report.causes, strict=True))


def test_gradients_are_named_in_the_order_of_the_backward_pass():
    """Forward passes agree; what comes before c has half its gradient, and b is the nearest to the outputs of that."""

    def port(parameters, x):
        h = jnp.tanh(x @ parameters["a"]["kernel"] + parameters["a"]["bias"])
        h = jnp.tanh(h @ parameters["b"]["kernel"] + parameters["b"]["bias"])
        h = 0.5 * h + jax.lax.stop_gradient(0.5 * h)
        return h @ parameters["c"]["kernel"] + parameters["c"]["bias"]

    report = parity.compare(Square(), (port, parameters()), inputs=X)
    assert failed(report) == {"gradients"}
    where = next(r.where for r in report.results if not r.passed)
    assert where.startswith("in the order of the backward pass b.") and "everything before agrees" in where


class Recurrent(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.cells, self.out = torch.nn.GRU(6, 4, batch_first=True), torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.cells(x)[0])


@pytest.mark.long
def test_the_biases_of_a_gru_are_mapped():
    """The reset and update gates add two biases of PyTorch; the third gate keeps them apart, because one is gated."""
    import equinox

    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(3)(linen.RNN(linen.GRUCell(4))(x))

    class Equinox(equinox.Module):
        cell: equinox.nn.GRUCell
        out: equinox.nn.Linear

        def __init__(self):
            self.cell = equinox.nn.GRUCell(6, 4, key=jax.random.key(0))
            self.out = equinox.nn.Linear(4, 3, key=jax.random.key(1))

        def __call__(self, x):
            def step(h, x):
                h = jax.vmap(self.cell)(x, h)
                return h, h

            _, states = jax.lax.scan(step, jnp.zeros((len(x), 4)), x.swapaxes(0, 1))
            return jax.vmap(jax.vmap(self.out))(states.swapaxes(0, 1))

    x = np.stack([X, X[::-1]])
    shapes = jax.eval_shape(lambda: Linen().init(jax.random.key(0), jnp.asarray(x, jnp.float32)))
    report = parity.compare(Recurrent, (Linen(), jax.tree.map(lambda s: jnp.zeros(s.shape), shapes)), inputs=x)
    assert report.passed, report.in_words()
    found = {m.candidate.removeprefix("GRUCell_0."): (m.reference, m.transform) for m in report.mapping}
    for number, gate in enumerate("rzn"):
        assert found[f"h{gate}.kernel"] == ("cells.weight_hh_l0", f"chunk({number}, 3, 0) | transpose")
        assert found[f"i{gate}.kernel"] == ("cells.weight_ih_l0", f"chunk({number}, 3, 0) | transpose")
    for number, gate in enumerate("rz"):
        assert found[f"i{gate}.bias"] == ("cells.bias_ih_l0 + cells.bias_hh_l0", f"add | chunk({number}, 3, 0)")
    assert found["in.bias"] == ("cells.bias_ih_l0", "chunk(2, 3, 0)")
    assert found["hn.bias"] == ("cells.bias_hh_l0", "chunk(2, 3, 0)")
    report = parity.compare(Recurrent, Equinox, inputs=x)
    assert report.passed, report.in_words()
    found = {m.candidate: (m.reference, m.transform) for m in report.mapping}
    assert found["cell.bias"] == ("cells.bias_ih_l0 + cells.bias_hh_l0", "add_first(2, 3)")
    assert found["cell.bias_n"] == ("cells.bias_hh_l0", "chunk(2, 3, 0)")


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


def test_a_small_difference_is_named_where_it_begins():
    """A constant written with eight digits: what it changes at once is less than what outputs are held to."""

    def port(parameters, x):
        for name in ("a", "b", "c"):
            x = x @ parameters[name]["kernel"] + parameters[name]["bias"]
            x = jnp.tanh(x * (1 + 3e-10)) if name == "a" else jnp.tanh(x) if name == "b" else x
        return x

    report = parity.compare(Square(), (port, parameters()), inputs=X, checks=("weights", "forward"))
    lines, first = inspect.getsourcelines(port)
    (expected,) = (first + i for i, line in enumerate(lines) if "3e-10" in line)
    assert report.first_divergence.lines[0].endswith(f":{expected}"), report.in_words()


ANGLES = np.arange(5)[:, None] * 10.0 ** -np.arange(6)


class Turned(Square):
    """Multiplies by a table that it computes; the mask asks for the lowest number of the inputs' type."""

    def forward(self, x):
        lowest = torch.full((5, 1), torch.finfo(x.dtype).min)
        table = torch.cos(torch.arange(5)[:, None] * 10.0 ** -torch.arange(6))
        return torch.maximum(super().forward(x * table), lowest)


@pytest.mark.parametrize(("angles", "verdict"), [(ANGLES, "same"), (ANGLES * (1 + 1e-4), "different")])
def test_a_table_that_was_rounded_before_tracing_counts_as_a_cast(angles, verdict):
    def port(parameters, x):
        table = jnp.broadcast_to(jnp.asarray(np.cos(angles.astype(np.float32)))[None], (1, 5, 6))[0]
        return square(parameters, x * table)

    report = parity.compare(Turned(), (port, parameters()), inputs=X, generate=False)
    assert report.verdict == verdict, report.in_words()
    if verdict == "same":
        assert any("candidate rounds to float32" in r.where for r in report.results)


class Scaled(Square):
    """Writes a factor with eight digits."""

    def forward(self, x):
        return super().forward(0.79788456 * x)


@pytest.mark.parametrize(
    ("factor", "dtype", "verdict"),
    [
        (0.79788456, "float32", "same"),
        (float(np.sqrt(2 / np.pi)), "float32", "same"),  # rounds to the same number
        (float(np.sqrt(2 / np.pi)), "float64", "different"),
        (0.7978848, "float32", "different"),
    ],
)
def test_a_number_that_is_held_in_float32_is_the_one_that_the_reference_writes(factor, dtype, verdict):
    def port(parameters, x):
        return square(parameters, (x.astype(dtype) * factor).astype(x.dtype))

    report = parity.compare(Scaled(), (port, parameters()), inputs=X, checks=("forward",))
    assert report.verdict == verdict, report.in_words()


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, "same"), (1.001, "different")])
def test_a_frozen_table_that_the_candidate_computes_needs_no_counterpart(factor, verdict):
    class Positions(Square):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.tensor(np.sin(ANGLES)), requires_grad=False)

        def forward(self, x):
            return super().forward(x + self.table)

    port = (lambda p, x: square(p, x + factor * jnp.sin(jnp.asarray(ANGLES))), parameters())
    report = parity.compare(Positions(), port, inputs=X, generate=False)
    assert report.verdict == verdict, report.in_words()


def test_a_number_that_float32_cannot_hold_stands_for_no_other():
    """1e-300 is 0 in float32, and the candidate's 0 stays 0; so does infinity."""
    program = JaxModel(of_tree({}, lambda _, x: jnp.maximum(x.astype("float32") + 0.0, -jnp.inf), "function")).program(
        Inputs.of(X)
    )
    assert program.with_numbers({1e-300, -1e300}) is program
    assert program.with_numbers({2.0}) is program


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
