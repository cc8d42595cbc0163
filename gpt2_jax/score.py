"""The probabilities that the JAX model gives to tokens, computed on the mesh of a program."""

import jax

from gpt2_core.data.batches import Batch
from gpt2_core.evaluation.scoring import ScoreBatch, TokenScores
from gpt2_jax.definition import Params
from gpt2_jax.train_step import Program


def scorer(program: Program, params: Params) -> ScoreBatch:
    """What scores a batch whose sequences the mesh can share; it returns while the devices still compute."""

    def score_batch(batch: Batch) -> TokenScores:
        with jax.set_mesh(program.mesh):
            return TokenScores(*program.score_step(params, *program.put_evaluation(batch)))

    return score_batch
