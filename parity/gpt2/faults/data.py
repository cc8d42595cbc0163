"""Mistakes between the text and the windows that are trained on."""

import dataclasses
import math

import gpt2_core.config.model
import gpt2_core.data.batches
import gpt2_core.data.prepare
import gpt2_core.data.token_files
import gpt2_core.data.tokenizer
from parity.gpt2.faults.fault import fault


@fault(
    "an end of text after every piece",
    check="data",
    place="a document that isn't one of the text",
    seam=(gpt2_core.data.prepare, "_tokenise"),
)
def an_end_of_text_after_every_piece(tokenise):
    """a long document is tokenised in pieces, and each is taken for a document"""

    return lambda pieces, *arguments: tokenise([piece._replace(ends=True) for piece in pieces], *arguments)


@fault(
    "a token file's header read as tokens",
    check="data",
    place="token files",
    seam=(gpt2_core.data.token_files, "_describe"),
)
def a_token_file_header_read_as_tokens(describe):
    """np.memmap(path, dtype) of llm.c's file, as it is right for nanoGPT's"""

    return lambda *arguments: describe(*arguments)._replace(offset=0)


@fault(
    "a mixture without its weights",
    check="data",
    place="a mixture of weights 3 and 1",
    seam=(gpt2_core.data.batches, "_sources"),
)
def a_mixture_without_its_weights(sources):
    """each source as often as the other"""

    return lambda tokens: tuple(dataclasses.replace(source, weight=1.0) for source in sources(tokens))


@fault(
    "a marker in a text becomes the token",
    check="data",
    place="becomes [50256]",
    seam=(gpt2_core.data.tokenizer.TiktokenTokenizer, "encode"),
)
def a_marker_in_a_text_becomes_the_token(encode):
    """allowed_special="all": a text about tokenizers ends in its middle"""

    def wrong(self, text):
        return self.encoding.encode_to_numpy(text, allowed_special="all").astype(encode(self, "").dtype)

    return wrong


@fault(
    "SwiGLU's width rounded to the nearest",
    check="settings",
    place="swiglu at n_embd",
    seam=(gpt2_core.config.model.ModelConfig, "mlp_size"),
)
def swiglu_width_rounded_to_the_nearest(mlp_size):
    """instead of up: the default is another model, and both frameworks make it alike"""

    def width(self):
        gated = self.mlp == "swiglu" and self.mlp_width is None
        return 64 * math.floor(8 * self.n_embd / (3 * 64) + 0.5) if gated else mlp_size.fget(self)

    return property(width)
