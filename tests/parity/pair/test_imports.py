"""What a comparison imports: the frameworks of its two models and nothing else, and nothing of GPT-2."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CHECKS = '("weights", "forward", "gradients", "optimizer", "loss_curve")'
TORCH = f"""
import numpy, parity, torch
class Model(torch.nn.Module):
    def __init__(self, epsilon):
        super().__init__()
        self.a, self.norm, self.b = torch.nn.Linear(6, 6), torch.nn.LayerNorm(6, epsilon), torch.nn.Linear(6, 3)
    def forward(self, x):
        return self.b(torch.tanh(self.norm(self.a(x))))
def compare(candidate):
    optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.1)
    return parity.compare(Model(1e-5), candidate, inputs=numpy.eye(6), checks={CHECKS}, optimizer=(optimizer,) * 2)
same, different = compare(Model(1e-5)), compare(Model(1e-3))
"""
JAX = f"""
import jax.numpy as jnp, numpy, optax, parity
def model(scale):
    return lambda p, x: jnp.tanh(scale * (x @ p["a"])) @ p["b"], dict(a=jnp.zeros((6, 5)), b=jnp.zeros((5, 3)))
def compare(candidate):
    optimizers = (optax.sgd(0.1),) * 2
    return parity.compare(model(1.0), candidate, inputs=numpy.eye(6), checks={CHECKS}, optimizer=optimizers, mutants=2)
same, different = compare(model(1.0)), compare(model(1.1))
"""
VERDICTS = """
import os, sys
assert (same.verdict, different.verdict) == ("same", "different")
for number, report in enumerate((same, different)):
    report.write(os.path.join(sys.argv[1], str(number)))
"""
COMMAND = """
import runpy, sys
sys.argv = ["parity", "compare", "tiny:make_torch", "tiny:make_torch", "--inputs", "tiny:TOKENS", "--report",
            sys.argv[1] + "/report"]
runpy.run_module("parity", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("code", "unneeded"),
    [
        ("import parity", ("torch", "jax", "flax")),
        pytest.param(TORCH + VERDICTS, ("jax", "flax", "optax"), marks=pytest.mark.long),
        pytest.param(JAX + VERDICTS, ("torch", "flax"), marks=pytest.mark.long),
        pytest.param(
            COMMAND, (r"gpt2_\w+", "jsonargparse", r"parity\.gpt2", r"parity\.compare"), marks=pytest.mark.long
        ),
    ],
    ids=["import", "two PyTorch models", "two JAX models", "command"],
)
def test_only_what_the_models_need_is_imported(code, unneeded, tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[2])])}
    code += "\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    modules = done.stdout.splitlines()[-1].split()
    assert "parity" in modules
    assert not [m for m in modules if re.match(rf"({'|'.join(unneeded)})(\.|$)", m)]
