"""The first divergence of two models: its lines, hints, the report's files, and causes told from consequences."""

import inspect
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny
import torch
from squares import Square, X, failed, parameters

import parity
from parity.engine.errors import EngineError


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
    assert "First divergence" in page and "Mapping of the weights" in page
    with pytest.raises(EngineError, match="exists and is not a report"):
        parity.compare(tiny.make_torch(), tiny.make_torch(), inputs=tiny.TOKENS).write(tmp_path)


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


def test_a_small_difference_is_named_where_it_begins():
    """A constant written with eight digits: what it changes at once is less than what outputs are held to."""

    def port(parameters, x):
        for name in ("a", "b", "c"):
            x = x @ parameters[name]["kernel"] + parameters[name]["bias"]
            x = jnp.tanh(x * (1 + 3e-10)) if name == "a" else jnp.tanh(x) if name == "b" else x
        return x

    torch.manual_seed(0)  # with other biases the outputs may differ by less than the limit
    report = parity.compare(Square(), (port, parameters()), inputs=X, checks=("weights", "forward"))
    lines, first = inspect.getsourcelines(port)
    (expected,) = (first + i for i, line in enumerate(lines) if "3e-10" in line)
    assert report.first_divergence.lines[0].endswith(f":{expected}"), report.in_words()
