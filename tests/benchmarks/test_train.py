import json

import pytest

from benchmarks import train
from gpt2_core.errors import UserError

SMALL = [
    *("--model.n_layer", "1", "--model.n_head", "2", "--model.n_embd", "16", "--model.block_size", "16"),
    *("--model.vocab_size", "64", "--batch", "2", "--rounds", "3", "--steps", "2"),
]


@pytest.mark.slow
def test_both_frameworks_are_measured_and_compared(tmp_path, capsys):
    """PyTorch uncompiled only: its compiler would take longer than all else here."""
    train._sides, sides = lambda *a: [s for s in sides(*a) if "compiled" not in s[0]], train._sides
    try:
        train.main([*SMALL, "--json", str(tmp_path / "o.json")])
    finally:
        train._sides = sides
    found = json.loads((tmp_path / "o.json").read_text())["results"]
    jax, torch = found["sides"]
    assert (jax["side"], torch["side"]) == ("jax", "torch, eager")
    # 16 x 16 x 12 + biases and norms + tied embedding of 64 rows: 6 N + 12 L T D by hand.
    multiplying = 64 * 16 + (3 * 16 * 16 + 48) + (16 * 16 + 16) + 2 * (16 * 64) + 64 + 16 + 3 * 32
    for side in (jax, torch):
        assert side["tokens_per_second"] == pytest.approx(2 * 16 / side["step_seconds"])
        flops = 6 * multiplying + 12 * 1 * 16 * 16
        assert side["flops"] == pytest.approx(side["tokens_per_second"] * flops)
        assert side["peak_bytes"] > 1e7 and side["matmul_flops"] > 1e8 and side["precision"] == "float32"
    assert found["ratios"]["jax over torch, eager"]["median"] > 0
    assert len(found["seconds_a_step"]["jax"]) == 3
    out = capsys.readouterr().out
    assert "tokens/s" in out and "times as fast" in out


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--frameworks", "jax,mxnet"],
            "--frameworks jax,mxnet: unknown framework 'mxnet'; use jax, torch or jax,torch",
        ),
        (["--preset", "gpt5"], "--preset gpt5: no such preset"),
        (["--rounds", "0"], "--rounds 0: must be 1 or more"),
        (["--frameworks", "jax", "--device", "cuda", *SMALL], "jax: --device cuda: JAX finds no GPU here"),
    ],
)
def test_bad_input_is_one_sentence(arguments, words):
    with pytest.raises(UserError, match=words):
        train.main(arguments)


def test_pytorchs_better_side_is_the_one_that_counts():
    seconds = {"jax": [1.0, 1.0], "torch, eager": [4.0, 4.0], "torch, compiled": [2.0, 2.0]}
    ((pair, found),) = train._ratios(seconds).items()
    assert pair == "jax over torch, compiled" and found.median == 2.0


@pytest.mark.parametrize(("name", "flash", "cudnn"), [("flash", True, False), ("cudnn", False, True)])
def test_pytorchs_attention_is_the_kernel_asked_for(name, flash, cudnn):
    import torch

    from benchmarks.harness import _attention_kernel

    enabled = torch.backends.cuda
    with _attention_kernel("auto"):
        assert enabled.flash_sdp_enabled() and enabled.math_sdp_enabled()
    with _attention_kernel(name):
        assert (enabled.flash_sdp_enabled(), enabled.cudnn_sdp_enabled()) == (flash, cudnn)
        assert not enabled.math_sdp_enabled()
