"""The HTTP contract: requests, with bounds on every field, and responses.

Every bound below is also in /openapi.json. A request that exceeds one is refused with 422 and the name of the field. The work
and the size of a refusal do not grow with the request: validation of a list stops at its first wrong id, and unknown fields are
refused together, without their names.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from cllm4rec.config import MAX_ID_CHARS
from cllm4rec.scoring.recommender import MAX_K, Answer, Query, Recommendation

MAX_HISTORY = 10_000
MAX_TEXT_CHARS = 1000
MAX_REQUESTS = 256

# Blanks around an id are removed, as prepare does.
Id = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_ID_CHARS)]
Ids = Annotated[list[Id], Field(fail_fast=True)]


def _integral(value: Any) -> Any:
    """JSON has one type of number, and 10.0 is an integer by JSON Schema."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _require_history_or_user(schema: dict[str, Any]) -> None:
    """Describe in the OpenAPI what `history_or_user_is_given` checks."""
    schema["anyOf"] = [
        {"required": ["user_id"], "properties": {"user_id": {"type": "string"}}},
        {"required": ["history"], "properties": {"history": {"type": "array"}}},
    ]


def _with_known_fields(model: type[BaseModel], body: Any) -> Any:
    # Not left to extra="forbid", which reports every unknown field with its name.
    if isinstance(body, dict) and any(name not in model.model_fields for name in body):
        raise PydanticCustomError("unknown_field", f"unknown field; the fields are {', '.join(model.model_fields)}")
    return body


class RecommendRequest(BaseModel):
    """A known user, a history, or a known user and the items that came since training."""

    # strict: "10" is not 10 and true is not 1; a client that sends these has a bug that should be reported.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, json_schema_extra=_require_history_or_user)

    user_id: Id | None = Field(
        None, description="a user's id; a user unknown at training is served from `history` alone"
    )
    history: Ids | None = Field(
        None,
        max_length=MAX_HISTORY,
        validate_default=True,
        description="item ids, oldest first; added to the stored history of `user_id`, and never recommended",
    )
    exclude: Ids = Field([], max_length=MAX_HISTORY, description="more item ids that must not be recommended")
    k: Annotated[int, BeforeValidator(_integral)] = Field(
        10, ge=1, le=MAX_K, description="how many items; fewer are returned if fewer remain"
    )

    @model_validator(mode="before")
    @classmethod
    def fields_are_known(cls, body: Any) -> Any:
        return _with_known_fields(cls, body)

    @field_validator("history")
    @classmethod
    def history_or_user_is_given(cls, history: list[str] | None, info: ValidationInfo) -> list[str] | None:
        # A wrong user_id is absent from info.data and has its own error.
        if history is None and info.data.get("user_id", "wrong") is None:
            raise PydanticCustomError("no_user_or_history", "give user_id, history or both")
        return history

    def to_query(self) -> Query:
        return Query(self.user_id, self.history, self.exclude, self.k)


class ManyRequest(BaseModel):
    """Requests for many users. Validation stops at the first wrong one, so that a refusal stays small."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests: Annotated[list[RecommendRequest], Field(fail_fast=True, min_length=1, max_length=MAX_REQUESTS)]

    @model_validator(mode="before")
    @classmethod
    def fields_are_known(cls, body: Any) -> Any:
        return _with_known_fields(cls, body)


class RecommendedItem(BaseModel):
    item_id: str
    score: float = Field(description="comparable within one answer; a share of interactions where cold_start is true")
    text: str = Field(description=f"the item's text, at most {MAX_TEXT_CHARS} characters of it")

    @classmethod
    def of(cls, item: Recommendation) -> Self:
        return cls(item_id=item.item_id, score=item.score, text=item.text[:MAX_TEXT_CHARS])


class SimilarRequest(NamedTuple):
    item_id: str
    k: int


class SimilarResponse(BaseModel):
    """Items that the same users like, best first. A score is the cosine of two embeddings, from -1 to 1."""

    model_config = ConfigDict(protected_namespaces=())

    items: list[RecommendedItem]
    model_version: str


class RecommendResponse(BaseModel):
    """Recommended items, best first."""

    model_config = ConfigDict(protected_namespaces=())

    items: list[RecommendedItem]
    model_version: str
    cold_start: bool = Field(description="true: neither user nor history is known; the items are the popular ones")
    ignored_items: list[str] = Field(description="ids of `history` and `exclude` that the model does not know")

    @classmethod
    def from_answer(cls, answer: Answer, model_version: str) -> Self:
        return cls(
            items=[RecommendedItem.of(item) for item in answer.items],
            model_version=model_version,
            cold_start=answer.cold_start,
            ignored_items=answer.ignored_items,
        )


class ManyResponse(BaseModel):
    answers: list[RecommendResponse] = Field(description="one for each request, in the same order")


class Alive(BaseModel):
    status: Literal["alive"] = "alive"


class Ready(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    status: Literal["ready"] = "ready"
    model_version: str
    is_wanted_model: bool = Field(
        True,
        description="false: the promoted model cannot be loaded (the replica's log says why), and an older one answers",
    )


class Problem(BaseModel):
    detail: str


class FieldProblem(BaseModel):
    loc: list[str | int] = Field(description='path of the field, such as ["body", "k"]')
    msg: str
    type: str


class FieldProblems(BaseModel):
    detail: list[FieldProblem]
