"""``nann train``, and the flags of training that other commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nann.cli.output import JsonOption, emit
from nann.cli.parameters import Flag, given, with_flags

__all__ = ["TRAIN_FLAGS", "train_command"]

# The fields of nann.offline.train.TrainConfig, whose import would load TensorFlow; a test compares.
TRAIN_FLAGS = (
    Flag("model", str, "Network: attention_dnn, dnn or two_sided."),
    Flag("batch_size", int, "Positive samples a step."),
    Flag("num_neg", int, "Negatives a positive sees."),
    Flag("negative_groups", int, "Sets of negatives drawn a step; each serves an equal part of the batch."),
    Flag("epochs", int, "Passes over the training samples."),
    Flag("max_steps", int, "Stop after so many steps, before the epochs end."),
    Flag("learning_rate", float, "Peak of AdamW's learning rate."),
    Flag("warmup_steps", int, "Steps until the learning rate is at its peak."),
    Flag("final_learning_rate_share", float, "Share of the peak that is left at the end."),
    Flag("weight_decay", float, "AdamW's decoupled weight decay."),
    Flag("clip_norm", float, "Largest norm of the gradient; 0 leaves it alone."),
    Flag("adv_eps", float, "FGSM step on item embeddings (NANN: 3e-5); 0 turns the adversarial term off."),
    Flag("adv_groups", int, "Sets of negatives that carry the adversarial term."),
    Flag("seed", int, "Decides weights and samples."),
    Flag("eval_every", int, "Steps between validations; 0 validates at the end of each epoch."),
    Flag("eval_users", int, "Validation users looked at."),
    Flag("checkpoint_every", int, "Steps between checkpoints."),
    Flag("jit", bool, "Compile the step with XLA."),
    Flag("threads", int, "Threads that training may use."),
)


@with_flags(TRAIN_FLAGS)
def train_command(
    data: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Output of nann prepare.")],
    output: Annotated[Path, typer.Option(help="Directory of the model.")],
    as_json: JsonOption = False,
    **training: Any,
) -> None:
    """Train a model, or go on with the one begun in --output."""
    from nann.offline.progress import Progress
    from nann.offline.train import TrainConfig, train

    report = train(data, output, TrainConfig(**given(training)), progress=Progress())
    emit(
        report,
        as_json=as_json,
        words=f"{output}: {report.steps:,} steps in {report.seconds:.0f} s, validation hit_rate@200 "
        f"{report.best_hit_rate:.3f} at step {report.best_step:,} (popularity "
        f"{report.popularity_hit_rate:.3f}); next: nann extract --model {output} --output EMBEDDINGS",
    )
