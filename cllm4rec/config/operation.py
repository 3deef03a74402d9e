"""What runs after training: lists, nightly runs, new items, promotion, the endpoint, and the cluster of all of them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cllm4rec.config.base import Fraction, Positive, Section
from cllm4rec.config.data import Source


class RulesConfig(Section):
    """What may be recommended, in the table and by the endpoint. Files are CSV, Parquet or YAML, local or at an fsspec URI."""

    deny: str | None = Field(
        None, description="File with the column item_id: these items are never recommended. null: no such list."
    )
    allow: str | None = Field(
        None, description="File with the column item_id: only these items are recommended. null: all items."
    )
    categories: str | None = Field(
        None, description="File with the columns item_id, category. An item may have several categories. null: none."
    )
    max_per_category: Positive | None = Field(
        None, description="Most items of one category in a list; needs `categories`. null: no limit."
    )
    min_support: Annotated[int, Field(ge=0)] = Field(
        0, description="Items that fewer users interacted with in training are not recommended."
    )
    availability: str | None = Field(
        None,
        description="File with the columns item_id, first_date, last_date (inclusive; empty: open). Items are only "
        "recommended on these days: the run date, or today (UTC) in the endpoint. null: always.",
    )
    boost: str | None = Field(
        None, description="File with the columns item_id, boost: added to the item's score. null: no boosts."
    )

    @model_validator(mode="after")
    def _caps_have_categories(self) -> Self:
        if self.max_per_category is not None and self.categories is None:
            raise ValueError("score.rules.max_per_category needs score.rules.categories; name a file of categories")
        return self


class ScoreConfig(Section):
    """The list of every user."""

    k: Positive = Field(20, description="Items per list.")
    num_actors: Positive = Field(1, description="Processes that score.")
    batch_users: Positive = Field(4096, description="Users that an actor receives at once.")
    rules: RulesConfig = RulesConfig()


class DriftLimits(Section):
    """How far a new table may be from the one published last. A table beyond a limit is not published."""

    max_users_gone: Fraction = Field(
        0.1, description="Largest share of the last table's users that are missing in the new one."
    )
    max_top10_changed: Fraction = Field(
        1.0,
        description="Largest share of users whose ten best items are another set. Lower it if the model stays the same "
        "from night to night.",
    )
    max_coverage_drop: Fraction = Field(
        0.5, description="Largest relative drop of the number of different items that are recommended."
    )
    max_lift_ratio: Annotated[float, Field(ge=1)] = Field(
        2.0, description="Largest factor by which the popularity lift may grow or shrink."
    )
    max_score_shift: Fraction = Field(
        1.0, description="Largest Kolmogorov-Smirnov distance between the two distributions of scores."
    )
    sample_users: Positive = Field(100_000, description="Number of users that are compared; all if there are fewer.")


class NightlyConfig(Section):
    """The nightly run."""

    events: Source | None = Field(
        None, description="Interactions since training, in the shape of data.interactions. null: none."
    )
    drift: DriftLimits = DriftLimits()


class ExtendConfig(Section):
    """Prediction of the embeddings of new items from their texts (`cllm4rec extend`)."""

    items: Source | None = Field(
        None, description="Texts of the new items; items that the model knows are skipped. null: data.items."
    )
    reader: Literal["auto", "words", "language_model"] = Field(
        "auto",
        description="What is read of a text: its words (TF-IDF), the states of the language model, or auto: words, states or a "
        "mixture, whichever predicts the embeddings of trained items best when they are left out.",
    )
    layers: tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...] = Field(
        (0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
        min_length=1,
        description="The layers of the language model to compare, as fractions of its depth.",
    )


class PromoteConfig(Section):
    """When a new model replaces the current one."""

    metric: Literal["recall@20", "recall@40", "ndcg@100"] = Field(
        "recall@20", description="The metric that is compared."
    )
    max_loss: Fraction = Field(
        0.01,
        description="The paired confidence interval of new minus current may not reach below minus this value.",
    )
    above_popularity: bool = Field(True, description="Refuse a model that is not better than popularity.")
    keep: Positive = Field(3, description="Promoted models that are kept for a rollback, including the current one.")


class ServeConfig(Section):
    """The HTTP endpoint."""

    host: str = Field(
        "127.0.0.1",
        description="Address to listen on. Use 0.0.0.0 only behind a gateway and with CLLM4REC_API_KEYS set.",
    )
    port: Annotated[int, Field(ge=1, le=65535)] = Field(8000, description="Port to listen on.")
    min_replicas: Positive = Field(
        1, description="Fewest replicas. With 1, an outage follows the death of a replica; use 2 or more in production."
    )
    max_replicas: Positive = Field(
        1, description="Most replicas. Above min_replicas, the number of replicas follows the load."
    )
    target_ongoing_requests: Positive = Field(16, description="Requests per replica that autoscaling aims at.")
    upscale_delay_s: Annotated[float, Field(ge=0)] = Field(
        30.0, description="Seconds that the load must stay above the target before replicas are added."
    )
    downscale_delay_s: Annotated[float, Field(ge=0)] = Field(
        600.0, description="Seconds that the load must stay below the target before replicas are removed."
    )
    max_batch_size: Positive = Field(32, description="Most requests that a replica answers in one batch.")
    batch_wait_timeout_s: Annotated[float, Field(ge=0)] = Field(
        0.005, description="Seconds that a batch with free places waits for more requests."
    )
    max_wait_s: Annotated[float, Field(gt=0)] = Field(
        1.0,
        description="Seconds that a request may wait in a replica for its batch, or until the running batch ends if that is "
        "longer. Requests that find no place are answered with status 429.",
    )
    max_queued_requests: Positive = Field(
        256, description="Requests that may wait in a replica. Further ones are answered with status 429."
    )
    request_timeout_s: Annotated[float, Field(gt=0)] = Field(
        5.0,
        description="Seconds after which a request without an answer gets status 503. Must be above three times that of a batch.",
    )

    @model_validator(mode="after")
    def _replicas_are_ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"serve.min_replicas {self.min_replicas} is above serve.max_replicas {self.max_replicas}; raise the latter"
            )
        return self


class ClusterConfig(Section):
    """CPUs, GPUs and limits of trainers, scoring actors and replicas."""

    num_workers: Positive = Field(1, description="Training workers.")
    cpus_per_worker: Positive = Field(
        1, description="CPUs that Ray reserves for each training worker, scoring actor and replica."
    )
    threads_per_worker: Positive | None = Field(
        None,
        description="Torch threads of each of these processes. null: on a local machine its cores divided by the number "
        "of processes, on a cluster cpus_per_worker.",
    )
    use_gpu: bool = Field(False, description="Give each training worker, scoring actor and replica one GPU.")
    max_failures: Annotated[int, Field(ge=0)] = Field(2, description="Worker failures that a training run survives.")
    start_timeout_s: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Seconds to wait for resources, at the start of a stage and after a node was lost. Then the stage fails "
        "and names what is missing. null: 900 with an autoscaler, otherwise 45 at the start and 900 after a loss.",
    )
    shard_disk_gb: Annotated[float, Field(gt=0)] = Field(
        64.0, description="Most gigabytes of TMPDIR that the documents of one worker may take."
    )
