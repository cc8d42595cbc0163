"""The table of options, the rows that cover its pairs, and what each row compares."""

import dataclasses

import numpy as np
import pytest

import gpt2_jax.generate
from gpt2_core.config import IGNORE_INDEX, ModelConfig, TrainConfig
from gpt2_jax.mesh import MESH_AXES, parse_mesh
from gpt2_jax.model import Execution
from parity.engine.covering import all_pairs, covering_rows, pairs_of
from parity.gpt2.adapters import both
from parity.gpt2.adapters.protocol import Trained
from parity.gpt2.checks import combinations
from parity.gpt2.checks.combinations import EXECUTION, MODEL, TABLE, config_of, first_difference
from parity.gpt2.faults import case_of
from parity.gpt2.faults.fault import replacing

pytestmark = pytest.mark.usefixtures("x64")


def settings(options: dict[str, dict[str, dict]]) -> set[str]:
    return {name for values in options.values() for changed in values.values() for name in changed}


def test_full_brings_every_pair_of_options_together():
    full = dataclasses.replace(case_of(), level="full")
    assert pairs_of(combinations.rows_of(full)) == set(all_pairs(TABLE))


def test_the_first_rows_are_worth_most():
    rows = covering_rows(TABLE)
    assert len(pairs_of(rows[:3])) > 0.4 * len(all_pairs(TABLE))
    assert len(rows) < 2 * len(TABLE["mesh"]) * len(TABLE["position"])


def test_rows_cover_a_table_of_which_no_row_covers_all():
    table = {"a": ["1", "2", "3"], "b": ["1", "2"], "c": ["1", "2"], "d": ["1", "2"]}
    rows = covering_rows(table)
    assert pairs_of(rows) == set(all_pairs(table)) and 6 <= len(rows) <= 8
    assert all(list(row) == list(table) for row in rows)
    assert pairs_of(rows[:-1]) < pairs_of(rows)


def test_every_setting_of_the_model_is_in_the_table():
    assert settings(MODEL) == {field.name for field in dataclasses.fields(ModelConfig)}


def test_every_way_of_executing_a_training_is_in_the_table():
    # The dtype is float64 here and the norm's kernel XLA's: the Triton one is for GPUs and computes in float32.
    execution = {field.name for field in dataclasses.fields(Execution)} - {"dtype", "norm"}
    assert execution | {"mesh", "accumulation", "gradient_exchange"} == settings(EXECUTION)
    assert settings(EXECUTION) <= {field.name for field in dataclasses.fields(TrainConfig)}
    meshes = [parse_mesh(changed["mesh"]) for changed in EXECUTION["mesh"].values()]
    assert all(any(sizes[axis] > 1 for sizes in meshes) for axis in MESH_AXES)


def test_every_row_is_a_training_that_can_be_run():
    # TrainConfig refuses a mesh that the model or the batch doesn't fit.
    assert all(config_of(row).precision == "float64" for row in covering_rows(TABLE))


def test_targets_count_unevenly_over_shards_and_parts():
    _, targets = combinations.uneven_batch(case_of(), ModelConfig(block_size=11, vocab_size=257), 0)
    counts = (targets != IGNORE_INDEX).sum(axis=1)
    assert counts[0] == 0 and counts[-1] == 11
    for parts in (2, 4):
        assert len(set(counts.reshape(parts, -1).sum(axis=1))) == parts


def test_the_first_divergence_of_two_trainings_is_named():
    trees = [{"wte.weight": np.ones(3), "ln_f.bias": np.ones(2)} for _ in range(3)]
    a = Trained(np.array([3.0, 2.0]), np.array([1.0, 1.0]), *trees, [])
    later = a._replace(losses=np.array([3.0, 2.1]), grad_norms=np.array([1.0, 1.5]))
    assert first_difference(a, a, 1e-10) == (0.0, "")
    assert first_difference(later, a, 1e-10)[1].startswith("step 1, loss: relative difference 5.0e-02")
    moved = a._replace(params={"wte.weight": np.ones(3), "ln_f.bias": np.array([1.0, np.nan])})
    measured, where = first_difference(moved, a, 1e-10)
    assert np.isnan(measured) and where.startswith("after the last step, parameter ln_f.bias")


@pytest.mark.long
def test_weights_narrowed_more_than_they_may_be_give_other_tokens():
    def narrow_everything(define):
        def wrong(*arguments):
            definition = define(*arguments)
            return dataclasses.replace(definition, narrow=frozenset(definition.abstract))

        return wrong

    case = case_of()
    candidate, _ = both(case.weights)
    with replacing(gpt2_jax.generate, "define", narrow_everything)():
        assert not combinations.bfloat16_tokens(case, candidate, "tied").passed
    assert combinations.bfloat16_tokens(case, candidate, "tied").passed


@pytest.mark.slow
def test_every_pair_of_options_agrees():
    case = dataclasses.replace(case_of(), level="full")
    results = list(combinations.check(case, *both(case.weights)))
    assert [r for r in results if not r.passed] == []
