"""Flax's weights of transformers 4, against files made after the rules by which it converted PyTorch's."""

import dataclasses
import json
import pickle
import tracemalloc
from fnmatch import fnmatch

import flax.serialization
import ml_dtypes
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict

from gpt2_convert import FORMATS, open_weights, write_weights
from gpt2_core.config import ModelConfig
from gpt2_core.errors import UserError
from gpt2_torch.weights import build
from parity.gpt2.cases import random_weights

transformers = pytest.importorskip("transformers")

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=97)


def flax_tree(state: dict[str, torch.Tensor]) -> dict:
    """A state dict of GPT2LMHeadModel as FlaxGPT2LMHeadModel's parameters: `rename_key_and_reshape_tensor` of
    transformers 4, modeling_flax_pytorch_utils.py."""
    tree = {}
    for name, tensor in state.items():
        *modules, kind = name.split(".")
        array = tensor.numpy()
        if kind == "weight" and modules[-1].startswith("ln_"):
            kind = "scale"
        elif kind == "weight" and modules[-1] in ("wte", "wpe"):
            kind = "embedding"
        elif kind == "weight":
            kind, array = "kernel", array.T
        tree[(*modules, kind)] = array
    return unflatten_dict(tree)


@pytest.fixture
def theirs(tmp_path):
    """A random model of transformers, and its folder as transformers 4 would save it for Flax."""

    def make(**options):
        torch.manual_seed(0)
        sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 16, "vocab_size": 97}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes | options)).eval()
        for parameter in model.parameters():  # biases too: transformers starts them at zero
            torch.nn.init.normal_(parameter, std=0.3)
        model.config.save_pretrained(tmp_path)
        state = model.state_dict()
        if model.config.tie_word_embeddings:
            del state["lm_head.weight"]
        return model, flax_tree(state), tmp_path / "flax_model.msgpack"

    return make


def logits_agree(model, folder) -> bool:
    tokens_BT = torch.from_numpy(np.random.default_rng(1).integers(0, 97, (2, 16)))
    with torch.no_grad():
        ours = build(open_weights(folder).in_memory().astype(np.float64))(tokens_BT)
        due = model.double()(tokens_BT).logits
    return bool((ours - due).abs().max() < 1e-12 * due.abs().max())


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": False}, {"n_inner": 40}], ids=str)
def test_models_of_transformers_4_give_transformers_logits(theirs, options):
    model, tree, path = theirs(**options)
    path.write_bytes(flax.serialization.msgpack_serialize(tree))
    assert logits_agree(model, path.parent) and logits_agree(model, path)


def test_a_bare_model_and_arrays_in_several_chunks_are_read(theirs, monkeypatch):
    model, tree, path = theirs()
    path.write_bytes(flax.serialization.msgpack_serialize(tree["transformer"]))
    assert logits_agree(model, path.parent) and logits_agree(model, path)
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 200)
    path.write_bytes(flax.serialization.msgpack_serialize(tree))
    assert b"__msgpack_chunked_array__" in path.read_bytes() and logits_agree(model, path.parent)


def save_shards(tree: dict, folder, number: int) -> dict[str, str]:
    """`flax_shard_checkpoint` and `save_pretrained` of transformers 4, modeling_flax_utils.py, with a given number of
    files instead of a size: each file has its part of the tree, the index the path of each array. Gives the map."""
    flat = flatten_dict(tree, sep="/")
    size = -(-len(flat) // number)
    file_of = {n: f"flax_model-{i // size + 1:05d}-of-{number:05d}.msgpack" for i, n in enumerate(flat)}
    for file in set(file_of.values()):
        part = unflatten_dict({n: array for n, array in flat.items() if file_of[n] == file}, sep="/")
        (folder / file).write_bytes(flax.serialization.to_bytes(part))
    write_index(folder, file_of)
    return file_of


def write_index(folder, file_of) -> None:
    index = {"metadata": {"total_size": 0}, "weight_map": file_of}
    (folder / "flax_model.msgpack.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("bare", [False, True])
def test_shards_are_read(theirs, bare):
    model, tree, path = theirs(tie_word_embeddings=bare)
    save_shards(tree["transformer"] if bare else tree, path.parent, 3)
    assert not path.exists() and logits_agree(model, path.parent)
    # From the Hub all of them are downloaded.
    (patterns,) = FORMATS["msgpack"].hub
    shards = [f.name for f in path.parent.glob("flax_model*")]
    assert len(shards) == 4 and all(any(fnmatch(name, pattern) for pattern in patterns) for name in shards)
    # What conversion writes over such a folder leaves no shard behind.
    weights = open_weights(path.parent).in_memory()
    write_weights(weights, path.parent, "msgpack", force=True)
    assert logits_agree(model, path.parent) and [f.name for f in path.parent.glob("*.msgpack*")] == [path.name]


def test_shards_that_are_not_as_their_index_says_are_refused(theirs):
    _, tree, path = theirs()
    folder = path.parent
    file_of = save_shards(tree, folder, 2)
    first, second = sorted(set(file_of.values()))
    name = "transformer/ln_f/bias"
    assert file_of[name] == second
    (folder / "x.bin").write_bytes((folder / first).read_bytes())
    for wrong, words in (
        ({n: f"../{f}" for n, f in file_of.items()}, "expected a file of weights in the same folder"),
        ({n: "x.bin" for n in file_of}, "names 'x.bin'; expected a file of weights in the same folder"),
        ({n: "no.msgpack" for n in file_of}, "names no.msgpack, which is missing"),
        (file_of | {name: first}, f"{second}: holds {name}, which flax_model.msgpack.index.json says is in {first}"),
        (file_of | {"lm_head/bias": first}, f"lm_head/bias isn't in {first}"),
        ({n: f for n, f in file_of.items() if f == first}, "transformer/.* missing"),
        (None, "has no 'weight_map' from tensors to files"),
    ):
        write_index(folder, wrong)
        with pytest.raises(UserError, match=words):
            open_weights(folder)
    write_index(folder, file_of)
    (folder / second).write_bytes((folder / second).read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{second}: not a complete file of flax.serialization"):
        open_weights(folder)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("chunk", [1 << 30, 94])  # 94: the last part of wte has one number in bfloat16
def test_what_is_written_is_what_flax_serializes(tmp_path, monkeypatch, dtype, chunk):
    """Byte for byte, though one array is in memory at a time."""
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", chunk)
    weights = random_weights(dataclasses.replace(CONFIG, tie_embeddings=False)).astype(dtype)
    write_weights(weights, tmp_path / "m", "msgpack")
    content = (tmp_path / "m" / "flax_model.msgpack").read_bytes()
    tree = flax.serialization.msgpack_restore(content)
    found = flatten_dict(tree, sep="/")
    due = {
        "transformer/wte/embedding": weights.arrays["wte.weight"],
        "transformer/h/1/attn/c_proj/kernel": weights.arrays["h.1.attn.c_proj.weight"].T,
        "transformer/h/0/mlp/c_fc/bias": weights.arrays["h.0.mlp.c_fc.bias"],
        "transformer/ln_f/scale": weights.arrays["ln_f.weight"],
        "lm_head/kernel": weights.arrays["lm_head.weight"].T,
    }
    assert due.keys() < found.keys() and len(found) == len(weights.arrays)
    assert all(found[n].dtype == dtype and found[n].tobytes() == a.tobytes() for n, a in due.items())
    assert content == flax.serialization.msgpack_serialize(tree, in_place=True)
    back = open_weights(tmp_path / "m")
    assert back.tokenizer == "bytes"
    assert all(back.arrays[name].tobytes() == array.tobytes() for name, array in weights.arrays.items())


def test_a_file_is_read_one_array_at_a_time(tmp_path):
    weights = random_weights(CONFIG)
    write_weights(weights, tmp_path / "m", "msgpack")
    open_weights(tmp_path / "m")  # whatever is imported for it, isn't counted below
    tracemalloc.start()
    opened = open_weights(tmp_path / "m")
    assert all(opened.arrays[name].tobytes() == array.tobytes() for name, array in weights.arrays.items())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < weights.nbytes / 2 + 100_000


def test_beside_pytorchs_weights_flaxs_are_left(tmp_path):
    """Many folders of the Hub have both."""
    write_weights(random_weights(CONFIG), tmp_path / "m", "hf")
    (tmp_path / "m" / "flax_model.msgpack").write_bytes(b"never read")
    assert open_weights(tmp_path / "m").arrays["ln_f.bias"].shape == (16,)
    with pytest.raises(UserError, match="flax_model.msgpack: not a complete file of flax.serialization"):
        open_weights(tmp_path / "m", form="msgpack")


class Evil:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_nothing_is_unpickled_and_what_isnt_an_array_is_refused(theirs, capsys):
    _, tree, path = theirs()
    pickled = pickle.dumps(Evil())
    serialize = flax.serialization.msgpack_serialize
    whole = serialize(tree)
    for content, words in (
        (pickled, "holds no weights that this project knows"),
        (serialize(tree | {"lm_head": {"kernel": pickled}}), "lm_head/kernel isn't an array"),
        (serialize(tree | {"lm_head": 3}), "lm_head isn't an array"),
        # An array of Python objects, which numpy would have to unpickle.
        (whole.replace(b"float32", b"object_", 1), "not a complete file of flax.serialization"),
        (whole + b"\0", "not a complete file of flax.serialization"),
        (serialize(tree | {"wte": tree["transformer"]["wte"]}), "transformer/wte/embedding appears twice"),
        (serialize(tree | {"value": {"kernel": np.zeros(3)}}), "value/kernel is not part of this GPT-2"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=words):
            open_weights(path)
    assert capsys.readouterr().out == ""


def test_other_models_are_refused_by_their_config_json(theirs):
    _, tree, path = theirs()
    path.write_bytes(flax.serialization.msgpack_serialize(tree))
    described = path.parent / "config.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"n_head": 3}))
    with pytest.raises(UserError, match="not divisible by n_head 3"):
        open_weights(path.parent)
    described.unlink()
    with pytest.raises(UserError, match="holds no weights that this project knows; expected .*flax_model.msgpack"):
        open_weights(path.parent)
