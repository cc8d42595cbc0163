import dataclasses
import shutil
from pathlib import Path

import jax
import pytest

from gpt2_core.config import OptimizerConfig
from gpt2_core.config.io import from_yaml
from gpt2_core.errors import RunError, UserError
from gpt2_core.runs.folder import read_metrics
from gpt2_jax import checkpoints, memory
from gpt2_jax import train as train_module
from gpt2_jax.train import resolve, train
from gpt2_jax.train_step import Metrics


def losses(folder, split="train"):
    return [row["loss"] for row in read_metrics(folder.metrics) if row["split"] == split]


@pytest.mark.long
def test_it_learns(make_config):
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=5)
    found = losses(train(make_config(steps=100, optimizer=optimizer, checkpoint_interval=50, mesh=2)), "val")
    assert found[0] > 5.4 and found[-1] < 4.0


class Watched:
    """A compiled step that writes down when it is dispatched, and when which step's metrics are fetched."""

    def __init__(self, compiled, events):
        self._compiled, self._events, self._step = compiled, events, 0

    def __getattr__(self, name):
        return getattr(self._compiled, name)

    def __call__(self, *arguments):
        state, metrics = self._compiled(*arguments)
        self._events.append(("dispatch", self._step))
        watched = [WatchedScalar(x, self._step, self._events) for x in (metrics.loss, metrics.grad_norm)]
        self._step += 1
        return state, Metrics(*watched)


class WatchedScalar:
    def __init__(self, value, step, events):
        self._value, self._step, self._events = value, step, events

    def __float__(self):
        self._events.append(("fetch", self._step))
        return float(self._value)


@pytest.mark.long
def test_the_host_never_waits_for_a_step_before_it_has_dispatched_the_next(make_config, monkeypatch):
    events = []

    def compile_watched(*arguments):
        compiled, seconds = compile_step(*arguments)
        return Watched(compiled, events), seconds

    def block_until_ready(state):
        events.append(("wait", None))

    compile_step = train_module._compile
    monkeypatch.setattr(train_module, "_compile", compile_watched)
    monkeypatch.setattr(train_module.jax, "block_until_ready", block_until_ready)
    train(make_config(steps=8, log_interval=3, eval_interval=100, checkpoint_interval=100, mesh=2))
    steps = [("dispatch", step) for step in range(8)]
    # With the steps that are logged, 0, 3 and 6, and the last one, those before them: loss and gradient norm.
    since = {0: [0], 3: [1, 2, 3], 6: [4, 5, 6], 7: [7]}
    fetches = {logged: [("fetch", step) for step in steps for _ in range(2)] for logged, steps in since.items()}
    ends = [*fetches[7], ("wait", None)]
    assert events == [*steps[:2], *fetches[0], *steps[2:5], *fetches[3], *steps[5:], *fetches[6], *ends]


@pytest.mark.long
def test_it_resumes_bitwise_on_the_same_mesh_and_to_rounding_on_another(make_config, tmp_path):
    model = dataclasses.replace(make_config().model, dropout=0.2)
    whole = train(make_config("whole", model=model, mesh=2))
    for mesh, tolerance in ((2, 0.0), (1, 1e-6)):
        name = f"on-{mesh}"
        shutil.copytree(whole.path, tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / "6")
        resumed = train(make_config(name, model=model, mesh=mesh, resume="newest"))
        assert losses(resumed) == pytest.approx(losses(whole), rel=tolerance, abs=0)
        assert [row["step"] for row in read_metrics(resumed.metrics) if row["split"] == "train"] == list(range(6))


@pytest.mark.long
def test_it_stops_at_the_target_and_accumulates_as_its_devices_need(make_config):
    settings = {"steps": 60, "target_loss": 4.5, "device_batch_size": 2, "eval_interval": 100, "mesh": 2}
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=2)
    folder = train(make_config(optimizer=optimizer, checkpoint_interval=100, **settings))
    found = losses(folder)
    means = [sum(found[end - 10 : end]) / 10 for end in range(10, len(found) + 1)]
    assert len(found) < 60 and means[-1] <= 4.5 < min(means[:-1])
    assert folder.steps() == [len(found)]  # the last step is kept and evaluated
    assert [row["step"] for row in read_metrics(folder.metrics) if row["split"] == "val"] == [0, len(found)]
    assert from_yaml(folder.config).accumulation == 2
    # Resumed, it has nothing left to do.
    resumed = train(make_config(optimizer=optimizer, checkpoint_interval=100, resume="newest", **settings))
    assert losses(resumed) == found


@pytest.mark.long
def test_samples_are_written(make_config):
    folder = train(make_config(steps=2, sample_interval=2, sample_tokens=20))
    assert len((folder.samples / "2.txt").read_text(errors="replace")) >= 10


@pytest.mark.slow
def test_samples_do_not_depend_on_the_mesh(make_config):
    # One sequence can't be split over two devices; asked to, XLA ends a float64 process.
    settings = {"steps": 1, "sample_interval": 1, "sample_tokens": 12, "precision": "float64"}
    with jax.enable_x64(True):
        folders = [train(make_config(f"on-{mesh}", mesh=mesh, **settings)) for mesh in (1, 2)]
    texts = {(folder.samples / "1.txt").read_bytes() for folder in folders}
    assert len(texts) == 1


@pytest.mark.parametrize(("mesh", "fits"), [("data=8", False), ("fsdp=8", True), ("data=2,fsdp=2,tensor=2", False)])
def test_a_model_that_cannot_be_held_leaves_no_folder(make_config, monkeypatch, mesh, fits):
    model = dataclasses.replace(make_config().model, n_embd=64)
    # Of parameters and moments, on each of eight devices: a little more than an eighth, and so less than a quarter.
    monkeypatch.setattr(memory, "bytes_available", lambda mesh, processes: 3 * 4 * model.parameter_count // 7)
    config = make_config(model=model, mesh=mesh, steps=0)
    if fits:
        train(config)
    else:
        with pytest.raises(UserError, match="out of memory: the model's .* parameters and the optimizer's state need"):
            train(config)
    assert Path(config.run_dir).exists() == fits


def test_a_mesh_larger_than_the_machine_is_refused(make_config):
    with pytest.raises(UserError, match="--mesh 16: needs 16 devices and this machine has 8"):
        resolve(make_config(mesh=16, batch_size=16))


def test_left_out_the_mesh_is_one_cpu_device(make_config):
    assert resolve(make_config(mesh=None)).mesh == "data=1,fsdp=1,tensor=1"


@pytest.mark.long
def test_a_checkpoint_that_cannot_be_saved_does_not_end_training(train_with_full_disk, capsys):
    folder = train_with_full_disk(train, checkpoints, failures=1)
    assert folder.steps() == [4, 6] and len(losses(folder)) == 6
    assert "warning: checkpoint 2 can't be saved ([Errno 28] No space left on device)" in capsys.readouterr().out


@pytest.mark.long
def test_a_run_whose_last_state_cannot_be_saved_fails(train_with_full_disk):
    with pytest.raises(RunError, match=r"checkpoint 6 can't be saved .*: the state after step 6 is lost; make room"):
        train_with_full_disk(train, checkpoints, failures=99)
