"""What the page shows, read as a browser reads it."""

import dataclasses
from html.parser import HTMLParser

import pytest

from gpt2_core.config import ModelConfig
from gpt2_page import html
from gpt2_page.steps import Step, Token

NASTY = (
    "<img src=x onerror=alert(1)></p><script>alert(2)</script>[a](javascript:alert(3))\"'` ${alert(4)} {{value}} &amp;"
)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def a_step(number: int = 1, ids: tuple[int, int] = (65, 65), text: str = "A", largest: float | None = 2e-7) -> Step:
    tokens = tuple(Token(i, text, (0.25, 0.25 + 1e-7)) for i in ids)
    return Step(number, tokens, (text, text), largest, tuple(dict.fromkeys(tokens)))


@pytest.mark.parametrize(
    "page",
    [
        html.results(NASTY, [], 300),
        html.results("", [a_step(text=NASTY)], 300),
        html.results(NASTY, [a_step(text=NASTY, ids=(65, 66))], 300),
        html.table([a_step(text=NASTY)]),
        html.likeliest(a_step(text=NASTY)),
        html.messages(NASTY),
    ],
)
def test_nothing_that_was_typed_or_generated_is_markup(page):
    read = Page(page)
    assert NASTY in read.text
    assert not {tag for tag, _ in read.tags} & {"img", "script", "a"}
    assert not [name for _, attributes in read.tags for name in attributes if name.startswith(("on", "src", "href"))]


def test_each_token_is_a_button_of_its_step():
    page = Page(html.results("a", [a_step(1, text="b"), a_step(2, text="\n"), a_step(3, text="")], 300))
    buttons = [attributes for _, attributes in page.tags if attributes.get("role") == "button"]
    assert [button["data-step"] for button in buttons] == ["1", "2", "3"] * 2
    assert [button["class"] for button in buttons[:3]] == ["token", "token newline", "token part"]
    assert all(button["tabindex"] == "0" for button in buttons)
    assert "--p: 0.250" in buttons[0]["style"] and "probability 0.2500" in buttons[0]["title"]


def words(page: str) -> str:
    return " ".join(Page(page.replace("</t", " </t")).text.split())  # the cells of a row are apart


def test_the_verdict_says_what_is_compared_and_the_largest_difference():
    steps = [a_step(1), a_step(2, largest=3.14e-7), a_step(3, largest=0.0)]
    assert words(html.results("", steps, 50257)).startswith(
        "The same 3 tokens in both. Largest difference of a probability: 3.1e-07, at token 2; "
        "compared were all 50,257 tokens of the vocabulary at each of 3 steps."
    )
    steps = [a_step(1), dataclasses.replace(a_step(2), chosen=(Token(1, "x", (0, 0)), Token(2, "y", (0, 0)))),
             a_step(3, largest=None)]  # fmt: skip
    said = words(html.results("", steps, 300))
    assert said.startswith(
        "Different tokens from token 2 on: JAX chose x, PyTorch chose y. What follows is not compared"
    )
    assert "at each of 2 steps" in said
    assert "Largest" not in words(html.results("a", [], 300))


def test_the_table_has_a_row_a_step_and_no_difference_where_nothing_is_compared():
    said = words(html.table([a_step(1), a_step(2, largest=None)]))
    assert said.endswith("1 A 0.2500 0.2500 1.0e-07 2 A 0.2500 0.2500 –"), said
    assert html.table([]).strip() == ""


def test_the_likeliest_tokens_say_which_of_them_was_chosen():
    step = a_step(4, ids=(65, 66))
    assert "Likeliest at token 4" in words(html.likeliest(step))
    assert "A chosen by JAX" in words(html.likeliest(step)) and "A chosen by PyTorch" in words(html.likeliest(step))
    assert "A chosen 0.25" in words(html.likeliest(a_step()))
    assert "another context" in words(html.likeliest(a_step(largest=None)))


def test_the_introduction_names_what_both_compute():
    config = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=32, vocab_size=300)
    said = words(html.intro(config, "bytes", "bfloat16"))
    assert (
        "2 layers, a context of 32 tokens, tokenizer bytes" in said and "bfloat16 (relative resolution 7.8e-03)" in said
    )


def test_the_style_loads_nothing():
    assert "url(" not in html.css() and "@import" not in html.css()
