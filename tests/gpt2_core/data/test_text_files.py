import gzip
import json
import random

import pytest

from gpt2_core.config import DataConfig
from gpt2_core.data import text_files
from gpt2_core.data.corpora import get_corpus
from gpt2_core.data.documents import LONGEST_PIECE
from gpt2_core.data.tokenizer import get_tokenizer
from gpt2_core.errors import UserError

TEXTS = ["one\ntwo", "drei vier – fünf", "", "six"]


def texts(corpus, start=0):
    return ["".join(document.pieces) for document in corpus.documents(start)]


def named(kind, path, **more):
    return get_corpus(DataConfig(kind, str(path), validation_fraction=0.0, **more))


def compressed(path, content):
    """The content as a plain file, by gzip, and by zstd where the extra is there."""
    path.write_bytes(content)
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
    zstandard = pytest.importorskip("zstandard")
    half = len(content) // 2  # two frames, as parallel compressors write them
    frames = [zstandard.ZstdCompressor().compress(part) for part in (content[:half], content[half:])]
    path.with_name(path.name + ".zst").write_bytes(b"".join(frames))
    return [path, path.with_name(path.name + ".gz"), path.with_name(path.name + ".zst")]


def test_jsonl_is_a_document_a_line_plain_or_compressed(tmp_path):
    rows = [json.dumps({"id": i, "body": text}) for i, text in enumerate(TEXTS)]
    rows.insert(1, json.dumps({"id": 9, "body": None}))
    for path in compressed(tmp_path / "a.jsonl", "\n".join(rows).encode()):
        corpus = named("jsonl", path, field="body")
        assert texts(corpus) == [TEXTS[0], "", *TEXTS[1:]]
        assert texts(corpus, start=2) == TEXTS[1:]
        assert corpus.progress() == 1.0


def test_parquet_is_a_document_a_row(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({"text": TEXTS, "n": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    assert texts(named("parquet", tmp_path / "a.parquet")) == TEXTS
    with pytest.raises(UserError, match="--data.field n: .* holds int there; expected text"):
        texts(named("parquet", tmp_path / "a.parquet", field="n"))
    with pytest.raises(UserError, match="--data.field body: .* has no such column; it has text, n"):
        texts(named("parquet", tmp_path / "a.parquet", field="body"))
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(UserError, match=r"b\.parquet: not a complete Parquet file"):
        texts(named("parquet", tmp_path / "b.parquet"))


def test_folders_and_patterns_name_the_files_of_a_kind_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.md", "d.jsonl", ".git/e.txt"):
        (tmp_path / name).write_text(f'{{"text": "{name}"}}')
    compressed(tmp_path / "z.txt", b"last")
    assert [p.name for p in named("text", tmp_path).files] == [
        "a.txt",
        "b.txt",
        "c.md",
        "z.txt",
        "z.txt.gz",
        "z.txt.zst",
    ]
    assert [p.name for p in named("text", tmp_path / "?.txt").files] == ["a.txt", "b.txt", "z.txt"]
    assert texts(named("jsonl", tmp_path)) == ["d.jsonl"]
    with pytest.raises(UserError, match="no file in it ends in .parquet"):
        named("parquet", tmp_path)
    with pytest.raises(UserError, match="no file matches"):
        named("text", tmp_path / "*.rst")


@pytest.mark.parametrize("fraction", [0.1, 0.1234, 0.3333, 0.5002])  # most of them cut a character in two
def test_a_single_text_is_cut_between_characters_plain_or_compressed(tmp_path, fraction):
    text = "aé中🦜" * 1000
    for path in compressed(tmp_path / "a.txt", text.encode()):
        corpus = get_corpus(DataConfig("text", str(path), validation_fraction=fraction))
        parts = {document.split: "".join(document.pieces) for document in corpus.documents()}
        assert parts["train"] + parts["val"] == text
        assert len(parts["val"]) == pytest.approx(fraction * len(text), abs=3)


@pytest.mark.parametrize("character", ["a", " ", "\n", "中", "!"])
def test_an_endless_line_is_cut_and_read(tmp_path, character):
    text = character * 1_500_000
    (tmp_path / "a.txt").write_text(text + "x", newline="")
    (document,) = named("text", tmp_path / "a.txt").documents()
    tokenizer, decoded = get_tokenizer("gpt2"), []
    for piece in document.pieces:
        assert len(piece) <= LONGEST_PIECE
        decoded.append(tokenizer.decode(tokenizer.encode(piece).tolist()))
    assert "".join(decoded) == text + "x"


def test_an_endless_line_of_jsonl_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "_LONGEST_LINE", 1 << 20)
    (tmp_path / "a.jsonl").write_text('{"text": "' + "a" * (1 << 20) + '"}')
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: longer than 1 MB"):
        texts(named("jsonl", tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("e.txt", b"", "the file is empty"),
        ("l.txt", b"caf\xe9", r"l\.txt: not UTF-8 text \(byte 3 is 0xe9\)"),
        ("m.txt", b"ab " * 100_000 + b"\xc3", r"not UTF-8 text \(byte 300000 is 0xc3\)"),
        ("t.txt.gz", gzip.compress(random.Random(1).randbytes(9999))[:-900], "truncated or damaged"),
        ("n.txt.gz", b"plain", "Not a gzipped file"),
        ("n.txt.zst", b"plain", "truncated or damaged"),
        ("t.txt.zst", b"\x28\xb5\x2f\xfd\x04", "it ends inside a zstd frame"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b', "line 2 isn't JSON"),
        ("b.jsonl", b'{"text": "caf\xe9"}', "line 1 isn't JSON .*utf-8"),
        ("c.jsonl", b'{"body": "a"}', "--data.field text: .* line 1 has no such field; it has body"),
        ("d.jsonl", b'["a"]', "isn't a JSON object"),
        ("e.jsonl", b'{"text": 5}', "line 1 holds int there; expected text"),
    ],
)
def test_bad_files_are_refused_by_name_and_place(tmp_path, name, content, words):
    if name.endswith(".zst"):
        pytest.importorskip("zstandard")
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        texts(named(text_files.kind_of(name), path))


def test_the_fingerprint_follows_the_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = get_corpus(DataConfig(corpus="text", path=str(path))).fingerprint()
    path.write_text("other")
    assert get_corpus(DataConfig(corpus="text", path=str(path))).fingerprint() != before
