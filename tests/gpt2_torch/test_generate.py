import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2_core.config import ModelConfig
from gpt2_core.sampling import Sampling, uniforms
from gpt2_torch.generate import generate, sample
from gpt2_torch.model import GPT2

sys.path.insert(0, str(Path(__file__).parent.parent))
from sampler_cases import SETTINGS, by_definition, logits_and_uniforms


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_the_sampler_follows_its_definition(sampling):
    logits, numbers = logits_and_uniforms()
    found = sample(torch.from_numpy(logits), torch.from_numpy(numbers), sampling)
    assert found.tolist() == [by_definition(row, u, sampling) for row, u in zip(logits, numbers, strict=True)]


def test_greedy_generation_goes_on_past_the_block_by_sliding():
    torch.manual_seed(0)
    model = GPT2(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=31)).double()
    tokens = [row[0] for row in generate(model, [[1, 2, 3]], np.zeros((1, 12)), Sampling(greedy=True))]
    context = [1, 2, 3]
    for token in tokens:
        with torch.no_grad():
            assert token == model(torch.tensor([context]))[0, -1].argmax()
        context = [*context, token] if len(context) < 8 else [*context[-3:], token]


def test_a_sample_is_a_function_of_its_seed_and_number():
    assert (uniforms(1, 2, 5) == uniforms(1, 2, 9)[:5]).all()
    assert (uniforms(1, 2, 5) != uniforms(1, 3, 5)).all() and (uniforms(2, 2, 5) != uniforms(1, 2, 5)).all()
