import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_core.config import ModelConfig
from gpt2_core.sampling import Sampling, fit_context
from gpt2_jax.generate import Generator, sample
from gpt2_jax.model import Execution, define

sys.path.insert(0, str(Path(__file__).parent.parent))
from sampler_cases import SETTINGS, by_definition, logits_and_uniforms

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=31)


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_the_sampler_follows_its_definition(x64, sampling):
    logits, numbers = logits_and_uniforms()
    found = sample(jnp.asarray(logits), jnp.asarray(numbers), sampling)
    assert found.tolist() == [by_definition(row, u, sampling) for row, u in zip(logits, numbers, strict=True)]


@pytest.fixture(scope="module", params=["learned", "rope"])
def generator(request):
    with jax.enable_x64(True):
        definition = define(dataclasses.replace(CONFIG, position=request.param), Execution("float64"))
        params = jax.tree.map(lambda p: 8 * p, jax.jit(definition.initialize)(jax.random.key(0)))
        yield Generator(definition), params


def recomputed(generator, params, prompt, tokens):
    """Greedy generation without a cache: the whole context through the model that trains, each time."""
    logits = jax.jit(lambda tokens_BT: generator.definition.merge(params)(tokens_BT))
    context, found = fit_context(prompt, 8, growing=False), []
    for _ in range(tokens):
        padded = np.array([context + [0] * (8 - len(context))])  # what follows is not seen
        found.append(int(np.argmax(logits(padded)[0, len(context) - 1])))
        context = fit_context([*context, found[-1]], 8, growing=True)
    return found


def test_the_cache_gives_what_recomputing_gives_past_the_block_too(x64, generator):
    prompts = [[1, 2, 3], list(range(12))]
    for prompt in prompts:
        found = [row[0] for row in generator[0](generator[1], [prompt], np.zeros((1, 20)), Sampling(greedy=True))]
        assert found == recomputed(*generator, prompt, 20)


def test_prompts_of_different_lengths_do_not_see_each_other(x64, generator):
    prompts = [[5], [1, 2, 3, 4, 5, 6, 7], [9, 8, 7], [2, 2]]
    numbers = np.random.default_rng(0).random((4, 16))
    sampling = Sampling(temperature=1.3, top_k=20, top_p=0.95)
    together = np.array(list(generator[0](generator[1], prompts, numbers, sampling))).T
    alone = [
        [row[0] for row in generator[0](generator[1], [p], numbers[i : i + 1], sampling)] for i, p in enumerate(prompts)
    ]
    assert together.tolist() == alone
