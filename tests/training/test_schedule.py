"""The schedule of a config that leaves it open: it fits the data, and never the machine."""

import dataclasses

import pytest

from cllm4rec.config import parse_config
from cllm4rec.storage.artifacts import Manifest
from cllm4rec.training.schedule import resolved

MINIMAL = {"output_dir": "runs/x", "data": {"interactions": {"path": "reviews.json"}}}
EMPTY = Manifest("prepared", 1, {}, {}, {}, {}, "", "")


def prepared(users: int, interactions: int, texts: int = 0, text_tokens: int = 0) -> Manifest:
    counts = {
        "documents": {"interactions": users, "review": texts},
        "tokens": {"interactions": interactions, "review": text_tokens},
    }
    return dataclasses.replace(EMPTY, counts=counts)


def schedule(data: Manifest, **sections: object) -> tuple[int | None, float | None, int | None, int | None]:
    config = resolved(parse_config(MINIMAL | sections), data)
    pretrain = config.pretrain
    return config.training.micro_batch_tokens, pretrain.text_fraction, pretrain.epochs, config.finetune.epochs


MUSICAL = prepared(526, 2525, 2525, 201_759)
DEMO = prepared(1843, 9982, 12_390, 254_539)
BOOKS = prepared(600_000, 12_000_000, 12_000_000, 600_000_000)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (MUSICAL, (512, 0.079, 40, 60)),
        (DEMO, (1024, 0.19, 25, 49)),
        (BOOKS, (4096, 0.07, 8, 8)),
        (prepared(500, 5000), (512, 1.0, 40, 60)),  # no texts at all
    ],
)
def test_small_data_take_many_epochs_of_small_steps_and_large_data_few(data, expected):
    assert schedule(data) == expected


@pytest.mark.parametrize(("data", "most"), [(MUSICAL, 4000), (DEMO, 4000)])
def test_a_run_has_some_thousand_steps_at_most(data, most):
    batch, fraction, epochs, _ = schedule(data)
    tokens = sum(data.counts["tokens"].values()) * fraction
    assert epochs * tokens / batch < most


def test_what_the_config_says_stays():
    given = {
        "training": {"micro_batch_tokens": 2048},
        "pretrain": {"epochs": 3, "text_fraction": 0.5},
        "finetune": {"epochs": 0},
    }
    assert schedule(DEMO, **given) == (2048, 0.5, 3, 0)


def test_a_batch_holds_the_longest_document():
    assert schedule(MUSICAL, model={"max_tokens": 700})[0] == 700


def test_the_machine_decides_nothing():
    assert schedule(DEMO, cluster={"use_gpu": True, "cpus_per_worker": 8}) == schedule(DEMO)


def test_a_global_batch_needs_a_micro_batch():
    with pytest.raises(ValueError, match=r"global_batch_tokens needs training.micro_batch_tokens"):
        parse_config(MINIMAL | {"training": {"global_batch_tokens": 8192}})
