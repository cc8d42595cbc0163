import errno
import hashlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from gpt2_core.config import DataConfig
from gpt2_core.data import prepare as module
from gpt2_core.data.corpora import get_corpus
from gpt2_core.data.documents import UnreachableError
from gpt2_core.data.prepare import Settings, is_validation, prepare
from gpt2_core.data.tokenizer import get_tokenizer
from gpt2_core.errors import UserError

ROOT = Path(__file__).parents[2]
END = 256


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> Path:
    """Documents of very different lengths; every fiftieth is empty."""
    generator = random.Random(5)
    path = tmp_path_factory.mktemp("corpus") / "lines.jsonl"
    with path.open("w") as file:
        for number in range(2_000):
            words = [f"w{generator.randrange(500)}" for _ in range(generator.choice((3, 30, 300)))]
            file.write(json.dumps({"text": "" if number % 50 == 7 else f"{number} " + " ".join(words)}) + "\n")
        file.write(json.dumps({"text": "long " * 60_000}) + "\n")
    return path


def corpus_of(path, kind="jsonl", fraction=0.1, **more):
    return get_corpus(DataConfig(kind, str(path), "bytes", fraction, **more))


def write(out, corpus, fraction=0.1, seed=1, shard_tokens=100_000, workers=2):
    prepare(out, corpus, get_tokenizer("bytes"), Settings(fraction, seed, shard_tokens), workers=workers)
    return json.loads((out / "index.json").read_text())


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def documents(folder, split):
    ids = np.concatenate([np.fromfile(path, "<u2") for path in sorted(folder.glob(f"{split}-*.bin"))])
    return [bytes(part[:-1].astype(np.uint8)).decode() for part in np.split(ids, np.flatnonzero(ids == END) + 1)[:-1]]


def test_every_document_is_there_once_whole_and_ends_with_end_of_text(lines, tmp_path):
    index = write(tmp_path / "out", corpus_of(lines))
    expected = [text for line in lines.read_text().splitlines() if (text := json.loads(line)["text"])]
    train, val = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "val")
    assert sorted(train + val) == sorted(expected)
    assert [text for text in expected if text in set(train)] == train  # in the corpus's order
    assert index["documents"] == {"train": len(train), "val": len(val)} and index["empty_documents"] == 40
    assert len(val) == pytest.approx(0.1 * len(expected), abs=10)
    for split in ("train", "val"):
        shards = index["shards"][split]
        assert [s["tokens"] for s in shards[:-1]] == [100_000] * (len(shards) - 1)
        assert sum(s["tokens"] for s in shards) == index["tokens"][split]
        for shard in shards:
            assert hashlib.sha256((tmp_path / "out" / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"index.json"} | {
        s["file"] for split in index["shards"].values() for s in split
    }


@pytest.mark.parametrize("fraction", [0.005, 0.1, 0.3, 0.5, 0.75, 0.999])
def test_the_share_held_back_is_exact_and_drawn_from_the_seed(fraction):
    drawn = [is_validation(number, fraction, 1) for number in range(3_000)]
    assert sum(drawn) == pytest.approx(3_000 * fraction, abs=1)
    if fraction < 0.9:
        assert drawn != [is_validation(number, fraction, 2) for number in range(3_000)]
    assert not any(is_validation(number, 0.0, 1) for number in range(100))


def test_the_bytes_are_the_same_with_any_number_of_workers(lines, tmp_path, monkeypatch):
    write(tmp_path / "one", corpus_of(lines), workers=1)
    monkeypatch.setattr(module, "_BATCH", 5_000)
    write(tmp_path / "many", corpus_of(lines), workers=7)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


@pytest.mark.long
def test_killed_at_random_and_started_again_it_writes_the_same_bytes(lines, tmp_path):
    write(tmp_path / "whole", corpus_of(lines), shard_tokens=30_000)
    seed = random.randrange(1 << 30)
    print(f"killed at the moments of seed {seed}")
    moments = random.Random(seed)
    # Small batches, committed at once and tokenised slowly, so that a kill falls into every part of the work.
    program = (
        "import sys, time; sys.path.insert(0, {root!r})\n"
        "from gpt2_core.data import prepare as m; from gpt2_core.config import DataConfig\n"
        "from gpt2_core.data.corpora import get_corpus; from gpt2_core.data.tokenizer import get_tokenizer\n"
        "m._BATCH, m._COMMIT_SECONDS = 20_000, 0.0\n"
        "tokenise = m._tokenise\n"
        "m._tokenise = lambda *a: (time.sleep(0.01), tokenise(*a))[1]\n"
        "corpus = get_corpus(DataConfig('jsonl', {path!r}, 'bytes'))\n"
        "m.prepare({out!r}, corpus, get_tokenizer('bytes'), m.Settings(0.1, 1, 30_000), workers=2)\n"
    ).format(root=str(ROOT), path=str(lines), out="OUT")
    program = program.replace("'OUT'", f"__import__('pathlib').Path({str(tmp_path / 'killed')!r})")
    progress = tmp_path / "killed" / "progress.json"
    kills, places = 0, []
    for _ in range(40):
        process = subprocess.Popen([sys.executable, "-c", program])
        before = progress.read_text() if progress.is_file() else None
        while process.poll() is None and not (progress.is_file() and progress.read_text() != before):
            time.sleep(0.001)
        time.sleep(moments.random() * 0.15)
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        kills += 1
        places.append(json.loads(progress.read_text())["place"] if progress.is_file() else None)
    assert process.returncode == 0 and kills >= 2, places
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


class _Full:
    """A file on a disk that is full after some bytes."""

    def __init__(self, file, room):
        self._file, self._room = file, room

    def write(self, content):
        if self._room[0] < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._room[0] -= len(content)
        return self._file.write(content)

    def __getattr__(self, name):
        return getattr(self._file, name)


def test_out_of_disk_it_says_so_and_loses_nothing(lines, tmp_path, monkeypatch):
    write(tmp_path / "whole", corpus_of(lines))
    monkeypatch.setattr(module, "_BATCH", 20_000)
    monkeypatch.setattr(module, "_COMMIT_SECONDS", 0.0)
    room, begin = [300_000], module._ShardWriter.write

    def write_to_full_disk(self, ids):
        if self._file is not None and not isinstance(self._file, _Full):
            self._file = _Full(self._file, room)
        begin(self, ids)

    monkeypatch.setattr(module._ShardWriter, "write", write_to_full_disk)
    with pytest.raises(UserError, match=r"out: the disk is full; .* free some space and run the same command again"):
        write(tmp_path / "out", corpus_of(lines))
    state = json.loads((tmp_path / "out" / "progress.json").read_text())
    assert state["place"][0] > 100
    room[0] = 1 << 40
    write(tmp_path / "out", corpus_of(lines))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_source_that_breaks_off_is_gone_on_with(lines, tmp_path, monkeypatch):
    write(tmp_path / "whole", corpus_of(lines))
    corpus, breaks = corpus_of(lines), [900]
    documents_of = corpus.documents

    def breaking(start=0):
        for number, document in enumerate(documents_of(start), start=start):
            if breaks and number == breaks[0]:
                breaks.pop()
                raise UnreachableError("the network is gone")
            yield document

    monkeypatch.setattr(corpus, "documents", breaking)
    monkeypatch.setattr(module, "_BATCH", 20_000)
    with pytest.raises(UserError, match="the network is gone"):
        write(tmp_path / "out", corpus)
    assert json.loads((tmp_path / "out" / "progress.json").read_text())["place"][0] > 100
    write(tmp_path / "out", corpus)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_broken_corpus_leaves_nothing_behind(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n{"text": bad}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2 isn't JSON"):
        write(tmp_path / "out", corpus_of(path))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def two_files(tmp_path, monkeypatch) -> Path:
    """A folder of two files, of which every batch is a few lines."""
    monkeypatch.setattr(module, "_BATCH", 200)
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a", "b"):
        rows = (json.dumps({"text": f"{name} {number} " + "word " * 20}) + "\n" for number in range(60))
        (folder / f"{name}.jsonl").write_text("".join(rows))
    return folder


def test_a_file_that_is_missing_for_a_while_costs_nothing_that_is_written(two_files, tmp_path):
    write(tmp_path / "whole", corpus_of(two_files))
    (two_files / "b.jsonl").rename(tmp_path / "away")
    corpus = corpus_of(two_files)
    corpus.files = (two_files / "a.jsonl", two_files / "b.jsonl")  # as listed before it went
    corpus._sizes = [1, 1]
    corpus.fingerprint = lambda: fingerprint
    (tmp_path / "away").rename(two_files / "b.jsonl")
    fingerprint = corpus_of(two_files).fingerprint()
    (two_files / "b.jsonl").rename(tmp_path / "away")
    with pytest.raises(UnreachableError, match=r"b\.jsonl: can't be read \(No such file or directory\); give the same"):
        write(tmp_path / "out", corpus)
    assert json.loads((tmp_path / "out" / "progress.json").read_text())["place"][0] > 50
    (tmp_path / "away").rename(two_files / "b.jsonl")
    write(tmp_path / "out", corpus_of(two_files))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_files_that_change_while_they_are_read_are_refused(two_files, tmp_path, monkeypatch):
    tokenise = module._tokenise

    def touched(*arguments):
        os.utime(two_files / "a.jsonl")
        return tokenise(*arguments)

    monkeypatch.setattr(module, "_tokenise", touched)
    with pytest.raises(UserError, match="texts .*: has changed while it was read; give the same command again"):
        write(tmp_path / "out", corpus_of(two_files))
    assert not (tmp_path / "out").exists()


def test_a_text_that_becomes_shorter_while_it_is_read_ends_in_a_sentence(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("A few words. " * 100)
    training, validation = corpus_of(path, "text").documents()
    path.write_text("A few")
    for document in (training, validation):
        with pytest.raises(UserError, match=r"text\.txt: has become shorter while it was read"):
            list(document.pieces)


def test_nothing_else_is_overwritten_and_another_corpus_is_refused(lines, tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("diary.txt", ".diary.tmp"):
        (tmp_path / "mine" / name).write_text("dear diary")
    mine = contents(tmp_path / "mine")
    with pytest.raises(UserError, match="mine: exists and is not a token folder"):
        write(tmp_path / "mine", corpus_of(lines))
    assert contents(tmp_path / "mine") == mine
    write(tmp_path / "out", corpus_of(lines))
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="out: these tokens were written with seed 1, not 2"):
        write(tmp_path / "out", corpus_of(lines), seed=2)
    assert contents(tmp_path / "out") == before
    write(tmp_path / "out", corpus_of(lines))  # the same again: nothing to do
    os.utime(lines)
    with pytest.raises(UserError, match="the text has changed since"):
        write(tmp_path / "out", corpus_of(lines))


def test_too_few_documents_for_the_fraction_are_refused(tmp_path):
    path = tmp_path / "few.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    with pytest.raises(UserError, match="--data.validation_fraction 0.01: .* has only 2 documents"):
        write(tmp_path / "out", corpus_of(path), fraction=0.01)
    path.write_text("\n\n")
    with pytest.raises(UserError, match="there is no text"):
        write(tmp_path / "out", corpus_of(path), fraction=0.0)


def test_a_tokenizer_with_many_ids_is_written_in_four_bytes(lines, tmp_path, monkeypatch):
    tokenizer = get_tokenizer("bytes")
    monkeypatch.setattr(type(tokenizer), "vocab_size", 100_277)
    index = write(tmp_path / "out", corpus_of(lines))
    assert index["dtype"] == "uint32"
    assert (tmp_path / "out" / "val-00000.bin").stat().st_size == 4 * min(100_000, index["tokens"]["val"])


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    path = tmp_path / "half.jsonl"
    path.write_text('{"text": "a\\ud83eb"}\n')
    write(tmp_path / "out", corpus_of(path), fraction=0.0)
    assert documents(tmp_path / "out", "train") == ["a\ufffdb"]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_documents_tokens_rate_and_time_left(lines, tmp_path, monkeypatch, terminal):
    monkeypatch.setattr(module, "_BATCH", 20_000)
    monkeypatch.setattr(module, "_LINE_SECONDS", 0.0)
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=120)
    settings = Settings(0.1, 1)
    prepare(tmp_path / "out", corpus_of(lines), get_tokenizer("bytes"), settings, workers=1, console=console)
    assert re.search(r"[1-9][\d,]* documents  [\d,]+ tokens  [1-9][\d,]* tokens/s  \d:\d\d:\d\d left", shown.getvalue())
    assert ("\x1b" in shown.getvalue()) == terminal


def test_two_processes_that_want_the_same_tokens_write_them_once(lines, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BATCH", 20_000)
    written, tokenise = [], module._tokenise
    monkeypatch.setattr(module, "_tokenise", lambda *a: (written.append(1), time.sleep(0.002), tokenise(*a))[2])
    write(tmp_path / "alone", corpus_of(lines))
    alone = len(written)
    with ThreadPoolExecutor(2) as pool:  # a lock on a folder is between open files, so threads will do
        both = [pool.submit(write, tmp_path / "out", corpus_of(lines)) for _ in range(2)]
    assert both[0].result() == both[1].result()
    assert len(written) == 2 * alone and contents(tmp_path / "out") == contents(tmp_path / "alone")
