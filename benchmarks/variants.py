"""Train steps that differ from the default in one respect, and the stage of a campaign that compares two steps.

A variant is a row of a table: settings of the configuration, attributes of modules (set before anything is traced), or
flags of XLA.
"""

import contextlib
import dataclasses
import functools
import importlib
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console

from benchmarks import train
from benchmarks.measure import Session, ratio
from gpt2_core.config import TrainConfig
from gpt2_core.config.io import from_dict
from gpt2_core.errors import RunError


@dataclasses.dataclass(frozen=True)
class Variant:
    """`config`: dotted settings of TrainConfig. `attributes`: values by `module:name` (`module:Class.name`); a value
    that is text names another attribute in the same way."""

    name: str
    what: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    attributes: Mapping[str, int | str] = dataclasses.field(default_factory=dict)
    flags: str = ""


VARIANTS = (
    Variant("norm-xla", "`--norm_kernel xla`", config={"norm_kernel": "xla"}),
    Variant(
        "softmax-two-passes",
        "softmax of the loss in two passes",
        attributes={"gpt2_jax.loss:_in_one_pass": "gpt2_jax.loss:_in_two_passes"},
    ),
    Variant("chunk-256MB", "loss in chunks of 256 MB", attributes={"gpt2_jax.loss:CHUNK_BYTES": 256 << 20}),
    Variant("chunk-1GB", "loss in chunks of 1 GB", attributes={"gpt2_jax.loss:CHUNK_BYTES": 1 << 30}),
    Variant("chunk-2GB", "loss in chunks of 2 GB", attributes={"gpt2_jax.loss:CHUNK_BYTES": 2 << 30}),
    Variant(
        "head-narrowed-in-chunks",
        "the head rounded to bfloat16 in every chunk of the loss",
        attributes={"gpt2_jax.loss:_narrowed": "benchmarks.variants:as_it_is"},
    ),
    Variant(
        "gelu-kept",
        "GELU's intermediate values kept for the backward pass",
        attributes={"gpt2_jax.model:_recomputed": "benchmarks.variants:as_it_is"},
    ),
    Variant(
        "qkv-one-product",
        "q, k and v as one product, split afterwards",
        attributes={"gpt2_jax.layers:Linear.split": "benchmarks.variants:split_afterwards"},
    ),
    Variant("dropout", "`--model.dropout 0.1`", config={"model.dropout": 0.1}),
    Variant("remat", "`--remat true`", config={"remat": True}),
)

FLAGS = (
    Variant("no-triton-gemm", "products by cuBLAS alone", flags="--xla_gpu_enable_triton_gemm=false"),
    Variant("no-command-buffers", "no CUDA graphs", flags="--xla_gpu_enable_command_buffer="),
    Variant("no-autotuning", "nothing autotuned", flags="--xla_gpu_autotune_level=0"),
    Variant("cudnn-layer-norm", "cuDNN's layer norm", config={"norm_kernel": "xla"},
            flags="--xla_gpu_enable_cudnn_layer_norm=true"),
    Variant("cudnn-gemm-fusion", "cuDNN's fused products", flags="--xla_gpu_cudnn_gemm_fusion_level=2"),
)  # fmt: skip


def as_it_is(given: Any, *_: Any) -> Any:
    """The identity, instead of a transformation that is switched off."""
    return given


def split_afterwards(linear: Any, x: Any) -> list[Any]:
    """`gpt2_jax.layers.Linear.split` as one product of n times the width."""
    from gpt2_jax.layers import _project

    weight_INO = linear.weight[...]
    I, N, O = weight_INO.shape
    bias = None if linear.bias is None else linear.bias[...].reshape(1, N * O)
    (out,) = _project(x.reshape(-1, I), weight_INO.reshape(I, 1, N * O), bias)
    out = out.reshape(*x.shape[:-1], N, O)
    return [out[..., n, :] for n in range(N)]


def jax_side(name: str, config: TrainConfig, variant: Variant | None = None) -> dict[str, Any]:
    """A side for `compare`: JAX's step of this configuration, the default or a variant."""
    variant = variant or Variant("", "")
    return {
        "name": name,
        "function": "benchmarks.variants:jax_session",
        "config": dataclasses.asdict(_with(config, variant.config)),
        "attributes": dict(variant.attributes),
        "flags": variant.flags,
    }


def torch_side(name: str, config: TrainConfig, attention: str, *, compile: bool) -> dict[str, Any]:
    """A side for `compare`: PyTorch's step of this configuration with one of its attention kernels."""
    return {
        "name": name,
        "function": "benchmarks.variants:torch_session",
        "config": dataclasses.asdict(config),
        "attention": attention,
        "compile": compile,
    }


def compare(spec: dict[str, Any]) -> dict[str, Any]:
    """Measure two sides in alternating rounds; the first is the candidate.

    With `halve`, a batch that doesn't fit is halved until it does.
    """
    candidate, baseline = spec["sides"]
    while True:
        config = from_dict(baseline["config"])
        functions = {side["name"]: (side["function"], side) for side in (candidate, baseline)}
        try:
            rows, seconds = train.measure(
                functions,
                config,
                rounds=spec["rounds"],
                steps=spec["steps"],
                console=Console(markup=False, soft_wrap=True),
            )
            break
        except RunError as error:
            batch = config.batch_size // 2
            if not (spec.get("halve") and batch and _OUT_OF_MEMORY.search(str(error))):
                raise
            print(f"{error}; trying again with a batch of {batch}", flush=True)
            candidate, baseline = ({**side, "config": side["config"] | {"batch_size": batch}}
                                 for side in (candidate, baseline))  # fmt: skip
    found = ratio(seconds[candidate["name"]], seconds[baseline["name"]])
    return {
        "batch": config.batch_size,
        "model": dataclasses.asdict(config.model),
        "parameters": config.model.parameter_count,
        "sides": rows,
        "seconds_a_step": seconds,
        "ratio": dataclasses.asdict(found),
    }


def jax_session(spec: dict[str, Any]) -> Session:
    """JAX's side; it doesn't reserve GPU memory, which the other side needs too."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {spec['flags']}".strip()
    for where, value in spec["attributes"].items():
        setattr(*_found(where), getattr(*_found(value)) if isinstance(value, str) else value)
    return _naming_lack_of_memory(lambda: train.jax_session(spec | {"cached": True}))


def torch_session(spec: dict[str, Any]) -> Session:
    return _naming_lack_of_memory(lambda: train.torch_session(spec))


_OUT_OF_MEMORY = re.compile(r"out of memory|RESOURCE_EXHAUSTED", re.I)


def _naming_lack_of_memory(make) -> Session:
    with _lack_of_memory():
        session = make()

    def work(units: int) -> Any:
        with _lack_of_memory():
            return session.work(units)

    return dataclasses.replace(session, work=work)


@contextlib.contextmanager
def _lack_of_memory() -> Iterator[None]:
    """Turn an out-of-memory error, whose message is long, into a RunError with its first line."""
    try:
        yield
    except Exception as error:
        if _OUT_OF_MEMORY.search(str(error)):
            raise RunError(f"out of memory: {str(error).strip().splitlines()[0][:200]}") from error
        raise


def _found(where: str) -> tuple[Any, str]:
    """The owner of the attribute `module:name`, and its name; raises RunError if there is no such attribute."""
    path, _, names = where.partition(":")
    *owners, name = names.split(".")
    try:
        owner = functools.reduce(getattr, owners, importlib.import_module(path))
        getattr(owner, name)
    except AttributeError as error:
        raise RunError(f"{where}: there is no such attribute; correct the table in benchmarks/variants.py") from error
    return owner, name


def _with(config: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    for name, value in settings.items():
        group, _, inner = name.rpartition(".")
        if group:
            value = dataclasses.replace(getattr(config, group), **{inner: value})
        config = dataclasses.replace(config, **{group or inner: value})
    return config
