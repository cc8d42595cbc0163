"""Convert weights between frameworks: python scripts/convert.py SRC DST --to jax|torch|safetensors"""

from pathlib import Path
from typing import Literal

from gpt2_core.cli import Parser, run
from gpt2_core.errors import UserError
from parity.formats import read_weights, write_weights


def main(arguments: list[str]) -> None:
    options = _parser().parse(arguments)
    target = Path(options.target)
    weights = read_weights(options.source, options.checkpoint)
    if target.exists() and not options.force:
        raise UserError(f"{target}: exists; add --force to replace it, or name another")
    if target.resolve() in (Path(options.source).resolve(), *Path(options.source).resolve().parents):
        raise UserError(f"{target}: holds the source itself; name another")
    write_weights(weights, target, options.to, force=options.force)
    print(f"{weights.source} -> {target} ({options.to}): {weights.config.parameter_count:,} parameters")


def _parser() -> Parser:
    parser = Parser(prog="convert.py", description="Convert GPT-2 weights, bit for bit.")
    parser.add_argument("source", type=str, help="Run folder, checkpoint folder or .safetensors file.")
    parser.add_argument("target", type=str, help="File (safetensors) or checkpoint folder (jax, torch) to write.")
    parser.add_argument(
        "--to",
        type=Literal["jax", "torch", "safetensors"],
        required=True,
        help="jax: a checkpoint of the JAX trainer (Orbax); torch: of the PyTorch trainer; safetensors: one file with "
        "GPT-2's own names and shapes.",
    )
    parser.add_argument(
        "--checkpoint", type=str, default="latest", help="Which checkpoint of a run folder: latest, best or a step."
    )
    parser.add_argument("--force", action="store_true", help="Replace a target that exists.")
    return parser


if __name__ == "__main__":
    run(main)
