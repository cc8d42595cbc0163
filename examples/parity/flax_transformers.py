"""The Flax models of `transformers` 4 against its PyTorch models: pairs that no line of `parity` was tuned on.

    python examples/parity/flax_transformers.py [--pairs bert,t5]

Small random configurations, nothing is downloaded. The table says how many of the candidate's tensors were mapped as
transformers' own conversion of checkpoints maps them, and the verdict. Version 4.57 is the last with models in Flax;
this project's own dependencies bring a newer one, so it needs a folder of its own:

    pip install --no-deps --target FOLDER transformers==4.57.6 huggingface_hub==0.36.0 tokenizers==0.22.1
    PYTHONPATH=FOLDER python examples/parity/flax_transformers.py
"""

import argparse
import itertools
import time
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax.traverse_util import flatten_dict
from rich.console import Console
from rich.table import Table

import parity

try:
    from transformers.modeling_flax_pytorch_utils import convert_pytorch_state_dict_to_flax
except ImportError:
    raise SystemExit(
        f"transformers {transformers.__version__} has no models in Flax: this file's first lines say what to install"
    ) from None

# Names of arguments that this jax no longer has.
_clip = jnp.clip
jnp.clip = lambda x, min=None, max=None, a_min=None, a_max=None: _clip(
    x, a_min if min is None else min, a_max if max is None else max
)

# Sizes that no two axes share, in the words of the configurations.
WIDTHS = {"vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
ENCODER = WIDTHS | {"intermediate_size": 40, "max_position_embeddings": 20, "pad_token_id": 0}
DECODER = WIDTHS | {"intermediate_size": 40, "max_position_embeddings": 20, "pad_token_id": None}
IMAGES = {k: v for k, v in ENCODER.items() if k != "vocab_size"} | {"image_size": 16, "patch_size": 4, "num_labels": 7}
CODER = {
    **{"vocab_size": 37, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 20},
    **{"encoder_attention_heads": 3, "decoder_attention_heads": 3, "encoder_ffn_dim": 40, "decoder_ffn_dim": 44},
}
T5 = {"vocab_size": 37, "d_model": 24, "d_kv": 10, "d_ff": 40, "num_layers": 2, "num_heads": 3}
STAGES = {"embedding_size": 8, "hidden_sizes": [8, 12, 16, 20], "depths": [1, 2, 1, 1], "num_labels": 7}
CLIP = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}


def tokens(length: int = 9, **names: int) -> dict[str, np.ndarray]:
    """Token ids by name; above the special ones, so that nothing is padding."""
    rng = np.random.default_rng(0)
    return {name: rng.integers(4, 37, (2, size)) for name, size in (names or {"input_ids": length}).items()}


def both() -> dict[str, np.ndarray]:
    return tokens(input_ids=9, decoder_input_ids=7)


def images(size: int = 16) -> dict[str, np.ndarray]:
    return {"pixel_values": np.random.default_rng(0).standard_normal((2, 3, size, size))}


@dataclass(frozen=True)
class Pair:
    """`model` is the PyTorch class; the Flax one has the same name with Flax before it."""

    model: str
    config: dict = field(default_factory=dict)
    inputs: dict = field(default_factory=tokens)

    def settings(self):
        return getattr(transformers, self.model).config_class(**self.config, attn_implementation="eager")

    def reference(self) -> torch.nn.Module:
        return First(getattr(transformers, self.model)(self.settings()))

    def candidate(self):
        """The Flax model, and what `parity` takes: a function of (parameters, inputs) and the parameters."""
        model = getattr(transformers, f"Flax{self.model}")(self.settings())
        return model, (lambda params, **inputs: model(**inputs, params=params)[0], model.params)


class First(torch.nn.Module):
    """A model of `transformers` that returns the first of its outputs."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return self.model(**inputs)[0]


PAIRS = {
    "albert": Pair("AlbertForMaskedLM", ENCODER | {"embedding_size": 16}),
    "bart": Pair("BartForConditionalGeneration", CODER, both()),
    "beit": Pair("BeitForImageClassification", IMAGES | {"use_relative_position_bias": True}, images()),
    "bert": Pair("BertForMaskedLM", ENCODER),
    "big_bird": Pair("BigBirdForMaskedLM", ENCODER | {"attention_type": "original_full"}),
    "blenderbot": Pair("BlenderbotForConditionalGeneration", CODER, both()),
    "blenderbot_small": Pair("BlenderbotSmallForConditionalGeneration", CODER, both()),
    "bloom": Pair("BloomForCausalLM", {"vocab_size": 37, "hidden_size": 24, "n_layer": 2, "n_head": 4}),
    "clip": Pair(
        "CLIPModel",
        {
            "text_config": CLIP | {"vocab_size": 37, "max_position_embeddings": 20},
            "vision_config": CLIP | {"image_size": 16, "patch_size": 4},
            "projection_dim": 18,
        },
        tokens() | images(),
    ),
    "dinov2": Pair("Dinov2ForImageClassification", IMAGES, images()),
    "distilbert": Pair(
        "DistilBertForMaskedLM",
        {"vocab_size": 37, "dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 40, "max_position_embeddings": 20},
    ),
    "electra": Pair("ElectraForMaskedLM", ENCODER | {"embedding_size": 16}),
    "gemma": Pair("GemmaForCausalLM", DECODER | {"num_key_value_heads": 1, "head_dim": 10}),
    "gpt2": Pair("GPT2LMHeadModel", {"vocab_size": 37, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 20}),
    "gpt_neo": Pair(
        "GPTNeoForCausalLM",
        {
            **{"vocab_size": 37, "hidden_size": 24, "num_layers": 2, "num_heads": 3, "max_position_embeddings": 20},
            **{"attention_types": [[["global", "local"], 1]], "window_size": 4},
        },
    ),
    "gptj": Pair(
        "GPTJForCausalLM",
        {"vocab_size": 37, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 20, "rotary_dim": 4},
    ),
    "llama": Pair("LlamaForCausalLM", DECODER | {"num_key_value_heads": 1}),
    "longt5": Pair("LongT5ForConditionalGeneration", T5 | {"local_radius": 3}, both()),
    "marian": Pair("MarianMTModel", CODER | {"pad_token_id": 0, "decoder_start_token_id": 0}, both()),
    "mbart": Pair("MBartForConditionalGeneration", CODER, both()),
    "mistral": Pair("MistralForCausalLM", DECODER | {"num_key_value_heads": 1, "sliding_window": 4}),
    "mt5": Pair("MT5ForConditionalGeneration", T5, both()),
    "opt": Pair(
        "OPTForCausalLM",
        {
            **{"vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "ffn_dim": 40},
            **{"max_position_embeddings": 20, "word_embed_proj_dim": 24},
        },
    ),
    "pegasus": Pair("PegasusForConditionalGeneration", CODER, both()),
    "regnet": Pair("RegNetForImageClassification", STAGES | {"groups_width": 4, "layer_type": "y"}, images(32)),
    "resnet": Pair("ResNetForImageClassification", STAGES | {"layer_type": "bottleneck"}, images(32)),
    "roberta": Pair("RobertaForMaskedLM", ENCODER),
    "roberta_prelayernorm": Pair("RobertaPreLayerNormForMaskedLM", ENCODER),
    "roformer": Pair("RoFormerForMaskedLM", ENCODER | {"num_attention_heads": 2, "embedding_size": 24}),
    "t5": Pair("T5ForConditionalGeneration", T5, both()),
    "vit": Pair("ViTForImageClassification", IMAGES, images()),
    "wav2vec2": Pair(
        "Wav2Vec2ForCTC",
        {
            **{k: v for k, v in ENCODER.items() if k != "max_position_embeddings"},
            **{"conv_dim": (12, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2},
            **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "do_stable_layer_norm": True},
            **{"feat_extract_norm": "layer"},
        },
        {"input_values": np.random.default_rng(0).standard_normal((2, 200))},
    ),
    "whisper": Pair(
        "WhisperForConditionalGeneration",
        {
            **{k: v for k, v in CODER.items() if k != "max_position_embeddings"},
            **{"num_mel_bins": 8, "max_source_positions": 15, "max_target_positions": 12, "pad_token_id": 0},
            **{"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "begin_suppress_tokens": None},
        },
        {"input_features": np.random.default_rng(0).standard_normal((2, 8, 30)), **tokens(decoder_input_ids=7)},
    ),
    "xglm": Pair(
        "XGLMForCausalLM",
        {"vocab_size": 37, "d_model": 24, "num_layers": 2, "attention_heads": 3, "ffn_dim": 40},
    ),
    "xlm_roberta": Pair("XLMRobertaForMaskedLM", ENCODER),
}


def numbered(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """The module's tensors with a number of its own in every element, tied tensors alike."""
    start, by_tensor, found = 1, {}, {}
    for name, tensor in itertools.chain(module.named_parameters(remove_duplicate=False), module.named_buffers()):
        if id(tensor) not in by_tensor:
            by_tensor[id(tensor)] = np.arange(start, start + tensor.numel(), dtype=np.float32).reshape(tensor.shape)
            start += tensor.numel()
        found[name] = by_tensor[id(tensor)]
    return found


def truth(module: torch.nn.Module, model) -> dict[str, np.ndarray]:
    """The Flax model's tensors by name, as transformers' own conversion makes them of numbered ones."""
    numbers = numbered(module)
    state = {name: torch.from_numpy(numbers[name].copy()) for name in module.state_dict() if name in numbers}
    converted = flatten_dict(convert_pytorch_state_dict_to_flax(state, model))
    own = flatten_dict(jax.device_get(model.params))
    return {".".join(path): np.asarray(converted[path]) for path in own if path in converted}


def judged(reference: First, model, report) -> tuple[int, dict[str, str], dict[str, str]]:
    """How many tensors are mapped right; which wrong, and which are left out, with what was made of them."""
    numbers = {f"model.{name}": x for name, x in numbered(reference.model).items()}
    rows = {row.target: row for row in report.table.rows}
    right, wrong, left = 0, {}, {}
    for name, expected in truth(reference.model, model).items():
        if (row := rows.get(name)) is None:
            left[name] = "left out"
        elif np.array_equal(row.transform(*(numbers[n] for n in row.source)), expected):
            right += 1
        else:
            wrong[name] = f"{' + '.join(row.source)} {row.transform}{'' if row.verified else ', decided by names'}"
    return right, wrong, left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", default=",".join(PAIRS), help="comma-separated names of: %(default)s")
    chosen = parser.parse_args().pairs.split(",")
    if unknown := [name for name in chosen if name not in PAIRS]:
        parser.error(f"--pairs {','.join(unknown)}: unknown; the pairs are {', '.join(PAIRS)}")
    transformers.logging.set_verbosity_error()
    table = Table("pair", "mapped right", "verdict", "difference", "first divergence", "seconds")
    console, remarks, silent, totals = Console(markup=False, width=140), [], 0, [0, 0]
    for name in chosen:
        pair = PAIRS[name]
        model, candidate = pair.candidate()
        started = time.monotonic()
        report = parity.compare(pair.reference, candidate, inputs=pair.inputs, generate=False)
        seconds = time.monotonic() - started
        right, wrong, left = judged(pair.reference(), model, report)
        count = right + len(wrong) + len(left)
        totals = [totals[0] + right, totals[1] + count]
        silent += len(wrong) if report.verdict == "same" else 0
        forward = [r.measured for r in report.results if r.check == "forward" and "as written" not in r.case]
        place = report.first_divergence.lines[0] if report.first_divergence and report.first_divergence.lines else ""
        difference = f"{max(forward):.0e}" if forward else ""
        table.add_row(name, f"{right} / {count}", report.verdict, difference, place, f"{seconds:.0f}")
        remarks += [f"{name}: {n} is mapped from {what}" for n, what in {**wrong, **left}.items()]
        remarks += [f"{name}: {r.check}, {r.case}: {r.measured:.1e}; {r.where}" for r in report.results if not r.passed]
        remarks += [f"{name}: {text}" for text in (*report.hints, *report.causes, *report.doubts)]
    console.print(table)
    for remark in remarks:
        console.print(remark, soft_wrap=True, highlight=False)
    console.print(f"{totals[0]} of {totals[1]} tensors mapped right; {silent} wrong under the verdict 'same'")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
