"""The check of the trainers: that its setting shows what it should, and that what differs is named."""

import contextlib
import dataclasses
import math
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import gpt2_core.data.batches
import gpt2_core.runs.log
import gpt2_torch.train
from gpt2_core.runs.folder import RunFolder
from parity.engine.results import Skipped
from parity.gpt2 import plain_loop, trainer_results, trainer_runs
from parity.gpt2.adapters import both
from parity.gpt2.adapters.protocol import TrainerState
from parity.gpt2.adapters.torch_adapter import TorchAdapter
from parity.gpt2.checks import trainer
from parity.gpt2.faults import case_of

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(scope="module")
def case():
    return case_of()


@pytest.fixture
def setting(case, tmp_path):
    return trainer_runs.setting_of(case, tmp_path, "cpu")


@pytest.mark.parametrize("seed", range(4))
def test_the_setting_shows_what_it_is_for(case, tmp_path, seed):
    case = dataclasses.replace(case, seed=seed, tokens=np.roll(case.tokens, -1500 * seed))
    setting = trainer_runs.setting_of(case, tmp_path, "cpu")
    config, due = setting.config, setting.due(setting.config)
    norms = [row["grad_norm"] for row in due.rows if row["split"] == "train"]
    assert min(norms) > config.optimizer.clip_norm  # every step is clipped
    assert due.best < max(due.kept)  # the best checkpoint is not the newest
    assert config.eval_sequences % config.microbatch_size  # the last batch is padded
    assert config.eval_sequences < len(plain_loop.windows((setting.text.val,), config.model.block_size))
    assert len(set(due.samples.values())) == len(due.samples) == 4


def test_windows_overlap_by_one_token_and_leave_no_shard():
    shards = (np.arange(10), np.arange(100, 109))
    found = [window.tolist() for window in plain_loop.windows(shards, 4)]
    assert found == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [100, 101, 102, 103, 104], [104, 105, 106, 107, 108]]


def windows_of(start):
    """Windows that begin elsewhere."""

    def make(place):
        def wrong(self, i):
            number, begin = place(self, i)
            return number, start(begin)

        return wrong

    return "_locate", make


WRONG_BATCHES = {
    "shifted": windows_of(lambda begin: max(0, begin - 1)),
    "always the first": windows_of(lambda begin: 0),
    "one left out": ("__len__", lambda length: lambda self: length(self) - 1),
}


@pytest.mark.parametrize("name", WRONG_BATCHES)
def test_windows_that_are_not_the_texts_are_seen(setting, name):
    assert plain_loop.wrong_batches(setting.text, setting.config)[1] == []
    attribute, make = WRONG_BATCHES[name]
    windows = gpt2_core.data.batches.Windows
    with mock.patch.object(windows, attribute, make(getattr(windows, attribute))):
        assert "windows left out" in plain_loop.wrong_batches(setting.text, setting.config)[1][0]


class Changed(gpt2_core.data.batches.TrainingBatches):
    """Batches with a mistake, which `change` makes of (right batch, batches, step)."""

    def __getitem__(self, step):
        return self.change(super().__getitem__, step)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda right, step: right(step)._replace(targets=right(step).inputs), "left out"),
        (lambda right, step: right(step // 2), "too many"),
        (lambda right, step: right(step % 4), "too many"),
        (lambda right, step: right(step + 1), "left out"),
    ],
    ids=["targets not shifted", "every batch twice", "an epoch that ends early", "the first batch left out"],
)
def test_batches_that_are_not_the_epochs_are_seen(setting, change, words):
    wrong = type("Wrong", (Changed,), {"change": staticmethod(change)})
    with mock.patch.object(plain_loop, "TrainingBatches", wrong):
        assert words in plain_loop.wrong_batches(setting.text, setting.config)[1][0]


def test_orders_and_processes_are_looked_at(setting):
    real = gpt2_core.data.batches.TrainingBatches

    def unseeded(*arguments, seed, **options):
        return real(*arguments, seed=0, **options)

    def all_to_each(*arguments, rows, **options):
        return real(*arguments, rows=[row - rows[0] for row in rows], **options)

    for wrong, words in ((unseeded, "two seeds"), (all_to_each, "two processes")):
        with mock.patch.object(plain_loop, "TrainingBatches", wrong):
            assert words in "; ".join(plain_loop.wrong_batches(setting.text, setting.config)[1])


ROWS = [
    {"split": "val", "step": 0, "loss": 5.0},
    {"split": "train", "step": 0, "loss": 5.0, "lr": 0.1, "grad_norm": 1.0},
    {"split": "train", "step": 2, "loss": 4.0, "lr": 0.2, "grad_norm": 2.0},
]


def test_the_first_differing_figure_is_named_with_what_came_before():
    rows = [ROWS[0], ROWS[1] | {"grad_norm": 1.0 + 1e-9}, ROWS[2] | {"loss": 3.0}]
    measured, where = trainer_results.first_difference(rows, ROWS)
    assert measured == 0.25
    assert where == "step 0, gradient norm: 1.000000001 where 1 is due; everything before agrees to 0e+00"
    measured, where = trainer_results.first_difference([ROWS[0] | {"loss": math.nan}, *ROWS[1:]], ROWS)
    assert math.isnan(measured) and where.startswith("validation after 0 updates, loss: nan")
    assert trainer_results.first_difference([], ROWS)[0] == math.inf


def test_rows_that_are_missing_repeated_or_out_of_order_are_named():
    assert trainer_results.differing_steps(ROWS, ROWS)[0] == 0
    assert trainer_results.differing_steps(ROWS[1:], ROWS)[2] == "step 0 where validation after 0 updates is due"
    assert trainer_results.differing_steps([*ROWS, ROWS[2]], ROWS)[2] == "step 2 where nothing is due"
    assert trainer_results.differing_steps(ROWS[:2], ROWS)[2] == "nothing where step 2 is due"


def test_the_first_differing_tensor_of_a_checkpoint_is_named():
    def state(updates=5, **changed):
        trees = {kind: {"a": np.ones(3), "b": np.ones(2)} for kind in TrainerState._fields[1:]}
        for kind, name in changed.items():
            trees[kind][name] = np.full_like(trees[kind][name], 1.1)
        return TrainerState(updates, **trees)

    def where(*states):
        return trainer_results.first_difference_of_states(*({5: s} for s in states))[1]

    assert where(state(first_moments="b", params="a"), state()).startswith("checkpoint 5, first moment b")
    assert where(state(params="a"), state()).startswith("checkpoint 5, param a")
    assert where(state(updates=4), state()).startswith("checkpoint 5, 4 updates where 5 are due")
    assert trainer_results.first_difference_of_states({5: state()}, {5: state()})[0] == 0


def test_tokens_are_counted_to_the_rounding_of_the_log(setting):
    row = {"split": "train", "step": 0, "tokens_per_second": 21333.3, "step_seconds": 0.003}
    assert trainer_results.wrong_tokens([row], setting.config)[0] < 1  # 64 tokens
    assert trainer_results.wrong_tokens([row | {"step_seconds": 0.0031}], setting.config)[0] > 1


@pytest.mark.long
def test_a_run_is_interrupted_resumed_and_silent(case, setting, capfd):
    pytorch = TorchAdapter(case.weights).trainer()
    config = trainer_runs.named(setting, setting.config, "a run")
    assert trainer_runs.run(pytorch, config, interrupt_at=6)
    assert RunFolder(Path(config.run_dir)).steps() == [5]
    assert not trainer_runs.run(pytorch, dataclasses.replace(config, resume="newest"))
    assert RunFolder(Path(config.run_dir)).steps() == [5, 12]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("module", "name", "wrong", "failed"),
    [
        (gpt2_torch.train, "first_not_finite", lambda model, parts: "h.0.ln_1", ["what is kept to study"]),
        (
            gpt2_core.runs.log.Outcome,
            "is_update",
            True,
            ["ends after two updates that are left out", "what is kept to study"],
        ),
        (
            gpt2_core.data.batches.TrainingBatches,
            "sequences",
            lambda self, step: list(range(step * 4 + 1, (step + 1) * 4 + 1)),
            ["what is kept to study"],
        ),
    ],
    ids=["another module is named", "every update counts as applied", "another batch is kept"],
)
def test_what_a_diverging_run_gets_wrong_is_seen(case, setting, module, name, wrong, failed):
    with mock.patch.object(module, name, wrong):
        results = list(trainer._diverging(setting, TorchAdapter(case.weights).trainer()))
    assert [result.case.split(": ")[1] for result in results if not result.passed] == failed


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_both_trainers_pass_on_other_devices_and_weights(case, seed):
    found = list(trainer.check(dataclasses.replace(case, level="full", seed=seed), *both(case.weights)))
    assert not any(isinstance(result, Skipped) for result in found)
    assert all(result.passed for result in found), [r for r in found if not r.passed]


@pytest.mark.slow
def test_an_evaluation_in_float32_of_a_run_in_bfloat16_is_seen(case, setting):
    evaluate = gpt2_torch.train.evaluate

    def wide(model, batches, device, autocast):
        return evaluate(model, batches, device, contextlib.nullcontext())

    with mock.patch.object(gpt2_torch.train, "evaluate", wide):
        results = trainer._in_bfloat16(TorchAdapter(case.weights), setting)
        failed = [result.case for result in results if not result.passed]
    assert failed == ["PyTorch, in bfloat16: the first loss of evaluation"]
