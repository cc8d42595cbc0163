"""What the check reads is what the text says, for any seed, and it prints nothing of its own."""

import dataclasses

import numpy as np
import pytest

from parity.gpt2.checks import data
from parity.gpt2.faults import case_of


@pytest.mark.parametrize("seed", range(4))
def test_right_code_gives_no_alarm(seed, capsys):
    case = dataclasses.replace(case_of(), seed=seed)
    wrong = [result for result in data.check(case, None, None) if not getattr(result, "passed", True)]
    assert wrong == [] and capsys.readouterr().out == ""


def test_documents_are_told_apart_by_their_ends_across_shards():
    split = data._split((np.array([65, 256, 66]), np.array([66, 256, 256, 67])))
    assert data._split_documents(split) == [b"A", b"BB", b"", b"C"]
