"""Tasks in several processes answer as they do in one."""

import operator

import pytest

from parity.engine import processes
from parity.gpt2.cases import Case, random_weights
from parity.gpt2.faults import MODEL

TASKS = {"the level": operator.attrgetter("level"), "the seed": operator.attrgetter("seed")}


def _case() -> Case:
    weights = random_weights(MODEL)
    return Case(weights, weights.arrays["wpe.weight"], level="quick", seed=5)


@pytest.mark.long
@pytest.mark.parametrize("count", [1, 2])
def test_every_task_answers_once_about_the_case(count):
    done = list(processes.run(TASKS, _case(), 1000, count, tuple))
    assert {d.name: d.answer for d in done} == {"the level": "quick", "the seed": 5} and len(done) == 2


def test_what_a_task_leaves_as_evidence_comes_back_and_no_other_task_sees_it():
    def leave(case: Case) -> int:
        case.evidence["left"] = len(case.evidence)
        return 0

    case = _case()
    done = list(processes.run({"a": leave, "b": leave}, case, 1000, 1, tuple))
    assert [d.evidence for d in done] == [{"left": 0}, {"left": 0}] and case.evidence == {}


def test_a_large_model_and_a_gpu_have_one_process():
    assert processes.count(1000, 1, "cpu") == 1 and processes.count(1000, 9, "gpu") == 1
    assert processes.count(processes.LARGEST + 1, 9, "cpu") == 1
