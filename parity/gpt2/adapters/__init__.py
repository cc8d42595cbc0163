"""What an adapter of a GPT-2 has, and the two that the suite compares: JAX's, the candidate, and PyTorch's, the
reference."""

from gpt2_core.weights import Weights
from parity.gpt2.adapters.protocol import Adapter


def both(weights: Weights, device: str = "cpu") -> tuple[Adapter, Adapter]:
    """The candidate and the reference in float64. `device` is PyTorch's, "cpu" or "cuda"; JAX computes where JAX
    does."""
    # Loaded late: two frameworks take seconds.
    from parity.gpt2.adapters.jax_adapter import JaxAdapter
    from parity.gpt2.adapters.torch_adapter import TorchAdapter

    return JaxAdapter(weights), TorchAdapter(weights, device=device)
