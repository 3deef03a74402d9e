"""A list of items for every user → `dump/`, a Delta table: scored, audited, then published in one commit.

    cllm4rec score --config demo score.k=20

An interrupted run continues with the users it has not scored. Lists that fail the audit are not published (status 3).
"""

from cllm4rec.commands.cli import stage_command

COMMAND = stage_command("score", __doc__)
