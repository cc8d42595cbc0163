import pytest

from benchmarks.data import batches, tokenisation


def test_both_sides_of_the_comparison_do_the_same_work():
    texts = [f"a line of text, number {i}. " * 40 for i in range(50)]
    found = tokenisation(texts, workers=2, rounds=1)
    assert found["tokens"] > 15_000
    assert found["ratio"] == found["prepare"] / found["encode_ordinary_batch"] > 0


@pytest.mark.long
def test_batches_are_measured_at_every_size():
    rows = batches(256, sizes=(10**5, 10**8), cores=2, rounds=1)
    assert [row["bytes"] for row in rows] == [10**5, 10**8]
    # Far below what any machine reaches: what it costs to shuffle 500 million tokens in memory would be seen here.
    assert all(row["tokens_per_second"] > 100_000 for row in rows)
