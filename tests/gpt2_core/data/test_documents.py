import random

import numpy as np

from gpt2_core.data import documents
from gpt2_core.data.documents import in_pieces
from gpt2_core.data.tokenizer import get_tokenizer


def test_pieces_depend_on_the_text_alone_and_leave_the_tokens_as_they_are(monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 40)
    monkeypatch.setattr(documents, "LONGEST_PIECE", 400)
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
