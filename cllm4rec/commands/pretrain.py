"""Content warm-up and mutually regularized pretraining → `pretrained/`.

    cllm4rec pretrain --config demo pretrain.epochs=20

Prints the expected time, then each epoch's loss, validation metrics and rates. An interrupted run resumes from its last
checkpoint.
"""

from cllm4rec.commands.cli import stage_command

COMMAND = stage_command("pretrain", __doc__)
