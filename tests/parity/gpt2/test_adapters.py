"""The checks run with any adapter: what one can't do is skipped, with its name and what it lacks."""

import functools

import numpy as np
import pytest

from gpt2_core.weights import Weights
from parity.engine.results import Result, Skipped
from parity.gpt2.adapters import both, protocol
from parity.gpt2.adapters.protocol import NAMES
from parity.gpt2.adapters.torch_adapter import TorchAdapter
from parity.gpt2.faults import case_of
from parity.gpt2.suite import CHECKS, load

pytestmark = pytest.mark.usefixtures("x64")


class LogitsOnly:
    """The least that an adapter has: a name, its weights, and logits."""

    name, device = "third", "cpu"

    def __init__(self, weights: Weights, dtype: str = "float64") -> None:
        self.weights, self.config = weights, weights.config
        self._inner = TorchAdapter(weights, dtype)

    def make(self, weights: Weights, dtype: str = "float64") -> "LogitsOnly":
        return LogitsOnly(weights, dtype)

    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        return self._inner.logits(tokens_BT)


class Third(TorchAdapter):
    """A PyTorch program that trains and generates, without dropout to see."""

    name = "third"
    dropout_masks = train_with_masks = None

    def make(self, weights: Weights, dtype: str = "float64") -> "Third":
        return Third(weights, dtype)


case = functools.cache(case_of)


def run(check: str, make) -> tuple[list[Result], list[Skipped]]:
    found = list(load(check)(case(), make(case().weights), TorchAdapter(case().weights)))
    assert all(isinstance(r, Skipped) or r.passed for r in found), found
    return [r for r in found if isinstance(r, Result)], [r for r in found if isinstance(r, Skipped)]


def test_both_adapters_bear_the_names_that_reports_give_them():
    assert tuple(adapter.name for adapter in both(case().weights)) == NAMES


# `weights`, `data` and `trainer` look at files, texts and the plain loop whatever the adapters are.
@pytest.mark.long
@pytest.mark.parametrize("check", [name for name in CHECKS if name not in ("trainer", "weights", "data")])
def test_an_adapter_with_nothing_but_logits_ends_no_check_in_an_error(check):
    results, skipped = run(check, LogitsOnly)
    assert skipped and all("third has no" in s.reason for s in skipped)
    assert any(r.case.startswith("1 values") for r in results) is (check == "forward")


def test_a_program_of_pytorch_alone_passes_what_it_can_and_is_excused_from_the_rest():
    passed = {
        check: run(check, Third) for check in ("forward", "gradients", "generation", "settings", "mesh", "dropout")
    }
    assert all(passed[check][0] for check in ("forward", "gradients", "generation", "settings"))
    assert passed["forward"][1] == passed["gradients"][1] == []
    assert "third has no KV cache (decoded_logits, decoded_intermediates)" in passed["generation"][1][0].reason
    assert "third has no mesh of devices" in passed["mesh"][1][0].reason and passed["mesh"][0] == []
    assert "third has no dropout masks that can be seen" in passed["dropout"][1][0].reason
    assert len(passed["settings"][1]) == 1  # the case with dropout


def test_a_wrong_third_program_is_seen_and_called_by_its_name():
    class Wrong(LogitsOnly):
        def logits(self, tokens_BT):
            return 1.5 * super().logits(tokens_BT)

    (first, *_) = [
        r for r in load("forward")(case(), Wrong(case().weights), TorchAdapter(case().weights)) if isinstance(r, Result)
    ]
    assert not first.passed and "1.5 times as large in third as in PyTorch" in first.where


# What each of the two adapters lacks. A method that is renamed would otherwise turn a check of it into a skipped case.
LACKS = {
    "JAX": {"GIVEN_MASKS", "PROCESSES", "SEEDS"},
    "PyTorch": {
        *("PLAIN_LOGITS", "PADDING", "NARROW_INITIALIZATION", "BORN_ON_MESH", "MESH", "DROPPED_INTERMEDIATES"),
        *("DECODING", "STOPPING", "ATTENTION", "LOSS", "NORM_KERNEL", "FEW_SLOTS", "PROGRAM", "STEP_PROGRAM"),
    },
}


def test_the_two_adapters_have_every_capability_but_these():
    capabilities = {n: c for n, c in vars(protocol).items() if isinstance(c, protocol.Capability)}
    for adapter in both(case().weights):
        assert {n for n, c in capabilities.items() if not c.of(adapter)} == LACKS[adapter.name]
