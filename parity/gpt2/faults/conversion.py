"""Mistakes of conversions: tensors, and the files of formats."""

import dataclasses
from collections.abc import Callable

import numpy as np

import gpt2_convert.hugging_face
import gpt2_convert.llmc
import gpt2_convert.msgpack
import gpt2_convert.nanogpt
import gpt2_convert.torch_files
import gpt2_torch.weights
import parity.gpt2.adapters.jax_adapter
from gpt2_core.weights.layouts import Placement
from parity.gpt2.faults.fault import MODEL, fault


def _heads_as_columns(name: str, array: np.ndarray) -> np.ndarray:
    if ".c_attn." not in name:
        return array
    heads = array.reshape(*array.shape[:-1], MODEL.head_size, MODEL.n_head)
    return heads.swapaxes(-1, -2).reshape(array.shape)


def _changed(convert: Callable, change: Callable[[str, np.ndarray], np.ndarray]) -> Callable:
    """The conversion to JAX, which gets a tensor wrong."""

    def wrong(weights, dtype):
        return {name: change(name, array) for name, array in convert(weights, dtype).items()}

    return wrong


@fault(
    "heads interleaved wrongly",
    check="forward",
    place="block 0, attn q",
    seam=(parity.gpt2.adapters.jax_adapter, "from_canonical"),
)
def heads_interleaved_wrongly(convert):
    """the projection reshaped to (head size, heads) instead of (heads, head size)"""

    return _changed(convert, _heads_as_columns)


@fault(
    "missing projection bias",
    check="forward",
    place="block 0, attn c_proj",
    seam=(parity.gpt2.adapters.jax_adapter, "from_canonical"),
)
def missing_projection_bias(convert):
    """use_bias=False taken over from another model"""

    return _changed(convert, lambda name, a: 0 * a if name.endswith("attn.c_proj.bias") else a)


@fault(
    "transposed square matrix",
    check="forward",
    place="block 0, attn c_proj",
    seam=(parity.gpt2.adapters.jax_adapter, "from_canonical"),
)
def transposed_square_matrix(convert):
    """Conv1D stores (in, out), nn.Linear (out, in); on a square matrix no shape complains (nanoGPT's
    from_pretrained transposes four by name for that reason)"""

    return _changed(convert, lambda name, a: a.T if name.endswith("attn.c_proj.weight") else a)


@fault(
    "a tensor left out by the conversion",
    check="forward",
    place="exceptions",
    seam=(parity.gpt2.adapters.jax_adapter, "from_canonical"),
)
def a_tensor_left_out_by_the_conversion(convert):
    """a list of names that is one short, and a loader that isn't strict: an exception is a failed case"""

    return lambda weights, dtype: {n: a for n, a in convert(weights, dtype).items() if n != "h.0.mlp.c_fc.bias"}


@fault(
    "float64 weights through float32",
    check="weights",
    place="11 layers in float64",
    part="other models",
    seam=(gpt2_torch.weights, "to_tensor"),
)
def float64_weights_through_float32(convert):
    """a conversion with a dtype of its own on the way: the dtype is right, the digits are gone"""

    return lambda array: convert(array.astype(np.float32).astype(array.dtype))


@fault(
    "a file's layers in the order of their names",
    check="weights",
    place="llmc: the tensors",
    part="files as others read them",
    seam=(gpt2_convert.llmc, "_order"),
)
def a_file_layers_in_the_order_of_their_names(order):
    """reader and writer sort alike: the round trip is bitwise, and llm.c reads other weights"""

    def wrong(config):
        layers = sorted(range(config.n_layer), key=str)
        yield from ("wte.weight", "wpe.weight")
        for name in gpt2_convert.llmc.BLOCK_ORDER:
            yield from (f"h.{layer}.{name}" for layer in layers)
        yield from ("ln_f.weight", "ln_f.bias")

    return wrong


@fault(
    "Flax's kernels as Conv1D stores them",
    check="weights",
    place="msgpack: transformer/h/0/attn/c_attn/kernel",
    part="files as others read them",
    seam=(gpt2_convert.msgpack._FlaxLayout, "placement"),
)
def flax_kernels_as_conv1d_stores_them(placement):
    """FlaxConv1D's kernel is (out, in), and reader and writer leave it (in, out): the round trip is bitwise, and
    transformers reads the transpose of every matrix"""

    def wrong(self, name, shape):
        right = placement(self, name, shape)
        if not right.name.endswith("/kernel"):
            return right
        return dataclasses.replace(right, shape=shape, encode=np.asarray, decode=np.asarray)

    return wrong


@fault(
    "layer norm's epsilon not read from config.json",
    check="weights",
    place="layer_norm_epsilon 0.03 becomes 1e-05",
    part="other models",
    seam=(gpt2_convert.hugging_face, "_SETTINGS"),
)
def layer_norm_epsilon_not_read_from_config_json(settings):
    """a setting that a format says and its reader leaves at the default"""

    return {n: v for n, v in settings.items() if n != "layer_norm_epsilon"}


@fault(
    "Flax's head as the embedding",
    check="weights",
    place="msgpack: lm_head/kernel",
    part="an untied head as others read it",
    seam=(gpt2_convert.msgpack._FlaxLayout, "placement"),
)
def flax_head_as_the_embedding(placement):
    """(vocabulary, width), where an nn.Dense has (in, out): reader and writer agree, and transformers doesn't"""

    def wrong(self, name, shape):
        found = placement(self, name, shape)
        return Placement(found.name, shape, np.asarray, np.asarray) if name == "lm_head.weight" else found

    return wrong


@fault(
    "one wrapper's prefix removed",
    check="weights",
    place="files as other programs leave them nanoGPT, compiled, by several processes",
    part="files as others write them",
    seam=(gpt2_convert.nanogpt, "_WRAPPERS"),
)
def one_wrapper_prefix_removed(wrappers):
    """torch.compile's, and not DistributedDataParallel's beneath it"""

    return wrappers[:1]


@fault(
    "a view read as if it were whole",
    check="weights",
    place="files as other programs leave them nanoGPT, tensors that are views",
    part="files as others write them",
    seam=(gpt2_convert.torch_files, "_stored"),
)
def a_view_read_as_if_it_were_whole(stored):
    """a transposed tensor's values in the order in which they lie in the file: the shape is right"""

    def wrong(*arguments):
        tensor = stored(*arguments)
        return tensor.map(tensor.shape, lambda array: array.ravel(order="K").reshape(tensor.shape))

    return wrong
