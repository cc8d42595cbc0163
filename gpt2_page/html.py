"""What the page shows, as HTML: Jinja templates that escape all they are given."""

import functools
from collections.abc import Sequence
from importlib.resources import files

from jinja2 import Environment, PackageLoader
from markupsafe import escape
from ml_dtypes import finfo

from gpt2_core.config import ModelConfig
from gpt2_page.steps import Step, agreement

NAMES = ("JAX", "PyTorch")


def intro(config: ModelConfig, tokenizer: str, precision: str) -> str:
    """What is compared."""
    resolution = float(finfo(precision).eps)
    return _render("intro.html", config=config, tokenizer=tokenizer, precision=precision, resolution=resolution)


def results(prompt: str, steps: Sequence[Step], vocabulary: int) -> str:
    """What was compared and how far apart it is, and both texts, of whose tokens each is a button."""
    return _render("results.html", prompt=prompt, steps=steps, agreement=agreement(steps), vocabulary=vocabulary)


def table(steps: Sequence[Step]) -> str:
    """The steps in figures."""
    return _render("table.html", steps=steps, agreement=agreement(steps))


def likeliest(step: Step) -> str:
    """The tokens that either framework found likeliest at a step."""
    return _render("likeliest.html", step=step)


def messages(*sentences: str | None) -> str:
    """Errors and notices, a paragraph each."""
    return "".join(f'<p class="message" role="alert">{escape(sentence)}</p>' for sentence in sentences if sentence)


def css() -> str:
    return (files("gpt2_page") / "page.css").read_text(encoding="utf-8")


def _render(name: str, **values: object) -> str:
    return _templates().get_template(name).render(names=NAMES, **values)


@functools.cache
def _templates() -> Environment:
    templates = Environment(
        loader=PackageLoader("gpt2_page", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters |= {"probability": "{:.4f}".format, "difference": "{:.1e}".format}
    return templates
