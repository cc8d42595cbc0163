import numpy as np
import pytest

from gpt2_core.batches import IGNORED, TrainingBatches, evaluation_batches

T, B = 4, 6
TOKENS = np.arange(31 * T + 3, dtype=np.uint16)  # 31 windows, and a rest that fills none


def batches(**overrides):
    return TrainingBatches(TOKENS, **{"block_size": T, "batch_size": B, "seed": 7} | overrides)


def starts(batch):
    return batch.inputs[:, 0].tolist()


def test_targets_are_the_inputs_that_follow():
    batch = batches()[3]
    assert batch.inputs.shape == batch.targets.shape == (B, T)
    assert (batch.targets == batch.inputs + 1).all()


def test_every_window_comes_once_an_epoch_in_an_order_of_its_own():
    stream = [start for step in range(31 * 2) for start in starts(batches()[step])]
    epochs = [stream[e * 31 : (e + 1) * 31] for e in range(12)]
    assert all(sorted(epoch) == [i * T for i in range(31)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 12


def test_a_batch_is_a_function_of_seed_and_step_alone():
    once, again = batches(), batches()
    _ = [again[step] for step in (9, 2, 5)]
    assert all((a == b).all() for a, b in zip(once[5], again[5], strict=True))
    assert starts(once[5]) != starts(batches(seed=8)[5])


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_together_see_the_batch_that_one_would(processes):
    parts = [batches(process=p, processes=processes) for p in range(processes)]
    for step in range(14):
        union = [start for part in parts for start in starts(part[step])]
        assert sorted(union) == sorted(starts(batches()[step]))


def test_evaluation_reads_the_first_windows_in_order_and_ignores_the_filling():
    found = list(evaluation_batches(TOKENS, block_size=T, batch_size=4, sequences=10))
    assert [b.inputs.shape for b in found] == [(4, T)] * 3
    targets = np.concatenate([b.targets for b in found])
    assert (targets[:10].ravel() == np.arange(1, 10 * T + 1)).all()
    assert (targets[10:] == IGNORED).all()
    assert (
        sum((b.targets != IGNORED).sum() for b in evaluation_batches(TOKENS, block_size=T, batch_size=4, sequences=99))
        == 31 * T
    )
