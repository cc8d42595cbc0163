"""The command, as a user runs it."""

import dataclasses
import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2_convert.canonical import write as write_safetensors
from gpt2_core.config import ModelConfig
from parity.gpt2.cases import random_weights
from parity.gpt2.suite import CANNOT_SEE, CHECKS

ROOT = Path(__file__).parents[2]
TINY = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=300)


@pytest.fixture
def run(tmp_path):
    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "parity" / "compare.py"), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True)

    return run


# What the report draws comes from these.
DRAWN = "forward,gradients,loss_curve,precision,generation"


@pytest.mark.long
@pytest.mark.parametrize("checks", [DRAWN, pytest.param(",".join(CHECKS), marks=pytest.mark.slow)], ids=["some", "all"])
def test_the_quick_form_proves_the_models_the_same_and_writes_its_report(run, tmp_path, checks):
    write_safetensors(random_weights(TINY), tmp_path / "w.safetensors")
    done = run("--quick", "--checks", checks, *(("--weights", "w.safetensors") if checks == DRAWN else ()))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "parity_report" / "report.json").read_text())
    assert report["passed"] is True and {"passed", "environment", "checks"} <= set(report)
    assert {"jax", "torch", "python", "weights"} <= set(report["environment"])
    assert {c["check"] for c in report["checks"]} == set(checks.split(",")) and report["skipped"] == []
    for c in report["checks"]:
        assert set(c) == {"check", "case", "measured", "limit", "passed", "where"}
        assert c["passed"] is (c["measured"] <= c["limit"]) is True
    limits = {(c["check"], c["limit"]) for c in report["checks"] if c["limit"] > 0}
    assert {("forward", 1e-12), ("gradients", 1e-10), ("loss_curve", 1e-11)} < limits
    page = (tmp_path / "parity_report" / "index.html").read_text()
    assert "The two are the same model" in page and "data:image/png;base64" in page
    assert not re.search(r"(src|href)=.?http", page)  # nothing to fetch
    assert bool(re.search(r"\d+ of \d+ pairs of options have met", page)) is (checks != DRAWN)
    assert {p.name for p in (tmp_path / "parity_report").iterdir()} == {
        *("report.json", "index.html", "table.svg"),
        *("loss_curve.png", "forward.png", "gradients.png", "precision.png"),
    }
    svg = (tmp_path / "parity_report" / "table.svg").read_text()
    assert "loss_curve" in svg and "@font-face" not in svg and "url(http" not in svg


@pytest.fixture
def run_with(run, tmp_path):
    """The command, after a line of Python that breaks something."""

    def run_with(fault: str, *arguments: str) -> subprocess.CompletedProcess:
        # Python runs it at its start, in the processes of the checks too.
        (tmp_path / "faulty").mkdir(exist_ok=True)
        (tmp_path / "faulty" / "sitecustomize.py").write_text(fault + "\n")
        return run(*arguments, PYTHONPATH=str(tmp_path / "faulty"))

    return run_with


@pytest.mark.long
def test_a_users_weights_are_compared_and_a_failure_is_exit_code_1(run, run_with, tmp_path):
    weights = random_weights(TINY)
    write_safetensors(weights, tmp_path / "w.safetensors")
    arguments = ("--weights", "w.safetensors", "--checks", "forward", "--report", "mine")
    assert run(*arguments).returncode == 0
    fault = "import torch.nn.functional as F; g = F.gelu; F.gelu = lambda x, approximate: g(x)"
    done = run_with(fault, *arguments)
    assert done.returncode == 1 and "FAIL" in done.stdout
    assert "look first at forward" in done.stdout and "PyTorch looks like erf GELU" in done.stdout
    report = json.loads((tmp_path / "mine" / "report.json").read_text())
    assert report["passed"] is False and not any(c["passed"] for c in report["checks"])


@pytest.mark.long
def test_an_exception_in_a_check_is_a_failed_case_and_nothing_else_is_lost(run_with, tmp_path):
    write_safetensors(random_weights(TINY), tmp_path / "w.safetensors")
    fault = "import torch.nn.functional as F; F.gelu = lambda x: x"
    done = run_with(fault, "--weights", "w.safetensors", "--quick", "--checks", "weights,forward,schedule")
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr, done.stderr
    report = json.loads((tmp_path / "parity_report" / "report.json").read_text())
    failed = {c["check"]: c for c in report["checks"] if not c["passed"]}
    assert set(failed) == {"forward", "schedule"} and any(c["check"] == "weights" for c in report["checks"])
    for c in failed.values():
        assert (c["case"], c["measured"], c["limit"]) == ("exceptions", 1.0, 0.0)
        assert "TypeError" in c["where"] and "approximate" in c["where"] and "gpt2_torch/model.py:" in c["where"]
    assert report["explanation"].startswith("look first at forward, exceptions: TypeError")
    assert "TypeError" in (tmp_path / "parity_report" / "index.html").read_text()


@pytest.mark.slow
def test_the_default_form_passes_too(run):
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_full_form_passes_too(run):
    done = run("--full", "--checks", "loss_curve")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_every_mistake_is_caught_and_the_report_says_so(run, tmp_path):
    done = run("--prove")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "parity_report" / "report.json").read_text())
    assert len(report["faults"]) >= 100 and all(f["in_place"] for f in report["faults"])
    page = (tmp_path / "parity_report" / "index.html").read_text()
    assert "planted mistakes were caught" in page and all(s in html.unescape(page) for s in CANNOT_SEE)


@pytest.mark.long
def test_two_sets_of_weights_are_the_same_model_or_the_tensor_is_named(run, tmp_path):
    weights = random_weights(TINY)
    write_safetensors(weights, tmp_path / "a.safetensors")
    write_safetensors(weights, tmp_path / "b.safetensors")
    changed = weights.arrays["h.0.mlp.c_fc.bias"].copy()
    changed[3] += 1e-3
    write_safetensors(
        dataclasses.replace(weights, arrays=dict(weights.arrays) | {"h.0.mlp.c_fc.bias": changed}),
        tmp_path / "c.safetensors",
    )
    assert run("--weights", "a.safetensors", "--against", "b.safetensors").returncode == 0
    done = run("--weights", "a.safetensors", "--against", "c.safetensors")
    assert done.returncode == 1
    report = json.loads((tmp_path / "parity_report" / "report.json").read_text())
    assert [c["where"].split(":")[0] for c in report["checks"]] == ["block 0, mlp c_fc bias", "block 0, mlp c_fc"]


@pytest.mark.long
def test_a_users_own_implementation_is_judged(run, tmp_path):
    write_safetensors(random_weights(TINY), tmp_path / "w.safetensors")
    shutil.copy(ROOT / "tests" / "parity" / "my_port.py", tmp_path)
    done = run("--weights", "w.safetensors", "--against", "my_port:logits")
    assert done.returncode == 0, done.stdout + done.stderr
    done = run("--against", "my_port:nothing")
    assert done.returncode == 2 and "--against my_port:nothing" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--weights", "nowhere"), "nowhere: no such file or folder"),
        (("--checks", "forward,backward"), "no check is called 'backward'; there are data, initialization, weights"),
        (("--report", "taken"), "--report taken: exists and is not a report"),
        (("--report", "file/x"), "--report file/x: can't write there"),
        (("--device", "gpu"), "--device gpu: JAX finds no GPU here; use --device cpu"),
        (("--prove", "--full"), "--prove: plants its mistakes in a tiny model of its own"),
        (("--steps", "0"), "--steps 0: must be 1 or more"),
        (("--steps", "many"), "--steps many: expected a whole number"),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(run, tmp_path, arguments, words):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("precious")
    (tmp_path / "file").write_text("")
    done = run(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and words in done.stderr and done.stderr.count("\n") == 1
    assert (tmp_path / "taken" / "thesis.tex").read_text() == "precious"
