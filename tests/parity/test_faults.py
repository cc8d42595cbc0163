"""Each mistake of the catalogue is caught, by its check and at its place."""

import pytest

from parity.faults import FAULTS, judge

pytestmark = pytest.mark.usefixtures("x64")


def test_the_catalogue_is_as_long_as_it_says():
    assert len(FAULTS) >= 40 and len({fault.name for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_it_is_caught_in_its_place(fault):
    verdict = judge(fault)
    assert verdict.caught and verdict.in_place, verdict
    assert verdict.orders > 0.5, verdict
