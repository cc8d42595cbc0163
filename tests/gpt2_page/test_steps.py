import dataclasses

import numpy as np
import pytest

from gpt2_core.config import ModelConfig
from gpt2_core.data.tokenizer import get_tokenizer
from gpt2_core.errors import UserError
from gpt2_jax.language_model import JaxModel
from gpt2_page import steps
from gpt2_page.steps import LIKELIEST, agreement, continue_both, cut, label, next_probabilities, options
from gpt2_torch.language_model import TorchModel
from parity.gpt2.cases import random_weights

MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=300)
# More tokens than the context holds, so that the window slides.
SETTINGS = {"max_new_tokens": 40, "temperature": 0.9, "top_k": 50, "top_p": 0.95, "seed": 3}


@pytest.fixture(scope="module")
def models():
    weights = random_weights(MODEL)
    return JaxModel(weights, precision="float32"), TorchModel(weights, precision="float32")


@pytest.fixture(scope="module")
def others():
    """Two models that disagree."""
    return tuple(TorchModel(random_weights(MODEL, seed), precision="float32") for seed in (0, 1))


@pytest.fixture(scope="module")
def compared(models):
    return list(continue_both(models, "def ", **SETTINGS))


def test_the_texts_are_those_that_each_model_generates(models, compared):
    for side, model in enumerate(models):
        assert "def " + "".join(step.texts[side] for step in compared) == model.generate("def ", **SETTINGS)
        assert [step.chosen[side].id for step in compared] == list(model.stream_ids("def ", **SETTINGS))
    assert [step.number for step in compared] == list(range(1, 41))


def test_a_character_of_several_tokens_comes_with_its_last(models):
    ids = list("é".encode())

    class Fixed(TorchModel):
        def stream_ids(self, prompt="", **options):
            return iter([*ids, ids[0]])

    fixed = Fixed(random_weights(MODEL), precision="float32")
    made = list(continue_both([fixed, fixed], "a", max_new_tokens=3))
    assert [step.texts[0] for step in made] == ["", "é", "�"]


def test_probabilities_are_softmax_of_the_logits_in_the_context_that_generation_sees(models, compared):
    context = models[1].encode("def ")
    for step in compared:
        logits = models[1].logits(context)[-1].astype(np.float64)
        expected = np.exp(logits) / np.exp(logits).sum()
        for side in (0, 1):
            assert step.chosen[side].probabilities == pytest.approx((expected[step.chosen[side].id],) * 2, abs=1e-6)
        context = [*context, step.chosen[1].id]
        context = context if len(context) <= MODEL.block_size else context[-MODEL.block_size // 2 :]


def test_filling_up_changes_no_probability_and_adds_few_lengths(models):
    seen = set()

    class Counting(TorchModel):
        def _logits(self, tokens_BT):
            seen.add(tokens_BT.shape[1])
            return super()._logits(tokens_BT)

    counting = Counting(random_weights(MODEL), precision="float64")
    for length in range(1, MODEL.block_size + 1):
        found = next_probabilities(counting, list(range(length)))
        logits = TorchModel.logits(counting, range(length))[-1]
        assert np.allclose(found, np.exp(logits) / np.exp(logits).sum(), atol=1e-12, rtol=0)
        seen -= {length} - {1, 2, 4, 8, 16}
    assert seen == {1, 2, 4, 8, 16}


def test_a_step_knows_the_likeliest_tokens_of_both_models(others):
    context = others[0].encode("def ")
    step = next(continue_both(others, "def ", **SETTINGS))
    both = [next_probabilities(model, context) for model in others]
    expected = {int(i) for one in both for i in np.argsort(-one)[:LIKELIEST]} | {token.id for token in step.chosen}
    assert {token.id for token in step.likeliest} == expected and len(expected) > LIKELIEST
    for token in step.likeliest:
        assert token.probabilities == (both[0][token.id], both[1][token.id])
        assert token.difference == abs(both[0][token.id] - both[1][token.id])
    assert step.largest == np.abs(both[0] - both[1]).max()
    largest = [max(token.probabilities) for token in step.likeliest]
    assert largest == sorted(largest, reverse=True)


def test_two_frameworks_agree_to_rounding(compared):
    found = agreement(compared)
    assert (found.compared, found.parted) == (40, None)
    assert 0 < found.worst.largest < 1e-6
    assert found.worst.largest == max(step.largest for step in compared)


def test_what_follows_another_token_is_not_compared(others):
    made = list(continue_both(others, "def ", **SETTINGS))
    first = next(step.number for step in made if step.chosen[0].id != step.chosen[1].id)
    assert first < 39
    assert [step.largest is None for step in made] == [step.number > first for step in made]
    assert [step.is_same for step in made] == [step.number < first for step in made]
    found = agreement(made)
    assert found.compared == first and found.parted.number == first and found.worst.number <= first
    assert agreement([]) == steps.Agreement(0, None, None)


@pytest.mark.parametrize("prompt", ["", "x" * 16, "x" * 15 + "y"])
def test_a_prompt_that_fits_is_left_alone(models, prompt):
    assert cut(prompt, models[0]) == (prompt, models[0].encode(prompt), None)


def test_a_long_prompt_is_cut_with_a_notice(models, monkeypatch):
    kept, seen, notice = cut("a" + "b" * 16, models[0])
    assert (kept, seen) == ("a" + "b" * 16, [98] * 16)
    assert notice == "The prompt is longer than this model's context: only its last 16 tokens are used."
    wide = TorchModel(random_weights(dataclasses.replace(MODEL, block_size=64)), precision="float32")
    monkeypatch.setattr(steps, "MOST_CHARACTERS", 20)
    kept, seen, notice = cut("a" + "b" * 20, wide)
    assert (kept, seen) == ("b" * 20, [98] * 20)
    assert notice == "The prompt is too long for this page: only its last 20 characters are used."


def test_options_are_those_of_the_command():
    assert options(40, 1, 0, 1, 0) == {"max_new_tokens": 40, "temperature": 1, "top_k": None, "top_p": None, "seed": 0}
    assert options(1.0, 0.5, 3.0, 0.9, 7.0) == {
        "max_new_tokens": 1, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "seed": 7
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((None, 1, 0, 1, 0), "max_new_tokens: expected a number"),
        ((201, 1, 0, 1, 0), "max_new_tokens 201: this page generates 200 at most"),
        ((10**400, 1, 0, 1, 0), "max_new_tokens .a number of about 401 digits.: not a number to compute with"),
        ((2.5, 1, 0, 1, 0), "max_new_tokens 2.5: expected a whole number"),
        ((4, float("nan"), 0, 1, 0), "temperature nan: not a number to compute with"),
        ((4, "hot", 0, 1, 0), "temperature: expected a number"),
        ((4, 1, True, 1, 0), "top_k: expected a number"),
        ((4, 1, 0, None, 0), "top_p: expected a number"),
        ((4, 1, 0, 1, [0]), "seed: expected a number"),
    ],
)
def test_what_is_no_option_is_said_in_a_sentence(given, said):
    with pytest.raises(UserError, match=said):
        options(*given)


def test_weights_that_are_not_finite_are_said_in_a_sentence():
    weights = random_weights(MODEL)
    weights.arrays["ln_f.weight"][:] = np.nan
    broken = TorchModel(weights, precision="float32")
    with pytest.raises(UserError, match="logits that are NaN or infinite; it needs others"):
        list(continue_both([broken, broken], "a", max_new_tokens=2))


@pytest.mark.parametrize(
    ("content", "shown"),
    [(b"ab", "ab"), (b" a\n\t", "␣a⏎⇥"), ("é".encode(), "é"), (b"\xc3", "C3"), (b"\xa9\xff", "A9 FF"),
     (b"\x00", "U+0000"), ("‮".encode(), "U+202E"), (b"", "")],
)  # fmt: skip
def test_a_label_shows_all_of_a_token(content, shown):
    assert label(content) == shown
    assert label(get_tokenizer("bytes").decode_bytes([256])) == "<|endoftext|>"
