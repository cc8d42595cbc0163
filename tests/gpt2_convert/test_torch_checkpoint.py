import pytest
import torch

from gpt2_convert import open_weights, write_weights
from gpt2_core.errors import UserError
from gpt2_core.runs.folder import RunFolder
from gpt2_torch.train import train
from gpt2_torch.weights import build


def test_weights_survive_a_checkpoint_bitwise(make_config, tmp_path):
    folder = train(make_config(steps=2))
    weights = open_weights(folder.checkpoint("latest"))
    write_weights(weights, tmp_path / "copy", "torch")
    again = open_weights(tmp_path / "copy")
    assert again.config == weights.config and again.tokenizer == "bytes"
    assert all(again.arrays[n].tobytes() == a.tobytes() for n, a in weights.arrays.items())


def test_building_a_model_copies(make_config, tmp_path):
    weights = open_weights(train(make_config(steps=0)).checkpoint("latest"))
    before = weights.arrays["wte.weight"].copy()
    with torch.no_grad():
        build(weights).wte.weight.zero_()
    assert (weights.arrays["wte.weight"] == before).all()


def test_a_damaged_checkpoint_is_refused(make_config):
    folder = train(make_config(steps=0))
    (folder.checkpoint("latest") / "model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(UserError, match="model.safetensors: not a complete safetensors file"):
        open_weights(RunFolder(folder.path).checkpoint("latest"))
