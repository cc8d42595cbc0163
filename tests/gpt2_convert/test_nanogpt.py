import sys
import types

import numpy as np
import pytest
import torch

from gpt2_convert import open_weights, write_weights
from gpt2_core.config import ModelConfig
from gpt2_core.errors import UserError
from parity.gpt2.cases import random_weights

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=8, block_size=8, vocab_size=20, mlp="gelu_exact")
ARGUMENTS = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 8, "bias": True, "vocab_size": 20, "dropout": 0.2}


def state_of(config=CONFIG) -> dict[str, torch.Tensor]:
    """A state dict as nanoGPT's GPT has it, written out: nn.Linear's orientation, a tied head."""
    state = {}
    for name, array in random_weights(config).arrays.items():
        transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        state[f"transformer.{name}"] = torch.from_numpy(np.ascontiguousarray(array.T if transposed else array))
    return state | {"lm_head.weight": state["transformer.wte.weight"]}


def same(weights, expected) -> bool:
    return all(weights.arrays[n].tobytes() == a.tobytes() for n, a in expected.arrays.items())


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
def test_checkpoints_of_nanogpt_are_read_and_the_assumed_gelu_is_said(tmp_path, prefix):
    contents = {
        "model": {prefix + name: tensor for name, tensor in state_of().items()},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}},
        "model_args": ARGUMENTS,
        "iter_num": 7,
        "best_val_loss": torch.tensor(2.5),
        "config": {"dataset": "shakespeare"},
    }
    torch.save(contents, tmp_path / "some.file")
    weights = open_weights(tmp_path / "some.file")
    assert weights.config == ModelConfig(2, 2, 8, 8, 20, mlp="gelu_exact", dropout=0.2)
    assert same(weights, random_weights(CONFIG))
    assert "read as a model with mlp gelu_exact" in weights.notes[0]
    tanh = open_weights(tmp_path / "some.file", mlp="gelu_tanh")
    assert tanh.config.mlp == "gelu_tanh" and tanh.notes == ()


def test_models_without_biases_are_read(tmp_path):
    config = ModelConfig(2, 2, 8, 8, 20, mlp="gelu_exact", bias=False)
    torch.save({"model": state_of(config), "model_args": ARGUMENTS | {"bias": False}}, tmp_path / "x.pt")
    assert same(open_weights(tmp_path / "x.pt"), random_weights(config))


def test_build_nanogpts_checkpoints_are_read_with_their_config_object_and_no_other(tmp_path, monkeypatch):
    main = types.ModuleType("__main__")
    for name in ("GPTConfig", "Other"):
        kind = type(name, (), {"__module__": "__main__", "__qualname__": name})
        setattr(main, name, kind)
    monkeypatch.setitem(sys.modules, "__main__", main)
    for name in ("GPTConfig", "Other"):
        config = getattr(main, name)()
        config.__dict__.update(block_size=8, vocab_size=20, n_layer=2, n_head=2, n_embd=8)
        torch.save({"model": state_of(), "config": config, "step": 1, "val_loss": 3.0}, tmp_path / f"{name}.pt")
    weights = open_weights(tmp_path / "GPTConfig.pt")
    assert weights.config == ModelConfig(2, 2, 8, 8, 20, mlp="gelu_tanh")
    assert "build-nanogpt" in weights.notes[0] and same(weights, random_weights(CONFIG))
    with pytest.raises(UserError, match=r"Other.pt: holds an object of __main__.Other"):
        open_weights(tmp_path / "Other.pt")


def test_what_is_written_is_what_nanogpts_sample_py_loads(tmp_path):
    """It calls torch.load, GPTConfig(**model_args) and load_state_dict, after taking off _orig_mod."""
    weights = random_weights(CONFIG)
    write_weights(weights, tmp_path / "ckpt.pt", "nanogpt")
    contents = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert contents["model_args"] == ARGUMENTS | {"dropout": 0.0}
    expected = state_of()
    assert contents["model"].keys() == expected.keys()
    assert all(torch.equal(contents["model"][name], tensor) for name, tensor in expected.items())
    shared = [contents["model"][n].untyped_storage().data_ptr() for n in ("lm_head.weight", "transformer.wte.weight")]
    assert shared[0] == shared[1]


def test_the_gelu_that_was_written_is_known_again(tmp_path):
    for mlp in ("gelu_tanh", "gelu_exact"):
        write_weights(random_weights(ModelConfig(2, 2, 8, 8, 20, mlp=mlp)), tmp_path / mlp, "nanogpt")
        weights = open_weights(tmp_path / mlp)
        assert (weights.config.mlp, weights.notes) == (mlp, ())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_args": {}}, "doesn't record its model's n_layer, n_head"),
        ({"model_args": ARGUMENTS | {"n_kv_head": 1}}, "its model has n_kv_head"),
        ({"model_args": ARGUMENTS | {"n_head": "2"}}, "n_head '2', which is not a value"),
        ({"model_args": None}, "neither nanoGPT's"),
        ({"model": [1]}, "not a checkpoint of nanoGPT"),
        ({"model": {"transformer.wte.weight": 3}}, "transformer.wte.weight isn't a tensor"),
        ({"model": state_of() | {"module.lm_head.weight": torch.zeros(20, 8)}}, "lm_head.weight appears twice"),
    ],
)
def test_other_contents_are_refused(tmp_path, change, words):
    torch.save({"model": state_of(), "model_args": ARGUMENTS} | change, tmp_path / "x.pt")
    with pytest.raises(UserError, match=words):
        open_weights(tmp_path / "x.pt", form="nanogpt")
