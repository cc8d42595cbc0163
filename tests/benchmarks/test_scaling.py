import json

import pytest

from benchmarks import scaling
from gpt2_core.config import ModelConfig, TrainConfig
from gpt2_core.errors import UserError

SMALL = [
    *("--model.n_layer", "1", "--model.n_head", "2", "--model.n_embd", "16", "--model.block_size", "16"),
    *("--model.vocab_size", "64", "--batch", "2", "--rounds", "1", "--steps", "1"),
]


@pytest.mark.slow
def test_a_step_is_measured_at_each_size(tmp_path, capsys):
    options = ["--axes", "vocabulary", "--factors", "1,8", "--frameworks", "jax", "--json", str(tmp_path / "o.json")]
    scaling.main([*SMALL, *options])
    small, large = json.loads((tmp_path / "o.json").read_text())["results"]["rows"]
    assert [(row["factor"], row["side"]) for row in (small, large)] == [(1, "jax"), (8, "jax")]
    assert 0 < small["step_bytes"] < large["step_bytes"]
    assert small["tokens_per_second"] == pytest.approx(2 * 16 / small["step_seconds"])
    assert "as an exponent" in capsys.readouterr().out


def test_one_size_grows_and_the_rest_stays():
    base = TrainConfig(ModelConfig(2, 2, 16, 16, 64), batch_size=4, mesh=1)
    assert scaling.grown(base, "batch", 2).batch_size == 8
    assert scaling.grown(base, "devices", 4).mesh == 4
    for axis, name in (("block_size", "block_size"), ("layers", "n_layer"), ("vocabulary", "vocab_size")):
        grown = scaling.grown(base, axis, 4)
        assert getattr(grown.model, name) == 4 * getattr(base.model, name)
        assert scaling.grown(base, axis, 1) == base


def test_growth_is_an_exponent():
    assert scaling.growth([1, 2, 4], [1.0, 3.0, 12.0]) == pytest.approx(2.0)
    assert scaling.growth([2, 8], [5.0, 20.0]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--axes", "depth"], "--axes depth: no axis is called 'depth'; use some of block_size,batch"),
        (["--factors", "0"], "--factors 0: expected comma-separated positive integers"),
        (["--frameworks", "mxnet"], "--frameworks mxnet: unknown framework 'mxnet'"),
    ],
)
def test_bad_input_is_one_sentence(arguments, words):
    with pytest.raises(UserError, match=words):
        scaling.main(arguments)
