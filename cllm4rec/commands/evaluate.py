"""Full-catalog ranking of CLLM4Rec, popularity and EASE on the test split → `evaluation/`.

    cllm4rec evaluate --config demo

Writes metrics.json, per_user.parquet, top100.parquet, plots and report.md.
"""

from cllm4rec.commands.cli import stage_command

COMMAND = stage_command("evaluate", __doc__)
