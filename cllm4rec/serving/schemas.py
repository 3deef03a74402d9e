"""What callers may ask and what they get: the HTTP contract, bounded on every side.

Every bound below is also in /openapi.json. A request outside of them is refused with 422 and the field's name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

MAX_K = 1000
MAX_HISTORY = 10_000
MAX_ID_CHARS = 256
MAX_TEXT_CHARS = 1000
MAX_BODY_BYTES = 1_000_000

Id = Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)]


def _integral(value: Any) -> Any:
    """JSON has one kind of number, and by JSON Schema 10.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _someone_is_named(schema: dict[str, Any]) -> None:
    """Say in the OpenAPI what `history_or_user_is_given` checks."""
    schema["anyOf"] = [
        {"required": ["user_id"], "properties": {"user_id": {"type": "string"}}},
        {"required": ["history"], "properties": {"history": {"type": "array"}}},
    ]


class RecommendRequest(BaseModel):
    """Who is to be recommended something: a known user, a history, or a known user and what came since the training."""

    # strict: "10" is not 10 and true is not 1; a client that sends them has a bug it wants to hear of.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, json_schema_extra=_someone_is_named)

    user_id: Id | None = Field(
        None, description="a user's id; one unknown at training is answered from `history` alone"
    )
    history: list[Id] | None = Field(
        None,
        max_length=MAX_HISTORY,
        validate_default=True,
        description="item ids the user has, oldest first; added to what is known of `user_id`; never recommended",
    )
    exclude: list[Id] = Field([], max_length=MAX_HISTORY, description="item ids not to recommend, beside the history")
    k: Annotated[int, BeforeValidator(_integral)] = Field(
        10, ge=1, le=MAX_K, description="how many items; fewer come back where fewer remain"
    )

    @field_validator("history")
    @classmethod
    def history_or_user_is_given(cls, history: list[str] | None, info: ValidationInfo) -> list[str] | None:
        # A wrong user_id is absent from info.data and has an error of its own.
        if history is None and info.data.get("user_id", "wrong") is None:
            raise PydanticCustomError("nobody_named", "give user_id, history or both")
        return history


class RecommendedItem(BaseModel):
    item_id: str
    score: float = Field(description="comparable within one answer; a share of interactions where cold_start is true")
    text: str = Field(description=f"the item's text, cut at {MAX_TEXT_CHARS} characters")


class RecommendResponse(BaseModel):
    """Best item first."""

    model_config = ConfigDict(protected_namespaces=())

    items: list[RecommendedItem]
    model_version: str
    cold_start: bool = Field(description="true: nothing is known of the user, these are the popular items")
    ignored_items: list[str] = Field(description="ids of `history` and `exclude` that were unknown at training")


class Alive(BaseModel):
    status: Literal["alive"] = "alive"


class Ready(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    status: Literal["ready"] = "ready"
    model_version: str


class Problem(BaseModel):
    detail: str


class FieldProblem(BaseModel):
    loc: list[str | int] = Field(description='where, such as ["body", "k"]')
    msg: str
    type: str


class FieldProblems(BaseModel):
    detail: list[FieldProblem]
