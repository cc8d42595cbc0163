"""Each mistake of the catalogue is caught, by its check and at its place."""

import collections

import pytest

from parity.faults import FAULTS, judge
from parity.suite import CHECKS

pytestmark = pytest.mark.usefixtures("x64")

# Of each check so many are planted in every run of the tests, the others in the slow ones: each takes some seconds.
ALWAYS = 2


def _parameters():
    seen = collections.Counter()
    for fault in FAULTS:
        seen[fault.check] += 1
        marks = [pytest.mark.slow] if seen[fault.check] > ALWAYS else []
        yield pytest.param(fault, marks=marks, id=fault.name)


def test_the_catalogue_has_mistakes_for_every_check():
    assert len(FAULTS) >= 100 and len({fault.name for fault in FAULTS}) == len(FAULTS)
    # `variants` is other checks with options.
    assert {fault.check for fault in FAULTS} == set(CHECKS) - {"variants"}


@pytest.mark.parametrize("fault", _parameters())
def test_it_is_caught_in_its_place(fault):
    verdict = judge(fault)
    assert verdict.caught and verdict.in_place, verdict
    assert verdict.orders > 0.5, verdict
