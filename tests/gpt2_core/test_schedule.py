import pytest

from gpt2_core.config import OptimizerConfig
from gpt2_core.schedule import learning_rate

CONFIG = OptimizerConfig(learning_rate=4e-4, warmup_steps=4, final_fraction=0.1)


def test_warmup_rises_linearly_to_the_peak_at_its_last_update():
    assert [learning_rate(step, 100, CONFIG) for step in range(4)] == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4], rel=1e-15)


def test_cosine_starts_at_the_peak_and_ends_at_the_final_fraction():
    assert learning_rate(4, 104, CONFIG) == 4e-4
    assert learning_rate(54, 104, CONFIG) == pytest.approx(2.2e-4, rel=1e-14)  # halfway between 4e-4 and 4e-5
    assert learning_rate(104, 104, CONFIG) == pytest.approx(4e-5, rel=1e-14)


def test_it_never_rises_after_the_warmup_and_stays_at_the_end_beyond_it():
    rates = [learning_rate(step, 104, CONFIG) for step in range(3, 200)]
    assert rates == sorted(rates, reverse=True)
    assert set(rates[-50:]) == {rates[-1]}


def test_without_warmup_the_first_update_has_the_peak():
    assert learning_rate(0, 10, OptimizerConfig(learning_rate=1.0, warmup_steps=0)) == 1.0
