import json

import pytest

from benchmarks import campaign_commands
from benchmarks.campaign_commands import bundled_text, nvidia_smi
from benchmarks.runner import run_stage

SMALL = [
    *("--model.n_layer", "1", "--model.n_head", "2", "--model.n_embd", "16", "--model.block_size", "64"),
]


def test_the_bundled_text_is_english_of_the_recipes_length():
    text = bundled_text()
    assert 0 <= campaign_commands._TEXT_BYTES - len(text) < 4
    words = text.decode("utf-8").split()
    assert sum(word in ("the", "of", "a", "is", "to") for word in words) > len(words) / 10
    assert text == bundled_text()


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """A driver's tool that prints what it is given."""

    def make(answer: str, code: int = 0) -> None:
        path = tmp_path / "nvidia-smi"
        path.write_text(f"#!/bin/sh\necho '{answer}'\nexit {code}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    return make


def test_the_driver_is_asked_for_facts_and_clocks(tool, monkeypatch, tmp_path):
    tool("NVIDIA H200, 580.159.03, 143771 MiB, 345 MHz, 1980 MHz, 3201 MHz, 700.00 W, 31")
    found = nvidia_smi()
    assert found["name"] == "NVIDIA H200" and found["memory.total"] == "143771 MiB"
    assert found["clocks.max.sm"] == "1980 MHz" and found["temperature.gpu"] == "31"
    tool("no devices were found", 6)
    assert nvidia_smi() is None
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert nvidia_smi() is None


def test_the_runs_curve_is_read_from_its_folder(make_config, tmp_path):
    from gpt2_core.config.io import to_yaml

    config = make_config(reference_curve={0: 10.97, 50: 5.25})
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    rows = [{"split": "train", "step": step, "loss": 1.0 - step / 10, "tokens_per_second": rate}
            for step, rate in enumerate([5.0, 100.0, 90.0])] + [{"split": "val", "step": 3, "loss": 9.0}]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert campaign_commands._curve(tmp_path) == {
        "losses": {0: 1.0, 1: 0.9, 2: 0.8},
        "published": {0: 10.97, 50: 5.25},
        "steps": 3,
        "tokens_per_second": 90.0,
    }


@pytest.mark.slow
@pytest.mark.parametrize("function", ["generation", "parity", "overfit"])
def test_commands_of_this_project_run_as_stages(function, tmp_path, text_file):
    """Each at toy size on CPU."""
    specs = {
        "generation": {
            "arguments": [*SMALL, "--sides", "jax", "--batch", "2", "--prompt", "8", "--tokens", "4", "--rounds", "2",
                          "--device", "cpu", "--uncached_tokens", "2"],
        },
        "parity": {
            "folder": str(tmp_path / "parity"),
            "arguments": ["--quick", "--device", "cpu", "--checks", "schedule"],
        },
        "overfit": {
            "folder": str(tmp_path / "overfit"),
            "text": str(text_file),
            "target_loss": 100.0,
            "arguments": [*SMALL, "--data.tokenizer", "bytes", "--batch_size", "2", "--accumulation", "1", "--steps",
                          "15"],
        },
    }  # fmt: skip
    function_name = f"benchmarks.campaign_commands:{function}"
    found = run_stage(function_name, specs[function], limit=180, log=tmp_path / "log.txt")
    assert found.status == "done", (tmp_path / "log.txt").read_text()[-3000:]
    results = found.results
    if function == "generation":
        assert results["sides"][0]["side"] == "jax" and results["sides"][0]["prefill"] > 0
    elif function == "parity":
        assert results["passed"] and results["cases"] >= 1 and (tmp_path / "parity" / "report.json").is_file()
    else:
        # The mean of the last ten logged losses is under the target as soon as there are ten.
        assert results["steps"] == 10 and results["published"]["250"] == 0.0052
        assert results["text"] == "license.txt" and not (tmp_path / "overfit" / "run" / "checkpoints").exists()
