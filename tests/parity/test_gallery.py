"""Ten ports with a bug from a public thread each: `parity.compare` names its line, and passes the port without it."""

import importlib.util
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "parity" / "gallery"


def load_runner():
    spec = importlib.util.spec_from_file_location("gallery_runner", FOLDER / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gallery = load_runner()


def test_there_are_ten_pairs():
    assert len(gallery.NAMES) == 10


@pytest.mark.parametrize("name", gallery.NAMES)
def test_a_pair_cites_its_thread_and_marks_its_bug(name):
    pair = gallery.load(name)
    assert re.search(r"[\w.-]+/[\w.-]+#\d+", pair.__doc__)
    assert gallery.planted_lines(pair)


# One of each kind of finding in every run; all ten in the slow tests.
QUICK = ("gelu_form", "lora_dropped")
PAIRS = [pytest.param(n, marks=pytest.mark.long if n in QUICK else pytest.mark.slow) for n in gallery.NAMES]


@pytest.mark.parametrize("name", PAIRS)
def test_the_bug_is_found_and_the_mended_port_is_the_same(name):
    outcome = gallery.judge(gallery.load(name))
    assert outcome.planted, outcome.found
    assert outcome.hinted, outcome.hint
    assert outcome.mended == "same"
