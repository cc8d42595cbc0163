"""Nine models of github.com/jax-ml/bonsai (commit 36284254) against their originals in `transformers`.

    python examples/parity/bonsai.py PATH_TO_CHECKOUT [--pairs qwen3,vit] [--mended] [--by-hand]

Small random configurations, nothing is downloaded. The table says how many of the candidate's tensors were mapped as
the checkout's own conversion tables (`bonsai/models/*/params.py`) map them, the verdict, and whether the first
divergence is a line that is known to differ. With `--mended` the lines that differ are read as the original has them,
and all nine must be the same. `--by-hand` writes the weights by the tables and compares outputs without `parity`. Needs
jaxtyping beside the project's own packages.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import pairs
from flax import nnx
from pairs import Output, Pair, Rule, channels_last, convolution, into_heads, normal, out_of_heads, tokens
from pairs import transposed as linear

MENDS = {
    "vit": {
        "jax.nn.gelu(self.linear1(layer_output))": "jax.nn.gelu(self.linear1(layer_output), approximate=False)",
    },
    "dinov3": {
        "q = q.astype(jnp.bfloat16)": "q = q",
        "k = k.astype(jnp.bfloat16)": "k = k",
        "cos = cos.astype(jnp.bfloat16)": "cos = cos",
        "sin = sin.astype(jnp.bfloat16)": "sin = sin",
        "self.act_fn(self.up_proj(x))": "nnx.gelu(self.up_proj(x), approximate=False)",
    },
    "whisper": {
        "jax.nn.gelu(self.conv1(input_features))": "jax.nn.gelu(self.conv1(input_features), approximate=False)",
        "jax.nn.gelu(self.conv2(inputs_embeds))": "jax.nn.gelu(self.conv2(inputs_embeds), approximate=False)",
    },
    "convnext": {
        "(dim, epsilon=cfg.layernorm_eps": "(dim, epsilon=1e-6",
        "(in_ch, epsilon=cfg.layernorm_eps": "(in_ch, epsilon=1e-6",
        "(cfg.stage_dims[0], epsilon=cfg.layernorm_eps": "(cfg.stage_dims[0], epsilon=1e-6",
    },
    "gemma3": {"dtype=jnp.bfloat16).astype(jnp.float32)": "dtype=jnp.float32)"},
}
"""What the checkout's source has, and what it would have to have to compute what the original does."""


@dataclasses.dataclass(frozen=True)
class Checkout:
    folder: Path
    mended: bool = False

    def modeling(self, model: str) -> ModuleType:
        """`bonsai/models/MODEL/modeling.py`, without the imports of the other models beside it."""
        name, file = (
            f"bonsai_{model}{'_mended' * self.mended}",
            self.folder / "bonsai" / "models" / model / "modeling.py",
        )
        if name not in sys.modules:
            if not file.exists():
                raise SystemExit(f"{self.folder}: no checkout of github.com/jax-ml/bonsai; {file} is missing")
            source = file.read_text()
            for wrong, right in MENDS.get(model, {}).items() if self.mended else ():
                if wrong not in source:
                    raise SystemExit(f"{file}: no {wrong!r} in it; the checkout is of another commit than 36284254")
                source = source.replace(wrong, right)
            module = sys.modules[name] = ModuleType(name)
            module.__file__ = str(file)
            try:
                exec(compile(source, str(file), "exec"), module.__dict__)
            except ModuleNotFoundError as error:
                raise SystemExit(f"{file} imports {error.name}, which is missing: pip install {error.name}") from None
        return sys.modules[name]


# --- qwen3: grouped queries whose width isn't the model's, a KV cache, an untied head --------------------------------


def qwen3_reference():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=37,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000},
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    return Output(Qwen3ForCausalLM(config), "logits", use_cache=False)


class WithCache(nnx.Module):
    """A decoder called with an empty cache of the length of its input."""

    def __init__(self, model, init_cache):
        self.model, self.init_cache = model, init_cache

    def __call__(self, token_ids):
        batch, length = token_ids.shape
        dtype = jnp.promote_types(jnp.float32, jax.tree.leaves(nnx.state(self.model, nnx.Param))[0].dtype)
        cache = self.init_cache(self.model.config, batch, length, 0, dtype=dtype)
        return self.model(token_ids, cache=cache, segment_ids=jnp.ones(token_ids.shape, jnp.int32))


def qwen3_candidate(checkout):
    qwen3 = checkout.modeling("qwen3")
    config = qwen3.ModelConfig(
        num_layers=2,
        vocab_size=37,
        emb_dim=24,
        mlp_dim=40,
        num_heads=6,
        head_dim=10,
        num_kv_heads=2,
        rope_theta=1_000_000,
        rope_scaling_factor=8.0,
        local_rope_theta=1e4,
        norm_eps=1e-6,
        tie_word_embeddings=False,
    )
    return WithCache(qwen3.Qwen3(config, rngs=nnx.Rngs(0)), qwen3.init_cache)


QWEN3 = Pair(
    "qwen3",
    qwen3_reference,
    qwen3_candidate,
    lambda: tokens(37, 8),
    rules=(
        Rule(r"model\.embedder\.embedding", "model.embed_tokens.weight"),
        Rule(r"model\.layers\.(\d)\.attn\.q_proj\.kernel", r"model.layers.\1.self_attn.q_proj.weight", into_heads(6)),
        Rule(
            r"model\.layers\.(\d)\.attn\.(k|v)_proj\.kernel",
            r"model.layers.\1.self_attn.\2_proj.weight",
            into_heads(2),
        ),
        Rule(r"model\.layers\.(\d)\.attn\.o_proj\.kernel", r"model.layers.\1.self_attn.o_proj.weight", out_of_heads(6)),
        Rule(r"model\.layers\.(\d)\.attn\.(q|k)_norm\.scale", r"model.layers.\1.self_attn.\2_norm.weight"),
        Rule(r"model\.layers\.(\d)\.mlp\.(\w+)\.kernel", r"model.layers.\1.mlp.\2.weight", linear),
        Rule(r"model\.layers\.(\d)\.(\w+_layernorm)\.scale", r"model.layers.\1.\2.weight"),
        Rule(r"model\.final_norm\.scale", "model.norm.weight"),
        Rule(r"model\.lm_head\.kernel", "lm_head.weight", linear),
    ),
)

# --- umt5, the encoder: relative positions in every layer, a gated MLP ----------------------------------------------


def umt5_reference():
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=37,
        d_model=24,
        d_kv=5,
        d_ff=40,
        num_layers=2,
        num_heads=3,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        attn_implementation="eager",
    )
    return Output(UMT5EncoderModel(config), "last_hidden_state")


def umt5_candidate(checkout):
    umt5 = checkout.modeling("umt5")
    config = umt5.ModelConfig(
        vocab_size=37,
        d_model=24,
        d_kv=5,
        d_ff=40,
        num_layers=2,
        num_heads=3,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
    )
    return evaluated(umt5.UMT5EncoderModel(config, rngs=nnx.Rngs(0)))


def evaluated(model: nnx.Module) -> nnx.Module:
    model.eval()
    return model


UMT5 = Pair(
    "umt5",
    umt5_reference,
    umt5_candidate,
    lambda: tokens(37, 11),
    rules=(
        Rule(r"encoder\.embed_tokens\.embedding", "shared.weight"),
        Rule(
            r"encoder\.block\.(\d)\.layer\.0\.SelfAttention\.relative_attention_bias\.embedding",
            r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.weight",
        ),
        Rule(
            r"encoder\.block\.(\d)\.layer\.0\.SelfAttention\.([qkvo])\.kernel",
            r"encoder.block.\1.layer.0.SelfAttention.\2.weight",
            linear,
        ),
        Rule(
            r"encoder\.block\.(\d)\.layer\.1\.DenseReluDense\.(\w+)\.kernel",
            r"encoder.block.\1.layer.1.DenseReluDense.\2.weight",
            linear,
        ),
        Rule(r"encoder\.block\.(\d)\.layer\.(\d)\.layer_norm\.scale", r"encoder.block.\1.layer.\2.layer_norm.weight"),
        Rule(r"encoder\.final_layer_norm\.scale", "encoder.final_layer_norm.weight"),
    ),
)

# --- mamba2: a state space computed in chunks, a depthwise convolution ----------------------------------------------


def mamba2_reference():
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=37,
        hidden_size=16,
        expand=2,
        num_heads=4,
        head_dim=8,
        state_size=6,
        conv_kernel=3,
        n_groups=1,
        chunk_size=4,
        num_hidden_layers=2,
        tie_word_embeddings=False,
    )
    return Output(Mamba2ForCausalLM(config), "logits", use_cache=False)


class Logits(nnx.Module):
    """A model that returns logits among other things."""

    def __init__(self, model):
        self.model = model

    def __call__(self, token_ids):
        return self.model(token_ids)["logits"]


def mamba2_candidate(checkout):
    mamba2 = checkout.modeling("mamba2")
    config = mamba2.ModelConfig(
        vocab_size=37,
        hidden_size=16,
        expand=2,
        head_dim=8,
        state_size=6,
        conv_kernel=3,
        chunk_size=4,
        num_hidden_layers=2,
        tie_word_embeddings=False,
    )
    return Logits(mamba2.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0)))


MAMBA2 = Pair(
    "mamba2",
    mamba2_reference,
    mamba2_candidate,
    lambda: tokens(37, 10),  # two chunks and a half
    rules=(
        Rule(r"model\.backbone\.embedder\.embedding", "backbone.embeddings.weight"),
        Rule(r"model\.backbone\.layers\.(\d)\.norm\.weight", r"backbone.layers.\1.norm.weight"),
        Rule(
            r"model\.backbone\.layers\.(\d)\.mixer\.(in|out)_proj\.kernel",
            r"backbone.layers.\1.mixer.\2_proj.weight",
            linear,
        ),
        Rule(
            r"model\.backbone\.layers\.(\d)\.mixer\.conv1d\.conv\.kernel",
            r"backbone.layers.\1.mixer.conv1d.weight",
            convolution,
        ),
        Rule(r"model\.backbone\.layers\.(\d)\.mixer\.conv1d\.conv\.bias", r"backbone.layers.\1.mixer.conv1d.bias"),
        Rule(
            r"model\.backbone\.layers\.(\d)\.mixer\.(A_log|D|dt_bias|norm\.weight)",
            r"backbone.layers.\1.mixer.\2",
        ),
        Rule(r"model\.backbone\.final_norm\.weight", "backbone.norm_f.weight"),
        Rule(r"model\.lm_head\.kernel", "lm_head.weight", linear),
    ),
)

# --- resnet: BatchNorm's running statistics, strides. The checkout fixes the widths --------------------------------


def resnet_reference():
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=64, hidden_sizes=[256, 512, 1024, 2048], depths=[1, 1, 1, 1], num_labels=7)
    return Output(ResNetForImageClassification(config), "logits")


def resnet_candidate(checkout):
    resnet = checkout.modeling("resnet")
    return resnet.ResNet(resnet.ModelConfig(block_layers=[1, 1, 1, 1], num_classes=7), rngs=nnx.Rngs(0))


def norm_rules(candidate: str, reference: str) -> tuple[Rule, ...]:
    """Scale, bias, mean and variance of a BatchNorm."""
    fields = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    return tuple(Rule(rf"{candidate}\.{ours}", rf"{reference}.{theirs}") for ours, theirs in fields.items())


RESNET = Pair(
    "resnet",
    resnet_reference,
    resnet_candidate,
    lambda: normal(2, 3, 64, 48),
    rules=(
        Rule(r"stem\.conv\.kernel", "resnet.embedder.embedder.convolution.weight", convolution),
        *norm_rules(r"stem\.bn", "resnet.embedder.embedder.normalization"),
        Rule(
            r"layer(\d)\.blocks\.(\d)\.conv(\d)\.kernel",
            r"resnet.encoder.stages.\1.layers.\2.layer.\3.convolution.weight",
            convolution,
        ),
        *norm_rules(r"layer(\d)\.blocks\.(\d)\.bn(\d)", r"resnet.encoder.stages.\1.layers.\2.layer.\3.normalization"),
        Rule(
            r"layer(\d)\.blocks\.(\d)\.downsample\.conv\.kernel",
            r"resnet.encoder.stages.\1.layers.\2.shortcut.convolution.weight",
            convolution,
        ),
        *norm_rules(
            r"layer(\d)\.blocks\.(\d)\.downsample\.bn", r"resnet.encoder.stages.\1.layers.\2.shortcut.normalization"
        ),
        Rule(r"fc\.kernel", "classifier.1.weight", linear),
        Rule(r"fc\.bias", "classifier.1.bias"),
    ),
    to_candidate=channels_last,
)

# --- vit: attention split into heads; the checkout's GELU is the tanh form ------------------------------------------


def vit_reference():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=(12, 15),
        patch_size=(3, 5),
        num_labels=7,
        attn_implementation="eager",
    )
    return Output(ViTForImageClassification(config), "logits")


class WithoutRngs(nnx.Module):
    """A model whose call asks for random keys that it doesn't use in evaluation."""

    def __init__(self, model):
        self.model = model

    def __call__(self, inputs):
        return self.model(inputs, rngs=None)


def vit_candidate(checkout):
    vit = checkout.modeling("vit")
    config = vit.ModelConfig(
        image_size=(12, 15),
        patch_size=(3, 5),
        num_channels=3,
        hidden_dim=24,
        attn_dropout_prob=0.0,
        dropout_prob=0.0,
        num_heads=3,
        mlp_dim=40,
        eps=1e-12,
        num_layers=2,
        num_labels=7,
    )
    return evaluated(WithoutRngs(vit.ViTClassificationModel(config, rngs=nnx.Rngs(0))))


QKV = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}


def qkv_rules(candidate: str, reference: str, heads: int) -> tuple[Rule, ...]:
    """Kernels and biases of `nnx.MultiHeadAttention` but for its output."""
    return tuple(
        Rule(rf"{candidate}\.{ours}\.{kind}", rf"{reference}.{theirs}.{torchs}", into_heads(heads))
        for ours, theirs in QKV.items()
        for kind, torchs in {"kernel": "weight", "bias": "bias"}.items()
    )


VIT = Pair(
    "vit",
    vit_reference,
    vit_candidate,
    lambda: normal(2, 3, 12, 15),
    rules=(
        Rule(r"model\.pos_embeddings\.cls_token", "vit.embeddings.cls_token"),
        Rule(r"model\.pos_embeddings\.pos_embeddings", "vit.embeddings.position_embeddings"),
        Rule(
            r"model\.pos_embeddings\.projection\.kernel",
            "vit.embeddings.patch_embeddings.projection.weight",
            convolution,
        ),
        Rule(r"model\.pos_embeddings\.projection\.bias", "vit.embeddings.patch_embeddings.projection.bias"),
        *qkv_rules(r"model\.layers\.(\d)\.attention", r"vit.layers.\1.attention", 3),
        Rule(r"model\.layers\.(\d)\.attention\.out\.kernel", r"vit.layers.\1.attention.o_proj.weight", out_of_heads(3)),
        Rule(r"model\.layers\.(\d)\.attention\.out\.bias", r"vit.layers.\1.attention.o_proj.bias"),
        Rule(r"model\.layers\.(\d)\.linear([12])\.kernel", r"vit.layers.\1.mlp.fc\2.weight", linear),
        Rule(r"model\.layers\.(\d)\.linear([12])\.bias", r"vit.layers.\1.mlp.fc\2.bias"),
        Rule(r"model\.layers\.(\d)\.(layernorm_\w+)\.scale", r"vit.layers.\1.\2.weight"),
        Rule(r"model\.layers\.(\d)\.(layernorm_\w+)\.bias", r"vit.layers.\1.\2.bias"),
        Rule(r"model\.ln\.scale", "vit.layernorm.weight"),
        Rule(r"model\.ln\.bias", "vit.layernorm.bias"),
        Rule(r"model\.classifier\.kernel", "classifier.weight", linear),
        Rule(r"model\.classifier\.bias", "classifier.bias"),
    ),
    to_candidate=channels_last,
    differs_at=("jax.nn.gelu(self.linear1(layer_output))",),
    hint="GELU",
)

# --- dinov3: rotary positions in two dimensions; the checkout rounds them to bfloat16, and its GELU is the tanh form -


def dinov3_reference():
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    config = DINOv3ViTConfig(
        patch_size=4,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=16,
        num_register_tokens=3,
        attn_implementation="eager",
    )
    return Output(DINOv3ViTModel(config), "last_hidden_state")


class LastHiddenState(nnx.Module):
    """A model that returns its last hidden state among other things."""

    def __init__(self, model):
        self.model = model

    def __call__(self, inputs):
        return self.model(inputs)["last_hidden_state"]


def dinov3_candidate(checkout):
    dinov3 = checkout.modeling("dinov3")
    config = dinov3.ModelConfig(
        patch_size=(4, 4),
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=16,
        num_register_tokens=3,
    )
    return LastHiddenState(dinov3.Dinov3ViTModel(config, rngs=nnx.Rngs(0)))


DINOV3 = Pair(
    "dinov3",
    dinov3_reference,
    dinov3_candidate,
    lambda: normal(2, 3, 16, 24),
    rules=(
        Rule(r"model\.embeddings\.(cls_token|mask_token|register_tokens)", r"embeddings.\1"),
        Rule(r"model\.embeddings\.patch_embeddings\.kernel", "embeddings.patch_embeddings.weight", convolution),
        Rule(r"model\.embeddings\.patch_embeddings\.bias", "embeddings.patch_embeddings.bias"),
        Rule(r"model\.layer\.(\d)\.(attention|mlp)\.(\w+_proj)\.kernel", r"model.layer.\1.\2.\3.weight", linear),
        Rule(r"model\.layer\.(\d)\.(attention|mlp)\.(\w+_proj)\.bias", r"model.layer.\1.\2.\3.bias"),
        Rule(r"model\.layer\.(\d)\.(layer_scale[12])\.lambda1", r"model.layer.\1.\2.lambda1"),
        Rule(r"model\.layer\.(\d)\.(norm[12])\.scale", r"model.layer.\1.\2.weight"),
        Rule(r"model\.layer\.(\d)\.(norm[12])\.bias", r"model.layer.\1.\2.bias"),
        Rule(r"model\.norm\.scale", "norm.weight"),
        Rule(r"model\.norm\.bias", "norm.bias"),
    ),
    differs_at=(
        "q = q.astype(jnp.bfloat16)",
        "k = k.astype(jnp.bfloat16)",
        "cos = cos.astype(jnp.bfloat16)",
        "sin = sin.astype(jnp.bfloat16)",
        "self.down_proj(self.act_fn(self.up_proj(x)))",
    ),
    hint="GELU|bfloat16",
)

# --- whisper, the encoder: convolutions over time, keys without a bias; the GELU of its convolutions is the tanh form


def whisper_reference():
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        d_model=24,
        encoder_layers=2,
        encoder_attention_heads=3,
        encoder_ffn_dim=40,
        num_mel_bins=10,
        max_source_positions=9,
        attn_implementation="eager",
    )
    return Output(WhisperEncoder(config), "last_hidden_state")


def whisper_candidate(checkout):
    whisper = checkout.modeling("whisper")
    config = dataclasses.replace(
        whisper.ModelConfig.whisper_tiny(),
        d_model=24,
        encoder_layers=2,
        encoder_attention_heads=3,
        encoder_ffn_dim=40,
        num_mel_bins=10,
        max_source_positions=9,
    )
    return whisper.WhisperEncoder(config, rngs=nnx.Rngs(0))


WHISPER = Pair(
    "whisper",
    whisper_reference,
    whisper_candidate,
    lambda: normal(2, 10, 18),
    rules=(
        Rule(r"conv([12])\.kernel", r"conv\1.weight", convolution),
        Rule(r"conv([12])\.bias", r"conv\1.bias"),
        Rule(r"embed_positions\.embedding", "embed_positions.weight"),
        *(
            rule
            for rule in qkv_rules(r"layers\.(\d)\.self_attn", r"layers.\1.self_attn", 3)
            if rule.candidate != r"layers\.(\d)\.self_attn\.key\.bias"
        ),
        Rule(r"layers\.(\d)\.self_attn\.out\.kernel", r"layers.\1.self_attn.out_proj.weight", out_of_heads(3)),
        Rule(r"layers\.(\d)\.self_attn\.out\.bias", r"layers.\1.self_attn.out_proj.bias"),
        Rule(r"layers\.(\d)\.fc([12])\.kernel", r"layers.\1.fc\2.weight", linear),
        Rule(r"layers\.(\d)\.fc([12])\.bias", r"layers.\1.fc\2.bias"),
        Rule(r"layers\.(\d)\.(\w+_layer_norm)\.scale", r"layers.\1.\2.weight"),
        Rule(r"layers\.(\d)\.(\w+_layer_norm)\.bias", r"layers.\1.\2.bias"),
        Rule(r"layer_norm\.scale", "layer_norm.weight"),
        Rule(r"layer_norm\.bias", "layer_norm.bias"),
    ),
    to_candidate=channels_last,
    differs_at=("jax.nn.gelu(self.conv1(input_features))", "jax.nn.gelu(self.conv2(inputs_embeds))"),
    hint="GELU",
    # A bias of the keys adds the same to all scores of a query: softmax takes it away.
    ignore=("layers.0.self_attn.key.bias", "layers.1.self_attn.key.bias"),
)

# --- convnext: depthwise convolutions; the original's norms have an epsilon of 1e-6, the checkout's of 1e-12 ---------


def convnext_reference():
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(hidden_sizes=[6, 10, 14, 18], depths=[1, 1, 2, 1], num_labels=7)
    return Output(ConvNextForImageClassification(config), "logits")


def convnext_candidate(checkout):
    convnext = checkout.modeling("convnext")
    config = convnext.ModelConfig(
        stage_depths=(1, 1, 2, 1), stage_dims=(6, 10, 14, 18), drop_path_rate=0.0, num_classes=7
    )
    return WithoutRngs(convnext.ConvNeXt(config, rngs=nnx.Rngs(0)))


STAGE = r"model\.stages\.(\d)\.layers\.(\d)"
CONVNEXT = Pair(
    "convnext",
    convnext_reference,
    convnext_candidate,
    lambda: normal(2, 3, 64, 32),
    rules=(
        Rule(r"model\.embedding_layer\.layers\.0\.kernel", "convnext.embeddings.patch_embeddings.weight", convolution),
        Rule(r"model\.embedding_layer\.layers\.0\.bias", "convnext.embeddings.patch_embeddings.bias"),
        Rule(r"model\.embedding_layer\.layers\.1\.scale", "convnext.embeddings.layernorm.weight"),
        Rule(r"model\.embedding_layer\.layers\.1\.bias", "convnext.embeddings.layernorm.bias"),
        Rule(
            r"model\.stages\.(\d)\.downsample_layers\.0\.scale",
            r"convnext.encoder.stages.\1.downsampling_layer.0.weight",
        ),
        Rule(
            r"model\.stages\.(\d)\.downsample_layers\.1\.kernel",
            r"convnext.encoder.stages.\1.downsampling_layer.1.weight",
            convolution,
        ),
        Rule(
            r"model\.stages\.(\d)\.downsample_layers\.([01])\.bias",
            r"convnext.encoder.stages.\1.downsampling_layer.\2.bias",
        ),
        Rule(STAGE + r"\.dwconv\.kernel", r"convnext.encoder.stages.\1.layers.\2.dwconv.weight", convolution),
        Rule(STAGE + r"\.norm\.scale", r"convnext.encoder.stages.\1.layers.\2.layernorm.weight"),
        Rule(STAGE + r"\.norm\.bias", r"convnext.encoder.stages.\1.layers.\2.layernorm.bias"),
        Rule(STAGE + r"\.pwconv([12])\.kernel", r"convnext.encoder.stages.\1.layers.\2.pwconv\3.weight", linear),
        Rule(STAGE + r"\.(dwconv|pwconv[12])\.bias", r"convnext.encoder.stages.\1.layers.\2.\3.bias"),
        Rule(STAGE + r"\.gamma", r"convnext.encoder.stages.\1.layers.\2.layer_scale_parameter"),
        Rule(r"model\.norm\.scale", "convnext.layernorm.weight"),
        Rule(r"model\.norm\.bias", "convnext.layernorm.bias"),
        Rule(r"model\.head\.kernel", "classifier.weight", linear),
        Rule(r"model\.head\.bias", "classifier.bias"),
    ),
    to_candidate=channels_last,
    differs_at=(
        "x = self.embedding_layer(x)",
        "x = l(x)",
        "x = self.norm(self.dwconv(x))",
    ),
    hint="epsilon",
)

# --- gemma3, the text model: two kinds of attention, a tied head; the embeddings' scale is rounded to bfloat16 -------

GEMMA3_LAYERS = ("sliding_attention", "sliding_attention", "full_attention")


def gemma3_reference():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=37,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        query_pre_attn_scalar=10,
        sliding_window=5,
        layer_types=list(GEMMA3_LAYERS),
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        },
        attn_implementation="eager",
    )
    return Output(Gemma3ForCausalLM(config), "logits", use_cache=False)


class TextOnly(nnx.Module):
    """What `Gemma3Model` computes of text, without its vision tower."""

    def __init__(self, config, gemma3: ModuleType):
        self.embed_tokens = gemma3.Gemma3TextScaledWordEmbedding(config, rngs=nnx.Rngs(0))
        self.language_model = gemma3.Gemma3TextModel(config, rngs=nnx.Rngs(1))
        self.config, self.gemma3 = config, gemma3

    def __call__(self, token_ids):
        batch, length = token_ids.shape
        dtype = jnp.promote_types(jnp.float32, self.embed_tokens.weight.embedding[...].dtype)
        cache = [self.gemma3.LayerCache(self.config, i, batch, length, dtype) for i in range(len(GEMMA3_LAYERS))]
        text = jnp.zeros(token_ids.shape, jnp.int32)
        causal = self.gemma3.make_causal_mask(cache[0], text, out_sharding=None)
        window = self.config.sliding_window
        sliding = self.gemma3.make_window_mask(cache[0], text, slide_size=window, out_sharding=None)
        embeddings = self.embed_tokens(token_ids)
        hidden = self.language_model(embeddings, cache, jnp.ones(token_ids.shape, jnp.int32), sliding, causal)
        return self.embed_tokens.weight.attend(hidden)


def gemma3_candidate(checkout):
    gemma3 = checkout.modeling("gemma3")
    config = gemma3.TextConfig(
        attention_bias=False,
        attention_dropout=0.0,
        head_dim=10,
        hidden_size=24,
        intermediate_size=40,
        layer_types=[gemma3.AttentionMode(kind) for kind in GEMMA3_LAYERS],
        max_position_embeddings=64,
        num_attention_heads=6,
        num_hidden_layers=3,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        rope_full_factor=8.0,
        rope_full_theta=1_000_000.0,
        rope_slide_factor=1.0,
        rope_slide_theta=10_000.0,
        sliding_window=5,
        vocab_size=37,
        norm_dtype=jnp.float32,
    )
    return TextOnly(config, gemma3)


LAYER = r"language_model\.layers\.(\d)"
GEMMA3 = Pair(
    "gemma3",
    gemma3_reference,
    gemma3_candidate,
    lambda: tokens(37, 8),
    rules=(
        Rule(r"embed_tokens\.weight\.embedding", "model.embed_tokens.weight"),
        Rule(LAYER + r"\.self_attn\.([qkvo]_proj)\.kernel", r"model.layers.\1.self_attn.\2.weight", linear),
        Rule(LAYER + r"\.self_attn\.([qk]_norm)\.scale", r"model.layers.\1.self_attn.\2.weight"),
        Rule(LAYER + r"\.mlp\.(\w+_proj)\.kernel", r"model.layers.\1.mlp.\2.weight", linear),
        Rule(LAYER + r"\.(\w+_layernorm)\.scale", r"model.layers.\1.\2.weight"),
        Rule(r"language_model\.norm\.scale", "model.norm.weight"),
    ),
    differs_at=("self.weight(input_ids, out_sharding=shd) * self.embed_scale", "dtype=jnp.bfloat16).astype"),
    hint="times|bfloat16|scale",
)

PAIRS = (QWEN3, UMT5, MAMBA2, RESNET, VIT, DINOV3, WHISPER, CONVNEXT, GEMMA3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--mended", action="store_true", help="with the lines that differ as the original has them")
    arguments = pairs.parse(parser, PAIRS)
    checkout = Checkout(arguments.checkout, arguments.mended)
    # A mended pair has nothing that is known to differ.
    chosen = [dataclasses.replace(p, differs_at=()) if arguments.mended else p for p in arguments.pairs]
    models = arguments.checkout / "bonsai" / "models"
    raise SystemExit(pairs.run(chosen, arguments.by_hand, checkout, lambda pair: models / pair.name))


if __name__ == "__main__":
    main()
