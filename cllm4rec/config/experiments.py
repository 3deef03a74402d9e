"""What is measured: the evaluation of a model, and comparisons of methods."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, StrictBool, StrictInt, model_validator

from cllm4rec.config.base import Fraction, MetricName, Positive, Section

# From left to right: a number that YAML 1.1 reads as a string (1e-4) is still a number, and 1 is not true.
SweepValue = Annotated[
    StrictBool | StrictInt | float | list[float] | str, Field(union_mode="left_to_right", title="value of any kind")
]


class Published(Section):
    """Results that others published. Reports print them beside those measured here."""

    source: Annotated[str, Field(min_length=1)] = Field(description="Where they were published.")
    note: str = Field("", description="How far the two can be compared.")
    results: dict[str, dict[MetricName, Fraction]] = Field(
        description="Method → metric → value, for instance {cllm4rec: {recall@20: 0.1656}}."
    )


class EvaluateConfig(Section):
    """The report on a trained model."""

    mask: Literal["train", "train+validation"] = Field(
        "train+validation", description="Items of these splits are not recommended at test time."
    )
    read: Literal["train", "train+validation"] = Field(
        "train", description="The history that every method reads at test time."
    )
    bootstrap_samples: Positive = Field(1000, description="Samples behind each confidence interval.")
    published: Published | None = Field(
        None, description="Results of others, printed beside those measured here. null: none."
    )

    @model_validator(mode="after")
    def _what_is_read_is_masked(self) -> Self:
        if self.read == "train+validation" and self.mask == "train":
            raise ValueError(
                "evaluate.read train+validation with evaluate.mask train would recommend items that were just read; "
                "set evaluate.mask to train+validation"
            )
        return self


class Sweep(Section):
    """CLLM4Rec with the config's own values and one thing changed."""

    name: Annotated[str, Field(pattern=r"^\w[\w ]*$")] = Field(
        description="Heading of the sweep and part of file names: letters, digits, underscores and spaces."
    )
    settings: Annotated[list[str], Field(min_length=1)] = Field(
        description="Dotted keys that are set to the same value together, such as pretrain.lambda_c."
    )
    values: Annotated[list[SweepValue], Field(min_length=2)] = Field(description="The values to compare.")

    @property
    def slug(self) -> str:
        """The name in paths."""
        return self.name.replace(" ", "_")


class CompareConfig(Section):
    """The comparison (`cllm4rec compare`): every method on the same splits with the same budget."""

    rows: Literal["main", "all"] = Field("main", description="Which methods run if `methods` is empty.")
    methods: list[str] = Field(
        [], description="Names of methods, such as cllm4rec, ease or sasrec. An unknown name is refused with the list."
    )
    seeds: Annotated[list[int], Field(min_length=1)] = Field(
        [0], description="Each seed is one split, on which every method runs once."
    )
    trials: Positive = Field(
        6, description="Most combinations of settings that are tried per method and split. Validation chooses one."
    )
    minutes: Annotated[float, Field(gt=0)] = Field(
        6.0, description="After this many minutes no further combination is started for a method on a split."
    )
    backbone_epochs: Positive = Field(
        8,
        description="Epochs of the language model that LLM-FtAll and M6-Retrieval start from, if backbone.epochs is 0.",
    )
    sweeps: list[Sweep] = Field(
        [], description="Sensitivity to single settings. They are reported; nothing is chosen by them."
    )
    sweep_seeds: Annotated[list[int], Field(min_length=1)] | None = Field(
        None, description="Seeds on whose splits sweeps run, a subset of `seeds`. null: the first of `seeds`."
    )

    @model_validator(mode="after")
    def _seeds_differ(self) -> Self:
        for name, seeds in (("seeds", self.seeds), ("sweep_seeds", self.seeds_of_sweeps)):
            if len(set(seeds)) < len(seeds):
                raise ValueError(f"compare.{name} {seeds} names a seed twice; name each split once")
        if not set(self.seeds_of_sweeps) <= set(self.seeds):
            raise ValueError(f"compare.sweep_seeds {self.sweep_seeds} should be a subset of compare.seeds {self.seeds}")
        return self

    @model_validator(mode="after")
    def _sweeps_differ(self) -> Self:
        slugs = [sweep.slug for sweep in self.sweeps]
        if len(set(slugs)) < len(slugs):
            raise ValueError(f"compare.sweeps {', '.join(slugs)}: two have the same name; give each its own")
        return self

    @property
    def seeds_of_sweeps(self) -> list[int]:
        return self.seeds[:1] if self.sweep_seeds is None else self.sweep_seeds


class ColdStartConfig(Section):
    """An experiment on items that training never saw (`cllm4rec coldstart`)."""

    seeds: tuple[int, ...] = Field(
        (0, 1, 2, 3, 4), min_length=1, description="One split for each: other items are taken out of training."
    )
    fraction: Annotated[float, Field(gt=0.0, lt=0.5)] = Field(
        0.1, description="Share of the items that are taken out of training."
    )
