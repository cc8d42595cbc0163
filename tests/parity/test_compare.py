"""The command, as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2_core.config import ModelConfig
from gpt2_core.weights import write_safetensors
from parity.subjects import random_weights

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "parity" / "compare.py"), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    return run


def test_the_quick_form_proves_the_models_the_same_and_writes_its_report(run, tmp_path):
    done = run("--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "parity_report" / "report.json").read_text())
    assert report["passed"] is True and set(report) == {"passed", "environment", "checks"}
    assert {"jax", "torch", "python", "weights"} <= set(report["environment"])
    assert {c["check"] for c in report["checks"]} == {"weights", "forward", "gradients", "loss_curve", "generation"}
    for c in report["checks"]:
        assert set(c) == {"check", "case", "measured", "limit", "passed", "where"}
        assert c["passed"] is (c["measured"] <= c["limit"]) is True
    limits = {(c["check"], c["limit"]) for c in report["checks"] if c["limit"] > 0}
    assert limits == {("forward", 1e-12), ("gradients", 1e-10), ("loss_curve", 1e-11)}
    svg = (tmp_path / "parity_report" / "table.svg").read_text()
    assert "loss_curve" in svg and "@font-face" not in svg and "url(http" not in svg


def test_a_users_weights_are_compared_and_a_failure_is_exit_code_1(run, tmp_path):
    weights = random_weights(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=300))
    write_safetensors(weights, tmp_path / "w.safetensors")
    arguments = ("--weights", "w.safetensors", "--checks", "forward", "--report", "mine")
    assert run(*arguments).returncode == 0
    fault = "import torch.nn.functional as F; g = F.gelu; F.gelu = lambda x, approximate: g(x)\n"
    script = tmp_path / "faulty.py"
    script.write_text(
        "import sys, runpy\n" + fault + f"sys.argv[0] = {str(ROOT / 'parity' / 'compare.py')!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, script, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "FAIL" in done.stdout
    report = json.loads((tmp_path / "mine" / "report.json").read_text())
    assert report["passed"] is False and not any(c["passed"] for c in report["checks"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--weights", "nowhere"), "nowhere: no such file or folder"),
        (("--checks", "forward,backward"), "no check is called 'backward'; there are weights, forward"),
        (("--report", "taken"), "--report taken: exists and is not a report"),
        (("--report", "file/x"), "--report file/x: can't write there"),
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
