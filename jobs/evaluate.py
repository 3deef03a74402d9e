"""Full-catalogue ranking of CLLM4Rec, popularity and EASE on the test split → `evaluation/`.

    python -m jobs.evaluate --config jobs/configs/demo.yaml

Writes metrics.json, per_user.parquet, top100.parquet, plots and report.md.
"""

from jobs.cli import main

if __name__ == "__main__":
    main("evaluate", __doc__)
