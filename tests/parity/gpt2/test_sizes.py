"""The cases lie on both sides of every size at which the code decides something."""

import dataclasses
import functools
import importlib
import pkgutil
from unittest import mock

import numpy as np
import pytest

import gpt2_jax
import gpt2_jax.attention
import gpt2_jax.generate
import gpt2_jax.loss
from parity.gpt2.adapters import both
from parity.gpt2.checks import sizes
from parity.gpt2.faults import case_of

pytestmark = pytest.mark.usefixtures("x64")


def test_every_constant_that_is_a_size_has_its_case():
    # Where and by whom something is computed decides no number.
    machine = ("distributed", "runtime", "compilation_cache")
    names = [m.name for m in pkgutil.iter_modules(gpt2_jax.__path__) if m.name not in machine]
    modules = [importlib.import_module(f"gpt2_jax.{name}") for name in names]
    found = {
        f"{module.__name__.removeprefix('gpt2_jax.')}.{name}"
        for module in modules
        for name, value in vars(module).items()
        if name.isupper()
        and type(value) is int
        and value > 0
        # The configuration's; the loss is compared at vocabularies that it divides and doesn't. The pieces divide every
        # table.
        and name not in ("VOCABULARY_MULTIPLE", "TABLE_PIECES")
    }
    assert found == set(sizes.CONSTANTS)


tiny = functools.cache(case_of)


def results(part, level: str) -> list:
    return list(part(dataclasses.replace(tiny(), level=level), *both(tiny().weights)))


NOTHING = {"nothing": (np.zeros(1), np.zeros(1))}


def test_queries_are_computed_in_one_block_and_in_several_and_a_remainder_is_met():
    with mock.patch.object(sizes, "_attended", return_value=NOTHING) as attended:
        results(sizes._attention, "default")
    lengths = {call.args[3][2] for call in attended.call_args_list}
    assert {len(gpt2_jax.attention._blocks(T)) for T in lengths} == {1, gpt2_jax.attention.BLOCKS}
    assert any(T > gpt2_jax.attention.SHORTEST_IN_BLOCKS and T % gpt2_jax.attention.BLOCKS for T in lengths)


def test_the_loss_has_one_chunk_and_several_and_a_remainder():
    seen = set()

    def chunks(candidate, B, T, V, rows):
        C = gpt2_jax.loss._chunk_length(B, T, rows * 8)
        seen.add((C < T, T % C > 0))
        return NOTHING

    with mock.patch.object(sizes, "_cross_entropy", chunks):
        results(sizes._loss, "default")
    assert seen == {(False, False), (True, False), (True, True)}


@pytest.mark.long
def test_the_cache_grows_where_mistakes_are_planted():
    with mock.patch.object(gpt2_jax.generate, "_grow", wraps=gpt2_jax.generate._grow) as grow:
        (result,) = results(sizes._generation, "prove")
    assert result.passed and len({call.args[1] for call in grow.call_args_list}) >= 1


def test_the_longest_prompt_that_a_cache_grows_for_is_not_the_first():
    with mock.patch.object(sizes, "_generated", return_value=None) as generated:
        results(sizes._generation, "quick")
    (call,) = generated.call_args_list
    lengths = call.args[4]
    assert max(lengths) not in (lengths[0], lengths[-1]) and max(lengths) % gpt2_jax.generate.CHUNK


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_the_whole_check_gives_no_alarm(seed):
    full = dataclasses.replace(tiny(), level="full", seed=seed)
    assert [r for r in sizes.check(full, *both(full.weights)) if not r.passed] == []
