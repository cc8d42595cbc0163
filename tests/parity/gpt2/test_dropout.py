"""Dropout's masks: what is looked at is named, and no alarm on right ones."""

import dataclasses

import numpy as np
import pytest

from parity.engine.results import Result
from parity.gpt2 import faults
from parity.gpt2.adapters import both
from parity.gpt2.checks import dropout

pytestmark = pytest.mark.usefixtures("x64")

MODEL = dataclasses.replace(faults.MODEL, n_layer=2, n_head=2, n_embd=28, block_size=40)
CONFIG = dropout._config(MODEL, 0.4, 3, 0)


@pytest.fixture
def steps():
    """Masks that are as they should be, in numpy."""
    generator = np.random.default_rng(1)

    def part():
        return [[generator.random(shape) >= 0.4] for shape in dropout.expected_sites(CONFIG).values()]

    return [[part() for _ in range(CONFIG.accumulation)] for _ in range(dropout.STEPS_LOOKED_AT)]


def _failed(steps) -> list[Result]:
    found = [dropout._sites("", steps, CONFIG)]
    if found[0].passed:
        found += [dropout._shares("", steps, CONFIG), *dropout._independence("", steps, CONFIG)]
    return [result for result in found if not result.passed]


def test_right_masks_pass(steps):
    assert _failed(steps) == []


def _without_a_site(steps):
    for parts in steps:
        del parts[1][2], parts[1][2]


def _without_the_rate_at_a_site(steps):
    for parts in steps:
        for sites in parts:
            sites[3] = [np.random.default_rng(len(sites)).random(sites[3][0].shape) >= 0.38]


def _last_feature_kept(steps):
    for parts in steps:
        for sites in parts:
            sites[0][0][..., -1] = True


def _part_repeated(steps):
    steps[1][1] = steps[1][0]


def _step_repeated(steps):
    steps[2] = steps[0]


def _site_of_another_layer_shifted(steps):
    for parts in steps:
        for sites in parts:
            sites[6] = [np.roll(sites[3][0], 7, axis=1)]


def _site_turned_over(steps):
    for parts in steps:
        for sites in parts:
            sites[6][0][:, :28] = sites[5][0][:, :28].swapaxes(1, 2)


@pytest.mark.parametrize(
    ("spoil", "where"),
    [
        (_without_a_site, "step 0, part 1: (4, 2, 40, 40) where (4, 40, 28) of block 0, attn c_proj is due"),
        (_without_the_rate_at_a_site, "block 0, mlp c_proj"),
        (_last_feature_kept, "embeddings, slice 27 of axis 3: 1.0000"),
        (_part_repeated, "step 1, part 0, sequence 0 with embeddings of step 1, part 1, sequence 0"),
        (_step_repeated, "step 0, part 0, sequence 0 with embeddings of step 2, part 0, sequence 0"),
        (_site_of_another_layer_shifted, "block 0, mlp c_proj with block 1, mlp c_proj, displaced by [0, -7, 0]"),
        (_site_turned_over, "block 1, attn c_proj with block 1, mlp c_proj, transposed, displaced by [0, 0, 0]"),
    ],
)
def test_a_wrong_mask_is_named(steps, spoil, where):
    spoil(steps)
    assert any(where in result.where for result in _failed(steps)), _failed(steps)


def test_a_loss_and_a_gradient_norm_are_named_by_their_step():
    def trained(losses, norms):
        return dropout.Trained(np.array(losses), np.array(norms), {}, {}, {}, [])

    right = trained([5.0, 4.0, 3.0], [1.0, 1.0, 1.0])
    assert dropout._first_difference(right, right)[0] == 0.0
    measured, where = dropout._first_difference(trained([5.0, 4.0, 9.0], [1.0, 1.1, 1.0]), right)
    assert measured == 6.0 and where == "first at step 1, gradient norm"
    measured, where = dropout._first_difference(trained([5.0, np.nan, 3.0], [1.0, 1.0, 1.0]), right)
    assert np.isnan(measured) and where == "first at step 1, loss"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_right_programs_are_not_suspected(seed):
    case = dataclasses.replace(faults.case_of(), seed=seed, level="default")
    results = list(dropout.check(case, *both(case.weights)))
    assert [r for r in results if isinstance(r, Result) and not r.passed] == []
