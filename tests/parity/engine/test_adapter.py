"""A capability is its methods, and what an adapter lacks is said."""

from parity.engine.adapter import Capability, lacking
from parity.engine.results import Skipped

CACHE = Capability("KV cache", ("decode", "grow"))


class Bare:
    name = "bare"
    grow = None


class Able(Bare):
    name = "able"

    def decode(self): ...

    def grow(self): ...


def test_an_adapter_has_a_capability_if_it_has_all_of_its_methods():
    assert CACHE.of(Able()) and not CACHE.of(Bare())
    assert lacking("generation", "decoding", (Able(), CACHE)) is None
    skipped = Skipped("generation", "decoding: bare has no KV cache (decode, grow)")
    assert lacking("generation", "decoding", (Able(), CACHE), (Bare(), CACHE)) == skipped
