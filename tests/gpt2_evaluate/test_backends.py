"""Both frameworks give the same probabilities, on any mesh."""

import dataclasses

import jax
import numpy as np
import pytest

import gpt2_torch.score
from gpt2_core.config import ModelConfig
from gpt2_core.data.batches import Batch
from gpt2_core.data.tokenizer import BytesTokenizer
from gpt2_core.evaluation.run import Evaluated, evaluate_task
from gpt2_core.evaluation.scoring import Request, rolling_requests, score
from gpt2_evaluate.backends import jax_program, jax_scorer, torch_scorer
from gpt2_jax.score import scorer
from parity.gpt2.cases import random_weights

MODEL = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=48, vocab_size=257, dropout=0.1)
SIZES = {"block_size": MODEL.block_size, "batch_size": 8}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def requests(count: int = 20) -> list[Request]:
    """Of many lengths, some too long for the block."""
    generator = np.random.default_rng(0)
    sizes = generator.integers(1, 40, (count, 2))
    return [Request(*(generator.integers(0, 257, size).tolist() for size in pair)) for pair in sizes]


@pytest.mark.parametrize("mesh", ["1", pytest.param("data=2,fsdp=2,tensor=2", marks=pytest.mark.long)])
def test_both_frameworks_score_alike_in_float64(x64, mesh):
    weights = random_weights(MODEL, dtype=np.float64)
    ours = score(requests(), jax_scorer(weights, mesh=mesh, precision="float64", batch_size=8), **SIZES)
    theirs = score(requests(), torch_scorer(weights, device="cpu", precision="float64"), **SIZES)
    assert max(abs(a.log_prob - b.log_prob) for a, b in zip(ours, theirs, strict=True)) <= 1e-10
    assert [a.is_greedy for a in ours] == [b.is_greedy for b in theirs]


def test_both_know_what_is_likeliest(x64):
    """Of the continuation that greedy generation makes, every token is; with the last changed, not every one."""
    weights = random_weights(MODEL, dtype=np.float64)
    reference = torch_scorer(weights, device="cpu", precision="float64")
    ids = [65]
    while len(ids) < 6:
        tries = [Request(ids, [token]) for token in range(257)]
        ids.append([answer.is_greedy for answer in score(tries, reference, **SIZES)].index(True))
    asked = [Request(ids[:1], ids[1:]), Request(ids[:1], [*ids[1:-1], (ids[-1] + 1) % 257])]
    for backend in (reference, jax_scorer(weights, mesh="1", precision="float64", batch_size=8)):
        assert [answer.is_greedy for answer in score(asked, backend, **SIZES)] == [True, False]


def test_a_scores_probabilities_add_up_to_one(x64):
    weights = random_weights(MODEL, dtype=np.float64)
    tries = [Request([1, 2, 3], [token]) for token in range(257)]
    scores = score(tries, jax_scorer(weights, mesh="1", precision="float64", batch_size=8), **SIZES)
    assert abs(sum(np.exp(answer.log_prob) for answer in scores) - 1) <= 1e-12
    assert sum(answer.is_greedy for answer in scores) == 1


@pytest.mark.long
def test_few_programs_are_compiled():
    program, params = jax_program(random_weights(MODEL), mesh="2", precision="float32", batch_size=8)
    score([*requests(60), *rolling_requests(list(range(200)), 256, MODEL.block_size)], scorer(program, params), **SIZES)
    assert program.score_step._cache_size() == 2  # 32 and the block size


def test_a_tasks_figures_are_the_same_of_both(x64):
    weights = random_weights(dataclasses.replace(MODEL, tie_embeddings=False), dtype=np.float64)
    rows = [{"page": f" = {word} = \n\n A text of {word} , and more of {word} .\n" * 3} for word in ("one", "two")]
    backends = (
        jax_scorer(weights, mesh="fsdp=2", precision="float64", batch_size=4),
        torch_scorer(weights, device="cpu", precision="float64"),
    )
    both = [
        evaluate_task(Evaluated(weights.config, BytesTokenizer(), backend, 4), "wikitext103", rows, _untold)
        for backend in backends
    ]
    for ours, theirs in zip(*both, strict=True):
        assert ours.value == pytest.approx(theirs.value, rel=1e-12) and ours.figure == theirs.figure


def _untold(task, total):
    return lambda count: None


@pytest.mark.parametrize("logits_bytes", [1, 3 * 4 * 257 * 48, 1 << 30], ids=["one", "three", "all"])
def test_the_reference_computes_as_many_sequences_at_a_time_as_fit(monkeypatch, logits_bytes):
    monkeypatch.setattr(gpt2_torch.score, "LOGITS_BYTES", logits_bytes)
    backend = torch_scorer(random_weights(MODEL, dtype=np.float64), device="cpu", precision="float64")
    generator = np.random.default_rng(0)
    inputs_BT, targets_BT = generator.integers(0, 257, (2, 8, MODEL.block_size))
    whole = backend(Batch(inputs_BT, targets_BT))
    alone = [backend(Batch(inputs_BT[row : row + 1], targets_BT[row : row + 1])) for row in range(8)]
    assert np.abs(whole.log_probs - np.concatenate([one.log_probs for one in alone])).max() <= 1e-12
