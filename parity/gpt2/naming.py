"""Names of a GPT-2's values: in words, and in the order in which a backward pass makes their gradients."""

import functools

from parity.engine import divergence


def in_words(name: str) -> str:
    """'h.2.mlp.activation' as 'block 2, mlp activation', and 'first moment of h.2...' likewise."""
    what, of, name = name.rpartition(" of ")
    parts = name.split(".")
    words = f"block {parts[1]}, {' '.join(parts[2:])}" if parts[0] == "h" else " ".join(parts)
    return what + of + words


first_beyond = functools.partial(divergence.first_beyond, in_words=in_words)


def backward_order(values: list[str], parameters: list[str]) -> list[str]:
    """Gradients in the order the backward pass makes them: each value's, then its own parameters'."""
    owner: dict[str, list[str]] = {}
    for name in parameters:
        owner.setdefault(_maker(name), []).append(name)
    order = []
    for value in reversed(values):
        order += [value, *owner.pop(value, [])]
    return order + [name for names in owner.values() for name in names]


def _maker(parameter: str) -> str:
    """The value that a parameter takes part in last on the way back."""
    module = parameter.rpartition(".")[0]
    if module.endswith("attn.c_attn") or module.endswith("attn.q_norm"):
        return module.rpartition(".")[0] + ".q"
    if module.endswith("attn.k_norm"):
        return module.rpartition(".")[0] + ".k"
    return {"wte": "embeddings", "wpe": "embeddings", "lm_head": "logits"}.get(module, module)
