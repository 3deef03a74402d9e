"""The language model → `backbone/`: built or loaded, and with `backbone.epochs` trained on the training split's texts.

    cllm4rec backbone --config demo backbone.epochs=3

Without `backbone.epochs` it takes seconds: the model is built, or loaded by its name or folder, and its digest is written.
"""

from cllm4rec.commands.cli import stage_command

COMMAND = stage_command("backbone", __doc__)
