"""Mistakes of the trainers' loops: batches, evaluations, checkpoints, logs."""

import dataclasses

import numpy as np

import gpt2_core.data.batches
import gpt2_core.runs.due
import gpt2_core.runs.folder
import gpt2_jax.train
import gpt2_torch.checkpoints
import gpt2_torch.train
from gpt2_core.config import IGNORE_INDEX
from parity.gpt2.faults.fault import fault, replacing


@fault(
    "windows left out",
    check="trainer",
    place="windows left out",
    seam=(gpt2_core.data.batches.Windows, "__len__"),
)
def windows_left_out(length):
    """range(0, len(tokens) - 2 * T, T): the last window of the text is never trained on, whichever framework"""

    return lambda self: length(self) - 1


@fault(
    "validation reads the beginning only",
    check="trainer",
    place="validation after 0 updates, loss",
    seam=(gpt2_core.data.batches, "_evenly_spaced"),
)
def validation_reads_the_beginning_only(_):
    """the first sequences of the split instead of some from all over it, by both trainers"""

    return lambda count, of: list(range(min(count, of)))


@fault(
    "evaluation averages batches",
    check="trainer",
    place="validation after 0 updates, loss",
    seam=(gpt2_torch.train, "evaluate"),
)
def evaluation_averages_batches(evaluate):
    """the mean of the batches' mean losses: the last, mostly padding, counts as much as a full one"""

    def wrong(model, batches, device, autocast):
        return float(np.mean([evaluate(model, [batch], device, autocast) for batch in batches]))

    return wrong


@fault(
    "padding counts in the mean",
    check="trainer",
    place="JAX, interrupted and resumed: figures validation after 0 updates",
    seam=(gpt2_jax.train, "IGNORE_INDEX"),
)
def padding_counts_in_the_mean(_):
    """the summed loss over the number of targets, those that are ignored included"""

    return IGNORE_INDEX - 1


@fault(
    "validation on the training text",
    check="trainer",
    place="validation after 0 updates, loss",
    seam=(gpt2_torch.train, "open_tokens"),
)
def validation_on_the_training_text(open_tokens):
    """one variable instead of another: the curve looks better than it is"""

    def wrong(config):
        tokens = open_tokens(config)
        return dataclasses.replace(tokens, val=tokens.train)

    return wrong


@fault(
    "the model stays in evaluation mode",
    check="trainer",
    place="PyTorch, dropout: watched, interrupted and resumed, or neither step 1, loss",
    seam=(gpt2_torch.train.Trainer, "evaluate"),
)
def the_model_stays_in_evaluation_mode(evaluate):
    """model.train() forgotten after an evaluation: no dropout from then on"""

    def wrong(self, updates):
        evaluate(self, updates)
        self.model.eval()

    return wrong


@fault(
    "the last part's loss is logged",
    check="trainer",
    place="step 0, loss",
    seam=(gpt2_torch.train, "accumulate_gradients"),
)
def the_last_part_loss_is_logged(accumulate):
    """of an accumulated batch, as loss.item() after the loop gives it"""

    def wrong(model, inputs, targets, *, accumulation=1, autocast=None):
        accumulate(model, inputs, targets, accumulation=accumulation, autocast=autocast)
        inputs, targets = inputs.chunk(accumulation)[-1], targets.chunk(accumulation)[-1]
        return model(inputs, targets).detach() / (targets != IGNORE_INDEX).sum()

    return wrong


@fault(
    "the gradient norm is logged after clipping",
    check="trainer",
    place="step 0, gradient norm",
    seam=(gpt2_torch.train, "train_step"),
)
def the_gradient_norm_is_logged_after_clipping(step):
    """it then never exceeds the limit, and says nothing of the run"""

    def wrong(*arguments, clip_norm, **options):
        loss, norm = step(*arguments, clip_norm=clip_norm, **options)
        return loss, norm.clamp(max=clip_norm)

    return wrong


@fault(
    "the optimizer isn't restored",
    check="trainer",
    place="PyTorch, interrupted and resumed: figures step 6",
    seam=(gpt2_torch.checkpoints, "restore_optimizer"),
)
def the_optimizer_isn_t_restored(restore_optimizer):
    """a run goes on with its weights and without their moments"""
    return lambda checkpoint, optimizer: None


@fault(
    "a resumed run begins the text again",
    check="trainer",
    place="JAX, interrupted and resumed: figures step 6",
    seam=(gpt2_jax.train._Loop, "run"),
)
def a_resumed_run_begins_the_text_again(run):
    """the data loader's position isn't part of the checkpoint"""

    def wrong(self, state, plan):
        put = self.put
        self.put = lambda step: put(step - plan.step)
        run(self, state, plan)

    return wrong


@fault(
    "a resumed run begins the schedule again",
    check="trainer",
    place="step 6, learning rate",
    seam=(gpt2_jax.train._Loop, "run"),
)
def a_resumed_run_begins_the_schedule_again(run):
    """a counter of its own: a second warmup"""

    def wrong(self, state, plan):
        def restarted(rate):
            return lambda step, steps, config: rate(step - plan.step, steps, config)

        with replacing(gpt2_jax.train, "learning_rate", restarted)():
            run(self, state, plan)

    return wrong


@fault(
    "a resumed run keeps what it does again in the log",
    check="trainer",
    place="logged steps",
    seam=(gpt2_core.runs.folder, "_cut_metrics"),
)
def a_resumed_run_keeps_what_it_does_again_in_the_log(_):
    """steps after the checkpoint are there twice"""

    return lambda *arguments, **options: None


@fault(
    "the best checkpoint is the one with the largest loss",
    check="trainer",
    place="best 12, where [5, 12] and 5 are due",
    seam=(gpt2_core.runs.folder.RunFolder, "best_step"),
)
def the_best_checkpoint_is_the_one_with_the_largest_loss(best_step):
    """max instead of min, as for an accuracy"""

    def wrong(self):
        rows = gpt2_core.runs.folder.read_metrics(self.metrics)
        losses = {row["step"]: row["loss"] for row in rows if row["split"] == "val"}
        losses = losses or {step: gpt2_core.runs.folder.recent_training_loss(rows, step) for step in self.steps()}
        return max(self.steps(), key=losses.__getitem__, default=None)

    return wrong


@fault(
    "intervals counted by steps from zero",
    check="trainer",
    place="logged steps step 4 where validation after 4 updates is due",
    seam=(gpt2_core.runs.due, "_is_multiple"),
)
def intervals_counted_by_steps_from_zero(is_multiple):
    """`step % interval == 0` after the update of a step that is counted from 0: everything is one update late, in both
    trainers"""

    return lambda updates, interval: is_multiple(updates - 1, interval)


@fault(
    "the last update isn't saved",
    check="trainer",
    place="PyTorch, interrupted and resumed: checkpoints kept [5, 10], best 5",
    seam=(gpt2_torch.train, "due_after"),
)
def the_last_update_isn_t_saved(due_after):
    """checkpoints at multiples of the interval only: of a run of 12 steps the last two are lost"""

    def wrong(updates, config, **options):
        due = due_after(updates, config, **options)
        return due._replace(save=due.save and updates % config.checkpoint_interval == 0)

    return wrong


@fault(
    "checkpoints are never removed",
    check="trainer",
    place="kept [5, 10, 12]",
    seam=(gpt2_core.runs.folder.RunFolder, "remove_obsolete"),
)
def checkpoints_are_never_removed(_):
    """the disk fills up some days into the run"""

    return lambda self, keep: None


@fault(
    "the same masks at every step",
    check="trainer",
    place="PyTorch, dropout: every step has masks of its own",
    seam=(gpt2_torch.train, "dropout_seed"),
)
def the_same_masks_at_every_step(_):
    """the generator seeded alike before each step, so that dropout is reproducible"""

    return lambda seed, step, rank, processes: 0


@fault(
    "every sample from the same numbers",
    check="trainer",
    place="samples",
    seam=(gpt2_torch.train, "uniforms"),
)
def every_sample_from_the_same_numbers(draw):
    """a generator seeded again for each sample"""

    return lambda seed, sample, count: draw(seed, 0, count)
