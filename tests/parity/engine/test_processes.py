"""Tasks in several processes answer as they do in one."""

import dataclasses
import operator

import pytest
from parity.suite import Subject

from gpt2_core.config import ModelConfig
from parity import processes
from parity.gpt2.cases import random_weights
from parity.gpt2.faults import MODEL

TASKS = {"the level": operator.attrgetter("level"), "the seed": operator.attrgetter("seed")}


def _subject() -> Subject:
    weights = random_weights(MODEL)
    return Subject(weights, weights.arrays["wpe.weight"], level="quick", seed=5)


@pytest.mark.parametrize("count", [1, 2])
def test_every_task_answers_once_about_the_subject(count):
    done = list(processes.run(TASKS, _subject(), count, tuple))
    assert {d.name: d.answer for d in done} == {"the level": "quick", "the seed": 5} and len(done) == 2


def test_what_a_task_leaves_as_evidence_comes_back_and_no_other_task_sees_it():
    def leave(subject: Subject) -> int:
        subject.evidence["left"] = len(subject.evidence)
        return 0

    subject = _subject()
    done = list(processes.run({"a": leave, "b": leave}, subject, 1, tuple))
    assert [d.evidence for d in done] == [{"left": 0}, {"left": 0}] and subject.evidence == {}


def test_a_large_model_and_a_gpu_have_one_process():
    small = _subject()
    assert processes.count(small, 1, "cpu") == 1 and processes.count(small, 9, "gpu") == 1
    large = random_weights(ModelConfig(n_layer=1, n_head=1, n_embd=1024, block_size=16, vocab_size=257))
    assert large.config.parameter_count > processes.LARGEST
    assert processes.count(dataclasses.replace(small, weights=large), 9, "cpu") == 1
