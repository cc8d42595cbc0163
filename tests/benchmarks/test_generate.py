import dataclasses
import json

import numpy as np
import pytest

from benchmarks import generate
from gpt2_core.config import ModelConfig
from gpt2_core.errors import UserError

SMALL = [
    *("--model.n_layer", "1", "--model.n_head", "2", "--model.n_embd", "16", "--model.block_size", "16"),
    *("--model.vocab_size", "64", "--prompt", "4", "--tokens", "3", "--rounds", "2"),
]


@pytest.mark.slow
def test_each_side_is_measured_beside_transformers(tmp_path, capsys):
    pytest.importorskip("transformers")
    sides = "jax;jax, no cache;transformers"
    generate.main(
        [*SMALL, "--batch", "2", "--sides", sides, "--uncached_tokens", "2", "--json", str(tmp_path / "o.json")]
    )
    jax, uncached, transformers = json.loads((tmp_path / "o.json").read_text())["results"]["sides"]
    assert (jax["side"], jax["batch"], transformers["side"]) == ("jax", 2, "transformers")
    assert jax["prefill"] > 0 and jax["prefill_ratio"]["median"] > 0
    # So few tokens may take less time than it varies by on a busy machine: there is then no rate, never a wrong one.
    assert uncached["side"] == "jax, no cache" and (uncached["decode"] is None or uncached["decode"] > 0)
    assert transformers["prefill_ratio"]["median"] == 1.0
    said = capsys.readouterr().out
    assert "decode" in said and ("no rate of decoding" in said) == (
        None in (side["decode"] for side in (jax, uncached, transformers))
    )


def test_a_token_of_the_prefill_is_not_one_of_the_decode():
    """A prefill of 3 seconds and 4 tokens at a second each: 7 seconds for five tokens, 1.4 a token."""
    seconds = {name: {"prefill": [3.0], "decode": [(1.4 * 5 - 3.0) / 4]} for name in ("jax", "transformers")}
    row = generate._row("jax", 2, seconds, prompt=6)
    assert row["prefill"] == pytest.approx(2 * 6 / 3.0) and row["decode"] == pytest.approx(2 / 1.0)


def test_a_difference_below_its_noise_is_no_rate():
    """Where prefill alone took longer than prefill and decoding together, nothing is said of decoding."""
    seconds = {
        "jax": {"prefill": [3.0, 3.0], "decode": [1.0, -0.5]},
        "transformers": {"prefill": [6.0, 6.0], "decode": [2.0, 2.0]},
    }
    row = generate._row("jax", 2, seconds, prompt=6)
    assert row["decode"] is None and row["decode_ratio"] is None
    assert row["prefill"] == pytest.approx(4.0) and row["prefill_ratio"].median == pytest.approx(2.0)
    assert generate._row("transformers", 2, seconds, prompt=6)["decode"] == pytest.approx(1.0)


def test_a_step_of_decoding_reads_each_weight_once_and_the_cache():
    tied = ModelConfig(n_layer=1, n_head=1, n_embd=4, block_size=8, vocab_size=10)
    block = 12 * 4 * 4 + 13 * 4  # by hand: four matrices, their biases, two norms
    read = 10 * 4 + block + 2 * 4  # the table as the head, the last norm
    assert generate.numbers_read(tied, 3, 5) == read + 3 * 2 * 5 * 4
    untied = dataclasses.replace(tied, tie_embeddings=False)
    assert generate.numbers_read(untied, 3, 5) == read + 3 * 2 * 5 * 4
    # Ten steps a second of a thousand numbers of 4 bytes, where 100,000 bytes could be read.
    facts = {"precision": "float32", "bandwidth": 100_000.0}
    assert generate._bandwidth_share(10.0, 1000, facts) == pytest.approx(0.4)
    assert generate._bandwidth_share(10.0, 1000, facts | {"bandwidth": None}) is None


@pytest.mark.long
def test_all_sides_compute_the_same_tokens():
    """What is raced is the same work: every session's model continues the prompt alike."""
    from benchmarks.generate import _prompts, _weights
    from gpt2_core.sampling import Sampling
    from gpt2_jax.definition import define
    from gpt2_jax.generate import Generator
    from gpt2_jax.model import Execution
    from gpt2_jax.weights import from_canonical
    from gpt2_torch.generate import generate as by_reference
    from gpt2_torch.weights import build

    model = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 64}
    spec = {"model": model, "batch": 2, "prompt": 4}
    # Not by the session's own function, which sets JAX up again for the whole process.
    params = from_canonical(_weights(spec), "float32")
    uniforms = np.zeros((2, 5))
    generator = Generator(define(ModelConfig(**model), Execution("float32")))
    ours = list(generator(params, _prompts(spec), uniforms, Sampling(greedy=True)))
    assert ours == list(by_reference(build(_weights(spec)), _prompts(spec), uniforms, Sampling(greedy=True)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "1,x"], "--batch x: expected comma-separated positive integers"),
        (["--sides", "vllm"], "--sides vllm: no such side; use jax; jax, no cache"),
        (["--prompt", "1000", "--tokens", "100"], "more than model.block_size 1024"),
        (["--tokens", "1"], "--tokens 1: must be 2 or more"),
        (["--uncached_tokens", "66"], "--uncached_tokens 66: must be 2 to 65"),
    ],
)
def test_bad_input_is_one_sentence(arguments, words):
    with pytest.raises(UserError, match=words):
        generate.main(arguments)
