"""Every setting of a run as frozen dataclasses, with GPT-2's own defaults, and the counts that follow from them."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from gpt2_core.errors import UserError

# The value of `--resume` when it stands alone.
NEWEST = "newest"

MESH_AXES = ("data", "fsdp", "tensor")

# Sizes of the four published models (Radford et al. 2019, table 2).
PRESETS = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}


def _refuse_unless(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def check_seed(seed: int) -> None:
    """Refuse a seed that not every generator takes."""
    _refuse_unless(0 <= seed < 1 << 32, f"--seed {seed}: must be from 0 to {(1 << 32) - 1}")


def _require_positive(group: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _refuse_unless(value >= 1, f"--{group}{name} {value}: must be 1 or more")


def _require_nonnegative(group: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _refuse_unless(math.isfinite(value) and value >= 0, f"--{group}{name} {value}: must be a number of 0 or more")


@dataclass(frozen=True)
class ModelConfig:
    """The architecture."""

    n_layer: int = 12
    """Number of transformer blocks."""
    n_head: int = 12
    """Attention heads a block; must divide n_embd."""
    n_embd: int = 768
    """Width of the residual stream, in features."""
    block_size: int = 1024
    """Longest context, in tokens: the number of learned positions and the length of a training sequence."""
    vocab_size: int = 50257
    """Number of token ids the model knows, at least the tokenizer's. Left out: the tokenizer's (gpt2 50257, bytes
    257)."""
    dropout: float = 0.0
    """Dropout rate of embeddings, attention weights and residual branches, 0 to below 1."""
    layer_norm_epsilon: float = 1e-5
    """Added to the variance (rmsnorm: the mean square) in every norm."""
    position: Literal["learned", "rope", "alibi"] = "learned"
    """How the model knows positions: learned position embeddings, rotary embeddings of queries and keys (rope), or
    attention scores that fall linearly with the distance between query and key (alibi)."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_pairs: Literal["half", "interleaved"] = "half"
    """Which features of a head rotate together: i and i + head size / 2 (Hugging Face), or 2i and 2i + 1 (paper)."""
    mlp: Literal["gelu_tanh", "gelu_exact", "swiglu"] = "gelu_tanh"
    """The MLP: GELU in GPT-2's tanh form or exact by erf, or SwiGLU."""
    mlp_width: int | None = None
    """Hidden width of the MLP, in features. Left out: 4 n_embd; for swiglu, which has three matrices in place of two,
    8/3 n_embd rounded up to a multiple of 64."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """The norm before each branch and before the head; rmsnorm has a weight and no bias."""
    bias: bool = True
    """Whether linear layers and layer norms have a bias."""
    tie_embeddings: bool = True
    """Whether the head shares the token embedding's weight."""
    qk_norm: bool = False
    """Whether queries and keys pass through an RMS norm, each head by itself, before they meet."""

    def __post_init__(self) -> None:
        _require_positive("model.", self, "n_layer", "n_head", "n_embd", "block_size", "vocab_size")
        _refuse_unless(
            self.n_embd % self.n_head == 0,
            f"--model.n_embd {self.n_embd}: not divisible by n_head {self.n_head}; "
            f"use a multiple of {self.n_head}, or a number of heads that divides {self.n_embd}",
        )
        _refuse_unless(0.0 <= self.dropout < 1.0, f"--model.dropout {self.dropout}: must be at least 0 and below 1")
        _refuse_unless(
            self.layer_norm_epsilon > 0,
            f"--model.layer_norm_epsilon {self.layer_norm_epsilon}: must be above 0",
        )
        if self.mlp_width is not None:
            _require_positive("model.", self, "mlp_width")
        if self.position == "rope":
            _refuse_unless(
                self.head_size % 2 == 0,
                f"--model.position rope: rotates pairs of features, and n_embd {self.n_embd} / n_head {self.n_head} = "
                f"{self.head_size} is odd; use another n_head or n_embd",
            )
            _refuse_unless(self.rope_theta > 0, f"--model.rope_theta {self.rope_theta}: must be above 0")

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def mlp_size(self) -> int:
        """Hidden width of the MLP, given or by default."""
        if self.mlp_width is not None:
            return self.mlp_width
        return 64 * math.ceil(8 * self.n_embd / (3 * 64)) if self.mlp == "swiglu" else 4 * self.n_embd

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's canonical name and shape: GPT-2's own names, linear weights as (in, out)."""
        D, F, V, T = self.n_embd, self.mlp_size, self.vocab_size, self.block_size
        shapes: dict[str, tuple[int, ...]] = {"wte.weight": (V, D)}
        if self.position == "learned":
            shapes["wpe.weight"] = (T, D)
        for layer in range(self.n_layer):
            h = f"h.{layer}."
            shapes |= self._norm(h + "ln_1")
            shapes |= self._linear(h + "attn.c_attn", D, 3 * D)
            if self.qk_norm:
                shapes |= {h + "attn.q_norm.weight": (self.head_size,), h + "attn.k_norm.weight": (self.head_size,)}
            shapes |= self._linear(h + "attn.c_proj", D, D)
            shapes |= self._norm(h + "ln_2")
            shapes |= self._linear(h + "mlp.c_fc", D, F)
            if self.mlp == "swiglu":
                shapes |= self._linear(h + "mlp.c_gate", D, F)
            shapes |= self._linear(h + "mlp.c_proj", F, D)
        shapes |= self._norm("ln_f")
        if not self.tie_embeddings:
            shapes["lm_head.weight"] = (V, D)
        return shapes

    def _linear(self, name: str, size_in: int, size_out: int) -> dict[str, tuple[int, ...]]:
        weight = {f"{name}.weight": (size_in, size_out)}
        return weight | {f"{name}.bias": (size_out,)} if self.bias else weight

    def _norm(self, name: str) -> dict[str, tuple[int, ...]]:
        weight = {f"{name}.weight": (self.n_embd,)}
        return weight | {f"{name}.bias": (self.n_embd,)} if self.bias and self.norm == "layernorm" else weight

    @property
    def parameter_count(self) -> int:
        """Number of parameters; a head that shares the token embedding's is not counted again."""
        return sum(math.prod(shape) for shape in self.parameter_shapes.values())

    @property
    def training_flops_per_token(self) -> int:
        """Floating-point operations of a forward and backward pass for one token of a full block.

        6 N + 12 L T D (Chowdhery et al. 2022, "PaLM", appendix B), N being the parameters that multiply something: all
        but the position embeddings, and but the token embeddings where the head has a weight of its own. The attention
        term counts the whole T x T square, as that paper does, although a causal kernel computes half of it.
        """
        looked_up = ["wpe.weight"] if self.tie_embeddings else ["wpe.weight", "wte.weight"]
        shapes = self.parameter_shapes
        multiplying = self.parameter_count - sum(math.prod(shapes[name]) for name in looked_up if name in shapes)
        return 6 * multiplying + 12 * self.n_layer * self.block_size * self.n_embd


@dataclass(frozen=True)
class DataConfig:
    """The text and how it becomes tokens."""

    corpus: str = "stdlib"
    """Which text: stdlib (the running Python's own library sources), shakespeare, openwebtext, tinystories, wikitext2,
    wikitext103 or fineweb-edu-10b; or files of yours (data.path), of the kind text, jsonl or parquet."""
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
    """Token files in place of a text: a folder that prepare_data.py wrote, or one (a file, a pattern) of nanoGPT's,
    llm.c's or datatrove's, read as they are."""
    mixture: dict[str, float] | str | None = None
    """Several such in place of one, with weights: FOLDER=0.7,OTHER=0.3, or a mapping in a recipe."""

    def __post_init__(self) -> None:
        _refuse_unless(
            0.0 <= self.validation_fraction < 1.0,
            f"--data.validation_fraction {self.validation_fraction}: must be at least 0 and below 1",
        )
        _refuse_unless(
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
        _require_nonnegative(
            "optimizer.", self, "learning_rate", "final_fraction", "weight_decay", "epsilon", "clip_norm"
        )
        _require_nonnegative("optimizer.", self, "warmup_steps")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _refuse_unless(0.0 <= value < 1.0, f"--optimizer.{name} {value}: must be at least 0 and below 1")


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    steps: int = 1000
    """Updates to make."""
    epochs: float | None = None
    """Passes over the training split, in place of steps."""
    target_loss: float | None = None
    """End the run early, once the mean of the last ten logged training losses is this or less."""
    batch_size: int = 8
    """Sequences a step, over all devices and accumulation together."""
    batch_tokens: int | None = None
    """Tokens a step, in place of batch_size; a multiple of model.block_size."""
    accumulation: int = 1
    """Parts a step's batch is computed in, one after the other, to save memory; must divide batch_size."""
    device_batch_size: int | None = None
    """Sequences that fit on a device at once, in place of accumulation, which then is as small as they allow."""
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
    xla (keeps the weights for the backward pass) or recompute (computes them again, in much less memory); auto takes
    cudnn where it works, else xla on CPU and recompute on accelerators, and prints which."""
    norm_kernel: Literal["auto", "triton", "xla"] = "auto"
    """JAX: layer norm kernel: triton (one pass over memory for a layer norm and the addition before it, on NVIDIA GPUs)
    or xla (everywhere, every dtype); auto takes triton where it works and prints which."""
    scan_layers: bool = False
    """JAX: one compiled block scanned over the layers in place of unrolled layers: compiles faster, runs slower."""
    remat: bool = False
    """JAX: recompute each block's activations in the backward pass: less memory, about a third more arithmetic."""
    gradient_exchange: Literal["float32", "bfloat16"] = "float32"
    """JAX: dtype in which devices exchange gradients: float32 (float64 in a float64 run), or bfloat16, half the bytes,
    rounded before they are summed."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """PyTorch: device to train on; auto takes cuda, then mps, then cpu."""
    compile: bool | None = None
    """PyTorch: compile the model with torch.compile; left out: on cuda only."""
    run_dir: str | None = None
    """Folder of the run (configuration, metrics, curves, samples, checkpoints). Left out: runs/RECIPE-FRAMEWORK."""
    resume: str | None = None
    """Go on from a checkpoint: alone, the newest of the run folder; or the path of a checkpoint of the same
    configuration, whose run goes on in run_dir."""
    init_from: str | None = None
    """Start from these weights (a path in any format that convert.py reads, or a name of the Hugging Face Hub, like
    gpt2) in place of random ones; a resumed run goes on from its checkpoint instead."""
    log_interval: int = 10
    """Steps between two logged steps."""
    eval_interval: int = 250
    """Steps between two evaluations on the validation split; there is one at step 0, at the end, and at every
    checkpoint too."""
    eval_sequences: int = 256
    """Sequences of the validation split that an evaluation reads, spread evenly over it; fewer if it has fewer."""
    checkpoint_interval: int = 250
    """Steps between two checkpoints; there is one at the end too."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints are kept; the one with the best validation loss (without validation, the best
    mean of the last ten logged training losses) is kept besides."""
    sample_interval: int = 0
    """Steps between two generated samples in the run folder's samples/; 0: none."""
    sample_tokens: int = 128
    """Length of such a sample, in tokens."""
    track: Literal["wandb", "tensorboard", "mlflow"] | None = None
    """Where metrics go besides the run folder; each needs its package: pip install 'gpt2-jax[wandb]'."""
    reference_curve: dict[int, float] | None = None
    """A published run's training losses by step, drawn beside this run's in curves.png."""

    def __post_init__(self) -> None:
        _require_positive("", self, "batch_size", "accumulation", "log_interval", "eval_interval", "eval_sequences")
        _require_positive("", self, "checkpoint_interval", "keep_checkpoints", "sample_tokens")
        _require_nonnegative("", self, "steps", "sample_interval")
        check_seed(self.seed)
        for name in ("epochs", "target_loss", "batch_tokens", "device_batch_size"):
            value = getattr(self, name)
            _refuse_unless(value is None or value > 0, f"--{name} {value}: must be above 0")
        if self.batch_tokens is not None:
            block = self.model.block_size
            _refuse_unless(
                self.batch_tokens % block == 0,
                f"--batch_tokens {self.batch_tokens}: not a multiple of model.block_size {block}; use "
                f"{block * max(1, round(self.batch_tokens / block))}",
            )
            object.__setattr__(self, "batch_size", self.batch_tokens // block)
        _refuse_unless(
            self.device_batch_size is not None or self.batch_size % self.accumulation == 0,
            f"--accumulation {self.accumulation}: batch_size {self.batch_size} is not divisible by it; "
            f"use {_choices(divisors(self.batch_size))}",
        )
        if self.mesh is not None and self.device_batch_size is None:
            check_mesh(parse_mesh(self.mesh), self)

    @property
    def microbatch_size(self) -> int:
        """Sequences computed at once, over all devices."""
        return self.batch_size // self.accumulation

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.model.block_size


def dtype_of(precision: str) -> str:
    """The dtype of arrays in a resolved precision: tf32 is a way to multiply float32 ones."""
    return "float32" if precision == "tf32" else precision


def accumulate(config: TrainConfig, devices: int) -> TrainConfig:
    """The configuration with its accumulation, where that is to be computed, for a batch spread over `devices`.

    Raises UserError if the batch can't be spread so.
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


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _choices(numbers: list[int]) -> str:
    """«1, 2, 4 or 8», leaving out the middle of long lists."""
    words = [str(n) for n in numbers]
    if len(words) > 8:
        words = [*words[:4], "...", *words[-3:]]
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def parse_mesh(mesh: int | str) -> dict[str, int]:
    """Sizes of all three axes from what `--mesh` takes: `8` means `data=8`, `data=2,tensor=2` names them."""
    sizes = dict.fromkeys(MESH_AXES, 1)
    help_text = "expected a number of devices (8) or axis=n,... with the axes data, fsdp, tensor (data=4,fsdp=2)"
    text = str(mesh).strip()
    parts = [f"data={text}"] if text.isdigit() else text.split(",")
    given = set()
    for part in parts:
        axis, equals, size = part.strip().partition("=")
        if axis not in sizes or not equals or not size.isdigit() or int(size) < 1:
            raise UserError(f"--mesh {mesh}: {help_text}")
        if axis in given:
            raise UserError(f"--mesh {mesh}: the axis {axis} is named twice; name it once")
        given.add(axis)
        sizes[axis] = int(size)
    return sizes


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
    _refuse_unless(bool(weights) and good, f"--data.mixture {mixture}: expected FOLDER=WEIGHT,... with weights above 0")
    return weights


def format_mesh(sizes: dict[str, int]) -> str:
    return ",".join(f"{axis}={sizes[axis]}" for axis in MESH_AXES)


def check_mesh(sizes: dict[str, int], config: TrainConfig) -> None:
    """Refuse a mesh that can't hold this model and batch, in the words of the person who typed it."""
    given = ",".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1) or "1"
    model = config.model
    ways = sizes["data"] * sizes["fsdp"]
    size = config.microbatch_size
    batch = f"batch_size {config.batch_size}"
    if config.accumulation > 1:
        batch += f" / accumulation {config.accumulation} = {size}"
    if size % ways:
        axes = "data" if sizes["fsdp"] == 1 else "data x fsdp"
        raise UserError(f"--mesh {given}: {batch} is not divisible by {axes} = {ways}; use {_choices(divisors(size))}")
    if model.n_head % sizes["tensor"]:
        raise UserError(
            f"--mesh {given}: n_head {model.n_head} is not divisible by tensor = {sizes['tensor']}; "
            f"use {_choices(divisors(model.n_head))}"
        )
    if model.n_embd % (sizes["fsdp"] * sizes["tensor"]):
        axes = "fsdp" if sizes["tensor"] == 1 else "fsdp x tensor"
        raise UserError(
            f"--mesh {given}: n_embd {model.n_embd} is not divisible by {axes} = {sizes['fsdp'] * sizes['tensor']}; "
            f"use {_choices(divisors(model.n_embd))}"
        )
    if model.mlp_size % (sizes["fsdp"] * sizes["tensor"]):
        raise UserError(
            f"--mesh {given}: the MLP's width {model.mlp_size} is not divisible by fsdp x tensor = "
            f"{sizes['fsdp'] * sizes['tensor']}; give another --model.mlp_width"
        )
    if 128 % sizes["tensor"]:
        # The vocabulary is padded to a multiple of 128 (gpt2_jax.sharding), and its rows are split over this axis.
        raise UserError(f"--mesh {given}: the tensor axis must divide 128; use {_choices(divisors(128))}")


def to_yaml(config: TrainConfig) -> str:
    """The whole configuration as a recipe that `--config` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def from_yaml(path: Path) -> TrainConfig:
    """Read a configuration that `to_yaml` wrote; raises UserError if it isn't one."""
    try:
        return from_dict(yaml.safe_load(path.read_text()))
    except (OSError, yaml.YAMLError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a run's configuration ({error})") from error


def from_dict(values: dict[str, Any]) -> TrainConfig:
    return TrainConfig(**{k: GROUPS[k](**v) if k in GROUPS else v for k, v in values.items()})


def model_from_dict(values: dict[str, Any], source: str) -> ModelConfig:
    """An architecture read from a file; raises UserError, beginning with `source`, for a setting of the wrong kind."""
    kinds = get_type_hints(ModelConfig)
    for name, value in values.items():
        if name not in kinds:
            raise UserError(f"{source}: its configuration has a setting {name}, which no model here knows")
        if not _is_a(kinds[name], value):
            raise UserError(f"{source}: its configuration has {name} {value!r:.80}, which is not a value it can take")
    try:
        return ModelConfig(**values)
    except UserError as error:
        raise UserError(f"{source}: its configuration can't be: {error}") from error


def _is_a(kind: Any, value: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_args(kind):
        return any(_is_a(k, value) for k in get_args(kind))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


def differences(ours: Any, theirs: Any, ignore: frozenset[str] = frozenset()) -> Iterator[tuple[str, Any, Any]]:
    """Dotted names and both values of the settings in which two configurations differ."""
    for f in dataclasses.fields(ours):
        a, b = getattr(ours, f.name), getattr(theirs, f.name)
        if f.name in ignore or a == b:
            continue
        if dataclasses.is_dataclass(a):
            inside = frozenset(name.partition(".")[2] for name in ignore if name.startswith(f.name + "."))
            yield from ((f"{f.name}.{name}", x, y) for name, x, y in differences(a, b, inside))
        else:
            yield f.name, a, b
