"""gpt2 page: JAX and PyTorch continue one prompt side by side on a page; or the files of a Space that shows it."""

import importlib.util
import socket
from pathlib import Path
from typing import Literal

from gpt2_convert import read_weights
from gpt2_core.cli import Parser
from gpt2_core.errors import UserError
from gpt2_core.memory import keep_freed_memory


def main(arguments: list[str], command: str = "gpt2 page") -> None:
    keep_freed_memory()
    options = parser(command).parse(arguments)
    if importlib.util.find_spec("gradio") is None:
        raise UserError(f"{command}: needs the package gradio; pip install 'gpt2-jax[page]'")
    if options.force and options.space is None:
        raise UserError("--force: replaces the files of a Space; add --space FOLDER, or leave it out")
    # What is wrong with these is said before the weights are read.
    if options.space is None:
        check_address(options.host, options.port)
        _serve(options)
    else:
        _write_space(options)


def _serve(options) -> None:
    from gpt2_jax.runtime import configure

    configure(options.precision)
    from gpt2_jax.language_model import JaxModel
    from gpt2_page.app import build, serve
    from gpt2_torch.language_model import TorchModel

    weights = read_weights(options.weights, options.checkpoint)
    given = {"tokenizer": options.tokenizer, "precision": options.precision}
    serve(
        build([JaxModel(weights, **given), TorchModel(weights, **given)], options.precision), options.host, options.port
    )


def _write_space(options) -> None:
    from gpt2_page.space import write

    folder = Path(options.space)
    write(
        folder, read_weights(options.weights, options.checkpoint), options.tokenizer, options.precision, options.force
    )
    print(f"{folder}: the files of a Space; python {folder / 'app.py'} shows the page here")


def check_address(host: str, port: int) -> None:
    """Raise UserError if nothing can be served at this address."""
    if not 0 < port < 1 << 16:
        raise UserError(f"--port {port}: must be from 1 to {(1 << 16) - 1}")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            # A server that has just ended doesn't keep the port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--host {host} --port {port}: nothing can be served there ({reason}); give another --port, or --host"
        ) from error


def parser(command: str) -> Parser:
    made = Parser(
        prog=command,
        description="Serve a page on which JAX and PyTorch continue one prompt side by side, with the probability of "
        "each token in both; or write a folder that is a Hugging Face Space with this page.",
    )
    made.add_weights_arguments()
    made.add_argument(
        "--precision",
        type=Literal["float32", "bfloat16", "float64"],
        default="float32",
        help="Dtype of the matrix products in both frameworks.",
    )
    made.add_argument(
        "--host", type=str, default="127.0.0.1", help="Address to serve at; 0.0.0.0 lets other machines see the page."
    )
    made.add_argument("--port", type=int, default=7860, help="Port to serve at.")
    made.add_argument(
        "--space",
        type=str,
        help="Folder to write instead: a Hugging Face Space with these weights and this page. Nothing is uploaded.",
    )
    made.add_argument("--force", action="store_true", help="Replace the files of a Space that is in that folder.")
    return made
