"""An Equinox and a Linen model of public packages against their originals in `transformers`.

    pip install --no-deps esm2quinox==0.2.0 flaim==0.0.5
    python examples/parity/packages.py [--pairs esm2,vit-linen] [--by-hand]

The options are those of `bonsai.py`. `esm2quinox` (github.com/patrick-kidger/esm2quinox) is ESM-2 in Equinox: its
layers are one scan over stacked weights, and its embeddings are its head's. `flaim` (github.com/bobmcdear/flaim) has
vision models in Linen, whose queries, keys and values are one kernel.
"""

import argparse

import equinox
import jax
import jax.numpy as jnp
import pairs
from pairs import Output, Pair, Rule, channels_last, convolution, fused, normal, stacked, tokens
from pairs import transposed as linear

# --- esm2: rotary positions, layers in a scan, a tied head -----------------------------------------------------------


def esm2_reference():
    from transformers import EsmConfig, EsmForMaskedLM

    config = EsmConfig(
        vocab_size=33,
        mask_token_id=32,
        pad_token_id=1,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        position_embedding_type="rotary",
        token_dropout=True,
        emb_layer_norm_before=False,
        layer_norm_eps=1e-5,
        attn_implementation="eager",
    )
    return Output(EsmForMaskedLM(config), "logits")


class Batched(equinox.Module):
    """A model of one sequence, applied to each of a batch."""

    model: equinox.Module

    def __call__(self, token_ids):
        return jax.vmap(self.model)(token_ids).logits


def esm2_candidate(_):
    try:
        import esm2quinox
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is missing: pip install --no-deps esm2quinox==0.2.0 jaxtyping") from None
    with jax.enable_x64(True):  # its rotary table is computed at construction
        return Batched(esm2quinox.ESM2(2, 24, 3, token_dropout=True, key=jax.random.key(0)))


def both_layers(template: str) -> tuple[str, str]:
    return tuple(f"esm.encoder.layer.{number}.{template}" for number in range(2))


ESM2 = Pair(
    "esm2",
    esm2_reference,
    esm2_candidate,
    lambda: tokens(33, 9),
    rules=(
        Rule(
            r"model\.layers\.attn\.(query|key|value)_proj\.(weight|bias)",
            both_layers(r"attention.self.\1.\2"),
            stacked,
        ),
        Rule(r"model\.layers\.attn\.output_proj\.(weight|bias)", both_layers(r"attention.output.dense.\1"), stacked),
        Rule(r"model\.layers\.layer_norm1\.(weight|bias)", both_layers(r"attention.LayerNorm.\1"), stacked),
        Rule(r"model\.layers\.layer_norm2\.(weight|bias)", both_layers(r"LayerNorm.\1"), stacked),
        Rule(r"model\.layers\.linear1\.(weight|bias)", both_layers(r"intermediate.dense.\1"), stacked),
        Rule(r"model\.layers\.linear2\.(weight|bias)", both_layers(r"output.dense.\1"), stacked),
        Rule(r"model\.layer_norm\.(weight|bias)", r"esm.encoder.emb_layer_norm_after.\1"),
        Rule(r"model\.logit_head\.linear1\.(weight|bias)", r"lm_head.dense.\1"),
        Rule(r"model\.logit_head\.layer_norm\.(weight|bias)", r"lm_head.layer_norm.\1"),
        Rule(r"model\.logit_head\.linear2\.weight", "esm.embeddings.word_embeddings.weight"),
        Rule(r"model\.logit_head\.linear2\.bias", "lm_head.bias"),
    ),
    ignore=(
        # Not part of the logits.
        "model.esm.contact_head.regression.weight",
        "model.esm.contact_head.regression.bias",
        # A constant that the original's checkpoints hold and the port computes.
        "model.esm.rotary_embeddings.inv_freq",
    ),
)

# --- a vision transformer in Linen: one kernel for queries, keys and values ------------------------------------------


def vit_reference():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=48,
        image_size=(12, 16),
        patch_size=4,
        layer_norm_eps=1e-6,
        num_labels=7,
        attn_implementation="eager",
    )
    return Output(ViTForImageClassification(config), "logits")


def vit_candidate(_):
    if not hasattr(jax.random, "KeyArray"):
        jax.random.KeyArray = jax.Array  # a name that flaim's annotations use and newer versions of JAX don't have
    try:
        from flaim.models.vit import ViT
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is missing: pip install --no-deps flaim==0.0.5") from None
    model = ViT(
        depth=2,
        token_dim=24,
        n_heads=3,
        patch_size=4,
        mlp_hidden_dim_expansion_factor=2,
        layer_norm_eps=1e-6,
        n_classes=7,
    )
    return model, {"params": model.init(jax.random.key(0), jnp.zeros((1, 12, 16, 3)))["params"]}


def without_batch(tensor):
    """(1, ...) -> (...)."""
    return tensor[0]


BLOCK = r"MetaFormerBlock_(\d)"
VIT = Pair(
    "vit-linen",
    vit_reference,
    vit_candidate,
    lambda: normal(2, 3, 12, 16),
    rules=(
        Rule(r"AbsPosEmbed_0\.pos_embed", "vit.embeddings.position_embeddings", without_batch),
        Rule(r"ClassToken_0\.class_token", "vit.embeddings.cls_token"),
        Rule(r"PatchEmbed_0\.Conv_0\.Conv_0\.kernel", "vit.embeddings.patch_embeddings.projection.weight", convolution),
        Rule(r"PatchEmbed_0\.Conv_0\.Conv_0\.bias", "vit.embeddings.patch_embeddings.projection.bias"),
        Rule(
            BLOCK + r"\.MHSA_0\.QKV_0\.Dense_0\.kernel",
            tuple(rf"vit.layers.\1.attention.{x}_proj.weight" for x in "qkv"),
            fused,
        ),
        Rule(
            BLOCK + r"\.MHSA_0\.QKV_0\.Dense_0\.bias",
            tuple(rf"vit.layers.\1.attention.{x}_proj.bias" for x in "qkv"),
            fused,
        ),
        Rule(BLOCK + r"\.MHSA_0\.ProjOut_0\.Dense_0\.kernel", r"vit.layers.\1.attention.o_proj.weight", linear),
        Rule(BLOCK + r"\.MHSA_0\.ProjOut_0\.Dense_0\.bias", r"vit.layers.\1.attention.o_proj.bias"),
        Rule(BLOCK + r"\.LayerNorm_0\.scale", r"vit.layers.\1.layernorm_before.weight"),
        Rule(BLOCK + r"\.LayerNorm_0\.bias", r"vit.layers.\1.layernorm_before.bias"),
        Rule(BLOCK + r"\.TransformerMLP_0\.LayerNorm_0\.scale", r"vit.layers.\1.layernorm_after.weight"),
        Rule(BLOCK + r"\.TransformerMLP_0\.LayerNorm_0\.bias", r"vit.layers.\1.layernorm_after.bias"),
        Rule(BLOCK + r"\.TransformerMLP_0\.MLP_0\.Dense_0\.kernel", r"vit.layers.\1.mlp.fc1.weight", linear),
        Rule(BLOCK + r"\.TransformerMLP_0\.MLP_0\.Dense_0\.bias", r"vit.layers.\1.mlp.fc1.bias"),
        Rule(BLOCK + r"\.TransformerMLP_0\.MLP_0\.Dense_1\.kernel", r"vit.layers.\1.mlp.fc2.weight", linear),
        Rule(BLOCK + r"\.TransformerMLP_0\.MLP_0\.Dense_1\.bias", r"vit.layers.\1.mlp.fc2.bias"),
        Rule(r"ViTHead_0\.LayerNorm_0\.scale", "vit.layernorm.weight"),
        Rule(r"ViTHead_0\.LayerNorm_0\.bias", "vit.layernorm.bias"),
        Rule(r"ViTHead_0\.Dense_0\.kernel", "classifier.weight", linear),
        Rule(r"ViTHead_0\.Dense_0\.bias", "classifier.bias"),
    ),
    to_candidate=channels_last,
)

PAIRS = (ESM2, VIT)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    arguments = pairs.parse(parser, PAIRS)
    raise SystemExit(pairs.run(arguments.pairs, arguments.by_hand))
