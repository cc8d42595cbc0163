import pytest

from gpt2_convert.canonical import write as write_safetensors
from gpt2_core.config import ModelConfig
from parity.subjects import random_weights

MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=300)


@pytest.fixture
def weights(tmp_path):
    write_safetensors(random_weights(MODEL), tmp_path / "w.safetensors")
    return ("--weights", "w.safetensors", "--max_new_tokens", "40")


def test_both_backends_draw_the_same_text(run, weights):
    options = ("--prompt", "def ", "--num_samples", "2", "--top_k", "40", "--top_p", "0.9", "--precision", "float64")
    jax, torch = (run("generate.py", *weights, *options, "--backend", b) for b in ("jax", "torch"))
    assert jax == torch and jax[0] == 0 and jax[2] == ""
    first, second = jax[1].split("--- sample 2 of 2\n")
    assert first.startswith("--- sample 1 of 2\ndef ") and second.startswith("def ") and first[20:] != second


def test_seeds_choose_the_text_and_greedy_needs_none(run, weights):
    texts = [run("generate.py", *weights, "--seed", seed)[1] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]
    greedy = [run("generate.py", *weights, "--greedy", "--seed", seed)[1] for seed in ("1", "2")]
    assert greedy[0] == greedy[1]


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_sample_may_stop_at_the_end_of_its_text(run, weights, backend):
    options = (*weights, "--max_new_tokens", "600", "--temperature", "3", "--backend", backend)
    whole, stopped = run("generate.py", *options)[1], run("generate.py", *options, "--stop_at_end_of_text")[1]
    text, marker, _ = whole.partition("<|endoftext|>")
    assert marker and stopped == text + "\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--weights", "nowhere"), "nowhere: no such file"),
        (("--temperature", "0"), "--temperature 0.0: must be 0.001 or more; for the most likely token use --greedy"),
        (("--seed", "-1"), "--seed -1: must be from 0 to 4294967295"),
        (("--top_p", "1.5"), "--top_p 1.5"),
        (("--max_new_tokens", "0"), "must be 1 or more"),
        (("--backend", "flax"), "--backend flax: expected one of jax, torch"),
        (("--device", "cpu"), "chooses PyTorch's device"),
    ],
)
def test_bad_input_is_one_sentence(run, weights, arguments, words):
    code, out, err = run("generate.py", *weights, *arguments)
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1
