"""Recommendation-oriented finetuning → `model/`, the directory that is evaluated, scored and served.

    cllm4rec finetune --config demo finetune.epochs=30

Prints the expected time, then each epoch's loss, validation metrics and rates. An interrupted run resumes from its last
checkpoint.
"""

from cllm4rec.commands.cli import stage_command

COMMAND = stage_command("finetune", __doc__)
