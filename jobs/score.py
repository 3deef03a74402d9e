"""A list of items for every user → `dump/`, a Delta table: scored, audited, then published in one commit.

    python -m jobs.score --config jobs/configs/demo.yaml score.k=20

An interrupted run goes on with the users it has not scored. Lists that fail the audit are not published (status 3).
"""

from jobs.cli import main

if __name__ == "__main__":
    main("score", __doc__)
