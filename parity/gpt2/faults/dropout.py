"""Mistakes of dropout: rates, scales, and masks that aren't independent."""

import jax
import jax.numpy as jnp

import gpt2_jax.attention
import gpt2_jax.dropout
import gpt2_jax.model
import gpt2_jax.train_step
import gpt2_torch.model
import gpt2_torch.train
from parity.gpt2.faults.fault import fault


@fault(
    "dropout without its scale",
    check="dropout",
    place="steps at rate",
    part="training at rate 0.4",
    seam=(gpt2_jax.dropout, "keep_probability"),
)
def dropout_without_its_scale(_):
    """what is kept isn't divided by 1 - rate"""

    return lambda rate: 1.0


@fault(
    "dropout in evaluation",
    check="dropout",
    place="PyTorch: evaluation",
    part="evaluation",
    seam=(gpt2_torch.model.GPT2, "eval"),
)
def dropout_in_evaluation(evaluate):
    """model.eval() forgotten"""

    return lambda self: self.train()


@fault(
    "one dropout key for everything",
    check="dropout",
    place="embeddings of step 0, part 0, sequence 0 with block 0, attn weights of step 0, part 0, sequence 0",
    part="masks at rate 0.4",
    seam=(gpt2_jax.model, "site"),
)
def one_dropout_key_for_everything(site):
    """a key passed down without folding or splitting: every layer drops the same"""

    return lambda key, number: key


@fault(
    "one mask for every sequence",
    check="dropout",
    place="sequence 0 with embeddings of step 0, part 0, sequence 1",
    part="masks at rate 0.4",
    seam=(gpt2_jax.train_step, "dropout_keys"),
)
def one_mask_for_every_sequence(keys):
    """dropout without a batch axis, broadcast: no two masks are equal as wholes, and every sequence loses the same"""

    return lambda seed, step, shape: jnp.broadcast_to(keys(seed, step, (1, 1)), shape)


@fault(
    "one mask for all heads",
    check="dropout",
    place="block 0, attn weights with block 0, attn weights, displaced by [0, 1, 0, 0]",
    part="masks at rate 0.4",
    seam=(gpt2_jax.attention, "dropout_mask"),
)
def one_mask_for_all_heads(draw):
    """broadcast_dropout=True, the default of Flax's attention"""

    def wrong(keys, shape, rate):
        B, H, *rest = shape
        return jnp.repeat(draw(keys, (B, 1, *rest), rate), H, axis=1)

    return wrong


@fault(
    "attention's dropout forgotten",
    check="dropout",
    place="(4, 68, 36) where (4, 2, 68, 68) of block 0, attn weights is due",
    part="masks at rate 0.4",
    seam=(gpt2_jax.attention, "_dropout_masks"),
)
def attention_dropout_forgotten(_):
    """a kernel that takes no rate: two sites of three drop out"""

    return lambda shape, *_: [None] * len(gpt2_jax.attention._blocks(shape[2]))


@fault(
    "the rate kept instead of dropped",
    check="dropout",
    place="block 0, attn weights",
    part="masks at rate 0.4",
    seam=(gpt2_jax.attention, "dropout_mask"),
)
def the_rate_kept_in_the_place_of_dropped(draw):
    """bernoulli(rate) taken for what is kept, at one of the sites"""

    return lambda keys, shape, rate: draw(keys, shape, 1 - rate)


@fault(
    "masks that depend on the precision",
    check="dropout",
    place="bfloat16, part 0, embeddings",
    part="masks at rate 0.4",
    seam=(gpt2_jax.model, "dropout"),
)
def masks_that_depend_on_the_precision(dropout):
    """jax.random.bernoulli draws others in float64: no run in one precision can be held against another"""

    return lambda x, rate, keys: dropout(x, rate, gpt2_jax.dropout.site(keys, x.dtype.itemsize))


@fault(
    "every step seeded alike",
    check="dropout",
    place="embeddings of step 0, part 0, sequence 0 with embeddings of step 1, part 0, sequence 0",
    part="masks at rate 0.4",
    seam=(gpt2_torch.train, "dropout_seed"),
)
def every_step_seeded_alike(_):
    """torch.manual_seed(seed) moved into the loop: each step drops the same"""

    return lambda seed, step, rank, processes: seed


@fault(
    "one dropout key for all scanned layers",
    check="combinations",
    place="row 1",
    seam=(gpt2_jax.model, "site"),
)
def one_dropout_key_for_all_scanned_layers(site):
    """the key closed over by the scanned function instead of one for each layer"""

    def wrong(keys, number):
        return site(keys, 1 if isinstance(number, jax.core.Tracer) else number)

    return wrong


@fault(
    "a dropout rate of 8 bits",
    check="dropout",
    place="share kept at rate 0.006",
    part="masks at rate 0.006",
    seam=(gpt2_jax.attention, "dropout_mask"),
)
def a_dropout_rate_of_8_bits(draw):
    """a random byte an element is cheaper, and rounds 0.1 to 26/256"""

    return lambda keys, shape, rate: draw(keys, shape, round(rate * 256) / 256)


@fault(
    "a process repeats another's masks",
    check="dropout",
    place="seeds that two of 50 steps",
    part="seeds",
    seam=(gpt2_torch.train, "dropout_seed"),
)
def a_process_repeats_another_masks(_):
    """seed + step + rank: process 1 draws at a step what process 0 draws at the next"""

    return lambda seed, step, rank, processes: seed * 1_000_003 + step + rank
