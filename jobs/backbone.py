"""The language model → `backbone/`: built, or loaded, and with `backbone.epochs` trained on the training split's texts.

python -m jobs.backbone --config jobs/configs/demo.yaml backbone.epochs=3
"""

from jobs.cli import main

if __name__ == "__main__":
    main("backbone", __doc__)
