"""The model, and the stages that train it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cllm4rec.config.base import Fraction, Positive, Section


class BackboneSize(Section):
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


class ModelConfig(Section):
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


class Adapter(Section):
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


class BackboneConfig(Section):
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


class PretrainConfig(Section):
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


class FinetuneConfig(Section):
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


class TrainingConfig(Section):
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
