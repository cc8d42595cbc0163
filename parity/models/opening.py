"""Which kind of model something is. Frameworks are recognised by their classes' modules: none is imported for it."""

import contextlib
import inspect
import sys
from typing import Any

from parity.engine.errors import EngineError
from parity.engine.results import in_words
from parity.models.model import Model

KINDS = (
    "a torch.nn.Module, a flax.nnx.Module, an Equinox module, (Linen module, variables), (Haiku transformed function, "
    "parameters), (function of (parameters, inputs), parameters), or a function without arguments that makes one"
)


def open_model(given: Any, role: str, training: bool = False) -> Model:
    """The model behind the common interface. Raises EngineError if it is none of KINDS; `role` names it there."""
    made = _made(given)
    owned, given = made is not given, made
    if _is(given, "parity.pair.capturing", "Captured"):
        return given
    if _is(given, "torch.nn.modules.module", "Module"):
        from parity.models.torch_model import TorchModel

        return TorchModel(given, training, owned)
    kind = _jax_kind(given)
    if kind is None:
        raise EngineError(f"the {role} is {_describe(given)}; expected {KINDS}")
    from parity.models import jax_model

    if kind == "nnx":
        definition = jax_model.of_nnx(given, training)
    elif kind == "equinox":
        definition = jax_model.of_tree(given, _call, "Equinox module")
    elif kind == "linen":
        definition = jax_model.of_linen(*given, training)
    elif kind == "haiku":
        definition = jax_model.of_haiku(*given)
    else:
        function, parameters = given
        definition = jax_model.of_tree(parameters, function, "function of (parameters, inputs)")
    return jax_model.JaxModel(definition)


def _takes_arguments(given: Any) -> bool:
    # Of a class what its __init__ takes: classes of NNX have a metaclass that takes anything.
    function = given.__init__ if inspect.isclass(given) else given
    return len(inspect.signature(function).parameters) > inspect.isclass(given)


def _made(given: Any) -> Any:
    """The model of a function or class without arguments. It is made with float64 as both frameworks' default and casts
    to narrower types lifted, so that tables which it computes are as exact as its weights."""
    makes = inspect.isfunction(given) or inspect.ismethod(given) or inspect.isclass(given)
    if not makes or _takes_arguments(given):
        return given
    with contextlib.ExitStack() as exact:
        if "torch" in sys.modules:
            from parity.models.torch_model import exact_tables

            exact.enter_context(exact_tables())
        if "jax" in sys.modules:
            import jax

            exact.enter_context(jax.enable_x64(True))
        try:
            return given()
        except Exception as error:  # the user's own code
            packages = (given.__module__.partition(".")[0],)
            raise EngineError(f"{given.__name__}() makes no model: {in_words(error, packages)}") from error


def _call(module, *arguments, **keywords):
    return module(*arguments, **keywords)


def _jax_kind(given: Any) -> str | None:
    if _is(given, "flax.nnx", "Module"):
        return "nnx"
    if _is(given, "equinox", "Module") and callable(given):
        return "equinox"
    if isinstance(given, tuple) and len(given) in (2, 3):
        if _is(given[0], "flax.linen", "Module") and len(given) == 2:
            return "linen"
        if type(given[0]).__module__.startswith("haiku"):
            return "haiku"
        if callable(given[0]) and len(given) == 2:
            return "function"
    return None


def _is(given: Any, module: str, name: str) -> bool:
    return any(c.__name__ == name and c.__module__.startswith(module) for c in type(given).__mro__)


def _describe(given: Any) -> str:
    if _is(given, "flax.linen", "Module"):
        return "a Linen module without its variables"
    if inspect.isfunction(given):
        return f"the function {given.__name__} without its parameters"
    return f"a {type(given).__module__}.{type(given).__qualname__}"
