"""Files of other tools, as those tools write them."""

import numpy as np
import pytest

from gpt2_core.config import DataConfig, ModelConfig, TrainConfig
from gpt2_core.data import token_files
from gpt2_core.data.tokens import open_tokens
from gpt2_core.errors import UserError

IDS = np.random.default_rng(0).integers(0, 50257, 5_000)


def llm_c(path, ids, magic=20240520, version=1, dtype="<u2", count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + ids.astype(dtype).tobytes())


def datatrove(path, ids, name="gpt2", size=2):
    path.write_bytes(ids.astype(f"<u{size}").tobytes())
    np.array([100, len(ids)], "<u8").tofile(f"{path}.index")
    path.with_name(path.name + ".metadata").write_text(f"{name}|{size}\n{len(ids)}\n{len(ids) / 1000:.1f} kT")


def opened(path, vocab_size=50257, **data):
    model = ModelConfig(1, 1, 8, 16, vocab_size)
    return open_tokens(TrainConfig(model=model, data=DataConfig(tokens=str(path), **data)))


def shards(split):
    return [shard.tolist() for source in split for shard in source.shards]


def test_nanogpts_folder_is_read_as_it_is(tmp_path):
    IDS[:4000].astype("<u2").tofile(tmp_path / "train.bin")
    IDS[4000:].astype("<u2").tofile(tmp_path / "val.bin")
    tokens = opened(tmp_path)
    assert shards(tokens.train) == [IDS[:4000].tolist()] and shards(tokens.val) == [IDS[4000:].tolist()]


@pytest.mark.parametrize(("magic", "version", "dtype"), [(20240520, 1, "<u2"), (20240801, 7, "<u4")])
def test_llm_cs_shards_are_read_as_they_are(tmp_path, magic, version, dtype):
    kind = {"magic": magic, "version": version, "dtype": dtype}
    llm_c(tmp_path / "fineweb_val_000000.bin", IDS[:1000], **kind)
    llm_c(tmp_path / "fineweb_train_000002.bin", IDS[3000:], **kind)
    llm_c(tmp_path / "fineweb_train_000001.bin", IDS[1000:3000], **kind)
    for where in (tmp_path, tmp_path / "fineweb_*.bin"):
        tokens = opened(where)
        assert shards(tokens.train) == [IDS[1000:3000].tolist(), IDS[3000:].tolist()]
        assert shards(tokens.val) == [IDS[:1000].tolist()]
    one = opened(tmp_path / "fineweb_train_000001.bin", validation_fraction=0.0)
    assert shards(one.train) == [IDS[1000:3000].tolist()] and one.val == ()


@pytest.mark.parametrize("size", [2, 4])
def test_datatroves_files_are_read_as_they_are(tmp_path, size):
    datatrove(tmp_path / "00000_shuffled.ds", IDS[:4000], size=size)
    datatrove(tmp_path / "val_00000.ds", IDS[4000:], "openai-community/gpt2", size)
    tokens = opened(tmp_path)
    assert shards(tokens.train) == [IDS[:4000].tolist()] and shards(tokens.val) == [IDS[4000:].tolist()]


def test_the_digest_follows_the_content_not_the_place(tmp_path):
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        llm_c(tmp_path / folder / "train.bin", IDS if folder != "c" else IDS[::-1])
    a, b, c = (opened(tmp_path / folder, validation_fraction=0.0).digest for folder in ("a", "b", "c"))
    assert a == b != c


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda p: (p / "train.bin").write_bytes(b"abc"), r"train\.bin: 3 bytes are not a whole number of uint16"),
        (lambda p: llm_c(p / "train.bin", IDS, count=6000), r"train\.bin: 11024 bytes where its header says 6000"),
        (lambda p: llm_c(p / "train.bin", IDS, version=2), r"train\.bin: a token file of version 2; .* version 1"),
        (lambda p: llm_c(p / "train.bin", IDS + 9000), "--model.vocab_size 50257: token .* of .*train.bin is id"),
        (lambda p: llm_c(p / "val.bin", IDS), "only validation files there"),
        (
            lambda p: datatrove(p / "a.ds", IDS, "llama/llama-3"),
            "written with the tokenizer llama/llama-3, which isn't",
        ),
        (lambda p: datatrove(p / "a.ds", IDS, "cl100k_base"), "use --data.tokenizer cl100k_base"),
        (lambda p: (datatrove(p / "a.ds", IDS), np.array([7], "<u8").tofile(p / "a.ds.index")), "a.ds.index says 7"),
        (lambda p: llm_c(p / "train.bin", IDS), "--data.validation_fraction 0.1: .* has no validation split"),
        (lambda p: (p / "notes.txt").write_text("none"), "no token files there"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, write, words):
    write(tmp_path)
    with pytest.raises(UserError, match=words):
        opened(tmp_path)
    with pytest.raises(UserError, match="no token files there"):
        opened(tmp_path / "nowhere")


def test_where_files_cannot_be_mapped_they_are_read_with_a_warning(tmp_path, monkeypatch, capsys):
    def refuse(*_args, **_kwargs):
        raise OSError(19, "No such device")

    llm_c(tmp_path / "train.bin", IDS)
    monkeypatch.setattr(token_files.mmap, "mmap", refuse)
    tokens = opened(tmp_path, validation_fraction=0.0)
    assert shards(tokens.train) == [IDS.tolist()]
    assert "can't be memory-mapped here (No such device)" in capsys.readouterr().err
