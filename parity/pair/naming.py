"""How alike two names of weights are, whichever framework's habits they follow: q_proj.weight, query.kernel."""

import functools
import re
from collections import Counter
from collections.abc import Collection

from parity.pair.transforms import Transform

# One word for each group; the first is what the others become.
_GROUPS = (
    "weight kernel w gamma scale embedding embeddings",
    "bias b beta offset",
    "q query queries wq",
    "k key keys wk",
    "v value values wv",
    "attn attention self selfattention sa mha mixer",
    "cross crossattention encdec xattn",
    "proj projection linear dense fc lin conv",
    "out o output wo",
    "mlp ffn ff feedforward intermediate",
    "norm ln layernorm rmsnorm layer_norm bn batchnorm groupnorm gn",
    "embed embeddings wte tok token tokens word vocab patch",
    "pos position positions positional wpe",
    "head classifier logits lm cls score",
    "up wi fc1",
    "down fc2",
    "mean running_mean",
    "var variance running_var",
    "layer layers block blocks h stage stages",
    "gate g",
    "enc encoder",
    "dec decoder",
)
_WORDS = {word: group.split()[0] for group in _GROUPS for word in group.split()}
_LEAVES = ("weight", "bias", "mean", "var")


@functools.lru_cache(maxsize=100_000)
def parts(name: str) -> tuple[Counter, tuple[int, ...], str]:
    """Its words, its numbers, and what kind of tensor it is by its last word."""
    name = re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower().replace("running_", "")
    words = [w for w in re.split(r"[._/\s]+", name) if w]
    split = []
    for word in words:
        split += [word] if word in _WORDS else re.findall(r"\d+|[a-z]+", word)
    numbers = tuple(int(w) for w in split if w.isdigit())
    plain = [_WORDS.get(w, w) for w in split if not w.isdigit()]
    leaf = plain[-1] if plain and plain[-1] in _LEAVES else ""
    return Counter(plain), numbers, leaf


def alike(a: str, b: str) -> float:
    """From 0 for nothing in common to 3 for the same words, numbers and kind."""
    (words_a, numbers_a, leaf_a), (words_b, numbers_b, leaf_b) = parts(a), parts(b)
    total = words_a.total() + words_b.total()
    common = 2 * (words_a & words_b).total() / total if total else 0.0
    return common + (numbers_a == numbers_b) + (bool(leaf_a) and leaf_a == leaf_b)


# The order in which PyTorch fuses the gates of an LSTM and a GRU.
_GATES = {4: "ifgo", 3: "rzn"}


def recurrent(name: str, source: tuple[str, ...], transform: Transform, names: Collection[str]) -> float:
    """What a name such as `hf.kernel` or `LSTMCell.ii.kernel` says of the tensors that PyTorch fuses as weight_ih and
    weight_hh: which of them, and which part. Values can't say it one by one, because gates are sums of two products.
    `names` are those of the model that has this name."""
    module, _, leaf = name.rpartition(".")
    if leaf == "bias" and {f"{module}.weight_ih", f"{module}.weight_hh"} <= set(names):
        return 1.2 if transform.adds else -0.4  # Equinox has one for all gates
    gate = re.search(r"(?:^|[._])([ih])([ifgorzn])[._]", name)
    part = next((numbers for kind, numbers in transform.steps if kind == "chunk"), None)
    if gate is None or part is None or part[1] not in _GATES:
        return 0.0
    right = gate[2] in _GATES[part[1]] and _GATES[part[1]].index(gate[2]) == part[0]
    mine = any(f"_{gate[1]}h" in n for n in source)
    start = gate.start(1)
    other = f"{name[:start]}{'h' if gate[1] == 'i' else 'i'}{name[start + 1 :]}"
    # A gate's only bias is the sum of PyTorch's two.
    summed = name.endswith("bias") and other not in names
    return (1.0 if right else -1.0) + 0.5 * mine + (0.4 if (len(source) == 2) == summed else -0.4)


def pattern(name: str) -> str:
    """The name with its numbers left out: what the same tensor of every layer has in common."""
    return re.sub(r"\d+", "*", name)
