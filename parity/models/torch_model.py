"""PyTorch models: run in float64, watched through hooks and a dispatch mode. The user's module is copied first."""

import contextlib
import copy
import math
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch._decomp import get_decompositions
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from parity.engine.errors import EngineError
from parity.engine.results import in_words as in_one_line
from parity.models.model import Arrays, Inputs, NarrowCast, Recording, Step, Trained, Weight
from parity.models.places import is_library, short_place

aten = torch.ops.aten

# Operations that only move or repeat numbers.
LAYOUT = frozenset({
    *("_reshape_alias", "_to_copy", "_unsafe_view", "alias", "as_strided", "cat", "clone", "constant_pad_nd", "copy_"),
    *("detach", "embedding", "expand", "flip", "index", "index_select", "lift_fresh", "permute", "repeat", "roll"),
    *("select", "slice", "split", "split_with_sizes", "squeeze", "stack", "t", "transpose", "unbind", "unsqueeze"),
    *("view", "expand_copy", "permute_copy", "unfold", "narrow", "slice_scatter", "to", "broadcast_in_dim"),
    *("unsafe_split", "unsafe_chunk", "reshape", "convert_element_type", "_reshape_copy", "contiguous", "flatten"),
})  # fmt: skip
# Operations that compute in several steps are decomposed, so that each step is a value that can be compared.
_APART = get_decompositions([
    *(aten.addmm, aten.baddbmm, aten.addbmm, aten.native_layer_norm, aten.native_group_norm, aten.gelu, aten.silu),
    *(aten._softmax, aten._log_softmax, aten.mish, aten.hardswish, aten.hardsigmoid, aten.softplus, aten.elu),
    *(aten.leaky_relu, aten._native_batch_norm_legit_no_training, aten.native_batch_norm),
    *(aten.addcmul, aten.addcdiv, aten.var_mean),
])  # fmt: skip
_LIBRARIES = ("torch",)
# Files whose functions a user calls by name.
_NAMED = ("torch/nn/functional.py", "torch/functional.py")
_NARROW = (torch.float32, torch.float16, torch.bfloat16)


@contextlib.contextmanager
def exact_tables() -> Iterator[None]:
    """What is constructed inside, and asks for a narrower type or for none, is in float64."""
    with _by_default(torch.float64), _Lifted():
        yield


@contextlib.contextmanager
def _by_default(dtype: torch.dtype) -> Iterator[None]:
    """What asks for no type is in this one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class TorchModel:
    framework = "PyTorch"
    kind = "torch.nn.Module"

    def __init__(self, module: torch.nn.Module, training: bool = False, owned: bool = False) -> None:
        """`owned`: nobody else has the module, so that it needn't be copied."""
        first = next(module.parameters(), None)
        if first is not None and first.is_complex():
            raise EngineError("the PyTorch model has complex parameters, which can't be compared yet")
        if len({p.device for p in module.parameters()}) > 1:
            raise EngineError("the PyTorch model lies on several devices; move it to one, with .cpu()")
        self._held: Arrays | None = None
        self._training = training
        self._module = (module if owned else copy.deepcopy(module)).cpu().double()
        self._module.train(training)
        if training:
            # Dropout differs in every call: it is off on both sides.
            for part in self._module.modules():
                if isinstance(part, torch.nn.modules.dropout._DropoutNd):
                    part.eval()
        # Of an owned module: as they are, until other values are held.
        self._own = dict((*module.named_parameters(), *module.named_buffers()))
        self._tensors = self._named()
        self._frozen = {n for n, t in self._module.named_parameters() if not t.requires_grad}
        for name, tensor in self._tensors.items():
            if tensor.device.type == "meta":
                raise EngineError(f"{name} of the PyTorch model has no values (device meta); load its weights first")

    def _named(self) -> dict[str, torch.Tensor]:
        """Floating-point parameters, then buffers; a tensor with several names once, under its first."""
        found, seen = {}, set()
        for name, tensor in (*self._module.named_parameters(), *self._module.named_buffers()):
            if tensor.is_floating_point() and id(tensor) not in seen:
                seen.add(id(tensor))
                found[name] = tensor
        return found

    def weights(self) -> list[Weight]:
        parameters = {id(p) for p in self._module.parameters()}
        saved = set(self._module.state_dict(keep_vars=True))
        return [
            Weight(name, _array(self._own[name]), id(t) in parameters, name in saved, name in self._frozen)
            for name, t in self._tensors.items()
        ]

    def release(self) -> None:
        for t in self._tensors.values():
            t.data = t.new_zeros(()).expand(t.shape)
        self._held = None

    def run(self, weights: Arrays, inputs: Inputs) -> list[np.ndarray]:
        with self._holding(weights), torch.no_grad():
            return [x.detach().numpy().copy() for x in self._call(_tensors(inputs))]

    def gradients(
        self, weights: Arrays, inputs: Inputs, cotangents: Sequence[np.ndarray], of: Collection[str]
    ) -> tuple[Arrays, Arrays]:
        values = _tensors(inputs)
        floats = {n: x for n, x in zip(inputs.names(), values.values(), strict=True) if x.is_floating_point()}
        for x in floats.values():
            x.requires_grad_(True)
        for n, t in self._tensors.items():
            if isinstance(t, torch.nn.Parameter):
                t.requires_grad_(n in of)  # frozen ones too
        parameters = {n: t for n, t in self._tensors.items() if t.requires_grad}
        with self._holding(weights), _Lifted():
            outputs = self._call(values)
            loss = sum((o * torch.from_numpy(c)).sum() for o, c in zip(outputs, cotangents, strict=True))
            wanted = [*parameters.values(), *floats.values()]
            depends = loss.requires_grad
            found = torch.autograd.grad(loss, wanted, allow_unused=True) if depends else [None] * len(wanted)
        arrays = [np.zeros(w.shape) if g is None else g.numpy() for w, g in zip(wanted, found, strict=True)]
        return (
            dict(zip(parameters, arrays, strict=False)),
            dict(zip(floats, arrays[len(parameters) :], strict=True)),
        )

    def run_lifted(self, weights: Arrays, inputs: Inputs) -> list[np.ndarray]:
        with self._holding(weights), torch.no_grad(), _Lifted():
            return [x.detach().numpy().copy() for x in self._call(_tensors(inputs))]

    def run_in_float32(self, weights: Arrays, inputs: Inputs) -> list[np.ndarray]:
        with self._holding(weights), torch.no_grad():
            rounded = {id(t): _rounded(t) for t in self._tensors.values()}  # in place of copies in float64
            narrow = copy.deepcopy(self._module, rounded).float()
            values = [x.float() if x.is_floating_point() else x for x in _tensors(inputs).values()]
            with _by_default(torch.float32):
                outputs = _floats(narrow, _tensors(inputs).with_values(values))
            return [x.double().numpy() for x in outputs]

    def train(self, weights: Arrays, inputs: Inputs, loss: Any, optimizer: Any, steps: int) -> Trained:
        """Train on one input with what `optimizer(parameters)` returns, an optimizer of torch.optim."""
        values = _tensors(inputs)
        with self._holding(weights, alone=True):
            parameters = {
                n: t.requires_grad_(True) for n, t in self._tensors.items() if isinstance(t, torch.nn.Parameter)
            }
            stepper, losses, first = optimizer(list(parameters.values())), [], {}
            for number in range(steps):
                outputs = self._module(*values.arguments, **values.keywords)
                value = loss(outputs, *values.values()) if loss else _first_float(outputs).square().mean()
                stepper.zero_grad()
                value.backward()
                stepper.step()
                losses.append(float(value.detach()))
                if number == 0:
                    first = {n: t.detach().numpy().copy() for n, t in parameters.items()}
        return Trained(np.array(losses), first)

    def state_after(self, weights: Arrays, inputs: Inputs) -> Arrays:
        """Buffers after one call."""
        with self._holding(weights), torch.no_grad():
            self._call(_tensors(inputs))
            return {
                n: t.detach().numpy().copy() for n, t in self._tensors.items() if not isinstance(t, torch.nn.Parameter)
            }

    def record(self, weights: Arrays, inputs: Inputs) -> Recording:
        watch = _Watch(self._module, self._tensors, lift=True)
        with self._holding(weights), torch.no_grad():
            values = _tensors(inputs)
            watch.begin(dict(zip(inputs.names(), values.values(), strict=True)))
            with sdpa_kernel(SDPBackend.MATH), watch.watching():
                outputs = self._call(values)
        return watch.recording(outputs)

    def narrow_casts(self, inputs: Inputs) -> list[NarrowCast]:
        watch = _Watch(self._module, self._tensors, lift=False)
        with _by_default(torch.float64), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), watch.watching():
            self._call(_tensors(inputs))
        return list(dict.fromkeys(watch.narrow))

    def _call(self, inputs: Inputs) -> list[torch.Tensor]:
        return [x.double() for x in _floats(self._module, inputs)]

    @contextlib.contextmanager
    def _holding(self, weights: Arrays, alone: bool = False) -> Iterator[None]:
        """These values in the module inside; `alone`: in memory of its own, because they are changed."""
        # A call in training mode changes buffers, and an optimizer the parameters. Otherwise the module computes on the
        # arrays themselves: models are large.
        alone = alone or self._training
        if self._held is not weights or alone:
            for name, t in self._tensors.items():
                x = weights[name]
                t.data = torch.from_numpy(np.array(x) if alone or not x.flags.writeable else np.ascontiguousarray(x))
        self._held = None if alone else weights
        with _by_default(torch.float64):
            yield


def _array(tensor: torch.Tensor) -> np.ndarray:
    """As numpy, which has no bfloat16, without a copy where that is possible."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _rounded(tensor: torch.Tensor) -> torch.Tensor:
    narrow = tensor.detach().float()
    return torch.nn.Parameter(narrow) if isinstance(tensor, torch.nn.Parameter) else narrow


def _first_float(outputs: Any) -> torch.Tensor:
    return next(x for x in _leaves(outputs) if isinstance(x, torch.Tensor) and x.is_floating_point())


def _floats(module: torch.nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    """Its floating-point outputs."""
    try:
        outputs = module(*inputs.arguments, **inputs.keywords)
    except Exception as error:  # the user's own code
        raise EngineError(f"the PyTorch model can't be called with these inputs: {in_one_line(error)}") from error
    leaves = [x for x in _leaves(outputs) if isinstance(x, torch.Tensor)]
    if any(x.is_complex() for x in leaves):
        raise EngineError("the PyTorch model returns complex numbers, which can't be compared yet; return real ones")
    return [x for x in leaves if x.is_floating_point()]


def _leaves(outputs: Any) -> list[Any]:
    """Tensors of nested outputs in order: of a dataclass-like output of transformers as well."""
    if hasattr(outputs, "to_tuple"):
        outputs = outputs.to_tuple()
    if isinstance(outputs, dict):
        return [x for value in outputs.values() for x in _leaves(value)]
    if isinstance(outputs, list | tuple):
        return [x for value in outputs for x in _leaves(value)]
    return [outputs]


def _tensors(inputs: Inputs) -> Inputs:
    def tensor(x):
        array = np.asarray(x)
        if array.dtype.kind == "f":
            array = array.astype(np.float64)
        elif array.dtype == np.int32:
            array = array.astype(np.int64)  # what embeddings and losses of PyTorch expect
        return torch.from_numpy(np.array(array))

    return inputs.with_values([tensor(x) for x in inputs.values()])


class _Lifted(TorchDispatchMode):
    """Casts to narrower types become casts to float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        args, kwargs = _lifted_arguments(args, dict(kwargs or {}))
        return func(*args, **kwargs)


def _lifted_arguments(args, kwargs):
    """With float64 for every narrower type, and for the values of tensors that came in one."""

    def lifted(x):
        if isinstance(x, torch.dtype) and x in _NARROW:
            return torch.float64
        return x.double() if isinstance(x, torch.Tensor) and x.dtype in _NARROW else x

    return tree_map(lifted, (args, kwargs))


class _Watch(TorchDispatchMode):
    """Records what every operation computes. With `lift`, casts to narrower types become casts to float64."""

    def __init__(self, module: torch.nn.Module, tensors: dict[str, torch.Tensor], lift: bool) -> None:
        super().__init__()
        self._module, self._lift = module, lift
        self._numbers: dict[int, int] = {}
        self._alive: list[Any] = []  # so that no identity is given twice
        self._sharing: dict[int, list[int]] = defaultdict(list)  # numbers of the values in one memory
        self._stack: list[str] = []
        self._outer = ""  # the operation that is being decomposed
        self.values: dict[int, np.ndarray] = {}
        self.steps: list[Step] = []
        self.narrow: list[NarrowCast] = []
        self._constants: set[float] = set()
        self._weights = {self._new(t): name for name, t in tensors.items()} if lift else {}
        self._from_weights = set(self._weights)
        self._inputs: dict[int, str] = {}

    def begin(self, inputs: dict[str, torch.Tensor]) -> None:
        named = dict((*self._module.named_parameters(), *self._module.named_buffers()))
        for number, name in self._weights.items():
            self._keep(number, named[name])
        for name, x in inputs.items():
            number = self._new(x)
            self._inputs[number] = name
            self._keep(number, x)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        hooks = []
        for name, part in self._module.named_modules():
            hooks.append(part.register_forward_pre_hook(lambda *_, name=name: self._stack.append(name)))
            hooks.append(part.register_forward_hook(lambda *_: self._leave(), always_call=True))
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def _inside(self, operation: str) -> Iterator[None]:
        """Watch the steps of a decomposed operation, under its name."""
        before, self._outer = self._outer, self._outer or operation.removeprefix("native_").lstrip("_")
        try:
            with self:
                yield
        finally:
            self._outer = before

    def _leave(self) -> None:
        self._stack.pop()

    def recording(self, outputs: Sequence[torch.Tensor]) -> Recording:
        numbers = [self._numbers[id(x)] for x in outputs]
        return Recording(self.values, self.steps, self._weights, self._inputs, numbers, frozenset(self._constants))

    def number_of(self, output: torch.Tensor | np.ndarray) -> int | None:
        """Of a tensor that was computed, or of the latest one with these values."""
        if isinstance(output, torch.Tensor):
            return self._numbers.get(id(output))
        equal = (n for n, x in reversed(self.values.items()) if np.array_equal(x, output))
        return next(equal, None)

    def _new(self, tensor: torch.Tensor) -> int:
        number = len(self._alive)
        self._alive.append(tensor)
        self._numbers[id(tensor)] = number
        return number

    def _keep(self, number: int, tensor: torch.Tensor) -> None:
        """Its values without a copy, because models are large: it is made when something writes into them."""
        self.values[number] = tensor.detach().resolve_neg().numpy()
        self._sharing[_memory(tensor)].append(number)

    def _part_from(self, written: Iterable[torch.Tensor]) -> None:
        """Copy the values that are in the memory of these tensors, which are about to be changed."""
        for x in written:
            for number in self._sharing.pop(_memory(x), ()):
                self.values[number] = self.values[number].copy()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given, _ = tree_flatten((args, kwargs))
        sources = [self._numbers[id(x)] for x in given if id(x) in self._numbers]
        self._constants.update(x for x in given if isinstance(x, float))
        if self._lift:
            apart = _variance if func in (aten.var.correction, torch.ops.prims.var.default) else _APART.get(func)
            apart = _deviation if func is aten.std.correction else apart
            if apart and not _is_integer(args):
                with self._inside(func.overloadpacket.__name__):
                    return apart(*args, **kwargs)
            if func is aten.convolution.default and args[2] is not None:
                with self._inside("conv"):
                    bare = aten.convolution.default(*args[:2], None, *args[3:], **kwargs)
                    return bare + args[2].reshape(-1, *[1] * (bare.ndim - 2))
            args, kwargs = _lifted_arguments(args, kwargs)
        if func._schema.is_mutable:
            self._part_from(_written(func, args, kwargs))
        result = func(*args, **kwargs)
        place, caller = _place()
        caller = self._outer or caller
        name = func.overloadpacket.__name__
        for x in tree_flatten(result)[0]:
            if not isinstance(x, torch.Tensor):
                continue
            if not self._lift:
                if x.dtype in _NARROW and name == "_to_copy":
                    self.narrow.append(NarrowCast(str(x.dtype).removeprefix("torch."), place))
                continue
            number = self._new(x)
            layout = name in LAYOUT or name.rstrip("_") in LAYOUT
            alone = layout and sources and self._from_weights.issuperset(sources)
            if alone:
                self._from_weights.add(number)  # a transposed weight: it depends on no input, and isn't compared
            elif x.is_complex():
                self.values[number] = np.zeros(0)
            elif x.dtype == torch.float64 or not x.is_floating_point():
                self._keep(number, x)
            module = self._stack[-1] if self._stack else ""
            self.steps.append(Step(number, name, caller, place, module, tuple(sources), layout))
        return result


def _memory(tensor: torch.Tensor) -> int:
    """Where its elements are; views of one tensor share it."""
    return tensor.untyped_storage().data_ptr()


def _written(func: torch._ops.OpOverload, args, kwargs) -> list[torch.Tensor]:
    """The tensors that an operation changes, as its schema says."""
    arguments = func._schema.arguments
    given = [kwargs.get(a.name, args[i] if i < len(args) else None) for i, a in enumerate(arguments)]
    changed = [x for a, x in zip(arguments, given, strict=True) if a.alias_info and a.alias_info.is_write]
    return [x for x in tree_flatten(changed)[0] if isinstance(x, torch.Tensor)]


def _variance(x, dim=None, correction=1, keepdim=False, output_dtype=None):
    """A variance step by step; `aten.var` keeps no axis unless asked to, `prims.var` never does."""
    axes = list(range(x.ndim)) if not dim else [d % x.ndim for d in dim]
    count = math.prod(x.shape[d] for d in axes)
    squares = (x - x.mean(axes, keepdim=True)).square().sum(axes, keepdim=keepdim)
    return squares / (count - (1 if correction is None else correction))


def _deviation(*args, **kwargs):
    return _variance(*args, **kwargs).sqrt()


def _is_integer(args) -> bool:
    return isinstance(args[0], torch.Tensor) and not args[0].is_floating_point()


def _place() -> tuple[str, str]:
    """The innermost line outside PyTorch, and the function of PyTorch that it calls."""
    frame, caller = sys._getframe(2), ""
    while frame is not None:
        code = frame.f_code
        if is_library(code.co_filename, _LIBRARIES):
            if code.co_filename.endswith(_NAMED) and code.co_name not in ("forward", "inner"):
                caller = code.co_name.lstrip("_")
        elif "/parity/models/" not in code.co_filename:
            return short_place(code.co_filename, frame.f_lineno), caller
        frame = frame.f_back
    return "", caller


def record_function(function: Any, inputs: np.ndarray) -> Recording | None:
    """What a function from a numpy array computes with PyTorch, if it does; its float32 weights count as float64."""
    watch = _Watch(torch.nn.Module(), {}, lift=True)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), watch.watching():
        try:
            outputs = function(inputs)
        except Exception:  # the user's own code, which may do what can't be watched
            return None
    leaves = _leaves(outputs)
    if not watch.steps or not all(isinstance(x, torch.Tensor | np.ndarray) for x in leaves):
        return None
    numbers = [watch.number_of(x) for x in leaves]
    if None in numbers:
        return None
    return Recording(watch.values, watch.steps, {}, {}, numbers)
