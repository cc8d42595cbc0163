import numpy as np
import pytest

from gpt2_core.config import IGNORE_INDEX
from gpt2_core.data.batches import TrainingBatches, evaluation_batches
from gpt2_core.data.tokens import Source
from gpt2_core.errors import UserError

T, B = 4, 6
TOKENS = np.arange(31 * T + 3, dtype=np.uint16)  # 31 windows, and a rest that fills none


def batches(tokens=TOKENS, **overrides):
    return TrainingBatches(tokens, **{"sequence_length": T, "batch_size": B, "seed": 7} | overrides)


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


@pytest.mark.parametrize("tokens", [TOKENS, (Source((TOKENS[: 10 * T + 2], TOKENS[10 * T :]), ("a", "b")),)])
def test_in_the_order_of_the_text_each_window_follows_the_one_before(tokens):
    stream = [start for step in range(31) for start in starts(batches(tokens, order="sequential")[step])]
    assert stream == [i * T for i in range(31)] * B
    assert starts(batches(tokens, order="sequential", seed=8)[3]) == starts(batches(tokens, order="sequential")[3])


def test_a_batch_is_a_function_of_seed_and_step_alone():
    once, again = batches(), batches()
    _ = [again[step] for step in (9, 2, 5)]
    assert all((a == b).all() for a, b in zip(once[5], again[5], strict=True))
    assert starts(once[5]) != starts(batches(seed=8)[5])


def two_shards():
    """Shards of 10 and 21 windows, each with a rest that fills none; the ids say which shard and where."""
    shards = (np.arange(10 * T + 2, dtype=np.uint16), np.arange(1000, 1000 + 21 * T + 4, dtype=np.uint16))
    return Source(shards, ("first.bin", "second.bin"))


@pytest.mark.parametrize("tokens", [TOKENS, (two_shards(),), (two_shards(), Source((TOKENS,), ("",), 2.0))])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_together_see_the_batch_that_one_would(processes, tokens):
    parts = [batches(tokens, rows=range(p, 8, processes), batch_size=8) for p in range(processes)]
    for step in range(14):
        union = [start for part in parts for start in starts(part[step])]
        assert sorted(union) == sorted(starts(batches(tokens, batch_size=8)[step]))
        places = sorted(place for part in parts for place in part.sequences(step))
        assert places == batches(tokens, batch_size=8).sequences(step) == list(range(8 * step, 8 * step + 8))


def test_windows_of_all_shards_come_once_an_epoch_and_cross_none():
    stream = batches((two_shards(),), batch_size=31)
    expected = [i * T for i in range(10)] + [1000 + i * T for i in range(21)]
    for epoch in range(5):
        batch = stream[epoch]
        assert (batch.targets == batch.inputs + 1).all()  # within one shard ids count up
        assert sorted(starts(batch)) == expected


def test_a_mixture_deals_by_weight_and_each_source_comes_once_an_epoch_of_its_own():
    small, large = two_shards(), Source((TOKENS + 5000,), ("",), weight=3.0)
    stream = [start for step in range(31 * 4) for start in starts(batches((small, large), batch_size=4)[step])]
    of_large = [start for start in stream if start >= 5000]
    assert len(of_large) / len(stream) == pytest.approx(0.75, abs=0.01)
    assert all(0 < sum(s >= 5000 for s in stream[i : i + 8]) < 8 for i in range(0, len(stream), 8))  # evenly
    for source, size in (([s for s in stream if s < 5000], 31), (of_large, 31)):
        epochs = [source[i : i + size] for i in range(0, len(source) - size + 1, size)]
        assert len(epochs) >= 3 and all(len(set(epoch)) == size for epoch in epochs)
    assert stream == [s for step in range(31 * 4) for s in starts(batches((small, large), batch_size=4)[step])]


def test_sources_of_one_size_come_in_orders_of_their_own():
    mixture = (Source((TOKENS,), ("",)), Source((TOKENS + 5000,), ("",)))
    stream = [start for step in range(31) for start in starts(batches(mixture, batch_size=2)[step])]
    assert len(starts(batches(mixture, seed=(1 << 32) - 1)[0])) == B  # the largest seed has a next one too
    assert [s for s in stream if s < 5000] != [s - 5000 for s in stream if s >= 5000]


@pytest.mark.parametrize(("dtype", "id"), [(np.uint16, 999), (np.uint32, 4_000_000_000)])
def test_an_id_beyond_the_vocabulary_is_named_with_its_place(dtype, id):
    tokens = TOKENS.astype(dtype)
    tokens[50] = id
    source = Source((TOKENS, tokens), ("a.bin", "b.bin"), vocab_size=200)
    with pytest.raises(UserError, match=rf"--model.vocab_size 200: token 50 of b\.bin is id {id}"):
        _ = [batches((source,))[step] for step in range(12)]


def test_evaluation_reads_windows_from_all_over_in_order_and_ignores_the_filling():
    found = list(evaluation_batches(TOKENS, sequence_length=T, batch_size=4, sequences=10))
    assert [b.inputs.shape for b in found] == [(4, T)] * 3
    inputs, targets = (np.concatenate(parts) for parts in zip(*found, strict=True))
    windows = [start // T for start in inputs[:10, 0].tolist()]
    assert windows == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27]
    assert (targets[:10] == inputs[:10] + 1).all()
    assert (targets[10:] == IGNORE_INDEX).all()
    everything = list(evaluation_batches(TOKENS, sequence_length=T, batch_size=4, sequences=99))
    targets = np.concatenate([b.targets for b in everything])
    assert targets[targets != IGNORE_INDEX].tolist() == list(range(1, 31 * T + 1))


def test_evaluation_takes_each_sources_share_of_a_mixture():
    mixture = (two_shards(), Source((TOKENS + 5000,), ("",), weight=3.0))
    found = list(evaluation_batches(mixture, sequence_length=T, batch_size=4, sequences=20))
    first = np.concatenate([b.inputs[:, 0] for b in found])
    assert [len([i for i in first if (i < 5000) == small]) for small in (True, False)] == [5, 15]
    assert max(i for i in first if i < 5000) > 1000 and max(first) > 5000 + 25 * T
