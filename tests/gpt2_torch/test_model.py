import dataclasses

import pytest
import torch

from gpt2_core.batches import IGNORED
from gpt2_core.config import ModelConfig
from gpt2_torch.model import GPT2, alibi_mask, alibi_slopes

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=31)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT2(CONFIG).double()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"position": "rope"},
        {"position": "alibi"},
        {"mlp": "swiglu"},
        {"norm": "rmsnorm"},
        {"bias": False},
        {"tie_embeddings": False},
        {"qk_norm": True},
    ],
)
def test_it_has_exactly_the_parameters_the_configuration_counts(options):
    config = dataclasses.replace(CONFIG, **options)
    model = GPT2(config)
    assert sum(p.numel() for p in model.parameters()) == config.parameter_count
    assert set(model.state_dict()) == set(config.parameter_shapes)


def test_no_position_sees_what_follows_it(model):
    # The gradient of position t's logits with respect to the position embeddings is zero after t and nowhere before.
    tokens = torch.arange(8)[None]
    for t in (0, 3, 7):
        (grad,) = torch.autograd.grad(model(tokens)[0, t].square().sum(), model.wpe.weight)
        seen = grad.abs().sum(dim=1) > 0
        assert seen.tolist() == [position <= t for position in range(8)]


def test_alibis_slopes_are_those_of_the_paper_and_of_its_code():
    assert alibi_slopes(8) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]  # section 3 of the paper
    assert alibi_slopes(12) == alibi_slopes(8) + [alibi_slopes(16)[i] for i in (0, 2, 4, 6)]


def test_alibi_takes_from_each_score_the_slope_times_the_distance():
    (mask_HTT,) = alibi_mask(torch.zeros(2, 3, 5, 4, dtype=torch.float64))
    for h, slope in enumerate(alibi_slopes(3)):
        for t, row in enumerate(mask_HTT[h].tolist()):
            assert row == [-slope * (t - s) if s <= t else -float("inf") for s in range(5)]


def test_a_model_with_alibi_knows_the_order_of_tokens_and_takes_longer_texts_than_it_was_made_for():
    torch.manual_seed(0)
    model = GPT2(dataclasses.replace(CONFIG, position="alibi")).double()
    tokens = torch.randint(31, (1, 12))
    swapped = tokens[:, [1, 0, *range(2, 12)]]
    assert tokens[0, 0] != tokens[0, 1]
    assert (model(tokens)[0, -1] - model(swapped)[0, -1]).abs().max() > 1e-9
    torch.testing.assert_close(model(tokens)[:, :8], model(tokens[:, :8]), rtol=0, atol=1e-14)


def test_initial_weights_have_gpt2s_standard_deviations():
    torch.manual_seed(1)
    model = GPT2(ModelConfig(n_layer=8, n_head=2, n_embd=128, block_size=128, vocab_size=512))
    for name, p in model.named_parameters():
        if name.endswith(".bias"):
            assert (p == 0).all()
        elif "ln_" in name:
            assert (p == 1).all()
        else:
            expected = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02  # sqrt(2 x 8) = 4
            assert p.std().item() == pytest.approx(expected, rel=0.03), name


def test_the_loss_is_the_sum_over_the_targets_that_count(model):
    tokens, targets = torch.randint(31, (2, 8)), torch.randint(31, (2, 8))
    targets[0, 3:] = IGNORED
    logp = model(tokens).log_softmax(-1)
    kept = [(b, t) for b in range(2) for t in range(8) if targets[b, t] != IGNORED]
    expected = -sum(logp[b, t, targets[b, t]] for b, t in kept)
    assert model(tokens, targets).item() == pytest.approx(expected.item(), rel=1e-13)
