"""Recommendation-oriented finetuning → `model/`, the directory that is evaluated, scored and served.

python -m jobs.finetune --config jobs/configs/demo.yaml finetune.epochs=30
"""

from jobs.cli import main

if __name__ == "__main__":
    main("finetune", __doc__)
