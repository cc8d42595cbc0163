"""What checks ask of an adapter beyond its name, and how they say that one doesn't have it.

An adapter puts one implementation of a model behind methods that checks call. Checks are given two, the candidate and
the reference. Few methods are needed by all; each group of others is a capability, which an adapter has if it has its
methods.
"""

import dataclasses
from typing import Any, Protocol, Self

from parity.engine.results import Skipped


class Adapter(Protocol):
    """One implementation of a model, holding one set of weights."""

    name: str
    """As it is called in results: JAX, PyTorch."""

    def make(self, weights: Any, dtype: str = "float64") -> Self:
        """The same implementation, on the same device, with other weights or computing in another dtype."""


@dataclasses.dataclass(frozen=True)
class Capability:
    """Something that an adapter may be able to do."""

    words: str
    """What an adapter without it has none of: 'KV cache'."""
    methods: tuple[str, ...]

    def of(self, adapter: Adapter) -> bool:
        return not self.missing(adapter)

    def missing(self, adapter: Adapter) -> list[str]:
        """The methods that the adapter would need for it."""
        return [name for name in self.methods if not callable(getattr(adapter, name, None))]


def lacking(check: str, what: str, *asked: tuple[Adapter, Capability]) -> Skipped | None:
    """The skipped case, if one of these adapters lacks what `what` asks of it: 'logits on a mesh: PyTorch has no mesh
    of devices (its adapter has no devices)'. None if they have everything."""
    for adapter, capability in asked:
        if missing := capability.missing(adapter):
            return Skipped(check, f"{what}: {adapter.name} has no {capability.words} ({', '.join(missing)})")
    return None
