import dataclasses
import shutil

import pytest

from gpt2_core.config import OptimizerConfig
from gpt2_core.errors import UserError
from gpt2_core.run_folder import read_metrics
from gpt2_jax.train import resolve, train


def losses(folder, split="train"):
    return [row["loss"] for row in read_metrics(folder.metrics) if row["split"] == split]


def test_it_learns(make_config):
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=5)
    found = losses(train(make_config(steps=100, optimizer=optimizer, checkpoint_interval=50, mesh=2)), "val")
    assert found[0] > 5.4 and found[-1] < 4.0


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


def test_samples_are_written(make_config):
    folder = train(make_config(steps=2, sample_interval=2, sample_tokens=20))
    assert len((folder.samples / "2.txt").read_text(errors="replace")) >= 10


def test_a_mesh_larger_than_the_machine_is_refused(make_config):
    with pytest.raises(UserError, match="--mesh 16: needs 16 devices and this machine has 8"):
        resolve(make_config(mesh=16, batch_size=16))


def test_left_out_the_mesh_is_one_cpu_device(make_config):
    assert resolve(make_config(mesh=None)).mesh == "data=1,fsdp=1,tensor=1"
