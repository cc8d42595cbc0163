"""The optional trackers, each in its own package: a test is skipped, saying so, where that isn't installed."""

import struct
from pathlib import Path

import pytest

from gpt2_core.errors import UserError
from gpt2_core.runs import trackers
from gpt2_core.runs.folder import RunFolder
from gpt2_core.runs.log import Outcome, RunLog

LOSSES = [3.0, 2.5, 2.25]


def logged_run(make_config, name, start=0, **overrides):
    """A run of three steps and an evaluation, by way of the run's own log."""
    config = make_config(track=name, **overrides)
    folder = RunFolder(Path(config.run_dir))
    folder.path.mkdir(exist_ok=True)
    with RunLog(folder, config, start_step=start) as log:
        for step, loss in enumerate(LOSSES, start=start):
            log.train(step, Outcome(loss, 1.0), learning_rate=1e-3)
        log.evaluation(start + 3, 2.0)
    return folder.path


def records_of(content):
    """The records of an offline run's file: LevelDB's log format after a header of seven bytes."""
    record, place = b"", 7
    while place + 7 <= len(content):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            yield record
            record = b""


@pytest.mark.long
def test_wandb_works_without_a_network_and_a_resumed_run_goes_on_in_its_own(make_config, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "600")  # a busy machine takes long to start its process
    for start in (0, 3):
        # Folders are named by the second in which a run begins, which may be the same.
        monkeypatch.setenv("WANDB__SYNC_DIR_SUFFIX", f"from-{start}")
        folder = logged_run(make_config, "wandb", start=start)
        # A run that is finished may not have been written yet: its process is waited for, which ends with a command's.
        wandb.teardown()
    assert wandb.run is None  # finished
    runs = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert [run.parent.name[-6:] for run in runs] == ["from-0", "from-3"] and len({run.name for run in runs}) == 1
    found = []
    for run in runs:
        for data in records_of(run.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            if "train/loss" in items:
                found.append((int(items["step"]), float(items["train/loss"])))
    assert found == list(enumerate(LOSSES * 2))


def test_tensorboard_reads_back_what_was_logged(make_config):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    events = EventAccumulator(str(logged_run(make_config, "tensorboard") / "tensorboard"))
    events.Reload()
    found = [
        (event.step, float(tensor_util.make_ndarray(event.tensor_proto))) for event in events.Tensors("train/loss")
    ]
    assert found == list(enumerate(LOSSES))
    assert [event.step for event in events.Tensors("val/loss")] == [3]


def test_mlflow_reads_back_what_was_logged(make_config, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file:{tmp_path / 'mlruns'}")
    logged_run(make_config, "mlflow")
    logged_run(make_config, "mlflow", start=3)
    client = mlflow.MlflowClient()
    (experiment,) = [e for e in client.search_experiments() if e.name == "gpt2-jax"]
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "train.loss")
    assert [(m.step, m.value) for m in history] == list(enumerate(LOSSES * 2))
    assert run.data.params["model.n_layer"] == "2"


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(trackers.importlib, "import_module", absent)
    with pytest.raises(UserError, match=r"--track wandb: not installed .*pip install 'gpt2-jax\[wandb\]'"):
        trackers.require("wandb")
    trackers.require(None)


def test_a_tracker_that_fails_does_not_end_the_run(make_config, monkeypatch, capsys):
    class Failing:
        def log(self, step, values):
            raise ConnectionError("gone")

        def close(self):
            raise AssertionError("it was let go")

    monkeypatch.setattr("gpt2_core.runs.log.open_tracker", lambda folder, config: Failing())
    folder = logged_run(make_config, "wandb")
    assert capsys.readouterr().out.count("warning: --track wandb has failed (gone); continuing without it") == 1
    assert (folder / "metrics.jsonl").read_text().count("\n") == 4


def test_a_tracker_that_cannot_start_says_why(make_config, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")

    def refuse(**_):
        raise RuntimeError("no API key")

    monkeypatch.setattr("wandb.init", refuse)
    with pytest.raises(
        UserError, match=r"--track wandb: it can't be started \(no API key\); run `wandb login`, or set"
    ):
        logged_run(make_config, "wandb")
