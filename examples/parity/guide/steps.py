"""The early versions of port.py that docs/porting-guide.md mends one by one, each compared with the reference.

python examples/parity/guide/steps.py
"""

import dataclasses
import importlib.util
import sys
import tempfile
from pathlib import Path

import parity

PORT = Path(__file__).with_name("port.py")


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A line of port.py as the first version had it."""

    name: str
    right: str
    wrong: str
    named: str
    """Code of the line at which the comparison finds it: where what the wrong line makes is used."""
    hint: str
    """A regular expression."""


# In the order in which the guide mends them.
MISTAKES = (
    Mistake(
        "epsilon",
        right="nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs)",
        wrong="nnx.LayerNorm(config.hidden_size, rngs=rngs)",
        named="attended_BTE = self.attention(self.norm1(x_BTE))",
        hint="epsilon",
    ),
    Mistake(
        "rope",
        right="first, second = jnp.split(turned, 2, axis=-1)",
        wrong="first, second = turned[..., ::2], turned[..., 1::2]",
        named="jnp.concatenate([first * cos",
        hint="pairs",
    ),
    Mistake(
        "gelu",
        right="jax.nn.gelu(self.up(x_BTE), approximate=False)",
        wrong="jax.nn.gelu(self.up(x_BTE))",
        named="jax.nn.gelu",
        hint="GELU",
    ),
)


def source(mistakes):
    """The text of port.py with these mistakes; every line keeps its number."""
    text = PORT.read_text(encoding="utf-8")
    for mistake in mistakes:
        if text.count(mistake.right) != 1:
            raise ValueError(f"{PORT.name} should have one {mistake.right!r}")
        text = text.replace(mistake.right, mistake.wrong)
    return text


def load(folder, mistakes=()):
    """port.py with these mistakes as a module of its own, written into the folder: its file is named in reports."""
    path = Path(folder) / "draft" / PORT.name
    path.parent.mkdir(exist_ok=True)
    path.write_text(source(mistakes), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("_".join(["port", *(m.name for m in mistakes)]), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare(folder, mistakes):
    port = load(folder, mistakes)
    return parity.compare(port.make_reference, port.make_port, inputs=port.inputs)


def main():
    with tempfile.TemporaryDirectory() as folder:
        for mended in range(len(MISTAKES) + 1):
            left = MISTAKES[mended:]
            print(f"--- {', '.join(m.name for m in left) or 'finished'}")
            print(compare(folder, left).in_words())
    return 0


if __name__ == "__main__":
    sys.exit(main())
