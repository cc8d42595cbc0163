"""transformers is the independent reader and writer: what we write it loads, what it saves we load, and the logits of
both agree to rounding in float64."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gpt2_convert import FORMATS, open_weights, write_weights
from gpt2_core.config import PRESETS, ModelConfig
from gpt2_core.errors import UserError
from gpt2_torch.weights import build
from parity.gpt2.adapters.jax_adapter import JaxAdapter
from parity.gpt2.cases import random_weights

transformers = pytest.importorskip("transformers")

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=97)


def theirs_of(model, tokens_BT) -> np.ndarray:
    with torch.no_grad():
        return model.double().eval()(torch.from_numpy(tokens_BT)).logits.numpy()


def tokens_of(config: ModelConfig) -> np.ndarray:
    return np.random.default_rng(1).integers(0, config.vocab_size, (2, min(config.block_size, 16)))


def apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def ours_of(weights, tokens_BT) -> np.ndarray:
    with torch.no_grad():
        return build(weights.in_memory().astype(np.float64))(torch.from_numpy(tokens_BT)).numpy()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mlp": "gelu_exact"},
        {"mlp_width": 40},
        {"tie_embeddings": False},
        {"layer_norm_epsilon": 1e-3},
        {"vocab_size": 128, "dropout": 0.1},
    ],
    ids=str,
)
def test_gpt2_lm_head_model_loads_what_we_write_and_gives_our_logits(tmp_path, changes):
    weights = random_weights(dataclasses.replace(CONFIG, **changes))
    write_weights(weights, tmp_path / "m", "hf")
    model, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokens_BT = tokens_of(weights.config)
    theirs = theirs_of(model, tokens_BT)
    assert apart(ours_of(weights, tokens_BT), theirs) < 1e-12
    if not changes:
        with jax.enable_x64(True):
            assert apart(JaxAdapter(weights).logits(tokens_BT), theirs) < 1e-12
    back = open_weights(tmp_path / "m")
    assert (back.config, back.tokenizer) == (weights.config, "bytes")


def saved_by_transformers(folder, **sizes):
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    model.save_pretrained(folder)
    return model


@pytest.mark.long
@pytest.mark.parametrize("preset", PRESETS)
def test_what_transformers_saves_gives_its_logits(tmp_path, preset):
    """The four published shapes, at the depth of one layer and with fewer words."""
    sizes = PRESETS[preset] | {"n_layer": 1, "vocab_size": 300, "n_positions": 32}
    model = saved_by_transformers(tmp_path / "m", **sizes)
    weights = open_weights(tmp_path / "m")
    tokens_BT = tokens_of(weights.config)
    assert apart(ours_of(weights, tokens_BT), theirs_of(model, tokens_BT)) < 1e-12


@pytest.mark.slow
def test_gpt2_at_its_full_size_gives_transformers_logits(tmp_path):
    model = saved_by_transformers(tmp_path / "m")
    weights = open_weights(tmp_path / "m")
    assert weights.config.parameter_count == 124_439_808
    tokens_BT = tokens_of(weights.config)
    theirs = theirs_of(model, tokens_BT)
    del model
    with jax.enable_x64(True):
        assert apart(JaxAdapter(weights.in_memory()).logits(tokens_BT), theirs) < 1e-12
    write_weights(weights, tmp_path / "again", "hf")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "again")
    assert apart(theirs_of(again, tokens_BT), theirs) == 0.0


@pytest.fixture
def folder(tmp_path):
    """A small folder of ours, to be changed into what others have."""
    write_weights(random_weights(CONFIG), tmp_path / "m", "hf")
    return tmp_path / "m"


def tensors_of(folder) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def same(folder) -> bool:
    weights, expected = open_weights(folder), random_weights(CONFIG)
    return weights.config == CONFIG and all(
        weights.arrays[n].tobytes() == a.tobytes() for n, a in expected.arrays.items()
    )


def bare(tensors):
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def with_head(tensors):
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}


def with_masks(tensors):
    masks = {}
    for layer in (0, 1):
        masks[f"transformer.h.{layer}.attn.bias"] = torch.tril(torch.ones(16, 16, dtype=torch.bool))[None, None]
        masks[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return tensors | masks


@pytest.mark.parametrize("change", [bare, with_head, with_masks, lambda t: bare(with_masks(t))])
@pytest.mark.parametrize("container", ["safetensors", "bin", "bin before 2020"])
def test_every_way_that_such_folders_were_ever_written_is_read(folder, change, container):
    tensors = change(tensors_of(folder))
    (folder / "model.safetensors").unlink()
    if container == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    else:
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=container == "bin")
    assert same(folder)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_are_read_and_never_outside_the_folder(folder, suffix):
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    files = {f"{stem}-0000{i + 1}-of-00002.{suffix}": names[i::2] for i in (0, 1)}
    index = folder / f"{stem}.{suffix}.index.json"
    for file, inside in files.items():
        part = {name: tensors[name] for name in inside}
        save_file(part, folder / file) if suffix == "safetensors" else torch.save(part, folder / file)
    places = {name: file for file, inside in files.items() for name in inside}

    def write_index(places):
        index.write_text(json.dumps({"metadata": {}, "weight_map": places}))

    write_index(places)
    assert same(folder)
    first, second = files
    shutil.copy(folder / first, folder.parent / first)
    for wrong, words in (
        ({n: f"../{f}" if f == first else f for n, f in places.items()}, "expected a file of weights in the same"),
        ({n: f"{folder}/{f}" for n, f in places.items()}, "expected a file of weights in the same folder"),
        (dict.fromkeys(places, first), "is in|isn't in"),
        (places | {"x": first}, f"x isn't in {first}"),
        ({n: f for n, f in places.items() if n != names[0]}, f"holds {names[0]}, which"),
        ({n: f"no.{suffix}" for n in places}, "which is missing"),
        ([1], "has no 'weight_map'"),
    ):
        write_index(wrong)
        with pytest.raises(UserError, match=words):
            open_weights(folder)
    save = save_file if suffix == "safetensors" else torch.save
    save({name: tensors[name] for name in names}, folder / second)
    write_index(places)
    with pytest.raises(UserError, match="is also in another shard|which .* says is in"):
        open_weights(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llama"}, "model_type 'llama'; expected gpt2"),
        ({"activation_function": "relu"}, "activation_function 'relu' is not one of gelu_new"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True is a variant"),
        ({"add_cross_attention": True}, "add_cross_attention True is a variant"),
        ({"n_head": 3}, "not divisible by n_head 3"),
        ({"n_layer": 3}, "transformer.h.2.ln_1.weight.* missing"),
        ({"n_layer": 9999}, "declares 9999 layers but has"),
        ({"n_layer": 10**12}, "n_layer 1000000000000: must be at most"),
        ({"n_layer": "two"}, "n_layer 'two', which is not a value"),
        ({"vocab_size": 50257}, r"transformer.wte.weight has the shape \(97, 16\)"),
        ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
    ],
)
def test_other_models_are_refused(folder, change, words):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=words):
        open_weights(folder)


def test_the_prefix_in_one_place_and_not_in_another_is_refused(folder):
    tensors = tensors_of(folder)
    save_file(tensors | {"ln_f.bias": tensors["transformer.ln_f.bias"].clone()}, folder / "model.safetensors")
    with pytest.raises(UserError, match="transformer.ln_f.bias appears twice"):
        open_weights(folder)


def test_the_tokenizer_goes_along_and_is_known_again(tmp_path):
    weights = dataclasses.replace(random_weights(ModelConfig(1, 2, 8, 16, 50257)), tokenizer="gpt2")
    write_weights(weights, tmp_path / "m", "hf")
    tokenizer = transformers.GPT2Tokenizer.from_pretrained(tmp_path / "m")
    assert tokenizer("Hello, I'm a language model,")["input_ids"] == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert open_weights(tmp_path / "m").tokenizer == "gpt2"
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "m")
    assert model.generation_config.eos_token_id == 50256
    # As transformers itself writes both: without our metadata, and the tokenizer as one tokenizer.json.
    for name in ("a", "b"):
        model.save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / "a")
    for file in ("merges.txt", "vocab.json"):
        shutil.copy(tmp_path / "m" / file, tmp_path / "b")
    assert (tmp_path / "a" / "tokenizer.json").exists() and open_weights(tmp_path / "a").tokenizer == "gpt2"
    assert open_weights(tmp_path / "b").tokenizer == "gpt2"
    (tmp_path / "b" / "merges.txt").write_text("#version: 0.2\na b\n")
    assert open_weights(tmp_path / "b").tokenizer is None


def test_the_layout_that_is_written_is_the_table_s(folder):
    assert tensors_of(folder).keys() == {p.name for p in FORMATS["hf"].layout.placements(CONFIG).values()}
