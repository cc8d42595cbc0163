"""Generate text from a trained model: python scripts/generate.py --weights RUN --prompt TEXT"""

import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np

from gpt2_convert import read_weights
from gpt2_core.cli import Parser, run
from gpt2_core.config import check_seed
from gpt2_core.data.tokenizer import NAMES, stream_text
from gpt2_core.errors import UserError
from gpt2_core.memory import keep_freed_memory
from gpt2_core.sampling import Sampling, uniforms
from gpt2_core.weights import Weights
from gpt2_core.weights.tokenizer import choose_tokenizer


def main(arguments: list[str]) -> None:
    keep_freed_memory()
    options = _parser().parse(arguments)
    if options.max_new_tokens < 1 or options.num_samples < 1:
        raise UserError("--max_new_tokens and --num_samples: must be 1 or more")
    check_seed(options.seed)
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.greedy)

    if options.backend == "jax":
        if options.device is not None:
            raise UserError("--device: chooses PyTorch's device; with --backend jax set JAX_PLATFORMS=cpu for the CPU")
        from gpt2_jax.runtime import configure

        configure(options.precision)
    weights = read_weights(options.weights, options.checkpoint)
    tokenizer = choose_tokenizer(weights, options.tokenizer)
    try:
        prompt = tokenizer.encode(options.prompt).tolist() or [tokenizer.end_of_text]
    except UnicodeEncodeError as error:
        raise UserError("--prompt: not UTF-8 text") from error

    end_of_text = tokenizer.end_of_text if options.stop_at_end_of_text else None
    generate = _jax(weights, options, end_of_text) if options.backend == "jax" else _torch(weights, options)
    for number in range(options.num_samples):
        if options.num_samples > 1:
            print(f"--- sample {number + 1} of {options.num_samples}", flush=True)
        sys.stdout.write(options.prompt)
        drawn = uniforms(options.seed, number, options.max_new_tokens)[None]
        tokens = (row[0] for row in generate([prompt], drawn, sampling))
        for text in stream_text(tokenizer, itertools.takewhile(lambda token: token != end_of_text, tokens)):
            sys.stdout.write(text)
            sys.stdout.flush()
        print(flush=True)


Generate = Callable[[list[list[int]], np.ndarray, Sampling], Iterator[list[int]]]


def _jax(weights: Weights, options, end_of_text: int | None) -> Generate:
    import jax

    from gpt2_jax.definition import define
    from gpt2_jax.generate import Generator
    from gpt2_jax.model import Execution
    from gpt2_jax.runtime import resolve_precision
    from gpt2_jax.weights import from_canonical

    execution = Execution(resolve_precision(options.precision))
    params = jax.device_put(from_canonical(weights, execution.param_dtype))
    return functools.partial(Generator(define(weights.config, execution)), params, end_of_text=end_of_text)


def _torch(weights: Weights, options) -> Generate:
    import torch

    from gpt2_torch.generate import generate
    from gpt2_torch.runtime import pick_device, resolve_precision
    from gpt2_torch.weights import build

    device = pick_device(options.device or "auto")
    precision = resolve_precision(options.precision, device)
    model = build(weights.astype(np.float64 if precision == "float64" else np.float32)).to(device)

    def run(prompts, drawn, sampling):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            yield from generate(model, prompts, drawn, sampling)

    return run


def _parser() -> Parser:
    parser = Parser(
        prog="generate.py", description="Generate text, streamed as it comes, from a GPT-2 of either framework."
    )
    parser.add_argument(
        "--weights",
        type=str,
        required=True,
        help="A path in any format that convert.py reads, or a name of the Hugging Face Hub (gpt2).",
    )
    parser.add_argument(
        "--tokenizer",
        type=Literal[NAMES],
        help="Tokenizer, for weights that don't record one (files of llm.c and nanoGPT don't). Left out: the recorded "
        "one, else gpt2.",
    )
    parser.add_argument("--prompt", type=str, default="", help="Text to continue. Left out: the start of a document.")
    parser.add_argument("--backend", type=Literal["jax", "torch"], default="jax", help="Framework that computes.")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="Tokens to generate for each sample.")
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="Divides the logits: below 1 the text is more predictable, above 1 more random.",
    )
    parser.add_argument("--top_k", type=int, help="Keep the k most likely tokens. Left out: all.")
    parser.add_argument(
        "--top_p", type=float, help="Keep the most likely tokens that together reach this probability. Left out: all."
    )
    parser.add_argument("--greedy", action="store_true", help="Always take the most likely token.")
    parser.add_argument(
        "--stop_at_end_of_text", action="store_true", help="End a sample at the model's first end-of-text token."
    )
    parser.add_argument("--num_samples", type=int, default=1, help="Samples to generate, one after the other.")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="Seed of the samples; with one seed both backends write the same text.",
    )
    parser.add_argument(
        "--checkpoint", type=str, default="latest", help="Which checkpoint of a run folder: latest, best or a step."
    )
    parser.add_argument(
        "--precision",
        type=Literal["auto", "float32", "bfloat16", "float64"],
        default="auto",
        help="Dtype of the matrix products; auto is bfloat16 on an accelerator and float32 on CPU.",
    )
    parser.add_argument(
        "--device", type=Literal["auto", "cpu", "cuda", "mps"], help="PyTorch's device. Left out: auto."
    )
    return parser


if __name__ == "__main__":
    run(main)
