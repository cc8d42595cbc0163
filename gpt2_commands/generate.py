"""gpt2 generate: text from a trained model, streamed as it comes."""

import sys
from typing import Literal

from gpt2_core.cli import Parser
from gpt2_core.config import check_seed
from gpt2_core.errors import UserError
from gpt2_core.language_model import PRECISIONS, LanguageModel
from gpt2_core.memory import keep_freed_memory
from gpt2_core.sampling import Sampling


def main(arguments: list[str], command: str = "gpt2 generate") -> None:
    keep_freed_memory()
    options = parser(command).parse(arguments)
    if options.max_new_tokens < 1 or options.num_samples < 1:
        raise UserError("--max_new_tokens and --num_samples: must be 1 or more")
    # What is wrong with these is said before the weights are read.
    check_seed(options.seed)
    Sampling(options.temperature, options.top_k, options.top_p, options.greedy)

    model = _load(options)
    for number in range(options.num_samples):
        pieces = model.stream(
            options.prompt,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            greedy=options.greedy,
            seed=options.seed,
            sample=number,
            stop_at_end_of_text=options.stop_at_end_of_text,
        )
        if options.num_samples > 1:
            print(f"--- sample {number + 1} of {options.num_samples}", flush=True)
        sys.stdout.write(options.prompt)
        for text in pieces:
            sys.stdout.write(text)
            sys.stdout.flush()
        print(flush=True)


def _load(options) -> LanguageModel:
    given = {"checkpoint": options.checkpoint, "tokenizer": options.tokenizer, "precision": options.precision}
    if options.backend == "torch":
        import gpt2_torch

        return gpt2_torch.load(options.weights, device=options.device or "auto", **given)
    if options.device is not None:
        raise UserError("--device: chooses PyTorch's device; with --backend jax set JAX_PLATFORMS=cpu for the CPU")
    import gpt2_jax
    from gpt2_jax.runtime import configure

    configure(options.precision)
    return gpt2_jax.load(options.weights, **given)


def parser(command: str) -> Parser:
    made = Parser(prog=command, description="Generate text, streamed as it comes, from a GPT-2 of either framework.")
    made.add_weights_arguments()
    made.add_argument("--prompt", type=str, default="", help="Text to continue. Left out: the start of a document.")
    made.add_argument("--backend", type=Literal["jax", "torch"], default="jax", help="Framework that computes.")
    made.add_argument("--max_new_tokens", type=int, default=200, help="Tokens to generate for each sample.")
    made.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="Divides the logits: below 1 the text is more predictable, above 1 more random; 0 is --greedy.",
    )
    made.add_argument("--top_k", type=int, help="Keep the k most likely tokens. Left out: all.")
    made.add_argument(
        "--top_p", type=float, help="Keep the most likely tokens that together reach this probability. Left out: all."
    )
    made.add_argument("--greedy", action="store_true", help="Always take the most likely token.")
    made.add_argument(
        "--stop_at_end_of_text", action="store_true", help="End a sample at the model's first end-of-text token."
    )
    made.add_argument("--num_samples", type=int, default=1, help="Samples to generate, one after the other.")
    made.add_argument(
        "--seed",
        type=int,
        default=0,
        help="Seed of the samples; with one seed both backends write the same text.",
    )
    made.add_argument(
        "--precision",
        type=Literal[PRECISIONS],
        default="auto",
        help="Dtype of the matrix products; auto is bfloat16 on an accelerator and float32 on CPU.",
    )
    made.add_argument("--device", type=Literal["auto", "cpu", "cuda", "mps"], help="PyTorch's device. Left out: auto.")
    return made
