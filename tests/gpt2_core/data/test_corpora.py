import gzip
import json
import random
import sysconfig
import time

import numpy as np
import pytest

from gpt2_core.config import DataConfig
from gpt2_core.data import corpora
from gpt2_core.data.corpora import get_corpus, in_pieces
from gpt2_core.data.tokenizer import get_tokenizer
from gpt2_core.errors import UserError

TEXTS = ["one\ntwo", "drei vier – fünf", "", "six"]


def texts(corpus, start=0):
    return ["".join(document.pieces) for document in corpus.documents(start)]


def named(kind, path, **more):
    return get_corpus(DataConfig(kind, str(path), validation_fraction=0.0, **more))


def test_stdlib_is_megabytes_of_python_in_a_fixed_order():
    corpus = get_corpus(DataConfig(corpus="stdlib"))
    assert corpus.files == get_corpus(DataConfig(corpus="stdlib")).files
    assert sum(map(len, texts(corpus))) > 3_000_000
    root = sysconfig.get_paths()["stdlib"]
    assert all(str(path).startswith(root) and "site-packages" not in path.parts for path in corpus.files)


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
    with pytest.raises(UserError, match=r"b\.parquet: not a whole Parquet file"):
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
    with pytest.raises(UserError, match="no file below it ends in .parquet"):
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


def test_pieces_depend_on_the_text_alone_and_leave_the_tokens_as_they_are(monkeypatch):
    monkeypatch.setattr(corpora, "PIECE", 40)
    monkeypatch.setattr(corpora, "LONGEST_PIECE", 400)
    generator, gpt2 = random.Random(3), get_tokenizer("gpt2")
    for _ in range(300):
        words = generator.choices(
            [
                "the",
                "I'll",
                "it's",
                " ",
                "  ",
                "\n",
                "\r\n",
                "\t",
                "!",
                "…\n",
                "9",
                "x²",
                "é",
                "中文",
                "_",
                "<|endoftext|>",
            ],
            k=300,
        )
        text = "".join(word + generator.choice(["", " ", " ", "\n"]) for word in words)
        pieces = list(in_pieces([text]))
        size = generator.randrange(1, 500)
        assert pieces == list(in_pieces(text[i : i + size] for i in range(0, len(text), size)))
        assert "".join(pieces) == text and len(pieces) > 5
        cut = np.concatenate([gpt2.encode(piece) for piece in pieces])
        assert cut.tolist() == gpt2.encode(text).tolist()


@pytest.mark.parametrize("character", ["a", " ", "\n", "中", "!"])
def test_an_endless_line_is_cut_and_read(tmp_path, character):
    text = character * 1_500_000
    (tmp_path / "a.txt").write_text(text + "x", newline="")
    (document,) = named("text", tmp_path / "a.txt").documents()
    tokenizer, decoded = get_tokenizer("gpt2"), []
    for piece in document.pieces:
        assert len(piece) <= corpora.LONGEST_PIECE
        decoded.append(tokenizer.decode(tokenizer.encode(piece).tolist()))
    assert "".join(decoded) == text + "x"


def test_an_endless_line_of_jsonl_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "_LONGEST_LINE", 1 << 20)
    (tmp_path / "a.jsonl").write_text('{"text": "' + "a" * (1 << 20) + '"}')
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: longer than 1 MB"):
        texts(named("jsonl", tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            DataConfig(corpus="books"),
            "--data.corpus books: no such corpus; use stdlib, shakespeare, .* text, jsonl or parquet",
        ),
        (DataConfig(corpus="text"), "name the file, folder or pattern with --data.path"),
        (DataConfig(corpus="text", path="/nowhere.txt"), "--data.path /nowhere.txt: no such file"),
        (DataConfig(corpus="stdlib", path="x.txt"), "add --data.corpus text"),
    ],
)
def test_a_corpus_that_is_not_there_is_refused(config, words):
    with pytest.raises(UserError, match=words):
        get_corpus(config)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("e.txt", b"", "the file is empty"),
        ("l.txt", b"caf\xe9", r"l\.txt: not UTF-8 text \(byte 3 is 0xe9\)"),
        ("m.txt", b"ab " * 100_000 + b"\xc3", r"not UTF-8 text \(byte 300000 is 0xc3\)"),
        ("t.txt.gz", gzip.compress(random.Random(1).randbytes(9999))[:-900], "cut short or damaged"),
        ("n.txt.gz", b"plain", "Not a gzipped file"),
        ("n.txt.zst", b"plain", "cut short or damaged"),
        ("t.txt.zst", b"\x28\xb5\x2f\xfd\x04", "it ends within a zstd frame"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b', "line 2: not JSON"),
        ("b.jsonl", b'{"text": "caf\xe9"}', "line 1: not UTF-8"),
        ("c.jsonl", b'{"body": "a"}', "--data.field text: .* line 1 has no such field; it has body"),
        ("d.jsonl", b'["a"]', "expected a JSON object, found list"),
        ("e.jsonl", b'{"text": 5}', "line 1 holds int there; expected text"),
    ],
)
def test_bad_files_are_refused_by_name_and_place(tmp_path, name, content, words):
    if name.endswith(".zst"):
        pytest.importorskip("zstandard")
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        texts(named(corpora.kind_of(name), path))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Corpora of the hub's shape, in folders: `datasets` reads those as it reads the hub's."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")

    def make(name, **splits):
        folder = tmp_path / name
        folder.mkdir()
        for split, rows in splits.items():
            (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        monkeypatch.setitem(corpora._HUB, name, corpora._HUB[name]._replace(dataset=str(folder), config=None))
        return get_corpus(DataConfig(name))

    return make


@pytest.mark.parametrize("name", ["openwebtext", "tinystories"])
def test_a_corpus_of_the_hub_is_read_from_any_document_on(hub, name):
    rows = [f"text {i}" for i in range(50)]
    with_validation = name == "tinystories"
    corpus = hub(name, train=rows[:40], **({"validation": rows[40:]} if with_validation else {}))
    expected = rows if with_validation else rows[:40]
    assert texts(corpus) == expected
    assert texts(corpus, start=17) == expected[17:]
    splits = {document.split for document in corpus.documents()}
    assert splits == ({"train", "val"} if with_validation else {None})


def test_wikitexts_lines_are_joined_into_articles(hub):
    lines = ["", " = One = \n", " text \n", " = = Part = = \n", " more \n", " = Two = \n", " end \n"]
    corpus = hub("wikitext2", train=lines, validation=lines[1:3])
    articles = ["".join(lines[1:5]), "".join(lines[5:])]
    assert [t for t in texts(corpus) if t] == [*articles, "".join(lines[1:3])]
    assert texts(corpus, start=1) == texts(corpus)[1:]


def test_without_a_network_a_corpus_of_the_hub_is_looked_for_in_the_cache_alone(
    server, url_of, no_proxy_set, monkeypatch
):
    datasets, hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")
    url, offline = url_of(server), []

    def load(*_, **__):
        offline.append((datasets.config.HF_HUB_OFFLINE, hub.constants.HF_HUB_OFFLINE))
        return datasets.Dataset.from_dict({"text": ["cached"]})

    for module in (datasets.config, hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", url)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert texts(get_corpus(DataConfig("openwebtext"))) == ["cached"]
    server.close()
    assert texts(get_corpus(DataConfig("openwebtext"))) == ["cached"]
    assert offline == [(False, False), (True, True)]
    assert not datasets.config.HF_HUB_OFFLINE and not hub.constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("name", ["openwebtext", "wikitext2"])  # one is streamed
def test_without_a_network_it_is_said_at_once(name, server, url_of, no_proxy_set, tmp_path, monkeypatch):
    datasets, hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")
    for module in (datasets.config, hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", url_of(server))
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("tried again"))
    server.close()
    with pytest.raises(corpora.UnreachableError, match=f"--data.corpus {name}: .*refused.*; check the network"):
        texts(get_corpus(DataConfig(name)))


def test_without_the_network_or_the_extra_it_says_what_to_do(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(*_args, **_kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr(corpora, "network_error", lambda url: None)
    with pytest.raises(
        corpora.UnreachableError, match=r"--data.corpus openwebtext: .* \(no route\); check the network"
    ):
        texts(get_corpus(DataConfig("openwebtext")))
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'gpt2-jax\[data\]'"):
        get_corpus(DataConfig("openwebtext"))


def test_shakespeare_is_downloaded_once_checked_and_kept(tmp_path, monkeypatch):
    import hashlib
    import io

    calls = []

    def urlopen(url, timeout):
        calls.append(url)
        return io.BytesIO(b"to be")

    monkeypatch.setattr(corpora.urllib.request, "urlopen", urlopen)
    config = DataConfig("shakespeare", validation_fraction=0.0, cache_dir=str(tmp_path))
    with pytest.raises(UserError, match="sent another file than expected"):
        get_corpus(config)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(corpora, "_SHAKESPEARE_SHA256", hashlib.sha256(b"to be").hexdigest())
    assert texts(get_corpus(config)) == texts(get_corpus(config)) == ["to be"]
    assert len(calls) == 2

    def refuse(url, timeout):
        raise OSError("the network is off in this test")

    monkeypatch.setattr(corpora.urllib.request, "urlopen", refuse)
    with pytest.raises(UserError, match="can't be reached .*; put that file at"):
        get_corpus(DataConfig("shakespeare", cache_dir=str(tmp_path / "empty")))


def test_the_fingerprint_follows_the_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = get_corpus(DataConfig(corpus="text", path=str(path))).fingerprint()
    path.write_text("other")
    assert get_corpus(DataConfig(corpus="text", path=str(path))).fingerprint() != before
