import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_without_the_harness_a_sentence_names_the_extra(tmp_path):
    (tmp_path / "lm_eval.py").write_text("raise ModuleNotFoundError('no lm_eval here')\n")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "gpt2_evaluate", "--model", "gpt2_jax"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "no lm_eval here" in done.stderr and "pip install 'gpt2-jax[evaluate]'" in done.stderr
