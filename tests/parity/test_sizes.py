"""The cases lie on both sides of every size at which the code decides something."""

import dataclasses
import importlib
import pkgutil
from unittest import mock

import pytest

import gpt2_jax
import gpt2_jax.attention
import gpt2_jax.generate
import gpt2_jax.loss
from parity import sizes
from parity.faults import subject_of

pytestmark = pytest.mark.usefixtures("x64")


def test_every_constant_that_is_a_size_has_its_case():
    modules = [importlib.import_module(f"gpt2_jax.{m.name}") for m in pkgutil.iter_modules(gpt2_jax.__path__)]
    found = {
        f"{module.__name__.removeprefix('gpt2_jax.')}.{name}"
        for module in modules
        for name, value in vars(module).items()
        if name.isupper() and type(value) is int and not hasattr(__import__("gpt2_core.batches").batches, name)
    }
    assert found == set(sizes.CONSTANTS)


def results(part, level: str) -> list:
    return list(part(dataclasses.replace(subject_of(), level=level)))


def test_queries_are_computed_in_one_block_and_in_several_and_a_remainder_is_met():
    with mock.patch.object(gpt2_jax.attention, "_blocks", wraps=gpt2_jax.attention._blocks) as blocks:
        assert all(r.passed for r in results(sizes._attention, "default"))
    lengths = {call.args[0] for call in blocks.call_args_list}
    long = {T for T in lengths if T >= gpt2_jax.attention.SHORTEST_IN_BLOCKS}
    assert {T % gpt2_jax.attention.BLOCKS == 0 for T in long} == {True, False} and lengths - long


def test_the_loss_has_one_chunk_and_several_and_a_remainder():
    chunks = []

    def seen(B, T, bytes_of_token):
        chunks.append((T, chunk_length(B, T, bytes_of_token)))
        return chunks[-1][1]

    chunk_length = gpt2_jax.loss._chunk_length
    with mock.patch.object(gpt2_jax.loss, "_chunk_length", seen):
        assert all(r.passed for r in results(sizes._loss, "default"))
    assert {(C < T, T % C > 0) for T, C in chunks} == {(False, False), (True, False), (True, True)}


def test_the_cache_grows_even_in_the_quick_form():
    with mock.patch.object(gpt2_jax.generate, "_grow", wraps=gpt2_jax.generate._grow) as grow:
        (result,) = results(sizes._generation, "quick")
    assert result.passed and len({call.args[1] for call in grow.call_args_list}) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_the_whole_check_gives_no_alarm(seed):
    subject = dataclasses.replace(subject_of(), level="full", seed=seed)
    assert [r for r in sizes.check(subject) if not r.passed] == []
