import json

import pytest

from benchmarks import checkpoint

SMALL = [
    *("--model.n_layer", "1", "--model.n_head", "2", "--model.n_embd", "64", "--model.block_size", "16"),
    *("--model.vocab_size", "128", "--batch", "2", "--rounds", "2", "--steps", "2"),
]


@pytest.mark.long
def test_saves_and_restores_of_both_trainers_are_timed(tmp_path, capsys):
    checkpoint.main([*SMALL, "--json", str(tmp_path / "o.json")])
    found = json.loads((tmp_path / "o.json").read_text())["results"]["sides"]
    parameters = 128 * 64 + 16 * 64 + 12 * 64 * 64 + 13 * 64 + 2 * 64  # by hand: embeddings, a block, the last norm
    for row in found.values():
        # The parameters and two moments of each, and what describes them.
        assert 3 * 4 * parameters <= row["bytes"] < 1.3 * 3 * 4 * parameters
        assert min(row["blocked_seconds"], row["written_seconds"], row["restore_seconds"]) > 0
    assert "restored in" in capsys.readouterr().out


def test_the_share_lost_is_of_the_steps_between_two_saves():
    seconds = {"plain": [2.0, 2.0], "blocked": [0.1, 0.1], "saving": [2.4, 2.4], "written": [3, 3], "restore": [1, 1]}
    row = checkpoint._row({"seconds": seconds, "steps": 4, "bytes": 7}, interval=10)
    # A step takes 0.5 s, so ten of them 5 s; a save holds them up by 0.1 s and slows those after it by 0.4 s.
    assert row["step_seconds"] == 0.5 and row["share_lost"] == pytest.approx(0.5 / 5.0)
