"""The metadata that describes the model: each key is read by someone, is known to change nothing, or is an error."""

from __future__ import annotations

from typing import Any, TypeVar

from foldsearch.errors import ModelError
from foldsearch.model.gguf.file import GgufFile

__all__ = ["ModelKeys"]

Default = TypeVar("Default")

# Keys that change no number, whatever they say.
_HARMLESS = {
    "vocab_size",  # the embedding has as many rows as it has
    "rope.scaling.finetuned",  # how the model was trained
    "tensor_data_layout",  # where the first converters had their weights from
}
# Keys that change no number if they say this: what they describe is not there.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "rope.scaling.alpha": (0,),
    "rope.scaling.yarn_log_multiplier": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_group_count": (0,),
    "expert_group_used_count": (0,),
    "leading_dense_block_count": (0,),
}


class ModelKeys:
    """The keys under the architecture's prefix. What is asked for is ticked off; `finish` names what is left."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        prefix = file.architecture + "."
        self._values = {
            key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)
        }
        self._asked: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def integer(self, name: str, *default: Default) -> int | Default:
        """A whole number; of a list with one for each block, all of which must be the same."""
        value = self._ask(name, *default)
        if isinstance(value, list) and value:
            if any(entry != value[0] for entry in value):
                raise self.error(name, "the blocks differ in it, and foldsearch folds blocks that are alike")
            value = value[0]
        if default and value is default[0]:
            return default[0]
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(name, "it must be a whole number")
        return value

    def number(self, name: str, *default: Default) -> float | Default:
        """A number, as short as its 32 bits allow: 1e-05 and not 9.999999747378752e-06, which is the same one."""
        import numpy

        value = self._ask(name, *default)
        if default and value is default[0]:
            return default[0]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(name, "it must be a number")
        return float(str(numpy.float32(value)))

    def flag(self, name: str) -> bool:
        """A yes or no."""
        value = self._ask(name)
        if not isinstance(value, bool):
            raise self.error(name, "it must be true or false")
        return value

    def text(self, name: str, default: str) -> str:
        """A word."""
        value = self._ask(name, default)
        if not isinstance(value, str):
            raise self.error(name, "it must be a text")
        return value

    def anything(self, name: str) -> Any:
        """The value as it is; None if the file does not have it."""
        return self._ask(name, None)

    def must_equal(self, name: str, value: float, why: str) -> None:
        """Where the file says something else than what the model is built with, it is another model."""
        found = self.number(name, None)
        if found is not None and abs(found - value) > 1e-6 * max(1.0, abs(value)):
            raise self.error(name, f"{why}, which is {value:g}")

    def finish(self) -> None:
        """All keys were understood.

        Raises:
            ModelError: the file says something of the model that nothing here applies.
        """
        if self._values.get("expert_count"):
            raise self.error("expert_count", "it is a mixture of experts, and foldsearch folds dense models")
        for name, value in self._values.items():
            if name in self._asked or name in _HARMLESS or value in _NEUTRAL.get(name, ()):
                continue
            raise self.error(
                name,
                "foldsearch does not know this key, or not for this kind of model, and it may change its numbers",
            )

    def error(self, name: str, why: str) -> ModelError:
        """A sentence about one key."""
        shown = repr(self._values[name]) if name in self._values else "nothing"
        shown = shown[:80] + ("..." if len(shown) > 80 else "")
        return ModelError(
            f"{self.file.path}: {self.file.architecture}.{name} is {shown}: {why}. "
            "Give the folder of transformers that the file was converted from, or another file."
        )

    def _ask(self, name: str, *default: Any) -> Any:
        self._asked.add(name)
        if name in self._values:
            return self._values[name]
        if default:
            return default[0]
        raise self.error(name, "the file must say this, and does not")
