"""Recommendation-oriented finetuning → `model/`, the directory that is evaluated, scored and served.

cllm4rec finetune --config demo finetune.epochs=30
"""

from cllm4rec.commands.cli import stage_command

COMMAND = stage_command("finetune", __doc__)
