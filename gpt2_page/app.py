"""The page in Gradio: what a visitor gives, what the page shows of it, and the server."""

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from gpt2_core.errors import UserError
from gpt2_core.language_model import LanguageModel
from gpt2_page import html
from gpt2_page.steps import MOST_NEW_TOKENS, Step, continue_both, cut, options

# Visitors who are served at the same time; others wait for their turn.
_AT_ONCE = 4
# A visitor's steps are forgotten after this time, and when so many have come after them: 200 steps take 380 kB.
_FORGET_SECONDS = 3600
_SESSIONS = 1000

_GREYS = (("", "*neutral_600"), ("_dark", "*neutral_300"))

# A token is chosen by a click, or by Enter or Space as a button is. Its step is all that the server is told.
_CHOOSE_TOKEN = """
const choose = (event) => {
    const token = event.target.closest("[data-step]");
    if (!token || (event.type === "keydown" && event.key !== "Enter" && event.key !== " ")) return;
    event.preventDefault();
    trigger("click", {step: Number(token.dataset.step)});
};
element.addEventListener("click", choose);
element.addEventListener("keydown", choose);
"""

Shown = tuple[str, str, str, list[Step]]
"""Messages, results, table, and this visitor's steps."""


def build(models: Sequence[LanguageModel], precision: str) -> gr.Blocks:
    """The page. A visitor's steps are in the session's state, and nothing that visitors give is kept anywhere else."""
    with gr.Blocks(title="GPT-2 in JAX and in PyTorch", analytics_enabled=False) as page:
        gr.HTML(
            html.intro(models[0].config, models[0].tokenizer.name, precision),
            elem_classes="intro",
            apply_default_css=False,
        )
        prompt = gr.Textbox(label="prompt", lines=3, placeholder="Empty: the start of a document")
        with gr.Row():
            settings = [
                gr.Number(40, label="max_new_tokens", info=f"{MOST_NEW_TOKENS} at most", min_width=140),
                gr.Number(1.0, label="temperature", info="0: the likeliest token", step=0.1, min_width=140),
                gr.Number(0, label="top_k", info="0: all tokens", min_width=140),
                gr.Number(1.0, label="top_p", info="1: all tokens", step=0.05, min_width=140),
                gr.Number(0, label="seed", info="the same for both", min_width=140),
            ]
        with gr.Row():
            go = gr.Button("Continue in both", variant="primary", scale=3, min_width=180)
            stop = gr.Button("Stop", scale=1, min_width=80)
        messages = gr.HTML(elem_id="messages", apply_default_css=False)
        results = gr.HTML(elem_id="results", js_on_load=_CHOOSE_TOKEN, apply_default_css=False)
        likeliest = gr.HTML(elem_id="likeliest", apply_default_css=False)
        table = gr.HTML(elem_id="table", apply_default_css=False)
        steps = gr.State([], time_to_live=_FORGET_SECONDS)

        def run(prompt: str | None, *settings: Any) -> Iterator[Shown]:
            yield from answer(models, prompt or "", *settings)

        def choose(steps: list[Step], event: gr.EventData) -> str:
            return chosen_step(steps, event.step)

        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        started = [go.click, prompt.submit]
        gr.on(started, lambda: "", outputs=likeliest, queue=False, **private)
        shown = [messages, results, table, steps]
        running = gr.on(started, run, [prompt, *settings], shown, concurrency_limit=_AT_ONCE, **private)
        stop.click(None, cancels=running, **private)
        results.click(choose, steps, likeliest, queue=False, **private)
    return page


def serve(page: gr.Blocks, host: str, port: int) -> None:
    """Serve the page until the process is interrupted."""
    launch(page, host, port)
    print(f"the page is at http://{host}:{port} (Ctrl-C ends it)", flush=True)
    page.block_thread()


def launch(page: gr.Blocks, host: str, port: int) -> None:
    """Serve the page from another thread. It loads nothing from other machines, fonts neither, and tells none."""
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        state_session_capacity=_SESSIONS,
        theme=_theme(),
        css=html.css(),
    )


def _theme() -> gr.themes.Base:
    """Fonts of the visitor's own system, and small print dark enough to be read."""
    grey = {
        f"{name}_text_color{form}": shade
        for name in ("block_info", "block_label", "block_title")
        for form, shade in _GREYS
    }
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return theme.set(**grey, **{f"body_text_color_subdued{form}": shade for form, shade in _GREYS})


def answer(models: Sequence[LanguageModel], prompt: str, *settings: Any) -> Iterator[Shown]:
    """All that the page shows, after each token; `settings` are those of `options`, in its order."""
    steps: list[Step] = []
    try:
        chosen = options(*settings)
        kept, seen, notice = cut(prompt, models[0])
        text = models[0].tokenizer.decode(seen) if notice else kept

        def shown() -> Shown:
            return (
                html.messages(notice),
                html.results(text, steps, models[0].config.vocab_size),
                html.table(steps),
                list(steps),
            )

        yield shown()
        for step in continue_both(models, kept, **chosen):
            steps.append(step)
            yield shown()
    except UserError as error:
        # The fields of the page have the names of the options.
        yield html.messages(str(error).replace("--", "")), "", "", []


def chosen_step(steps: Sequence[Step], number: Any) -> str:
    """The likeliest tokens at a step of this visitor's; nothing if there is no such step."""
    return next((html.likeliest(step) for step in steps if step.number == number), "")
