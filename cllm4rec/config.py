"""One schema for a whole run: read from YAML, overridden by `section.key=value`, refused when wrong, frozen after.

    config = load_config("demo", ["pretrain.epochs=5"])

What can be derived (accumulation, directories, rows of a micro batch) is a property here and a setting nowhere.
"""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError, model_validator

from cllm4rec.errors import ConfigError
from cllm4rec.run import Run

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
MetricName = Annotated[str, Field(pattern=r"^(recall|ndcg)@[1-9]\d*$")]
# From left to right: a number that YAML 1.1 reads as a string (1e-4) is still a number, and 1 is not true.
Setting = Annotated[
    StrictBool | StrictInt | float | list[float] | str, Field(union_mode="left_to_right", description="any one value")
]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class Columns(_Section):
    """Which column of a `jsonl`, `csv`, `tsv` or `parquet` file means what."""

    user: str | None = None
    item: str | None = None
    rating: str | None = None
    text: str | list[str] | None = None
    timestamp: str | None = None


Format = Literal[
    "amazon2014", "amazon2018", "amazon2023", "yelp", "movielens", "recbole", "jsonl", "csv", "tsv", "parquet", "delta"
]


class Source(_Section):
    """Files of one kind: a path, a glob, a list of them, or any fsspec URI; plain or gzip by the file's name."""

    path: str | list[str]
    format: Format = "jsonl"
    columns: Columns = Columns()


class Split(_Section):
    kind: Literal["random", "temporal", "leave_one_out"] = "random"
    validation: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    test: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    seed: int = 0

    @model_validator(mode="after")
    def _leaves_something_to_train_on(self) -> Self:
        if self.validation + self.test >= 1.0:
            raise ValueError(
                f"data.split.validation {self.validation} and data.split.test {self.test} leave nothing to train on; "
                "make them sum to less than 1"
            )
        return self


class ExpectedCounts(_Section):
    """What a published data set has after prepare: another number means another data set."""

    users: Positive
    items: Positive
    interactions: Positive


class DataConfig(_Section):
    interactions: Source
    items: Source | None = None
    users: Source | None = None
    min_rating: float | None = Field(3.0, description="keep ratings strictly above; null for implicit data")
    core: Positive = Field(5, description="every kept user and item has at least this many interactions")
    expected: ExpectedCounts | None = Field(None, description="prepare fails where it keeps other numbers than these")
    split: Split = Split()
    max_bad_fraction: Fraction = Field(0.01, description="stop when more of the rows than this are unreadable")
    max_line_bytes: Positive = Field(1_000_000, description="a longer line is quarantined")
    max_id_chars: Positive = Field(256, description="a longer user or item id is quarantined")
    max_text_tokens: Positive = Field(128, description="a text document's main text is cut here")


class BackboneSize(_Section):
    """A language model to build from scratch, with a byte-level BPE trained on the training split's texts."""

    architecture: Literal["gpt2", "llama", "t5"] = "gpt2"
    layers: Positive = Field(1, description="untrained, a second one only blurs what the first passes on")
    width: Positive = 128
    heads: Positive = 4
    vocab_size: Annotated[int, Field(ge=257)] = 4096
    copying_heads: bool = Field(
        True,
        description="attention begins by passing on what it sees, as heads of a pretrained model do; false: random",
    )
    final_norm: bool = Field(
        False,
        description="the last LayerNorm, as pretrained models have it; false: a hidden state's length tells how much of "
        "a history agrees",
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"model.backbone.width {self.width} does not divide by {self.heads} heads")
        return self


class ModelConfig(_Section):
    backbone: str | BackboneSize = Field(
        BackboneSize(), description="a name or folder for from_pretrained, or a size to build from scratch"
    )
    revision: str | None = Field(None, description="the commit or tag of a backbone named on a hub")
    max_tokens: Annotated[int, Field(ge=16)] = Field(256, description="longest document")
    table_std: float | None = Field(
        None, gt=0, description="spread of fresh ID rows; null: that of the word embeddings"
    )
    table_init: Literal["noise", "texts"] = Field(
        "texts",
        description="fresh item rows; texts: principal components of texts and reviews, noise for items without",
    )
    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="items' logits are divided by it; near the root of the width they begin small"
    )


class BackboneStage(_Section):
    """Train the language model itself on the training split's texts; 0 epochs leave it as it is."""

    epochs: Annotated[int, Field(ge=0)] = 0
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3


class PretrainStage(_Section):
    warmup_epochs: Annotated[int, Field(ge=0)] = 10
    epochs: Annotated[int, Field(ge=0)] = 100
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    lambda_c: Annotated[float, Field(ge=0)] = 1.0
    alternate: bool = Field(False, description="the paper's alternating steps; false: both tables in one backward")
    reorder_items: bool = Field(True, description="false is the paper's LLM-FixOrd")
    user_dropout: Fraction = Field(0.0, description="chance that an interaction document hides its user")
    text_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = Field(1.0, description="share of text documents an epoch")
    patience: Positive = Field(10, description="epochs without a better validation before the stage stops")


class FinetuneStage(_Section):
    epochs: Annotated[int, Field(ge=0)] = 150
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    lambda_c: Annotated[float, Field(ge=0)] = 1.0
    mask_fraction: Fraction | tuple[Fraction, Fraction] = Field(
        0.2, description="share of a user's items held out as targets; a pair draws it anew for each user and epoch"
    )
    target: Literal["heldout", "all"] = "heldout"
    user_dropout: Fraction = Field(0.0, description="chance that a recommendation document hides its user")
    patience: Positive = Field(10, description="epochs without a better validation before the stage stops")

    @model_validator(mode="after")
    def _mask_range_is_ordered(self) -> Self:
        low, high = self.mask_range
        if low > high:
            raise ValueError(f"finetune.mask_fraction [{low}, {high}] is no range; write the smaller share first")
        return self

    @property
    def mask_range(self) -> tuple[float, float]:
        low_high = self.mask_fraction
        return low_high if isinstance(low_high, tuple) else (low_high, low_high)


class TrainingConfig(_Section):
    """How steps are taken, the same in every stage."""

    engine: Literal["deepspeed", "torch"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 0
    bf16: bool = Field(
        True,
        description="backbone and heads in bfloat16 on GPUs and CPUs that multiply it, float32 on others; tables, their "
        "gradients and sums in float32",
    )
    micro_batch_tokens: Positive = Field(4096, description="token slots of one worker's forward pass")
    global_batch_tokens: Positive | None = Field(
        None, description="token slots of one step of all workers; null: one micro batch each"
    )
    sampled_items: Positive | None = Field(
        None, description="items a step's softmax runs over besides its targets, drawn by popularity (logQ); null: all"
    )
    gradient_clipping: float | None = Field(None, gt=0)
    checkpoint_every_epochs: Positive = 1
    tensorboard: bool = False


class Published(_Section):
    """Figures of others that reports print beside those measured here."""

    source: Annotated[str, Field(min_length=1)]
    note: str = Field("", description="how far the two can be compared")
    results: dict[str, dict[MetricName, Fraction]] = Field(description="method → metric → value")


class EvaluateConfig(_Section):
    mask: Literal["train", "train+validation"] = Field(
        "train+validation", description="what no method may recommend at test time"
    )
    read: Literal["train", "train+validation"] = Field(
        "train", description="the history every method reads at test time"
    )
    bootstrap_samples: Positive = 1000
    published: Published | None = Field(None, description="figures of others, printed beside those measured here")

    @model_validator(mode="after")
    def _what_is_read_is_masked(self) -> Self:
        if self.read == "train+validation" and self.mask == "train":
            raise ValueError(
                "evaluate.read train+validation with evaluate.mask train would recommend what was just read; "
                "set evaluate.mask to train+validation"
            )
        return self


class Sweep(_Section):
    """CLLM4Rec under the config's own values with one thing changed (see `cllm4rec.experiments.comparison.sweeps`)."""

    name: Annotated[str, Field(pattern=r"^\w[\w ]*$", description="a heading, and part of file names")]
    settings: Annotated[list[str], Field(min_length=1, description="dotted keys, set to the same value together")]
    values: Annotated[list[Setting], Field(min_length=2)]

    @property
    def slug(self) -> str:
        """The name in paths."""
        return self.name.replace(" ", "_")


class CompareConfig(_Section):
    """What `cllm4rec compare` runs: every method with the same budget on every split."""

    rows: Literal["main", "all"] = Field("main", description="which methods, where compare.methods names none")
    methods: list[str] = Field([], description="names of the methods (see cllm4rec.experiments.comparison.methods)")
    seeds: Annotated[list[int], Field(min_length=1)] = Field([0], description="a split, and a run, for each seed")
    trials: Positive = Field(6, description="most settings tried of a method on a split; validation chooses")
    minutes: Annotated[float, Field(gt=0)] = Field(
        6.0, description="no further setting of a method is tried on a split after so long"
    )
    backbone_epochs: Positive = Field(
        8,
        description="epochs of the language model that LLM-FtAll and M6-Retrieval read with, where backbone.epochs is 0",
    )
    sweeps: list[Sweep] = Field([], description="how CLLM4Rec depends on its settings; nothing is chosen by it")
    sweep_seeds: Annotated[list[int], Field(min_length=1)] | None = Field(
        None, description="splits that sweeps run on, some of seeds; null: the first"
    )

    @model_validator(mode="after")
    def _seeds_differ(self) -> Self:
        for name, seeds in (("seeds", self.seeds), ("sweep_seeds", self.seeds_of_sweeps)):
            if len(set(seeds)) < len(seeds):
                raise ValueError(f"compare.{name} {seeds} names a seed twice; a split counts once")
        if not set(self.seeds_of_sweeps) <= set(self.seeds):
            raise ValueError(f"compare.sweep_seeds {self.sweep_seeds} should be some of compare.seeds {self.seeds}")
        return self

    @model_validator(mode="after")
    def _sweeps_differ(self) -> Self:
        slugs = [sweep.slug for sweep in self.sweeps]
        if len(set(slugs)) < len(slugs):
            raise ValueError(f"compare.sweeps {', '.join(slugs)}: two have one name; give each its own")
        return self

    @property
    def seeds_of_sweeps(self) -> list[int]:
        return self.seeds[:1] if self.sweep_seeds is None else self.sweep_seeds


class RulesConfig(_Section):
    """What may be recommended beside the scores; files are CSV, Parquet or YAML (see `cllm4rec.scoring.rules`)."""

    deny: str | None = Field(None, description="items nobody is recommended: column item_id")
    allow: str | None = Field(None, description="nothing but these items is recommended: column item_id")
    categories: str | None = Field(None, description="columns item_id, category; an item may stand in several")
    max_per_category: Positive | None = Field(None, description="most items of one category in a list")
    min_support: Annotated[int, Field(ge=0)] = Field(
        0, description="items with fewer distinct users in training are not recommended"
    )
    availability: str | None = Field(
        None, description="columns item_id, first_date, last_date (inclusive, empty: open); compared with the run date"
    )
    boost: str | None = Field(None, description="columns item_id, boost: added to the item's score")

    @model_validator(mode="after")
    def _caps_have_categories(self) -> Self:
        if self.max_per_category is not None and self.categories is None:
            raise ValueError("score.rules.max_per_category needs score.rules.categories; name a file of categories")
        return self


class ScoreConfig(_Section):
    k: Positive = 20
    num_actors: Positive = 1
    batch_users: Positive = Field(4096, description="users handed to an actor at once")
    rules: RulesConfig = RulesConfig()


class DriftLimits(_Section):
    """How far a nightly table may be from the one published before (see `cllm4rec.nightly.drift`)."""

    max_users_gone: Fraction = Field(0.1, description="share of the last table's users who are in the new one no more")
    max_top10_changed: Fraction = Field(1.0, description="share of users whose ten best items are another set")
    max_coverage_drop: Fraction = Field(0.5, description="by what share fewer different items may be recommended")
    max_lift_ratio: Annotated[float, Field(ge=1)] = Field(
        2.0, description="the popularity lift may grow or shrink by this factor"
    )
    max_score_shift: Fraction = Field(1.0, description="Kolmogorov-Smirnov distance of the scores' distributions")
    sample_users: Positive = Field(100_000, description="users compared; all where there are fewer")


class NightlyConfig(_Section):
    events: Source | None = Field(None, description="interactions since training, in the shape of data.interactions")
    drift: DriftLimits = DriftLimits()


class PromoteConfig(_Section):
    metric: Literal["recall@20", "recall@40", "ndcg@100"] = "recall@20"
    max_loss: Fraction = Field(
        0.01, description="the paired interval of new less current must not reach below minus this"
    )
    above_popularity: bool = Field(True, description="refuse a model that is not better than popularity")
    keep: Positive = Field(3, description="models kept for a rollback, the current one included")


class ServeConfig(_Section):
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    min_replicas: Positive = 1
    max_replicas: Positive = 1
    target_ongoing_requests: Positive = 16
    max_batch_size: Positive = 32
    batch_wait_timeout_s: Annotated[float, Field(ge=0)] = 0.005
    max_queued_requests: Positive = 256
    request_timeout_s: Annotated[float, Field(gt=0)] = 10.0

    @model_validator(mode="after")
    def _replicas_are_ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"serve.min_replicas {self.min_replicas} is above serve.max_replicas {self.max_replicas}; raise that"
            )
        return self


class ClusterConfig(_Section):
    num_workers: Positive = 1
    cpus_per_worker: Positive = 1
    threads_per_worker: Positive | None = Field(
        None, description="torch threads; null: this machine's cores / workers when local, else cpus_per_worker"
    )
    use_gpu: bool = False
    max_failures: Annotated[int, Field(ge=0)] = Field(2, description="worker losses a training run survives")
    start_timeout_s: Annotated[float, Field(gt=0)] = Field(45.0, description="wait this long for resources, then fail")
    shard_disk_gb: Annotated[float, Field(gt=0)] = Field(
        64.0, description="most of TMPDIR a worker's documents may take"
    )


class Config(_Section):
    """A whole run. Sections are named after the stages that read them."""

    output_dir: Annotated[str, Field(min_length=1)]
    seed: int = 0
    run_date: datetime.date | None = Field(None, description="written to every row of the table; null: today (UTC)")
    data: DataConfig
    model: ModelConfig = ModelConfig()
    backbone: BackboneStage = BackboneStage()
    pretrain: PretrainStage = PretrainStage()
    finetune: FinetuneStage = FinetuneStage()
    training: TrainingConfig = TrainingConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    compare: CompareConfig = CompareConfig()
    score: ScoreConfig = ScoreConfig()
    nightly: NightlyConfig = NightlyConfig()
    promote: PromoteConfig = PromoteConfig()
    serve: ServeConfig = ServeConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        micro, longest = self.training.micro_batch_tokens, self.model.max_tokens
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
        if self.pretrain.alternate and self.training.engine == "deepspeed":
            raise ValueError(
                "pretrain.alternate needs training.engine: torch; DeepSpeed gives a held table zero gradients, with "
                "which Adam's momentum would still move it"
            )
        if self.data.max_text_tokens > self.model.max_tokens - 16:
            raise ValueError(
                f"data.max_text_tokens {self.data.max_text_tokens} leaves no room for the prompt in "
                f"model.max_tokens {self.model.max_tokens}; use at most {self.model.max_tokens - 16}"
            )
        return self

    @property
    def accumulation(self) -> int:
        """Micro batches a worker takes for one optimizer step."""
        total = self.training.global_batch_tokens
        return 1 if total is None else total // (self.training.micro_batch_tokens * self.cluster.num_workers)

    @property
    def run(self) -> Run:
        """The directories below `output_dir`."""
        return Run(self.output_dir)


RENAMED = {"model.table_start": "model.table_init"}
"""Settings of older config files → their names now, for the error that refuses the old one."""


def load_config(path: str | os.PathLike[str], overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file, or a shipped config by its name, apply `section.key=value` overrides and return the checked config.

    Relative paths stay relative to the working directory, as `ray job submit --working-dir` expects.
    Raises ConfigError with one sentence that names the key.
    """
    try:
        text = (_shipped(path) or Path(path)).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}; give a YAML file to --config") from None
    except UnicodeDecodeError:
        raise ConfigError(f"the config {path} is not UTF-8 text; give a YAML file to --config") from None
    try:
        raw = _load_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds no sections; start with output_dir and data (see jobs/configs/)")
    for override in overrides:
        _apply_override(raw, override)
    return parse_config(raw)


def _shipped(name: str | os.PathLike[str]) -> Traversable | None:
    """The config of this package that a bare word names; None for a path."""
    if not re.fullmatch(r"\w+", os.fspath(name)) or os.path.exists(name):
        return None
    found = resources.files("cllm4rec.configs") / f"{name}.yaml"
    if found.is_file():
        return found
    known = sorted(file.name.removesuffix(".yaml") for file in found.parent.iterdir() if file.name.endswith(".yaml"))  # type: ignore[attr-defined]
    raise ConfigError(f"there is no file {name} and no shipped config of that name; shipped are {', '.join(known)}")


def parse_config(raw: dict[str, Any]) -> Config:
    """Check a plain dictionary against the schema. Raises ConfigError naming every wrong key."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"the config is refused: {'; '.join(_sentences(error, raw))}") from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"the override {override!r} is not of the form section.key=value")
    *sections, last = key.split(".")
    target = raw
    for name in sections:
        target[name] = target.get(name) or {}  # a section without settings reads as null
        target = target[name]
        if not isinstance(target, dict):
            raise ConfigError(f"the override {override!r} goes through {name!r}, which is a value and not a section")
    try:
        target[last] = _load_yaml(value)
    except yaml.YAMLError:
        raise ConfigError(f"the value of the override {override!r} is not valid YAML; quote it") from None


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: a date stays text, and a key that stands twice is a mistake."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as the base class has it
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for place, (key, _) in enumerate(node.value):
            if key.value in keys[:place]:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
        return super().construct_mapping(node, deep)


def _load_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def _sentences(error: ValidationError, raw: Mapping[str, Any]) -> list[str]:
    """One sentence for each wrong key that people wrote, whatever branches of a union pydantic tried for it."""
    problems: dict[str, list[Any]] = {}
    for problem in error.errors():
        problems.setdefault(_key(problem, raw), []).append(problem)
    inner = [key for key in problems if not key or not any(other.startswith(f"{key}.") for other in problems)]
    return [_sentence(key, problems[key]) for key in inner]


def _key(problem: Any, raw: Any) -> str:
    """Where a problem is in the words of the file: pydantic's location also names branches of unions."""
    keys: list[str] = []
    for part in problem["loc"]:
        is_written = part in raw if isinstance(raw, Mapping) else isinstance(raw, list) and isinstance(part, int)
        if is_written:
            keys.append(str(part))
            raw = raw[part]
    if problem["type"] == "missing":
        keys.append(str(problem["loc"][-1]))
    return ".".join(keys)


def _sentence(key: str, problems: list[Any]) -> str:
    ours = [problem["msg"].removeprefix("Value error, ") for problem in problems if problem["type"] == "value_error"]
    if ours:
        return "; ".join(ours)  # these name their keys
    if problems[0]["type"] in ("extra_forbidden", "missing"):
        if problems[0]["type"] == "missing":
            return f"{key} is missing"
        return f"{key} is now {RENAMED[key]}" if key in RENAMED else f"{key} is no setting"
    reasons = [re.sub(r"^\w+ should | or instance of \w+", "", problem["msg"]) for problem in problems]
    value = problems[0]["input"]
    given = f"is {json.dumps(value)} and " if isinstance(value, str | int | float | None) else ""
    return f"{key} {given}should {' or '.join(dict.fromkeys(reasons))}"
