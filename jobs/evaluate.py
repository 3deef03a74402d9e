"""Full-catalogue ranking of CLLM4Rec, popularity and EASE on the test split → `evaluation/`.

    python -m jobs.evaluate --config jobs/configs/demo.yaml

Writes metrics.json, per_user.parquet, top100.parquet, plots and report.md.
"""

from jobs.cli import main
from jobs.stages import EVALUATE

if __name__ == "__main__":
    main(EVALUATE, __doc__)
