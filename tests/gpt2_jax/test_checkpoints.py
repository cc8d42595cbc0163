import errno
from pathlib import Path

import jax
import numpy as np
import pytest

from gpt2_convert import open_weights, write_weights
from gpt2_core.config import ModelConfig
from gpt2_core.errors import SaveError, UserError
from gpt2_core.runs.folder import RunFolder, metadata_of
from gpt2_core.runs.manifest import damage
from gpt2_jax import checkpoints
from gpt2_jax.checkpoints import CheckpointWriter, restore
from gpt2_jax.train_step import make_program


@pytest.fixture
def saved(mesh_config):
    """A checkpoint written on data=8, and its state."""
    config = mesh_config(mesh=8)
    folder = RunFolder(Path(config.run_dir))
    folder.path.mkdir()
    state = make_program(config).initial_state()
    writer = CheckpointWriter(folder, keep=2)
    writer.save(4, state, metadata_of(config, 4, "jax", "d"))
    writer.close()
    return folder.checkpoints / "4", state


def abstract(config):
    return make_program(config).abstract_state


@pytest.mark.long
@pytest.mark.parametrize("mesh", [1, "data=2,fsdp=2,tensor=2"])
def test_any_mesh_restores_every_bit(saved, mesh_config, mesh):
    checkpoint, state = saved
    target = abstract(mesh_config(mesh=mesh))
    restored = restore(checkpoint, target)
    for old, new, wanted in zip(*map(jax.tree.leaves, (state, restored, target)), strict=True):
        assert np.asarray(old).tobytes() == np.asarray(new).tobytes() and old.dtype == new.dtype
        assert new.sharding == wanted.sharding


def test_another_precision_is_refused_before_orbax_casts(saved, mesh_config, x64):
    with pytest.raises(UserError, match="is float32 .*; this run needs float64"):
        restore(saved[0], abstract(mesh_config(precision="float64")))


def test_another_shape_is_refused(saved, mesh_config):
    with pytest.raises(UserError, match=r"is float32 .*16\); this run needs float32 .*32\)"):
        restore(saved[0], abstract(mesh_config(model=ModelConfig(2, 2, 32, 16, 257))))


def test_weights_survive_a_checkpoint_bitwise(saved, tmp_path):
    weights = open_weights(saved[0])
    assert weights.arrays["wte.weight"].shape == (257, 16) and weights.tokenizer == "bytes"
    write_weights(weights, tmp_path / "copy", "jax")
    again = open_weights(tmp_path / "copy")
    assert all(again.arrays[n].tobytes() == a.tobytes() for n, a in weights.arrays.items())


def test_where_nothing_can_be_saved_is_an_error_and_no_thread_waits(mesh_config):
    config = mesh_config(mesh=1)
    folder = RunFolder(Path(config.run_dir))
    state = make_program(config).initial_state()
    writer = CheckpointWriter(folder, keep=2)
    with pytest.raises(SaveError, match="checkpoint 4 can't be saved .*No such file or directory"):
        writer.save(4, state, metadata_of(config, 4, "jax", "d"))
    folder.path.mkdir()
    folder.checkpoints.write_text("in the way")
    with pytest.raises(SaveError, match="checkpoint 5 can't be saved .*File exists"):
        writer.save(5, state, metadata_of(config, 5, "jax", "d"))
    folder.checkpoints.unlink()
    writer.save(6, state, metadata_of(config, 6, "jax", "d"))
    writer.close()
    assert folder.steps() == [6] and damage(folder.checkpoints / "6") is None


def test_an_error_in_the_background_is_raised_by_the_next_wait(mesh_config, monkeypatch):
    config = mesh_config(mesh=1)
    folder = RunFolder(Path(config.run_dir))
    folder.path.mkdir()
    writer = CheckpointWriter(folder, keep=2)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(checkpoints, "publish", lambda *_: (_ for _ in ()).throw(full))
    writer.save(4, make_program(config).initial_state(), metadata_of(config, 4, "jax", "d"))
    with pytest.raises(SaveError, match="checkpoint 4 can't be saved .*No space left on device"):
        writer.wait()
    assert not writer.has_failed
    writer.close()
    assert folder.steps() == []
