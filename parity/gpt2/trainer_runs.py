"""Short runs of a trainer, for the check `trainer`: what they start from, and how they are interrupted."""

import contextlib
import dataclasses
import gc
import io
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np

import gpt2_core.runs.log
import gpt2_torch.train
from gpt2_convert import read_initial_weights, write_weights
from gpt2_core.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from gpt2_core.errors import Stopped
from gpt2_core.weights import Weights
from parity.gpt2 import plain_loop
from parity.gpt2.adapters.protocol import Trainer
from parity.gpt2.cases import Case, random_weights
from parity.gpt2.plain_loop import Outcome, Text

MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=257)
# Past a checkpoint, and no step that is evaluated: a resumed run takes back what was logged since.
INTERRUPTED_AT = 6


@dataclasses.dataclass(frozen=True)
class Setting:
    """What every run of the check starts from."""

    folder: Path
    text: Text
    weights: Weights
    config: TrainConfig
    """Its numbers are chosen so that every interval ends at another step, and nothing divides evenly."""

    def due(self, config: TrainConfig) -> Outcome:
        return plain_loop.run(config, self.weights, self.text)


def setting_of(case: Case, folder: Path, device: str) -> Setting:
    block_size = MODEL.block_size
    ids = case.tokens % MODEL.vocab_size
    first, second, third = np.split(ids, np.cumsum([11 * block_size + 6, 7 * block_size + 1]))
    # Validation text of another alphabet: training makes its loss worse, so the best checkpoint isn't the newest.
    val = (third[: 11 * block_size + 1] + MODEL.vocab_size // 2) % MODEL.vocab_size
    text = Text((first, second), val)
    tokens = folder / "tokens"
    tokens.mkdir()
    for name, shard in (("train-0", first), ("train-1", second), ("val", val)):
        shard.astype("<u2").tofile(tokens / f"{name}.bin")
    weights = random_weights(MODEL, case.seed)
    write_weights(weights, folder / "weights.safetensors", "safetensors")
    config = TrainConfig(
        model=MODEL,
        data=DataConfig(tokens=str(tokens), tokenizer="bytes"),
        # An epsilon above the rounding of gradients that are zero but for it, such as those of the keys' biases.
        optimizer=OptimizerConfig(
            learning_rate=1e-2,
            final_fraction=0.2,
            warmup_steps=3,
            weight_decay=0.2,
            beta1=0.85,
            beta2=0.97,
            epsilon=1e-6,
            clip_norm=0.25,
        ),
        steps=12,
        batch_size=4,
        accumulation=2,
        precision="float64",
        seed=case.seed + 7,  # none of the numbers that a mistake would put in its place: 0, 1, 1337
        mesh=1,
        device=device,
        compile=False,
        init_from=str(folder / "weights.safetensors"),
        log_interval=2,
        eval_interval=4,
        eval_sequences=7,
        checkpoint_interval=5,
        keep_checkpoints=1,
        sample_interval=3,
        sample_tokens=9,
    )
    return Setting(folder, text, weights, config)


def named(setting: Setting, config: TrainConfig, title: str) -> TrainConfig:
    return dataclasses.replace(config, run_dir=str(setting.folder / title.replace(", ", "-").replace(" ", "-")))


def _interrupt() -> None:
    raise KeyboardInterrupt


def run(
    trainer: Trainer, config: TrainConfig, interrupt_at: int | None = None, by: Callable[[], None] = _interrupt
) -> bool:
    """Train without a word; whether what `by` does as the batch of `interrupt_at` is logged ended it."""
    log, pressed = gpt2_core.runs.log.RunLog.train, False

    def logging(self, step: int, outcome: gpt2_core.runs.log.Outcome, *, learning_rate: float) -> None:
        nonlocal pressed
        log(self, step, outcome, learning_rate=learning_rate)
        if step == interrupt_at:
            pressed = True
            by()

    # What is older than the run needs no search for cycles after it, and is most of what there is.
    gc.freeze()
    with (
        contextlib.redirect_stdout(io.StringIO()),
        # No number hangs on either, and each takes longer than all the steps.
        mock.patch.object(gpt2_core.runs.log, "draw_curves"),
        mock.patch.object(gpt2_torch.train, "check_memory"),
        mock.patch.object(gpt2_core.runs.log.RunLog, "train", logging),
    ):
        try:
            trainer.train(config, read_initial_weights)
            pressed = False
        except (KeyboardInterrupt, Stopped):
            if not pressed:
                raise
        finally:
            # The folder is locked as long as anything refers to its plan; a command's process would be over.
            gc.collect()
            gc.unfreeze()
    return pressed
