"""Check `mesh`: JAX's losses and gradient norms on meshes of several shapes, and executed in every way, against
PyTorch's."""

import math
from collections.abc import Iterator

import jax
import numpy as np

from gpt2_core.batches import TrainingBatches
from gpt2_core.config import OptimizerConfig, TrainConfig
from gpt2_core.errors import UserError
from gpt2_jax.mesh import check_mesh, parse_mesh
from parity.sides import JaxSide, TorchSide
from parity.steps import first_divergence
from parity.suite import Result, Skipped, Subject

LIMIT = 1e-11  # a sum over devices is a sum in another order, no more
CASES = {
    "data=8": {"mesh": "data=8"},
    "fsdp=8": {"mesh": "fsdp=8"},
    "tensor=2": {"mesh": "tensor=2"},
    "data=2, fsdp=2, tensor=2": {"mesh": "data=2,fsdp=2,tensor=2"},
    "data=2, accumulation 4, remat, scan": {"mesh": "data=2", "accumulation": 4, "remat": True, "scan_layers": True},
    "1 device": {},
    "accumulation 2": {"accumulation": 2},
    "accumulation 4": {"accumulation": 4},
    "remat": {"remat": True},
    "scan over layers": {"scan_layers": True},
}
_QUICK = ("data=2, fsdp=2, tensor=2",)


def check(subject: Subject) -> Iterator[Result | Skipped]:
    steps = subject.at(4, 10)
    model = subject.weights.config
    stream = TrainingBatches(subject.tokens, block_size=model.block_size, batch_size=8, seed=subject.seed)
    batches = [stream[step] for step in range(steps)]
    ours, theirs, reference = JaxSide(subject.weights), TorchSide(subject.weights), _config(subject, steps, {})
    b = theirs.train(reference, batches)
    # What the later cases change, `combinations` changes too.
    for name in subject.at(_QUICK, list(CASES)[:5], CASES):
        settings = CASES[name]
        needed = math.prod(parse_mesh(settings.get("mesh", 1)).values())
        try:
            config = _config(subject, steps, settings)
            check_mesh(parse_mesh(config.mesh), config)
        except UserError as error:
            yield Skipped("mesh", f"{name}: {error}")
            continue
        if needed > len(jax.devices()):
            yield Skipped("mesh", f"{name}: needs {needed} devices and there are {len(jax.devices())}")
            continue
        a = ours.train(config, batches)
        # The norm of the gradient too: AdamW hardly sees a gradient that is too large by a factor.
        norms = np.abs(a.grad_norms - b.grad_norms) / b.grad_norms
        differences = np.maximum(np.abs(a.losses - b.losses), norms)
        where = f"largest at step {np.argmax(differences)}"
        if (beyond := ~(differences <= LIMIT)).any():
            again = ours.steps(config, batches), theirs.steps(reference, batches)
            where = f"loss or gradient norm part at step {np.argmax(beyond)}"
            where += f"; {first_divergence(subject.weights, *again, config, batches)}"
        yield Result("mesh", f"{name}, {steps} steps", float(np.max(differences)), LIMIT, where)


def _config(subject: Subject, steps: int, settings: dict) -> TrainConfig:
    return TrainConfig(
        model=subject.weights.config,
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2),
        steps=steps,
        batch_size=8,
        precision="float64",
        **{"mesh": 1} | settings,
    )
