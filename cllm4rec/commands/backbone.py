"""The language model → `backbone/`: built or loaded, and with `backbone.epochs` trained on the training split's texts.

cllm4rec backbone --config demo backbone.epochs=3
"""

from cllm4rec.commands.cli import stage_command

COMMAND = stage_command("backbone", __doc__)
