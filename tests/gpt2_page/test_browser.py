"""The page in a browser: what is typed, clicked and seen.

    SCREENSHOT=docs/images/page.png python -m pytest -m slow tests/gpt2_page/test_browser.py

also makes the README's picture again.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gpt2_core.config import ModelConfig
from gpt2_core.language_model import LanguageModel
from parity.gpt2.cases import random_weights

ROOT = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if CHROMIUM else ["a program chromium or google-chrome"]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")]

WIDTHS = (400, 1300)
PROMPT = "def main("
SETTINGS = {"max_new_tokens": 120, "temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": 3}
NASTY = "<img src=x onerror=alert(1)></p><script>alert(2)</script>[a](javascript:alert(3)) ${alert(4)} {{value}} `"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """The quickstart, trained until it writes something like Python."""
    folder = tmp_path_factory.mktemp("run") / "run"
    script(folder.parent, "train_jax.py", "--steps", "300", "--run_dir", folder)
    return folder


def script(folder: Path, name: str, *arguments: object) -> str:
    ours = ("JAX_NUM_CPU_DEVICES", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def served(serving, run_folder) -> Iterator[str]:
    with serving(ROOT / "scripts" / "demo_page.py", "--weights", run_folder) as address:
        yield address


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Containers seldom let an unprivileged process make the namespaces of Chromium's sandbox.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """Open the page as another visitor; fails in the end if it asked another machine, or a script failed or ran."""
    contexts, wrong = [], []

    def visit(address: str, width: int = WIDTHS[-1]):
        contexts.append(chromium.new_context(viewport={"width": width, "height": 900}))
        page = contexts[-1].new_page()
        page.set_default_timeout(120_000)
        page.on(
            "request", lambda request: None if request.url.startswith((address, "data:")) else wrong.append(request.url)
        )
        page.on("dialog", lambda dialog: (wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        page.goto(address)
        page.get_by_label("prompt").wait_for()
        return page

    yield visit
    for context in contexts:
        context.close()
    assert wrong == []


def fill_in(page, prompt: str, **settings: float) -> None:
    page.get_by_label("prompt").fill(prompt)
    for name, value in settings.items():
        page.get_by_label(name).fill(str(value))
        page.get_by_label(name).blur()
    page.get_by_role("button", name="Continue in both").click()


def texts(page) -> list[str]:
    return [text.text_content() for text in page.locator("#results .text").all()]


def wait_for_token(page, number: int) -> None:
    page.locator(f"#results [data-step='{number}']").nth(1).wait_for(state="attached")


def test_both_texts_are_those_of_the_command_and_come_token_by_token(visit, served, run_folder):
    page = visit(served)
    fill_in(page, PROMPT, **SETTINGS)
    wait_for_token(page, 1)
    assert page.locator("#results .token").count() < 2 * SETTINGS["max_new_tokens"]  # it isn't all there at once
    wait_for_token(page, SETTINGS["max_new_tokens"])
    options = [f"--{name}={value}" for name, value in SETTINGS.items()]
    for shown, backend in zip(texts(page), ("jax", "torch"), strict=True):
        arguments = ("--weights", run_folder, "--prompt", PROMPT, "--backend", backend, *options)
        assert script(run_folder.parent, "generate.py", *arguments) == shown + "\n"
    assert "The same 120 tokens in both" in page.locator(".verdict").text_content()
    assert float(page.locator(".worst").text_content()) < 1e-5
    assert page.locator("#table tbody tr").count() == SETTINGS["max_new_tokens"]


def test_a_click_on_a_token_shows_what_else_was_likely(visit, served):
    page = visit(served)
    fill_in(page, PROMPT, max_new_tokens=12)
    wait_for_token(page, 12)
    # By the mouse on one side, by the keyboard on the other.
    for side, number, choose in ((0, 5, lambda token: token.click()), (1, 9, lambda token: token.press("Enter"))):
        choose(page.locator("#results section").nth(side).locator(f"[data-step='{number}']"))
        page.get_by_role("heading", name=f"Likeliest at token {number}").wait_for()
        chosen = page.locator("#likeliest tr.chosen td")
        row = page.locator("#table tbody tr").nth(number - 1).locator("td")
        assert chosen.nth(0).text_content() == row.nth(1).text_content() + " chosen"
        assert chosen.all_text_contents()[1:] == row.all_text_contents()[2:]
        assert page.locator("#likeliest tbody tr").count() >= 5
    fill_in(page, PROMPT, max_new_tokens=2)
    page.locator("#likeliest table").wait_for(state="detached")


def test_visitors_at_once_see_their_own_results(visit, served):
    visitors = {prompt: visit(served) for prompt in ("import ", "class A", "return ")}
    for prompt, page in visitors.items():
        fill_in(page, prompt, max_new_tokens=60)
    for prompt, page in visitors.items():
        wait_for_token(page, 60)
        assert all(text.startswith(prompt) for text in texts(page))
    for number, page in enumerate(visitors.values(), start=1):
        page.locator("#results [data-step]").nth(number).click()
        page.get_by_role("heading", name=f"Likeliest at token {number + 1}").wait_for()


def test_what_is_wrong_is_a_sentence_and_the_page_goes_on(visit, served):
    page = visit(served)
    fill_in(page, PROMPT, top_p=1.5)
    page.get_by_text("top_p 1.5: must be above 0 and at most 1").wait_for()
    fill_in(page, "long " * 200, top_p=1, max_new_tokens=3)
    wait_for_token(page, 3)
    assert "only its last 128 tokens are used" in page.locator("#messages").text_content()
    assert all(len(text) == 128 + 3 for text in texts(page))


def test_a_run_can_be_stopped(visit, served):
    page = visit(served)
    fill_in(page, PROMPT, max_new_tokens=200)
    wait_for_token(page, 1)
    page.get_by_role("button", name="Stop").click()
    page.wait_for_timeout(1000)
    count = page.locator("#table tbody tr").count()
    page.wait_for_timeout(2000)
    assert page.locator("#table tbody tr").count() == count < 200


def test_a_prompt_is_text_whatever_it_says(visit, served):
    page = visit(served)
    fill_in(page, NASTY, max_new_tokens=3)
    wait_for_token(page, 3)
    assert all(text.startswith(NASTY) for text in texts(page))
    assert page.locator("#results img, #results script, #results a").count() == 0


class Scripted(LanguageModel):
    """Writes what it is told to write."""

    def __init__(self, text: str) -> None:
        super().__init__(random_weights(ModelConfig(1, 2, 16, 256, 300)), None, "float32")
        self.text = text

    def _continue(self, prompts, uniforms, sampling, end_of_text):
        yield from ([byte] for byte in self.text.encode())

    def _logits(self, tokens_BT):
        return np.zeros((*tokens_BT.shape, 300), np.float32)


def test_what_a_model_writes_is_text_whatever_it_says(visit, free_port):
    from gpt2_page.app import build, launch

    class WholeTokens(type(Scripted("").tokenizer)):
        def decode_bytes(self, ids):
            return NASTY.encode() if list(ids) == [1] else super().decode_bytes(ids)

    models = [Scripted("\x01" + NASTY) for _ in range(2)]
    for model in models:
        model.tokenizer = WholeTokens()
    server = build(models, "float32")
    launch(server, "127.0.0.1", port := free_port())
    try:
        page, length = visit(f"http://127.0.0.1:{port}"), 1 + len(NASTY)
        fill_in(page, "x", max_new_tokens=length)
        wait_for_token(page, length)
        assert texts(page) == ["x" + NASTY + NASTY] * 2
        page.locator("#results [data-step='1']").first.click()
        page.get_by_role("heading", name="Likeliest at token 1").wait_for()
        assert page.locator("#likeliest code").filter(has_text="onerror").count() == 1
        assert page.locator("#results, #likeliest, #table").locator("img, script, a").count() == 0
    finally:
        server.close()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_its_width(visit, served, width, tmp_path):
    page = visit(served, width)
    fill_in(page, PROMPT, **SETTINGS)
    wait_for_token(page, SETTINGS["max_new_tokens"])
    page.locator("#results [data-step='7']").first.click()
    page.locator("#likeliest table").wait_for()
    wide, seen = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert wide <= seen == width
    for scrolled in page.locator("#table .scroll").all():
        assert scrolled.evaluate("element => element.scrollWidth <= element.clientWidth")
    if width == max(WIDTHS):
        page.screenshot(path=os.environ.get("SCREENSHOT", tmp_path / "page.png"), full_page=True)
