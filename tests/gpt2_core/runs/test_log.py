import time

import pytest
from matplotlib.figure import Figure

from gpt2_core.config import DataConfig, OptimizerConfig
from gpt2_core.errors import DivergedError, RunError, UserError
from gpt2_core.runs.folder import RunFolder, plan_run, read_metrics
from gpt2_core.runs.log import Outcome, RunLog, draw_curves, peak_flops


@pytest.fixture
def folder(make_config) -> RunFolder:
    plan = plan_run(make_config(), framework="jax", data_digest="d")
    plan.begin()
    return plan.folder


def test_rows_keep_full_precision_and_plain_lines_are_printed(make_config, folder, capsys):
    loss = 0.1 + 0.2
    with RunLog(folder, make_config(), start_step=0) as log:
        log.train(0, Outcome(loss, 2.0), learning_rate=1e-4)
        log.evaluation(1, 1 / 3)
    train, val = read_metrics(folder.metrics)
    assert set(train) == {"step", "split", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "step_seconds"}
    assert (train["loss"], val) == (loss, {"step": 1, "split": "val", "loss": 1 / 3})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["step", "0"], ["step", "1"]]
    assert folder.curves.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_rows_that_the_disk_refuses_are_written_later_and_none_is_cut(make_config, folder, capsys):
    with RunLog(folder, make_config(), start_step=0) as log:
        log.evaluation(0, 2.0)
        file = log._file
        log._file = Full(file)
        log.evaluation(1, 1.5)
        assert [row["step"] for row in read_metrics(folder.metrics)] == [0]
        log._file = file
        log.evaluation(2, 1.0)
        log._file = Full(file)
        log.evaluation(3, 0.5)
        log._file = file
    assert [row["step"] for row in read_metrics(folder.metrics)] == [0, 1, 2, 3]
    assert "metrics.jsonl can't be written (No space left on device); training goes on" in capsys.readouterr().out


class Full:
    """A file on a full disk, which takes half of what is written."""

    def __init__(self, file):
        self._file = file

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, content: bytes) -> int:
        return self._file.write(content[: len(content) // 2])


def test_throughput_counts_steps_since_the_last_row_and_no_evaluation(make_config, folder):
    config = make_config()
    with RunLog(folder, config, start_step=4, peak_flops=1e9) as log:
        time.sleep(0.2)
        with log.untimed():
            time.sleep(0.5)
        log.train(7, Outcome(1.0, 2.0), learning_rate=1e-4)
    (row,) = read_metrics(folder.metrics)
    assert row["step_seconds"] == pytest.approx(0.2 / 4, rel=0.3)
    assert row["tokens_per_second"] == pytest.approx(config.tokens_per_step / row["step_seconds"], rel=1e-3)
    flops = row["tokens_per_second"] * config.training_flops_per_token
    assert row["mfu"] == pytest.approx(flops / 1e9, abs=1e-4)


def test_updates_that_are_left_out_are_counted_and_too_many_in_a_row_end_the_run(make_config, folder, capsys):
    nan, inf = float("nan"), float("inf")
    with RunLog(folder, make_config(max_skipped_steps=2), start_step=0) as log:
        log.check_updates(enumerate(map(Outcome, [1.0, nan, 1.0, 1.0], [1.0, 1.0, inf, 1.0])))
        log.train(3, Outcome(1.0, 1.0), learning_rate=1e-4)
        log.check_updates([(4, Outcome(nan, nan)), (5, Outcome(inf, 1.0))])
        log.train(5, Outcome(inf, 1.0), learning_rate=1e-4)  # no figure to log
        with pytest.raises(DivergedError, match="step 6 has loss nan .* for 3 steps .*lower --optimizer") as failure:
            log.check_updates([(6, Outcome(nan, 1.0)), (7, Outcome(1.0, 1.0))])
    assert failure.value.step == 6
    (row,) = read_metrics(folder.metrics)
    assert (row["step"], row["skipped"]) == (3, 2)
    out = capsys.readouterr().out
    assert "warning: step 2 has loss 1.0 and gradient norm inf: its update is left out (2 of this run)" in out


def test_none_is_left_out_where_none_may_be(make_config, folder):
    with RunLog(folder, make_config(max_skipped_steps=0), start_step=0) as log, pytest.raises(DivergedError):
        log.check_updates([(0, Outcome(float("nan"), 1.0))])


def test_a_validation_loss_or_a_state_that_is_not_finite_ends_the_run_with_a_sentence(make_config, folder):
    with RunLog(folder, make_config(), start_step=0) as log:
        with pytest.raises(RunError, match="the validation loss of step 4 is inf: the run has diverged"):
            log.evaluation(4, float("inf"))
        with pytest.raises(RunError, match="state after step 5 aren't finite: the run has diverged; try a lower"):
            log.refuse_state(5)
    assert read_metrics(folder.metrics) == []


def test_a_target_is_reached_by_the_mean_of_ten_logged_losses_across_a_resume(make_config, folder):
    config = make_config(target_loss=1.0)
    with RunLog(folder, config, start_step=0) as log:
        for step in range(9):
            log.train(step, Outcome(0.5, 2.0), learning_rate=1e-4)
            assert not log.reached_target
    with RunLog(folder, config, start_step=9) as log:
        log.train(9, Outcome(5.6, 2.0), learning_rate=1e-4)
        assert not log.reached_target  # 1.01
        log.train(10, Outcome(0.4, 2.0), learning_rate=1e-4)
        assert log.reached_target  # 1.00, without the oldest
    with RunLog(folder, make_config(), start_step=11) as log:
        assert not log.reached_target


def test_a_spike_of_the_loss_is_named_marked_and_seen_after_a_resume_too(make_config, folder, capsys):
    def losses(first, last):
        return {step: 2.0 + 0.01 * (step % 3) for step in range(first, last)}

    def logged(values, start):
        with RunLog(folder, make_config(), start_step=start) as log:
            for step, loss in values.items():
                log.train(step, Outcome(loss, 1.0), learning_rate=1e-4)

    logged(losses(0, 10) | {10: 9.0}, 0)  # too few before it to say
    assert "standard deviations" not in capsys.readouterr().out
    folder.metrics.write_text("")
    logged(losses(0, 40), 0)
    logged({40: 2.02, 41: 1.0, 42: 2.2}, 40)  # the second is low, and widens what is usual
    assert "standard deviations" not in capsys.readouterr().out
    folder.metrics.write_text("")
    logged(losses(0, 40), 0)
    logged({40: 2.2}, 40)
    assert "warning: step 40 has loss 2.2000, 23" in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(folder.metrics) if "spike" in row] == [40]


@pytest.mark.parametrize("validates", [True, False])
def test_the_best_loss_is_known_after_a_resume_too_and_of_validation_where_there_is_one(
    make_config, folder, text_file, validates
):
    data = DataConfig("text", str(text_file), validation_fraction=0.1 if validates else 0.0)
    config = make_config(data=data)
    with RunLog(folder, config, start_step=0) as log:
        assert log.figures == {} and not log.is_best(1)
        log.train(0, Outcome(4.0, 1.0), learning_rate=1e-4)
        log.train(1, Outcome(3.0, 1.0), learning_rate=1e-4)
        assert log.is_best(2) != validates and not log.is_best(1)
        if validates:
            log.evaluation(2, 3.6)
            assert log.is_best(2)
        assert log.figures == {"training_loss": 3.5} | ({"validation_loss": 3.6} if validates else {})
    with RunLog(folder, config, start_step=2) as log:
        log.train(2, Outcome(3.8, 1.0), learning_rate=1e-4)  # the mean of all three is 3.6
        assert not log.is_best(3)
        log.train(3, Outcome(1.0, 1.0), learning_rate=1e-4)
        if validates:
            log.evaluation(4, 3.61)
        assert log.is_best(4) != validates


def test_another_runs_curve_is_drawn_and_one_that_is_not_there_is_refused(make_config, folder, monkeypatch, tmp_path):
    import matplotlib.figure

    with RunLog(folder, make_config(), start_step=0) as log:
        log.train(0, Outcome(11.0, 2.0), learning_rate=1e-4)
        log.evaluation(1, 10.5)
    drawn = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, *a, **k: drawn.append(figure))
    other = make_config("other", reference_curve=str(folder.path))
    plan = plan_run(other, framework="jax", data_digest="d")
    plan.begin()
    with RunLog(plan.folder, other, start_step=0) as log:
        log.train(0, Outcome(9.0, 2.0), learning_rate=1e-4)
    curves = {line.get_label(): line.get_xydata().tolist() for line in drawn[-1].axes[0].get_lines()}
    assert curves == {"training": [[0.0, 9.0]], str(folder.path): [[0.0, 11.0]]}
    with pytest.raises(UserError, match="--reference_curve .*nothing: not the folder of a run that has logged a step"):
        plan_run(make_config("third", reference_curve=str(tmp_path / "nothing")), framework="jax", data_digest="d")


def test_a_published_curve_is_drawn_beside_the_runs_own(make_config, folder, monkeypatch):
    import matplotlib.figure

    drawn = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, *a, **k: drawn.append(figure))
    with RunLog(folder, make_config(reference_curve={50: 5.25, 0: 10.97}), start_step=0) as log:
        log.train(0, Outcome(11.0, 2.0), learning_rate=1e-4)
    curves = {line.get_label(): line.get_xydata().tolist() for line in drawn[-1].axes[0].get_lines()}
    assert curves == {"training": [[0.0, 11.0]], "published": [[0.0, 10.97], [50.0, 5.25]]}


def test_the_peak_is_known_for_the_gpus_we_build_for():
    assert peak_flops("NVIDIA H200", "bfloat16") == peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bfloat16") == 312e12
    tf32 = {"NVIDIA A100-SXM4-80GB": 156e12, "NVIDIA H100 PCIe": 378e12, "NVIDIA H200": 494.7e12}
    assert {name: peak_flops(name, "tf32") for name in tf32} == tf32
    assert peak_flops("cpu", "bfloat16") is None and peak_flops("NVIDIA H200", "float32") is None


@pytest.mark.parametrize(("steps", "warns"), [(6, False), (7, True)])
def test_a_warmup_longer_than_the_run_is_warned_of(make_config, folder, capsys, steps, warns):
    config = make_config(steps=6, optimizer=OptimizerConfig(warmup_steps=steps))
    with RunLog(folder, config, start_step=0) as log:
        log.introduce("a run")
    assert ("warning: --optimizer.warmup_steps" in capsys.readouterr().out) == warns


@pytest.mark.parametrize(("start", "updates", "said"), [(0, 6, True), (3, 6, True), (6, 6, True), (0, 4, False)])
def test_the_end_of_a_run_says_where_it_is_and_what_can_be_done_with_it(
    make_config, folder, capsys, start, updates, said
):
    with RunLog(folder, make_config(steps=6), start_step=start) as log:
        log.end(updates, "gpt2 train")
    out = capsys.readouterr().out
    assert ("the run had made its 6 steps before" in out) == (start == 6)
    for line in (
        f"results are in {folder.path}: checkpoints, ",
        f"gpt2 generate --weights {folder.path}\n",
        f"gpt2 train --resume --run_dir {folder.path} --steps 12\n",
    ):
        assert (line in out) == said  # a run that was told to stop says how it is continued, elsewhere


def test_curves_have_a_panel_of_accuracies_and_one_of_perplexities(tmp_path, monkeypatch):
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    train = {"step": 0, "split": "train", "loss": 1.0, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 1.0}
    val = [{"step": step, "split": "val", "loss": 1.0} for step in range(3)]
    tasks = {"hellaswag_llmc/acc_norm": 0.3, "lambada_openai/perplexity": 50.0, "wikitext103/bits_per_byte": 1.0}
    draw_curves([train, *val], tmp_path / "curves.png")
    draw_curves([train, val[0], *(row | tasks for row in val[1:])], tmp_path / "curves.png")
    assert [len(figure.axes) for figure in drawn] == [4, 6]
    accuracy, perplexity = drawn[1].axes[4:]
    for axis, figure, published in (
        (accuracy, "hellaswag_llmc/acc_norm", 0.2955),
        (perplexity, "lambada_openai/perplexity", 40.06),
    ):
        curve, line = axis.lines
        assert curve.get_label() == figure and list(curve.get_xdata()) == [1, 2]
        assert set(line.get_ydata()) == {published} and line.get_label() == "OpenAI's gpt2"
