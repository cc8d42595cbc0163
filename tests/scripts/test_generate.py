import dataclasses

import pytest

from gpt2_convert import read_weights
from gpt2_convert.canonical import write as write_safetensors
from gpt2_convert.llmc import write as write_llmc
from gpt2_core.config import ModelConfig
from gpt2_core.errors import UserError
from gpt2_core.language_model import choose_tokenizer
from parity.gpt2.cases import random_weights

MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=300)


@pytest.fixture
def weights(tmp_path):
    write_safetensors(random_weights(MODEL), tmp_path / "w.safetensors")
    return ("--weights", "w.safetensors", "--max_new_tokens", "40")


@pytest.mark.long
def test_both_backends_draw_the_same_text(run, weights):
    options = ("--prompt", "def ", "--num_samples", "2", "--top_k", "40", "--top_p", "0.9", "--precision", "float64")
    jax, torch = (run("generate.py", *weights, *options, "--backend", b) for b in ("jax", "torch"))
    assert jax == torch and jax[0] == 0 and jax[2] == ""
    first, second = jax[1].split("--- sample 2 of 2\n")
    assert first.startswith("--- sample 1 of 2\ndef ") and second.startswith("def ") and first[20:] != second


@pytest.mark.long
def test_seeds_choose_the_text_and_greedy_needs_none(run, weights):
    def text(*options):
        return run("generate.py", *weights, "--backend", "torch", *options)[1]

    texts = [text("--seed", seed) for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]
    greedy = [text("--greedy", "--seed", "1"), text("--greedy", "--seed", "2"), text("--temperature", "0")]
    assert greedy[0] == greedy[1] == greedy[2] != texts[0]


@pytest.mark.long
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_sample_may_stop_at_the_end_of_its_text(run, weights, backend):
    options = (*weights, "--max_new_tokens", "600", "--temperature", "3", "--backend", backend)
    whole, stopped = run("generate.py", *options)[1], run("generate.py", *options, "--stop_at_end_of_text")[1]
    text, marker, _ = whole.partition("<|endoftext|>")
    assert marker and stopped == text + "\n"


@pytest.fixture
def through_llmc(tmp_path):
    """A bytes model as llm.c's file, which has no place for a tokenizer's name."""
    write_llmc(random_weights(MODEL), tmp_path / "w.bin")
    return tmp_path / "w.bin"


@pytest.mark.long
def test_a_bytes_model_that_went_through_llmc_writes_its_text_again(run, weights, through_llmc):
    options = ("--prompt", "def ", "--greedy", "--max_new_tokens", "20", "--backend", "torch")
    again = run("generate.py", *options, "--weights", through_llmc, "--tokenizer", "bytes")
    assert again == run("generate.py", *options, *weights[:2]) and again[0] == 0


def test_a_tokenizer_is_the_recorded_one_and_must_fit(tmp_path, weights, through_llmc):
    choose = choose_tokenizer
    recorded, unknown = read_weights(str(tmp_path / "w.safetensors")), read_weights(str(through_llmc))
    assert choose(recorded, None).name == choose(recorded, "bytes").name == choose(unknown, "bytes").name == "bytes"
    gpt2, tiny = (
        dataclasses.replace(random_weights(dataclasses.replace(MODEL, vocab_size=ids)), tokenizer=None)
        for ids in (50257, 65)
    )
    assert choose(gpt2, None).name == "gpt2"
    for given, asked, words in (
        (unknown, None, r"w\.bin doesn't say which tokenizer .* has 300 ids, .* 50257 .* gpt2; use --tokenizer bytes$"),
        (unknown, "gpt2", r"^--tokenizer gpt2: .*w\.bin has 300 ids, too few .*; use --tokenizer bytes$"),
        (recorded, "gpt2", r"^--tokenizer gpt2: .* was trained with the tokenizer bytes; leave --tokenizer out$"),
        (tiny, None, r"no tokenizer that --tokenizer takes has so few$"),
    ):
        with pytest.raises(UserError, match=words):
            choose(given, asked)


def test_without_weights_the_option_is_named_and_what_it_takes(run):
    code, out, err = run("generate.py")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert (
        err.startswith("error: --weights is required (a path in any format that gpt2 convert reads, ") and "add" in err
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--weights", "nowhere"), "nowhere: no such file"),
        (("--temperature", "1e-9"), "--temperature 1e-09: must be 0.001 or more, or 0 for the most likely token"),
        (("--seed", "-1"), "--seed -1: must be from 0 to 4294967295"),
        (("--top_p", "1.5"), "--top_p 1.5"),
        (("--max_new_tokens", "0"), "must be 1 or more"),
        (("--backend", "flax"), "--backend flax: expected one of jax, torch"),
        (("--device", "cpu"), "chooses PyTorch's device"),
        (("--tokenizer", "words"), "--tokenizer words: expected one of gpt2, cl100k_base, o200k_base, bytes"),
    ],
)
def test_bad_input_is_one_sentence(run, weights, arguments, words):
    code, out, err = run("generate.py", *weights, *arguments)
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1
