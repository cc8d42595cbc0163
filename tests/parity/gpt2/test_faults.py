"""Each mistake of the catalogue is caught, by its check and at its place."""

import pytest

from parity.gpt2.faults import FAULTS, judge
from parity.gpt2.suite import CHECKS

pytestmark = pytest.mark.usefixtures("x64")


def _parameters() -> list:
    """The first mistake of each check in every run of the tests, the others in the slow ones: each takes seconds."""
    first = {fault.check: fault for fault in reversed(FAULTS)}
    slow = [() if first[fault.check] is fault else pytest.mark.slow for fault in FAULTS]
    return [pytest.param(fault, marks=marks, id=fault.name) for fault, marks in zip(FAULTS, slow, strict=True)]


def test_the_catalogue_has_mistakes_for_every_check():
    assert len(FAULTS) >= 100 and len({fault.name for fault in FAULTS}) == len(FAULTS)
    # `variants` is other checks with options.
    assert {fault.check for fault in FAULTS} == set(CHECKS) - {"variants"}


@pytest.mark.parametrize("fault", _parameters())
def test_it_is_caught_in_its_place(fault):
    verdict = judge(fault)
    assert verdict.caught and verdict.in_place, verdict
    assert verdict.orders > 0.5, verdict
