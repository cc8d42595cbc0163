"""The mutation score: what the inputs would miss."""

import pytest


@pytest.mark.long
def test_the_mutation_score_names_what_the_inputs_miss(right):
    score = right.mutation_score
    assert score.score > 0.8 and score.noticed + len(score.survivors) + score.equivalent + score.failed == 60
    # Seven positions show every change of the attention; what is left is named with its line.
    assert all("tiny.py:" in s.place or not s.place for s in score.survivors)
