import dataclasses
import json
import mmap
import os
import re
from pathlib import Path

import numpy as np
import pytest

from gpt2_core.config import DataConfig, ModelConfig
from gpt2_core.data.tokens import open_tokens, with_steps
from gpt2_core.errors import UserError

TINY_SHAKESPEARE = Path(__file__).parents[3] / "shared" / "data" / "tinyshakespeare.txt"


def ids(split) -> np.ndarray:
    return np.concatenate([shard for source in split for shard in source.shards])


def test_the_splits_are_the_text_in_order_without_overlap(make_config, text_file):
    tokens = open_tokens(make_config())
    text = text_file.read_bytes()
    train, val = ids(tokens.train), ids(tokens.val)
    assert bytes(train[:-1].astype(np.uint8)) + bytes(val[:-1].astype(np.uint8)) == text
    assert train[-1] == val[-1] == 256  # end of text
    assert len(val) / len(text) == pytest.approx(0.1, abs=0.01)


@pytest.mark.long
def test_the_seed_draws_which_documents_are_held_back(make_config):
    config = make_config(data=DataConfig("stdlib", None, "bytes", cache_dir=make_config().data.cache_dir))
    tokens = open_tokens(config)
    assert open_tokens(dataclasses.replace(config, seed=2)).digest != tokens.digest


def test_tokens_are_written_once_and_mapped(make_config):
    first = open_tokens(make_config())
    written = (first.path / "train-00000.bin").stat().st_mtime_ns
    again = open_tokens(make_config())
    assert isinstance(memoryview(again.train[0].shards[0].base).obj, mmap.mmap)
    assert (again.path / "train-00000.bin").stat().st_mtime_ns == written
    assert again.digest == first.digest
    assert [p.name for p in first.path.parent.iterdir()] == [first.path.name]  # nothing temporary stays


def test_training_on_everything_leaves_an_empty_validation_split(make_config, text_file):
    data = dataclasses.replace(make_config().data, validation_fraction=0.0)
    tokens = open_tokens(make_config(data=data))
    assert len(tokens.val) == 0 and len(ids(tokens.train)) == text_file.stat().st_size + 1


def test_a_block_longer_than_the_text_is_refused(make_config):
    with pytest.raises(UserError, match="--model.block_size 100000: the train split .* has only"):
        open_tokens(make_config(model=ModelConfig(1, 1, 8, 100_000, 257)))
    with pytest.raises(UserError, match="the val split"):
        open_tokens(make_config(model=ModelConfig(1, 1, 8, 5_000, 257)))


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(make_config):
    with pytest.raises(UserError, match="--model.vocab_size 256: the tokenizer bytes has 257 ids"):
        open_tokens(make_config(model=ModelConfig(1, 1, 8, 16, 256)))


def test_a_file_changed_under_its_old_time_is_found_when_all_are_to_be_compared(make_config):
    path = open_tokens(make_config()).path
    shard = path / "train-00000.bin"
    times = (shard.stat().st_atime_ns, shard.stat().st_mtime_ns)
    content = bytearray(shard.read_bytes())
    content[40] ^= 1
    with shard.open("r+b") as file:
        file.write(content)
    os.utime(shard, ns=times)
    open_tokens(make_config())  # the promise is for files whose size or time has changed
    always = dataclasses.replace(make_config().data, verify="always")
    with pytest.raises(UserError, match=r"train-00000\.bin: its sha256 isn't the one in index\.json"):
        open_tokens(make_config(data=always))


def test_an_index_names_files_of_its_own_folder_only(make_config):
    path = open_tokens(make_config()).path
    index = (path / "index.json").read_text()
    (path / "index.json").write_text(index.replace("train-00000.bin", "../train-00000.bin"))
    with pytest.raises(UserError, match=r"names \.\./train-00000\.bin, which isn't a file of this folder"):
        open_tokens(make_config())


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_index_that_lists_no_shard_of_a_split_is_named_and_not_only_the_text(make_config, split):
    path = open_tokens(make_config()).path
    index = json.loads((path / "index.json").read_text())
    index["shards"][split] = []
    (path / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=re.escape(f"{index['source']} ({path})")):
        open_tokens(make_config())


def test_damaged_token_folders_are_refused_by_name(make_config):
    path = open_tokens(make_config()).path
    shard, whole = path / "train-00000.bin", (path / "train-00000.bin").read_bytes()
    shard.write_bytes(whole[:-2])
    with pytest.raises(UserError, match=r"train-00000\.bin: .* delete"):
        open_tokens(make_config())
    shard.write_bytes(whole[:40] + b"\x07" + whole[41:])
    with pytest.raises(UserError, match=r"train-00000\.bin: its sha256 isn't the one in index\.json"):
        open_tokens(make_config())
    shard.unlink()
    with pytest.raises(UserError, match=r"train-00000\.bin: No such file"):
        open_tokens(make_config())
    shard.write_bytes(whole)
    open_tokens(make_config())
    index = json.loads((path / "index.json").read_text())
    del index["dtype"]
    (path / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index\.json: not of a token folder \('dtype'\); delete"):
        open_tokens(make_config())


def test_more_epochs_than_steps_can_be_counted_are_refused(make_config):
    config = make_config(epochs=1e308)
    with pytest.raises(UserError, match=r"--epochs 1e\+308: .* steps; at most"):
        with_steps(config, open_tokens(config))


def prepared(make_config, **data):
    """A prepared folder, by the way of training on a corpus."""
    return open_tokens(make_config(data=dataclasses.replace(make_config().data, **data)))


def named(make_config, path, **data):
    settings = {"tokens": str(path), "tokenizer": "bytes"} | data
    return make_config(data=DataConfig(**settings))


def test_a_prepared_folder_is_trained_on_by_name(make_config):
    first = prepared(make_config)
    again = open_tokens(named(make_config, first.path))
    assert again.digest == first.digest and (ids(again.train) == ids(first.train)).all()
    with pytest.raises(UserError, match="--data.tokenizer gpt2: .* was written with bytes; use --data.tokenizer bytes"):
        open_tokens(
            dataclasses.replace(named(make_config, first.path, tokenizer="gpt2"), model=ModelConfig(1, 1, 8, 16))
        )
    everything = prepared(make_config, validation_fraction=0.0)
    with pytest.raises(UserError, match="--data.validation_fraction 0.1: .* has no validation split; add"):
        open_tokens(named(make_config, everything.path))
    assert open_tokens(named(make_config, everything.path, validation_fraction=0.0)).val == ()


def test_an_unfinished_folder_is_refused(make_config, tmp_path):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "progress.json").write_text("{}")
    with pytest.raises(UserError, match="half: gpt2 prepare hasn't finished it"):
        open_tokens(named(make_config, tmp_path / "half"))


def test_a_mixture_is_named_by_folders_and_weights(make_config):
    a, b = prepared(make_config), prepared(make_config, validation_fraction=0.3)
    tokens = open_tokens(named(make_config, None, tokens=None, mixture=f"{a.path}=3,{b.path}=1"))
    assert [source.weight for source in tokens.train] == [3.0, 1.0] == [source.weight for source in tokens.val]
    same = open_tokens(named(make_config, None, tokens=None, mixture={str(a.path): 3, str(b.path): 1}))
    other = open_tokens(named(make_config, None, tokens=None, mixture=f"{a.path}=1,{b.path}=1"))
    assert same.digest == tokens.digest != other.digest
    with pytest.raises(UserError, match="--data.mixture .*: expected FOLDER=WEIGHT"):
        named(make_config, None, tokens=None, mixture="a,b=2")
    with pytest.raises(UserError, match="give one of them"):
        named(make_config, a.path, mixture="a=2")


def test_epochs_become_steps(make_config):
    tokens = open_tokens(make_config())
    windows = sum((len(shard) - 1) // 16 for shard in tokens.train[0].shards)
    config = with_steps(make_config(epochs=2.5, batch_size=8), tokens)
    assert config.steps == -(-2.5 * windows // 8)
    assert with_steps(make_config(steps=7), tokens).steps == 7
    mixed = dataclasses.replace(tokens, train=tokens.train * 2)
    with pytest.raises(UserError, match="--epochs 1.0: a mixture has no epochs"):
        with_steps(make_config(epochs=1.0), mixed)


def test_tinyshakespeare_has_its_known_number_of_gpt2_tokens(make_config):
    if not TINY_SHAKESPEARE.is_file():
        pytest.skip(f"{TINY_SHAKESPEARE} is not here")
    data = DataConfig("text", str(TINY_SHAKESPEARE), "gpt2", cache_dir=make_config().data.cache_dir)
    tokens = open_tokens(make_config(data=data, model=ModelConfig(1, 1, 8, 16)))
    # A 90/10 split by character gives nanoGPT's 301,966 and 36,059; each split ends with end-of-text here.
    assert (len(ids(tokens.train)) - 1, len(ids(tokens.val)) - 1) == (301_966, 36_059)
