"""What a table of a TOML file is, and the values that several tables have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, create_model
from pydantic_core import PydanticKnownError

Share01 = Annotated[float, Field(ge=0, le=1)]
Rank = Annotated[int, Field(ge=0)]


class TomlTable(BaseModel):
    """A table of a TOML file: frozen, strict types, finite numbers, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def table_of(name: str, fields: Mapping[str, tuple[Any, Any]]) -> type[TomlTable]:
    """A table with a key for each of `fields`: its type and its default."""
    made: type[TomlTable] = create_model(name, __base__=TomlTable, **fields)  # type: ignore[call-overload]
    return made


def as_toml(value: Any) -> str:
    """A value as TOML has it."""
    return str(value).lower() if isinstance(value, bool) else repr(value)


def ascending(value: tuple[float, float]) -> tuple[float, float]:
    """A range as it is.

    Raises:
        ValueError: its larger number stands first.
    """
    if value[0] > value[1]:
        raise ValueError(f"a range is written [from, to], the smaller number first; got {list(value)}")
    return value


def _rank_or_share(value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if not whole and not (isinstance(value, float) and 0 < value < 1):
        raise ValueError(
            f"a rank is a whole number, 0 or more, or a share of the model's width below 1; got {as_toml(value)}"
        )
    return value


RankOrShare = Annotated[int | float, BeforeValidator(_rank_or_share)]


def one_of(names: Callable[[], tuple[str, ...]]) -> AfterValidator:
    """A name must be one of a list's; another is told in the words that pydantic has for a `Literal`."""

    def check(name: str) -> str:
        if name not in names():
            *others, last = map(repr, names())
            expected = f"{', '.join(others)} or {last}" if others else last
            raise PydanticKnownError("literal_error", {"expected": expected})
        return name

    return AfterValidator(check)


def _not_empty(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise PydanticKnownError("too_short", {"field_type": "Tuple", "min_length": 1, "actual_length": 0})
    return names


# After each name is known: pydantic's own bound counts only those that are, and would tell of two faults.
not_empty = AfterValidator(_not_empty)
