"""Whether two models compute the same: `compare` for any pair, `parity/compare.py` for this project's own.

Importing this imports neither framework.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parity.pair.report import Report

__all__ = ["assert_same_model", "capture", "compare", "converter", "transfer"]


def compare(reference: Any, candidate: Any, **options: Any) -> "Report":
    """Compare two models; see `parity.pair.compare.compare` for the options."""
    from parity.pair.compare import compare

    return compare(reference, candidate, **options)


def assert_same_model(*, reference: Any, candidate: Any, **options: Any) -> None:
    """For a test suite: `compare(...).assert_same()`."""
    __tracebackhide__ = True
    compare(reference, candidate, **options).assert_same()


def transfer(source: Any, target: Any, **options: Any) -> Any:
    """Write the weights of one model into the other by their mapping; see `parity.pair.transfer`."""
    from parity.pair.transferring import transfer

    return transfer(source, target, **options)


def converter(mapping: Any) -> Any:
    """A plain function from the source's checkpoint to the target's, arrays by name."""
    from parity.pair.mapping import converter

    return converter(mapping)


def capture(model: Any, **options: Any) -> Any:
    """Record a model's values, to be compared in another environment; see `parity.pair.capturing`."""
    from parity.pair.capturing import capture

    return capture(model, **options)
