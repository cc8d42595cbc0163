"""Each mistake of the catalogue is caught, by its check and at its place."""

import collections
import math
import re
from pathlib import Path

import jax
import pytest
import torch

from parity.gpt2 import faults
from parity.gpt2.faults import FAULTS, judge
from parity.gpt2.suite import CHECKS

pytestmark = pytest.mark.usefixtures("x64")


# Of these checks the first mistake takes long to catch.
SHORTER = {"dropout": "dropout in evaluation", "sizes": "the last of equal logits"}


def _parameters() -> list:
    """A mistake of each check but `combinations` (half a minute) in every run of the tests, all in the slow ones."""
    chosen = {fault.check: fault.name for fault in reversed(FAULTS) if fault.check != "combinations"} | SHORTER
    slow = [() if fault.name in chosen.values() else pytest.mark.slow for fault in FAULTS]
    return [pytest.param(fault, marks=marks, id=fault.name) for fault, marks in zip(FAULTS, slow, strict=True)]


def test_the_catalogue_has_mistakes_for_every_check():
    assert len(FAULTS) >= 100 and len({fault.name for fault in FAULTS}) == len(FAULTS)
    # `variants` is other checks with options.
    assert {fault.check for fault in FAULTS} == set(CHECKS) - {"variants"}


def test_the_readme_counts_them():
    assert f"plant {len(FAULTS)} mistakes of porting" in (Path(__file__).parents[3] / "README.md").read_text()


def test_the_docs_count_them_by_check():
    text = (Path(__file__).parents[3] / "docs" / "parity.md").read_text(encoding="utf-8")
    sentence = re.search(r"By check: (.+?)\.\n", text, re.DOTALL)[1]
    said = {
        check: int(count)
        for checks, count in re.findall(r"([a-z_,\s]+)(\d+)", sentence)
        for check in re.findall(r"[a-z_]+", checks)
        if check not in ("and", "each")
    }
    assert said == collections.Counter(fault.check for fault in FAULTS)


@pytest.mark.parametrize("seam", [(math, "sqrt"), (jax.nn, "gelu"), (torch.nn.Linear, "forward")])
def test_a_fault_replaces_nothing_of_a_framework(seam):
    with pytest.raises(ValueError, match="a new one.*: replaces"):

        @faults.fault.fault("a new one", check="forward", place="", seam=seam)
        def planted(right):
            """a story"""

    assert "a new one" not in faults.fault.REGISTERED


@pytest.mark.parametrize(("name", "story"), [("erf GELU", "a story"), ("a new one", None)])
def test_a_fault_has_a_name_of_its_own_and_a_story(name, story):
    def planted(right): ...

    planted.__doc__ = story
    with pytest.raises(ValueError, match="needs a name of its own and a docstring"):
        faults.fault.fault(name, check="forward", place="")(planted)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_what_it_replaces_is_there(fault):
    """Most of them are planted in the slow tests alone, and the code that they change moves."""
    with fault.patch():
        pass


@pytest.mark.long
@pytest.mark.parametrize("fault", _parameters())
def test_it_is_caught_in_its_place(fault):
    verdict = judge(fault)
    assert verdict.caught and verdict.in_place, verdict
    assert verdict.orders > 0.5, verdict
