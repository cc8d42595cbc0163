"""Check `mesh`: the candidate's losses and gradient norms on meshes of several shapes, and executed in every way,
against the reference's."""

from collections.abc import Iterator

import numpy as np

from gpt2_core.config import OptimizerConfig, TrainConfig
from gpt2_core.data.batches import TrainingBatches
from gpt2_core.errors import UserError
from parity.engine.adapter import lacking
from parity.engine.results import Result, Skipped
from parity.gpt2 import limits
from parity.gpt2.adapters.protocol import MESH, TRAINING, Adapter
from parity.gpt2.cases import Case
from parity.gpt2.steps import first_divergence

CASES = {
    "data=8": {"mesh": "data=8"},
    # Gradients are reduce-scattered over one axis and all-reduced over the other; beside `tensor` they are not.
    "data=2, fsdp=4": {"mesh": "data=2,fsdp=4"},
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
_DEFAULT = ("data=8", "data=2, fsdp=4", *_QUICK, "data=2, accumulation 4, remat, scan")
_PROVE = ("data=2, fsdp=4", *_QUICK)


def check(case: Case, candidate: Adapter, reference: Adapter) -> Iterator[Result | Skipped]:
    if skipped := lacking(
        "mesh", "training on meshes", (candidate, TRAINING), (candidate, MESH), (reference, TRAINING)
    ):
        yield skipped
        return
    steps, limit = case.at(4, 10), limits.CURVE
    model = case.weights.config
    stream = TrainingBatches(case.tokens, sequence_length=model.block_size, batch_size=8, seed=case.seed)
    batches = [stream[step] for step in range(steps)]
    plainly = _config(case, steps, {})
    b = reference.train(plainly, batches)
    # What the others change, `combinations` changes too.
    for name in filter(case.runs, case.at(_QUICK, _DEFAULT, CASES, prove=_PROVE)):
        settings = CASES[name]
        needed = candidate.devices_of(settings.get("mesh", 1))
        try:
            config = _config(case, steps, settings)
            candidate.check_mesh(config)
        except UserError as error:
            yield Skipped("mesh", f"{name}: {error}")
            continue
        if needed > candidate.devices():
            yield Skipped("mesh", f"{name}: needs {needed} devices and there are {candidate.devices()}")
            continue
        a = candidate.train(config, batches)
        # The norm of the gradient too: AdamW hardly sees a gradient that is too large by a factor.
        norms = np.abs(a.grad_norms - b.grad_norms) / b.grad_norms
        differences = np.maximum(np.abs(a.losses - b.losses), norms)
        where = f"largest at step {np.argmax(differences)}"
        if (beyond := ~(differences <= limit)).any():
            where = f"loss or gradient norm part at step {np.argmax(beyond)}"
            where += f"; {first_divergence(case.weights, candidate, reference, config, plainly, batches)}"
        yield Result("mesh", f"{name}, {steps} steps", float(np.max(differences)), limit, where)


def _config(case: Case, steps: int, settings: dict) -> TrainConfig:
    return TrainConfig(
        model=case.weights.config,
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2),
        steps=steps,
        batch_size=8,
        precision="float64",
        **{"mesh": 1} | settings,
    )
