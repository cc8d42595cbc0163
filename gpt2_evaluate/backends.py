"""Either framework's scores of any weights."""

import dataclasses

import numpy as np

from gpt2_core.config import TrainConfig
from gpt2_core.evaluation.scoring import ScoreBatch
from gpt2_core.weights import Weights


def jax_program(weights: Weights, *, mesh: int | str | None, precision: str, batch_size: int):
    """A JAX program that computes batches of so many sequences on a mesh, and the parameters there.

    `gpt2_jax.runtime.configure` must have been called for this precision and mesh. Raises UserError if the model or the
    batch can't be split over the mesh.
    """
    from gpt2_jax.train import resolve
    from gpt2_jax.train_step import make_program
    from gpt2_jax.weights import from_canonical

    model = dataclasses.replace(weights.config, dropout=0.0)  # nothing is dropped, and no kernel need be able to
    program = make_program(resolve(TrainConfig(model=model, mesh=mesh, precision=precision, batch_size=batch_size)))
    return program, program.put_params(from_canonical(weights, program.definition.execution.param_dtype.name))


def jax_scorer(weights: Weights, *, mesh: int | str | None, precision: str, batch_size: int) -> ScoreBatch:
    """Scores by the JAX model; see `jax_program`."""
    from gpt2_jax.score import scorer

    return scorer(*jax_program(weights, mesh=mesh, precision=precision, batch_size=batch_size))


def torch_scorer(weights: Weights, *, device: str, precision: str) -> ScoreBatch:
    """Scores by the reference; raises UserError for a device or a precision that this machine doesn't have."""
    import torch

    from gpt2_torch.runtime import pick_device, resolve_precision, set_matmul_precision
    from gpt2_torch.score import scorer
    from gpt2_torch.weights import build

    chosen = pick_device(device)
    resolved = resolve_precision(precision, chosen)
    set_matmul_precision(resolved)
    model = build(weights.astype(np.float64 if resolved == "float64" else np.float32)).to(chosen)
    return scorer(model, chosen, torch.autocast(chosen.type, torch.bfloat16, enabled=resolved == "bfloat16"))
