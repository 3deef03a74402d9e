"""Content warm-up and mutually regularised pretraining → `pretrained/`.

    python -m jobs.pretrain --config jobs/configs/demo.yaml pretrain.epochs=20

Prints each epoch's loss, validation recall and rates. An interrupted run goes on from its last checkpoint.
"""

from jobs.cli import main

if __name__ == "__main__":
    main("pretrain", __doc__)
