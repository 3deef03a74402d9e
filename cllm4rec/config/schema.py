"""The schema of a run's configuration: every section, every setting, its range and its meaning.

Sections are frozen and refuse unknown keys. Values that follow from others (accumulation, directories) are properties,
not settings. `python -m cllm4rec.config.reference` writes docs/config.md from the descriptions.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, model_validator

from cllm4rec.run import Run

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
MAX_ID_CHARS = 1024
"""The longest id that any part takes: what prepare keeps, the endpoint must be able to ask for."""
MetricName = Annotated[str, Field(pattern=r"^(recall|ndcg)@[1-9]\d*$")]
# From left to right: a number that YAML 1.1 reads as a string (1e-4) is still a number, and 1 is not true.
SweepValue = Annotated[
    StrictBool | StrictInt | float | list[float] | str, Field(union_mode="left_to_right", title="value of any kind")
]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class Columns(_Section):
    """The names of the columns. A name that is given here also replaces that of a format that knows its columns."""

    user: str | None = Field(None, description="Column of the user id. null: the format's own, or no such column.")
    item: str | None = Field(None, description="Column of the item id. null: the format's own, or no such column.")
    rating: str | None = Field(None, description="Column of the rating. null: the format's own, or no ratings.")
    text: str | list[str] | None = Field(
        None,
        description="Column of the text, or several columns that are joined in order. null: the format's own, or no "
        "texts.",
    )
    timestamp: str | None = Field(
        None,
        description="Column of the time: a number or a date. null: the format's own, or no times.",
    )


Format = Literal[
    "amazon2014", "amazon2018", "amazon2023", "yelp", "movielens", "recbole", "jsonl", "csv", "tsv", "parquet", "delta"
]


class Source(_Section):
    """Files of one kind."""

    path: str | list[str] = Field(
        description="A file, a glob, a Delta table, a folder of Parquet files, or a list of them; local paths or fsspec URIs. Files "
        "whose names end in .gz, .bz2, .xz or .zst are unpacked."
    )
    format: Format = Field(
        "jsonl",
        description="How the files are written. jsonl, csv, tsv, parquet and delta need `columns`; the others know "
        "theirs.",
    )
    columns: Columns = Columns()
    delimiter: str | None = Field(
        None, min_length=1, description="What separates the columns of csv and tsv. null: a comma, a tab."
    )
    encoding: str | None = Field(
        None,
        description="Encoding of text files, such as latin-1 or cp1252. null: UTF-8 (movielens: Latin-1 where a line is not "
        "UTF-8).",
    )
    decimal: Literal[".", ","] | None = Field(
        None, description="What stands before the fraction of a rating in text. null: a point."
    )
    time_unit: Literal["s", "ms", "us", "ns"] | None = Field(
        None,
        description="Unit of times that are numbers since 1970. null: the format's own (ms for amazon2023, else s).",
    )
    time_format: str | None = Field(
        None,
        description="How times are written, as a format of strptime such as %d/%m/%Y. null: numbers, ISO 8601 and other dates "
        "that can mean one day only.",
    )

    @model_validator(mode="after")
    def _text_can_be_read(self) -> Self:
        if self.delimiter is not None and self.format not in ("csv", "tsv"):
            raise ValueError(f"delimiter is for the formats csv and tsv; format {self.format} has its own")
        is_one = self.delimiter is None or (len(self.delimiter) == 1 and self.delimiter.isascii())
        if self.format == "csv" and (not is_one or self.delimiter in ('"', "\n", "\r")):
            raise ValueError(
                f"delimiter {self.delimiter!r} is not one ASCII character; use format tsv for files without quotes"
            )
        if self.encoding is not None and not _writes_ascii(self.encoding):
            raise ValueError(
                f"encoding {self.encoding!r} is not known, or does not write ASCII as single bytes; write the files as UTF-8"
            )
        return self


def _writes_ascii(encoding: str) -> bool:
    """Files are divided into lines and columns before they are decoded."""
    try:
        return '\n,;"'.encode(encoding) == b'\n,;"'
    except LookupError:
        return False


class Split(_Section):
    """How each user's interactions are divided into train, validation and test."""

    kind: Literal["random", "temporal", "leave_one_out"] = Field(
        "random",
        description="Which items of a user are held out: random ones, the latest ones (temporal), or the last one for "
        "test and the one before it for validation (leave_one_out).",
    )
    validation: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.1,
        description="Share of each user's items for validation, at least one item; 0: none, and training runs all its epochs. "
        "Not used by leave_one_out.",
    )
    test: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.1,
        description="Share of each user's items for test, at least one item; 0: none, and evaluate is skipped. Not used by "
        "leave_one_out.",
    )
    seed: int = Field(0, description="Seed of the random split.")

    @model_validator(mode="after")
    def _leaves_something_to_train_on(self) -> Self:
        if self.validation + self.test >= 1.0:
            raise ValueError(
                f"data.split.validation {self.validation} and data.split.test {self.test} leave nothing to train on; "
                "make them sum to less than 1"
            )
        return self

    @property
    def has_validation(self) -> bool:
        """Whether anything is held out to choose the best epoch by."""
        return self.kind == "leave_one_out" or self.validation > 0.0

    @property
    def has_test(self) -> bool:
        """Whether anything is held out to evaluate on. A production model may train on everything."""
        return self.kind == "leave_one_out" or self.test > 0.0


class ExpectedCounts(_Section):
    """The counts of a published data set after prepare. Other counts mean another data set."""

    users: Positive = Field(description="Number of users.")
    items: Positive = Field(description="Number of items.")
    interactions: Positive = Field(description="Number of interactions.")


class DataConfig(_Section):
    """The raw files, and which of their rows are kept."""

    interactions: Source = Field(
        description="Who interacted with which item, with ratings, reviews and times if known."
    )
    items: Source | None = Field(None, description="Texts about items. null: none.")
    users: Source | None = Field(None, description="Texts about users. null: none.")
    min_rating: float | None = Field(
        3.0, description="Ratings strictly above this are kept. null: every interaction is kept (implicit data)."
    )
    core: Positive = Field(
        5, description="Every user and item that is kept has at least this many interactions with the others (k-core)."
    )
    expected: ExpectedCounts | None = Field(
        None, description="Prepare fails if it keeps other counts than these. null: no check."
    )
    split: Split = Split()
    max_bad_fraction: Fraction = Field(
        0.01, description="Prepare stops if a larger share of a source's rows is unreadable."
    )
    max_line_bytes: Positive = Field(1_000_000, description="A line of more bytes is quarantined.")
    max_id_chars: Annotated[int, Field(ge=1, le=MAX_ID_CHARS)] = Field(
        256, description="A row whose user or item id has more characters is quarantined."
    )
    max_text_tokens: Positive = Field(
        128, description="Texts are cut to this many tokens. At most model.max_tokens - 16."
    )


class BackboneSize(_Section):
    """A language model that is built from scratch, with a byte-level BPE trained on the training split's texts."""

    architecture: Literal["gpt2", "llama", "t5"] = Field("gpt2", description="The kind of Transformer.")
    layers: Positive = Field(
        1, description="Number of layers. Without training, a second layer only blurs the output of the first."
    )
    width: Positive = Field(128, description="Length of a hidden state and of an embedding.")
    heads: Positive = Field(4, description="Attention heads of each layer. Must divide width.")
    vocab_size: Annotated[int, Field(ge=257)] = Field(4096, description="Number of word tokens of the BPE.")
    copying_heads: bool = Field(
        True,
        description="Initialize attention so that it passes on the mean of what it reads, as heads of a pretrained model "
        "can. false: random initialization.",
    )
    final_norm: bool = Field(
        False,
        description="Keep the last LayerNorm, as pretrained models do. false: no last norm, so that the length of a "
        "hidden state shows how much of a history agrees.",
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"model.backbone.width {self.width} does not divide by {self.heads} heads")
        return self


class ModelConfig(_Section):
    """The language model and the tables of user and item embeddings."""

    backbone: str | BackboneSize = Field(
        BackboneSize(),
        description="The name or folder of a pretrained model for from_pretrained, or the size of a model that is built "
        "from scratch.",
    )
    revision: str | None = Field(
        None,
        description="Commit or tag of a backbone that is named on a hub. null: the version in the cache of the machine, "
        "else the newest one.",
    )
    store_backbone: Literal["reference", "copy"] = Field(
        "reference",
        description="What a model directory holds of a pretrained model: its name and digests, or a copy of its weights, so "
        "that a replica needs no hub.",
    )
    max_tokens: Annotated[int, Field(ge=16)] = Field(
        256, description="Tokens of the longest document. Of a longer history only a part is read."
    )
    id_width: Positive | None = Field(
        None,
        description="Length of a row of the four tables, at most the width of the language model. Learned projections map "
        "rows to it, and hidden states back. Memory and storage of the tables shrink with it. null: the width of the "
        "language model without projections, as in the paper.",
    )
    table_std: float | None = Field(
        None,
        gt=0,
        description="Standard deviation of freshly initialized embeddings, as the language model reads them. null: that of "
        "the word embeddings.",
    )
    table_init: Literal["noise", "texts"] = Field(
        "texts",
        description="Initialization of the item embeddings: noise, or principal components of the items' texts and "
        "reviews (noise for items without any).",
    )
    history: Literal["lm", "residual"] | None = Field(
        None,
        description="How a history reaches the item head. lm: through the language model alone, as in the paper. residual: "
        "the sum of the items' embeddings, plus a learned projection of the hidden state that starts at zero. null: residual "
        "for a pretrained model, lm for one that is built.",
    )
    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0,
        description="Item logits are divided by this. A value near the square root of the width makes them small at the "
        "start of training.",
    )

    @model_validator(mode="after")
    def _tables_fit_the_language_model(self) -> Self:
        if isinstance(self.backbone, BackboneSize) and self.id_width is not None:
            width = self.backbone.width
            if self.id_width > width:
                raise ValueError(
                    f"model.id_width {self.id_width} is above model.backbone.width {width}; use {width} or less, or null"
                )
        return self

    @property
    def is_residual(self) -> bool:
        """Whether the sum of the items' embeddings bypasses the language model (`history`)."""
        return self.history == "residual" or (self.history is None and isinstance(self.backbone, str))


class Adapter(_Section):
    """A LoRA adapter: small matrices that are trained beside the frozen weights of the language model."""

    rank: Positive = Field(8, description="Rank of the change of each weight matrix.")
    alpha: Annotated[float, Field(gt=0)] = Field(16.0, description="The change is multiplied by alpha / rank.")
    targets: tuple[str, ...] | None = Field(
        None,
        description="Names of the layers that are adapted, such as [q_proj, v_proj]. null: all of attention and MLP.",
    )
    trained_in: tuple[Literal["backbone", "pretrain", "finetune"], ...] = Field(
        ("backbone",), min_length=1, description="The stages that train it. Other stages leave it as it is."
    )


class BackboneConfig(_Section):
    """Training of the language model itself on the training split's texts."""

    epochs: Annotated[int, Field(ge=0)] = Field(0, description="Epochs over the texts. 0: no training.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-3, description="Learning rate of Adam.")
    adapter: Adapter | None = Field(
        None, description="Train a LoRA adapter instead of the weights of the language model. null: no adapter."
    )

    @model_validator(mode="after")
    def _adapter_is_trained(self) -> Self:
        if self.adapter is not None and self.adapter.trained_in == ("backbone",) and not self.epochs:
            raise ValueError(
                "backbone.adapter is never trained: set backbone.epochs, or add pretrain or finetune to "
                "backbone.adapter.trained_in"
            )
        if self.adapter is not None and "backbone" not in self.adapter.trained_in and self.epochs:
            raise ValueError(
                "backbone.epochs trains nothing: add backbone to backbone.adapter.trained_in, or set backbone.epochs to 0"
            )
        return self

    def trains_adapter(self, stage: str) -> bool:
        """Whether a stage trains an adapter."""
        return self.adapter is not None and stage in self.adapter.trained_in


class PretrainConfig(_Section):
    """Warm-up (texts only, content embeddings only), then pretraining (texts and interactions, all four tables)."""

    warmup_epochs: Annotated[int, Field(ge=0)] = Field(3, description="Epochs of the warm-up. The paper takes 10.")
    epochs: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Most epochs of pretraining. null: 8 to 40, about 2,000 steps. The paper takes 100."
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        3e-3, description="Learning rate of Adam. The paper takes 0.001."
    )
    lambda_c: Annotated[float, Field(ge=0)] = Field(
        1.0,
        description="Weight of mutual regularization: lambda_c / 2 times the squared distance between collaborative and "
        "content embeddings is part of the loss and draws the two together.",
    )
    alternate: bool = Field(
        False,
        description="Alternate steps on interactions and on texts, as in the paper; needs training.engine torch. false: "
        "both in one backward pass.",
    )
    reorder_items: bool = Field(
        True, description="Put each user's items in a new order in every epoch. false: the paper's LLM-FixOrd."
    )
    user_dropout: Fraction = Field(
        0.9,
        description="Probability that an interaction document hides its user, which teaches the model to answer from the "
        "history.",
    )
    text_fraction: Fraction | None = Field(
        None,
        description="Share of the text documents that an epoch reads. Less is faster. 0: none, and no warm-up; texts then only "
        "initialize the item embeddings (model.table_init). null: three tokens of texts for each token of a history. The "
        "paper reads all.",
    )
    patience: Positive = Field(
        6, description="Pretraining ends after this many epochs without a better validation NDCG@100."
    )


class FinetuneConfig(_Section):
    """Training for recommendation: predict held-out items of a user from the others. Only collaborative embeddings change."""

    epochs: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="Most epochs of finetuning. 0: the pretrained model is the result (the paper's LLM-PreRec). null: 8 to "
        "60, about 1,000 steps. The paper takes 150.",
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        3e-3, description="Learning rate of Adam. The paper takes 0.0001."
    )
    lambda_c: Annotated[float, Field(ge=0)] = Field(
        1.0,
        description="The same weight in finetuning. Only collaborative embeddings change there, so they stay near the content "
        "embeddings.",
    )
    mask_fraction: Fraction | tuple[Fraction, Fraction] = Field(
        (0.1, 0.9),
        description="Share of a user's items that are held out as targets. A pair [low, high]: drawn anew for each user "
        "and epoch.",
    )
    target: Literal["heldout", "all"] = Field(
        "heldout", description="What must be predicted: the held-out items, or all items of the user."
    )
    user_dropout: Fraction = Field(0.9, description="Probability that a recommendation document hides its user.")
    patience: Positive = Field(
        6, description="Finetuning ends after this many epochs without a better validation NDCG@100."
    )

    @model_validator(mode="after")
    def _mask_range_is_ordered(self) -> Self:
        low, high = self.mask_range
        if low > high:
            raise ValueError(f"finetune.mask_fraction [{low}, {high}] is not a range; write the smaller share first")
        return self

    @property
    def mask_range(self) -> tuple[float, float]:
        low_high = self.mask_fraction
        return low_high if isinstance(low_high, tuple) else (low_high, low_high)


class TrainingConfig(_Section):
    """How training steps are taken, the same in backbone, pretrain and finetune."""

    engine: Literal["deepspeed", "torch"] = Field("deepspeed", description="What turns losses into optimizer steps.")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        0, description="How far DeepSpeed divides optimizer state, gradients and parameters over the workers (ZeRO)."
    )
    cpu_offload: bool = Field(
        False,
        description="Keep what ZeRO divides in the memory of the CPU: Adam's state, with zero_stage 3 also parameters. Needs "
        "zero_stage 1 or more. Slower.",
    )
    bf16: bool = Field(
        True,
        description="Compute backbone and heads in bfloat16 on GPUs and CPUs that multiply it natively, in float32 on "
        "others. Tables, their gradients and sums are always float32.",
    )
    micro_batch_tokens: Positive | None = Field(
        None,
        description="Token slots of one worker's forward pass; at least model.max_tokens. Memory depends on it. null: 512 "
        "to 4,096, about 64 steps per pretraining epoch. A GPU is faster with 16,384 or more.",
    )
    global_batch_tokens: Positive | None = Field(
        None,
        description="Token slots of one optimizer step over all workers: a multiple of micro_batch_tokens × "
        "cluster.num_workers. null: one micro-batch per worker.",
    )
    sampled_items: Positive | None = Field(
        None,
        description="Negative items of a step's softmax, drawn by popularity (logQ correction). Meant for catalogs of half a "
        "million items and more. null: all other items are negatives.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Keep only the inputs of each layer of the language model for the backward pass and compute the rest "
        "again. Takes a fourth to a third longer and a fraction of the memory for activations.",
    )
    gradient_clipping: float | None = Field(None, gt=0, description="Largest norm of the gradient. null: no clipping.")
    checkpoint_every_epochs: Positive = Field(1, description="Epochs between two checkpoints.")
    validate_every_epochs: Positive | None = Field(
        None,
        description="Epochs between two validations, which choose the epoch that is kept; the last epoch of a phase is always "
        "validated. More saves time with a large language model. null: each epoch is validated.",
    )
    tensorboard: bool = Field(False, description="Write event files to runs/tensorboard/ below output_dir.")

    @model_validator(mode="after")
    def _offloads_what_is_divided(self) -> Self:
        if self.cpu_offload and (self.engine != "deepspeed" or self.zero_stage == 0):
            raise ValueError(
                "training.cpu_offload moves what ZeRO divides; set training.engine to deepspeed and training.zero_stage to 1 or "
                "more, or cpu_offload to false"
            )
        return self


class Published(_Section):
    """Results that others published. Reports print them beside those measured here."""

    source: Annotated[str, Field(min_length=1)] = Field(description="Where they were published.")
    note: str = Field("", description="How far the two can be compared.")
    results: dict[str, dict[MetricName, Fraction]] = Field(
        description="Method → metric → value, for instance {cllm4rec: {recall@20: 0.1656}}."
    )


class EvaluateConfig(_Section):
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


class Sweep(_Section):
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


class CompareConfig(_Section):
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


class ColdStartConfig(_Section):
    """An experiment on items that training never saw (`cllm4rec coldstart`)."""

    seeds: tuple[int, ...] = Field(
        (0, 1, 2, 3, 4), min_length=1, description="One split for each: other items are taken out of training."
    )
    fraction: Annotated[float, Field(gt=0.0, lt=0.5)] = Field(
        0.1, description="Share of the items that are taken out of training."
    )


class RulesConfig(_Section):
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


class ScoreConfig(_Section):
    """The list of every user."""

    k: Positive = Field(20, description="Items per list.")
    num_actors: Positive = Field(1, description="Processes that score.")
    batch_users: Positive = Field(4096, description="Users that an actor receives at once.")
    rules: RulesConfig = RulesConfig()


class DriftLimits(_Section):
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


class NightlyConfig(_Section):
    """The nightly run."""

    events: Source | None = Field(
        None, description="Interactions since training, in the shape of data.interactions. null: none."
    )
    drift: DriftLimits = DriftLimits()


class ExtendConfig(_Section):
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


class PromoteConfig(_Section):
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


class ServeConfig(_Section):
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


class ClusterConfig(_Section):
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


class Config(_Section):
    """A whole run. Most sections are named after the stage that reads them."""

    output_dir: Annotated[str, Field(min_length=1)] = Field(
        description="Directory of the run, a local path or an fsspec URI. Every stage writes below it."
    )
    seed: int = Field(
        0,
        description="Seed of initial embeddings, orders, masks and bootstrap samples. The split has its own, "
        "data.split.seed.",
    )
    run_date: datetime.date | None = Field(
        None, description="Date written to every row of the published table. null: today (UTC)."
    )
    data: DataConfig
    model: ModelConfig = ModelConfig()
    backbone: BackboneConfig = BackboneConfig()
    pretrain: PretrainConfig = PretrainConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    training: TrainingConfig = TrainingConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    compare: CompareConfig = CompareConfig()
    coldstart: ColdStartConfig = ColdStartConfig()
    score: ScoreConfig = ScoreConfig()
    nightly: NightlyConfig = NightlyConfig()
    extend: ExtendConfig = ExtendConfig()
    promote: PromoteConfig = PromoteConfig()
    serve: ServeConfig = ServeConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        micro, longest = self.training.micro_batch_tokens, self.model.max_tokens
        if micro is None:
            if self.training.global_batch_tokens is not None:
                raise ValueError("training.global_batch_tokens needs training.micro_batch_tokens; set both")
            return self
        if micro < longest:
            raise ValueError(
                f"training.micro_batch_tokens {micro} cannot hold a document of model.max_tokens {longest}; "
                f"use {longest} or more"
            )
        everyone = micro * self.cluster.num_workers
        total = self.training.global_batch_tokens
        if total is not None and total % everyone:
            fits = max(everyone, total // everyone * everyone)
            raise ValueError(
                f"training.global_batch_tokens {total} does not divide by {self.cluster.num_workers} workers × "
                f"training.micro_batch_tokens {micro}; use {fits} or {fits + everyone}"
            )
        return self

    @model_validator(mode="after")
    def _the_engine_can_alternate(self) -> Self:
        if self.pretrain.alternate and self.training.engine == "deepspeed":
            raise ValueError(
                "pretrain.alternate needs training.engine: torch; DeepSpeed gives a frozen table zero gradients, and "
                "Adam's momentum would still move it"
            )
        return self

    @model_validator(mode="after")
    def _texts_leave_room_for_the_prompt(self) -> Self:
        if self.data.max_text_tokens > self.model.max_tokens - 16:
            raise ValueError(
                f"data.max_text_tokens {self.data.max_text_tokens} leaves no room for the prompt in "
                f"model.max_tokens {self.model.max_tokens}; use at most {self.model.max_tokens - 16}"
            )
        return self

    @property
    def accumulation(self) -> int:
        """Micro-batches per worker in one optimizer step."""
        total, micro = self.training.global_batch_tokens, self.training.micro_batch_tokens
        return 1 if total is None or micro is None else total // (micro * self.cluster.num_workers)

    @property
    def run(self) -> Run:
        """The directories below `output_dir`."""
        return Run(self.output_dir)
