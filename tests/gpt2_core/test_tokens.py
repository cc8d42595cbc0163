import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from gpt2_core.config import DataConfig, ModelConfig
from gpt2_core.errors import UserError
from gpt2_core.tokens import open_tokens

TINY_SHAKESPEARE = Path(__file__).parents[3] / "shared" / "data" / "tinyshakespeare.txt"


def test_the_splits_are_the_text_in_order_without_overlap(make_config, text_file):
    config = make_config()
    tokens = open_tokens(config)
    text = text_file.read_bytes()
    assert bytes(tokens.train[:-1].astype(np.uint8)) + bytes(tokens.val[:-1].astype(np.uint8)) == text
    assert tokens.train[-1] == tokens.val[-1] == 256  # end of text
    assert len(tokens.val) / len(text) == pytest.approx(0.1, abs=0.01)


def test_whole_documents_go_to_one_split_and_none_is_lost(make_config):
    config = make_config(data=DataConfig("stdlib", None, "bytes", cache_dir=make_config().data.cache_dir))
    tokens = open_tokens(config)

    def documents(ids):
        return {bytes(part[:-1].astype(np.uint8)) for part in np.split(ids, np.flatnonzero(ids == 256) + 1)[:-1]}

    train, val = documents(tokens.train), documents(tokens.val)
    assert len(train) > 100 and len(val) > 10
    assert 0.03 < len(tokens.val) / (len(tokens.train) + len(tokens.val)) < 0.11
    assert open_tokens(dataclasses.replace(config, seed=2)).digest != tokens.digest


def test_tokens_are_written_once_and_mapped(make_config):
    first = open_tokens(make_config())
    written = (first.path / "train.bin").stat().st_mtime_ns
    again = open_tokens(make_config())
    assert isinstance(again.train, np.memmap)
    assert (again.path / "train.bin").stat().st_mtime_ns == written
    assert again.digest == first.digest
    assert [p.name for p in first.path.parent.iterdir()] == [first.path.name]  # nothing temporary stays


def test_training_on_everything_leaves_an_empty_validation_split(make_config, text_file):
    data = dataclasses.replace(make_config().data, validation_fraction=0.0)
    tokens = open_tokens(make_config(data=data))
    assert len(tokens.val) == 0 and len(tokens.train) == text_file.stat().st_size + 1


def test_a_block_longer_than_the_text_is_refused(make_config):
    with pytest.raises(UserError, match="--model.block_size 100000: the train split .* has only"):
        open_tokens(make_config(model=ModelConfig(1, 1, 8, 100_000, 257)))
    with pytest.raises(UserError, match="the val split"):
        open_tokens(make_config(model=ModelConfig(1, 1, 8, 5_000, 257)))


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(make_config):
    with pytest.raises(UserError, match="--model.vocab_size 256: the tokenizer bytes has 257 ids"):
        open_tokens(make_config(model=ModelConfig(1, 1, 8, 16, 256)))


def test_damaged_token_folders_are_refused_by_name(make_config):
    path = open_tokens(make_config()).path
    whole = (path / "train.bin").read_bytes()
    (path / "train.bin").write_bytes(whole[:-2])
    with pytest.raises(UserError, match=r"train\.bin: .* delete"):
        open_tokens(make_config())
    (path / "train.bin").write_bytes(whole)
    index = json.loads((path / "index.json").read_text())
    del index["dtype"]
    (path / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="not a whole token folder"):
        open_tokens(make_config())


def test_tinyshakespeare_has_its_known_number_of_gpt2_tokens(make_config):
    if not TINY_SHAKESPEARE.is_file():
        pytest.skip(f"{TINY_SHAKESPEARE} is not here")
    data = DataConfig("text", str(TINY_SHAKESPEARE), "gpt2", cache_dir=make_config().data.cache_dir)
    tokens = open_tokens(make_config(data=data, model=ModelConfig(1, 1, 8, 16)))
    # A 90/10 split by character gives nanoGPT's 301,966 and 36,059; each split ends with end-of-text here.
    assert (len(tokens.train) - 1, len(tokens.val) - 1) == (301_966, 36_059)
