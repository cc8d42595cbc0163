"""The settings of a training run, as they are asked for and as a machine resolves them."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from gpt2_core.config.checks import (
    check_seed,
    divisors,
    one_of,
    refuse_unless,
    require_above_zero,
    require_nonnegative,
    require_positive,
)
from gpt2_core.config.model import ModelConfig
from gpt2_core.errors import UserError

# The value of `--resume` when it stands alone.
NEWEST = "newest"

Precision = Literal["float32", "tf32", "bfloat16", "float64"]
Order = Literal["shuffled", "sequential"]


@dataclass(frozen=True)
class DataConfig:
    """The text and how it becomes tokens."""

    corpus: str = "stdlib"
    """Which text: stdlib (the running Python's own library sources), shakespeare, openwebtext, tinystories, wikitext2,
    wikitext103 or fineweb-edu-10b; or your own files (data.path), of the kind text, jsonl or parquet."""
    path: str | None = None
    """Your file, folder or pattern ("*.txt"), for data.corpus text, jsonl or parquet; UTF-8, .gz and .zst too."""
    tokenizer: str = "gpt2"
    """How text becomes token ids: gpt2 (its byte-pair encoding), cl100k_base, o200k_base, or bytes (256 values and
    end-of-text)."""
    validation_fraction: float = 0.1
    """Share of the documents held back for validation (of a single text: its end), 0 to below 1; 0 trains on everything
    and evaluates nothing. A corpus with a validation split of its own keeps that one."""
    cache_dir: str = "data"
    """Folder that keeps the token files, one subfolder a corpus, tokenizer and split."""
    field: str = "text"
    """Where the text is in a line of JSONL or a row of Parquet."""
    tokens: str | None = None
    """Token files instead of a text: a folder that gpt2 prepare wrote, or one (a file, a pattern) of nanoGPT's,
    llm.c's or datatrove's, read as they are."""
    mixture: dict[str, float] | str | None = None
    """Several token folders or files, each with a weight: FOLDER=0.7,OTHER=0.3, or a mapping in a recipe."""
    order: Order = "shuffled"
    """In which order the training split is read: a new random one each epoch, or the text's own (sequential)."""
    verify: Literal["changed", "always"] = "changed"
    """Which token files are compared with their checksums at the start: those whose size or time has changed since the
    last time, or all (a disk may change a file without either)."""

    def __post_init__(self) -> None:
        refuse_unless(
            0.0 <= self.validation_fraction < 1.0,
            f"--data.validation_fraction {self.validation_fraction}: must be at least 0 and below 1",
        )
        refuse_unless(
            self.tokens is None or self.mixture is None,
            f"--data.tokens {self.tokens} and --data.mixture {self.mixture}: give one of them",
        )
        if self.mixture is not None:
            parse_mixture(self.mixture)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019), its learning-rate schedule and gradient clipping."""

    learning_rate: float = 6e-4
    """Peak learning rate, reached at the end of the warmup."""
    final_fraction: float = 0.1
    """Learning rate at the end of the run, as a share of the peak."""
    warmup_steps: int = 100
    """Updates over which the learning rate rises linearly from 0 to its peak."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on parameters of two or more dimensions only."""
    beta1: float = 0.9
    """Decay rate of the first moment, per update."""
    beta2: float = 0.95
    """Decay rate of the second moment, per update."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    clip_norm: float = 1.0
    """Largest global gradient norm; longer gradients are scaled down to it. 0: no clipping."""

    def __post_init__(self) -> None:
        require_nonnegative("optimizer.", self, "learning_rate", "final_fraction", "weight_decay", "clip_norm")
        require_nonnegative("optimizer.", self, "warmup_steps")
        # With 0, a parameter that has never had a gradient would be updated by 0 / 0.
        require_above_zero("optimizer.", self, "epsilon")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            refuse_unless(0.0 <= value < 1.0, f"--optimizer.{name} {value}: must be at least 0 and below 1")


@dataclass(frozen=True)
class TrainConfig:
    """A training run as it was asked for: `auto` and what is left out are decided on the machine that runs it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    steps: int = 1000
    """Updates to make."""
    epochs: float | None = None
    """Passes over the training split, instead of steps."""
    target_loss: float | None = None
    """End the run early, once the mean of the last ten logged training losses is this or less."""
    batch_size: int = 8
    """Sequences a step, over all devices and accumulation together."""
    batch_tokens: int | None = None
    """Tokens a step, instead of batch_size; a multiple of the sequence length."""
    sequence_length: int | None = None
    """Tokens of a sequence in training and its evaluations, at most model.block_size. Left out: model.block_size."""
    accumulation: int = 1
    """Parts a step's batch is computed in, one after the other, to save memory; must divide batch_size."""
    device_batch_size: int | None = None
    """Sequences that fit on a device at once, instead of accumulation, which is then the smallest that they allow."""
    precision: Literal["auto", "float32", "tf32", "bfloat16", "float64"] = "auto"
    """Of the matrix products; auto is bfloat16 on an accelerator and float32 on CPU. tf32 is float32 whose products
    tensor cores do in TF32 (NVIDIA, Ampere or newer). Parameters and optimizer state are float32 (float64 for
    float64)."""
    seed: int = 1337
    """Seed of the initial weights, the order of the data and the dropout masks."""
    mesh: int | str | None = None
    """JAX: devices to train on: a number (data parallel) or axis=n,... with the axes data, fsdp, tensor. Left out:
    all visible accelerators, else one CPU device. Without accelerators, virtual CPU devices are made."""
    attention: Literal["auto", "cudnn", "recompute", "xla"] = "auto"
    """JAX: attention kernel: cudnn (flash attention of NVIDIA GPUs, bfloat16, no dropout, no alibi), or in every dtype
    xla (keeps the attention weights for the backward pass) or recompute (computes them again, in much less memory);
    auto takes cudnn where it works, else xla on CPU and recompute on accelerators, and prints which."""
    norm_kernel: Literal["auto", "triton", "xla"] = "auto"
    """JAX: layer norm kernel: triton (one pass over memory for a layer norm and the addition before it, on NVIDIA GPUs)
    or xla (everywhere, every dtype); auto takes triton where it works and prints which."""
    scan_layers: bool = False
    """JAX: one compiled block scanned over the layers instead of unrolled layers: compiles faster, runs slower."""
    remat: bool = False
    """JAX: recompute each block's activations in the backward pass: less memory, about a third more arithmetic."""
    gradient_exchange: Literal["float32", "bfloat16"] = "float32"
    """JAX: dtype in which devices exchange gradients: float32 (float64 in a float64 run), or bfloat16, half the bytes,
    rounded before they are summed."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """PyTorch: device to train on; auto takes cuda, then mps, then cpu."""
    compile: bool | None = None
    """PyTorch: compile the model with torch.compile; left out: on cuda only."""
    fsdp: bool = False
    """PyTorch: split parameters, gradients and optimizer state over torchrun's processes (fully_shard), instead of a
    copy in each."""
    run_dir: str | None = None
    """Folder of the run (configuration, metrics, curves, samples, checkpoints). Left out: runs/RECIPE-FRAMEWORK."""
    resume: str | None = None
    """Continue from a checkpoint: alone, the newest of the run folder; or the path of a checkpoint of the same
    configuration, whose run continues in run_dir."""
    init_from: str | None = None
    """Start from these weights (a path in any format that gpt2 convert reads, or a name of the Hugging Face Hub, like
    gpt2) instead of random ones; a resumed run continues from its checkpoint."""
    log_interval: int = 10
    """Steps between two logged steps."""
    eval_interval: int = 250
    """Steps between two evaluations on the validation split; there is one at step 0, at the end, and at every
    checkpoint too."""
    eval_sequences: int = 256
    """Sequences of the validation split that an evaluation reads, spread evenly over it; fewer if it has fewer."""
    eval_tasks: str | None = None
    """Tasks of evaluate.py, with commas between them, that are computed with each evaluation: hellaswag_llmc."""
    eval_examples: int = 1000
    """Examples of each of eval_tasks, the first of its data set; fewer if that has fewer."""
    eval_data_dir: str | None = None
    """Folder with the data sets of eval_tasks as TASK.jsonl, in the Hub's format. Left out: the Hugging Face Hub."""
    checkpoint_interval: int = 250
    """Steps between two checkpoints; there is one at the end too."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints are kept; the one with the best validation loss (without validation, the best
    mean of the last ten logged training losses) is kept too."""
    best_checkpoint_interval: int = 0
    """A checkpoint is saved too where a loss is the lowest so far (an evaluation's; without validation, the mean of the
    last ten logged training losses), if the checkpoint before is at least so many steps ago; 0: never."""
    sample_interval: int = 0
    """Steps between two generated samples in the run folder's samples/; 0: none."""
    sample_tokens: int = 128
    """Length of such a sample, in tokens."""
    track: Literal["wandb", "tensorboard", "mlflow"] | None = None
    """Where metrics go in addition to the run folder; each needs its package: pip install 'gpt2-jax[wandb]'."""
    max_skipped_steps: int = 10
    """An update is left out where the loss or the gradient norm isn't finite, or the loss a spike (skip_spikes); more
    than this many in a row end the run."""
    skip_spikes: float | None = None
    """Leave out an update whose loss is more than this many standard deviations above the mean of the 50 steps before
    (of as many as there are, if they are 20 or more). Not given: spikes are only reported."""
    hang_timeout: float | None = None
    """Seconds in which a step, or what is due between two steps, must finish; after them the process ends, and can be
    resumed. Give more than compiling takes, and more than a whole evaluation with its tasks. Left out: no limit."""
    deterministic: bool = False
    """Have GPUs compute the same bits in every run of one program on the same devices, with slower kernels where the
    fast ones add in any order. On CPUs runs are equal without it."""
    reference_curve: dict[int, float] | str | None = None
    """Training losses by step to draw beside this run's in curves.png: a published run's, or the folder of another run
    of yours."""

    def __post_init__(self) -> None:
        require_positive("", self, "batch_size", "accumulation", "log_interval", "eval_interval", "eval_sequences")
        require_positive("", self, "eval_examples", "checkpoint_interval", "keep_checkpoints", "sample_tokens")
        refuse_unless(
            self.eval_tasks is None or self.data.validation_fraction > 0,
            f"--eval_tasks {self.eval_tasks}: tasks are computed with the evaluations, which there are none of with "
            "--data.validation_fraction 0; hold back a share",
        )
        require_nonnegative("", self, "steps", "sample_interval", "max_skipped_steps")
        require_nonnegative("", self, "best_checkpoint_interval")
        check_seed(self.seed)
        require_above_zero("", self, "epochs", "target_loss", "batch_tokens", "device_batch_size", "hang_timeout")
        require_above_zero("", self, "skip_spikes")
        if self.sequence_length is not None:
            require_positive("", self, "sequence_length")
            refuse_unless(
                self.sequence_length <= self.model.block_size,
                f"--sequence_length {self.sequence_length}: the model has only {self.model.block_size} positions; use "
                "a smaller one, or a larger --model.block_size",
            )
        if self.batch_tokens is not None:
            length = self.tokens_per_sequence
            refuse_unless(
                self.batch_tokens % length == 0,
                f"--batch_tokens {self.batch_tokens}: not a multiple of the sequence length {length}; use "
                f"{length * max(1, round(self.batch_tokens / length))}",
            )
            object.__setattr__(self, "batch_size", self.batch_tokens // length)
        refuse_unless(
            self.device_batch_size is not None or self.batch_size % self.accumulation == 0,
            f"--accumulation {self.accumulation}: batch_size {self.batch_size} is not divisible by it; "
            f"use {one_of(divisors(self.batch_size))}",
        )

    @property
    def microbatch_size(self) -> int:
        """Sequences computed at once, over all devices."""
        return self.batch_size // self.accumulation

    @property
    def tokens_per_sequence(self) -> int:
        """Length of a training sequence."""
        return self.model.block_size if self.sequence_length is None else self.sequence_length

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.tokens_per_sequence

    @property
    def training_flops_per_token(self) -> int:
        """Floating-point operations of a forward and backward pass, for one token."""
        return self.model.training_flops_per_token(self.tokens_per_sequence)


@dataclass(frozen=True)
class ResolvedConfig(TrainConfig):
    """What a run really uses, and what config.yaml records: a TrainConfig after its trainer has decided on this machine
    what was left open.

    Precision and accumulation are set; for JAX mesh and kernels too, for PyTorch whether to compile. The options of the
    other framework stay as they were given.
    """

    precision: Precision = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.precision in get_args(Precision), f"{self.precision} isn't resolved"


def resolved(config: TrainConfig, **decided: Any) -> ResolvedConfig:
    """`config` with what a trainer has decided."""
    return ResolvedConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)} | decided)


def dtype_of(precision: str) -> str:
    """The dtype of arrays in a resolved precision: tf32 is a way to multiply float32 ones."""
    return "float32" if precision == "tf32" else precision


def with_accumulation(config: TrainConfig, devices: int) -> TrainConfig:
    """The configuration with its accumulation computed from `device_batch_size`, if given, for so many devices.

    Raises UserError if the batch can't be split over them.
    """
    if config.device_batch_size is None:
        return config
    if config.batch_size % devices:
        raise UserError(
            f"--batch_size {config.batch_size}: not divisible by the {devices} devices that share it; "
            f"use {config.batch_size // devices * devices or devices}"
        )
    share = config.batch_size // devices
    parts = next(n for n in divisors(share) if share // n <= config.device_batch_size)
    return dataclasses.replace(config, accumulation=parts)


# The groups of settings within a TrainConfig, by name.
GROUPS = {"model": ModelConfig, "data": DataConfig, "optimizer": OptimizerConfig}


def parse_mixture(mixture: dict[str, float] | str) -> dict[str, float]:
    """Weights by folder from what `--data.mixture` takes."""
    if isinstance(mixture, dict):
        weights = {folder: float(weight) for folder, weight in mixture.items()}
    else:
        weights = {}
        for part in mixture.split(","):
            folder, _, weight = part.strip().rpartition("=")
            try:
                weights[folder] = float(weight)
            except ValueError:
                weights[folder] = math.nan
    good = all(folder and 0 < weight < math.inf for folder, weight in weights.items())
    refuse_unless(bool(weights) and good, f"--data.mixture {mixture}: expected FOLDER=WEIGHT,... with weights above 0")
    return weights
