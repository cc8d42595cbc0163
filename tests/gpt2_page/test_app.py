"""What Gradio is given, and what comes back: no browser is needed."""

import concurrent.futures
import json
import re

import httpx
import pytest

from gpt2_convert import read_weights
from gpt2_jax.language_model import JaxModel
from gpt2_torch.language_model import TorchModel

pytest.importorskip("gradio", reason="needs gradio: pip install 'gpt2-jax[page]'")
pytestmark = pytest.mark.long

SETTINGS = (6, 1.0, 0, 1.0, 0)


@pytest.fixture(scope="module")
def models(weights_file):
    weights = read_weights(weights_file)
    return [kind(weights, precision="float32") for kind in (JaxModel, TorchModel)]


def answer(*arguments):
    from gpt2_page.app import answer

    return list(answer(*arguments))


def test_the_page_changes_with_each_token(models):
    shown = answer(models, "def ", *SETTINGS)
    assert [len(steps) for *_, steps in shown] == [0, 1, 2, 3, 4, 5, 6]
    assert all(messages == "" for messages, *_ in shown)
    assert "The same 6 tokens in both" in shown[-1][1] and "Token by token" in shown[-1][2]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ((0, 1.0, 0, 1.0, 0), "max_new_tokens 0: must be 1 or more"),
        ((6, -1.0, 0, 1.0, 0), "temperature -1.0: must be 0.001 or more, or 0 for the most likely token (greedy)"),
        ((6, 1.0, -2, 1.0, 0), "top_k -2: must be 1 or more"),
        ((6, 1.0, 0, 1.5, 0), "top_p 1.5: must be above 0 and at most 1"),
        ((6, 1.0, 0, 1.0, -1), "seed -1: must be from 0 to 4294967295"),
        ((6, None, 0, 1.0, 0), "temperature: expected a number; fill it in"),
    ],
)
def test_what_is_wrong_is_a_sentence_on_the_page(models, settings, said):
    assert answer(models, "a", *settings)[-1] == (f'<p class="message" role="alert">{said}</p>', "", "", [])


def test_a_prompt_that_is_no_text_is_a_sentence_on_the_page(models):
    assert "prompt: not UTF-8 text" in answer(models, "\ud800", *SETTINGS)[-1][0]


def test_a_long_prompt_is_cut_with_a_notice(models):
    *_, (messages, results, _, steps) = answer(models, "a" + "b" * 16, *SETTINGS)
    assert "only its last 16 tokens are used" in messages and len(steps) == 6
    assert f'"prompt">{"b" * 16}<' in results


def test_visitors_at_once_get_their_own_results(models):
    prompts = [f"prompt {number}" for number in range(8)]
    one_by_one = [answer(models, prompt, *SETTINGS) for prompt in prompts]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        at_once = list(threads.map(lambda prompt: answer(models, prompt, *SETTINGS), prompts))
    assert at_once == one_by_one
    assert len({results for [*_, (_, results, _, _)] in at_once}) == 8


def test_a_step_is_chosen_from_a_visitors_own(models):
    from gpt2_page.app import chosen_step

    *_, (*_, steps) = answer(models, "a", *SETTINGS)
    assert "Likeliest at token 3" in chosen_step(steps, 3)
    assert {chosen_step(steps, number) for number in (0, 7, "1", None, [1], {"a": 1})} == {""}


def test_nothing_is_shared_or_reported_and_there_is_no_public_api(models):
    from gpt2_page.app import build

    page = build(models, "float32")
    assert page.analytics_enabled is False
    assert {fn.api_visibility for fn in page.fns.values()} == {"private"}


def ask(client: httpx.Client, session: str, function: int, data: list, **event) -> dict:
    """What the page shows in the end, by the requests that a browser makes."""
    body = {"data": data, "fn_index": function, "session_hash": session} | event
    if "event_data" in event:
        return client.post("/gradio_api/run/predict", json=body).raise_for_status().json()
    client.post("/gradio_api/queue/join", json=body).raise_for_status()
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as answers:
        for line in answers.iter_lines():
            message = json.loads(line.removeprefix("data: ")) if line else {}
            if message.get("msg") == "process_completed":
                return message["output"]
    raise AssertionError("the stream ended without a result")


def test_each_session_has_its_own_steps(models, free_port):
    from gpt2_page.app import build, launch

    page = build(models, "float32")
    launch(page, "127.0.0.1", port := free_port())
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            functions = client.get("/config").json()["dependencies"]
            run = next(f for f in functions if len(f["inputs"]) == 6)["id"]
            choose = next(f for f in functions if f["targets"][0][1] == "click" and len(f["inputs"]) == 1)["id"]
            shown = {}
            for session, prompt, count in (("one", "a", 2), ("two", "b", 5)):
                shown[session] = ask(client, session, run, [prompt, count, *SETTINGS[1:]])["data"][1]
            assert "The same 2 tokens" in shown["one"] and "The same 5 tokens" in shown["two"]

            def click(session, step):
                return ask(client, session, choose, [None], event_data={"step": step})["data"][0]

            assert "Likeliest at token 2" in click("one", 2) and "Likeliest at token 5" in click("two", 5)
            assert click("one", 5) == click("three", 1) == ""
    finally:
        page.close()


def test_the_page_needs_no_other_machine(models, free_port):
    from gpt2_page.app import build, launch

    page = build(models, "float32")
    launch(page, "127.0.0.1", port := free_port())
    try:
        style = httpx.get(f"http://127.0.0.1:{port}/theme.css").text
        assert "system-ui" in style and "@font-face" not in style
        assert set(re.findall(r"url\(\W?(\w*:?)", style)) == {"data:"}  # pictures in the text itself
    finally:
        page.close()
