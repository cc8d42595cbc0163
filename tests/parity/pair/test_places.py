"""Places of divergences: planted changes are named at their line, causes are separated, inputs generated."""

import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch

import parity
from parity.engine.results import relative_to_largest
from parity.models.jax_model import arrays_of, recording
from parity.pair.comparison import opened
from parity.pair.divergence import locate
from parity.pair.mutation import Runner, mutants

PLANTED = 25


@pytest.mark.long
def test_the_line_of_a_random_change_is_named():
    comparison = opened(tiny.make_torch, tiny.make_jax, inputs=tiny.TOKENS)
    model, (theirs, ours) = comparison.candidate, comparison.cases[0]
    reference = comparison.reference.record(comparison.weights["reference"], theirs)
    names = [w.name for w in model.weights()]
    program = model.program(ours)
    values = program.run([comparison.weights["candidate"][n] for n in names], arrays_of(ours), lifted=True)
    assert (
        locate(recording(program, values, names, ["x"]), reference, [(0, 0)], comparison.made_of("candidate")) is None
    )
    runner, output, every = Runner(program, values), program.outputs[0], mutants(program, values)
    named = few = planted = 0
    for i in np.random.default_rng(0).permutation(len(every)):
        mutant = every[i]
        changed = runner.changed(mutant)
        if changed is None or output not in changed or relative_to_largest(changed[output], values[output]) < 1e-7:
            continue
        held = recording(program.with_operation(mutant.position, mutant.operation), values | changed, names, ["x"])
        place = locate(held, reference, [], comparison.made_of("candidate"))
        planted += 1
        named += mutant.place in place.lines
        few += mutant.place in place.lines and len(place.lines) <= 3
        if planted == PLANTED:
            break
    assert planted == PLANTED and named >= 0.9 * PLANTED and few >= 0.7 * PLANTED, (named, few)


@pytest.mark.long
def test_causes_are_told_from_consequences():
    report = parity.compare(tiny.make_torch, tiny.Decoder(epsilon=1e-3), inputs=tiny.TOKENS, checks=("forward",))
    # The first norm of each of the two blocks; the second norms, which are right, only follow.
    assert len(report.causes) == 2 and all("tiny.py:" in c and "wrong by itself" in c for c in report.causes)
    source = open(tiny.__file__, encoding="utf-8").read().splitlines()  # noqa: SIM115
    lines = {c.partition("tiny.py:")[2].partition(")")[0] for c in report.causes}
    assert [source[int(line) - 1].strip() for line in lines] == ["h = self.ln1(x)"]


class Sum(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(11, 4)

    def forward(self, tokens):
        return self.table(tokens).cumsum(1)


def cumulative(parameters, tokens, window=100):
    x = parameters["table"][tokens]
    seen = jnp.cumsum(x, axis=1)
    return seen - jnp.pad(seen, ((0, 0), (window, 0), (0, 0)))[:, : x.shape[1]]


def test_a_generated_input_shows_what_the_given_one_does_not():
    tokens = np.arange(8).reshape(2, 4)
    empty = {"table": jnp.zeros((11, 4))}
    assert parity.compare(Sum(), (cumulative, empty), inputs=tokens).passed
    report = parity.compare(Sum(), (lambda p, t: cumulative(p, t, window=5), empty), inputs=tokens)
    failed = [r.case for r in report.results if not r.passed]
    assert failed == ["generated input: a longer input"] and any("only a longer input" in h for h in report.hints)
    assert parity.compare(Sum(), (lambda p, t: cumulative(p, t, window=5), empty), inputs=tokens, generate=False).passed


CELLS = (
    """
import torch
class Reference(torch.nn.Module):
    def forward(self, x):
        return torch.sin(x)
""",
    """
import jax.numpy as jnp
def candidate(parameters, x):
    return jnp.cos(x)
""",
    """
import numpy as np, parity
report = parity.compare(Reference(), (candidate, {}), inputs=np.ones((2, 3)))
""",
)


@pytest.mark.long
def test_lines_of_a_notebook_are_named_by_their_cells():
    pytest.importorskip("IPython", reason="the extra `notebooks` isn't installed")
    code = (
        "from IPython.core.interactiveshell import InteractiveShell\n"
        f"shell = InteractiveShell.instance()\nfor cell in {CELLS!r}:\n"
        "    shell.run_cell(cell.strip(), store_history=True).raise_error()\n"
        "place = shell.user_ns['report'].first_divergence\nprint(place.reference, place.candidate, *place.lines)"
    )
    root = Path(parity.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "sin (In[1]:4) cos (In[2]:3) In[2]:3\n", done.stderr
