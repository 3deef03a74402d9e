"""Raw interactions and texts → `prepared/`: validated, filtered by rating and k-core, split, tokenized once.

    cllm4rec prepare --config demo

Prints how many rows were kept, filtered and quarantined, and the leakage audit. The demo's 2,000 users take about 10 s.
"""

from cllm4rec.commands.cli import stage_command

COMMAND = stage_command("prepare", __doc__)
