"""Packages of the extra `data`, which are imported when a corpus needs them."""

import importlib
from typing import Any

from gpt2_core.errors import UserError


def import_extra(module: str, purpose: str) -> Any:
    """Import the module that `purpose`, in the plural, need; raises UserError if it isn't installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{purpose} need the package {module.split('.')[0]}: pip install 'gpt2-jax[data]'") from error
