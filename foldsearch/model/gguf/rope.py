"""Rotary positions of a GGUF file in transformers' words, and the other way.

llama.cpp turns pair i of a head by position * base^(-2i/d) / factor / divisors[i], and multiplies queries and keys by
an attention factor. Everything but YaRN is a list of divisors, which transformers has too under the name "longrope";
the simpler name is taken wherever it says exactly the same, since exports are read by programs that know it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy

from foldsearch.errors import ModelError
from foldsearch.model.gguf.keys import ModelKeys
from foldsearch.model.gguf.weights import TensorReader

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["describe_rope", "rope_parameters"]

FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
_SAME = 1e-5  # relative; the divisors are stored in 32 bits, which is 6e-8


def rope_parameters(
    keys: ModelKeys, tensors: TensorReader, *, num_rotated: int, context_length: int
) -> dict[str, Any]:
    """The `rope_parameters` of a config: how queries and keys turn with their position.

    Args:
        keys: the file's metadata; everything under "rope.scaling." is asked for.
        tensors: the file's tensors; those with divisors are read.
        num_rotated: dimensions of a head that turn, d.
        context_length: of the model, for what the file leaves out.

    Raises:
        ModelError: the scaling is of a kind that is not known, or its parts do not fit together.
    """
    base = keys.number("rope.freq_base", 10_000.0)
    kind = keys.text("rope.scaling.type", "linear")
    legacy = keys.number("rope.scale_linear", 0.0)
    factor = keys.number("rope.scaling.factor", legacy) or 1.0  # 0 says: none
    original = keys.integer("rope.scaling.original_context_length", context_length)
    attention = keys.number("rope.scaling.attn_factor", 1.0)
    if factor < 0 or attention <= 0 or base <= 0 or original <= 0:
        raise keys.error("rope.scaling.factor", "the numbers of a scaling must be above 0")
    plain: dict[str, Any] = {"rope_theta": base}
    frequencies, long, short = (
        _divisors(keys, tensors, name, num_rotated) for name in (FREQUENCIES, LONG, SHORT)
    )
    if kind == "none":
        factor = 1.0
    elif kind == "yarn":
        if frequencies or long or short:
            raise keys.error("rope.scaling.type", f"with it the file must not hold {FREQUENCIES} or {LONG}")
        return plain | _yarn(keys, factor, original, attention)
    elif kind not in ("linear", "longrope"):
        raise keys.error("rope.scaling.type", "it must be none, linear, yarn or longrope")
    if (long is None) != (short is None) or (kind == "longrope" and long is None):
        raise keys.error("rope.scaling.type", f"the file must hold both {LONG} and {SHORT}, or none of them")
    if long and short:
        if frequencies:
            raise keys.error("rope.scaling.type", f"the file holds both {LONG} and {FREQUENCIES}")
        return plain | _longrope(long, short, factor, original, attention)
    if attention == 1.0 and not frequencies:
        return plain | (
            {"rope_type": "default"} if factor == 1 else {"rope_type": "linear", "factor": factor}
        )
    frequencies = frequencies or [1.0] * (num_rotated // 2)
    if attention == 1.0 and factor == 1.0:
        if max(abs(divisor - 1) for divisor in frequencies) < _SAME:
            return plain | {"rope_type": "default"}
        if llama3 := _llama3(frequencies, base):
            return plain | llama3
    return plain | _longrope(frequencies, frequencies, factor, context_length, attention)


def describe_rope(
    config: PretrainedConfig, kinds: tuple[str, ...], layer_type: str | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `rope_parameters` reads: the keys under the architecture's prefix, and the tensors with divisors.

    Args:
        config: of the model.
        kinds: of scaling that llama.cpp has for this kind of model.
        layer_type: of the blocks that are asked for, where a model has several.

    Raises:
        ModelError: the model has another scaling.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters: dict[str, Any] = config.rope_parameters[layer_type] if layer_type else config.rope_parameters
    kind, base = parameters.get("rope_type", "default"), float(parameters["rope_theta"])
    if kind not in kinds:
        raise ModelError(
            f"llama.cpp turns the positions of a {config.model_type} model by {', '.join(kinds)} RoPE only; got "
            f"rope_type '{kind}'. Export it to stock."
        )
    keys: dict[str, Any] = {"rope.freq_base": base}
    if kind == "default":
        return keys, {}
    frequencies, attention = ROPE_INIT_FUNCTIONS[kind](config, None, layer_type=layer_type)
    original = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
    if kind == "llama3":
        pairs = len(frequencies)
        plain = base ** (-numpy.arange(pairs, dtype=numpy.float64) / pairs)
        return keys, {FREQUENCIES: (plain / frequencies.double().numpy()).astype(numpy.float32)}
    keys["rope.scaling.type"] = kind
    if kind == "linear":
        return keys | {"rope.scaling.factor": float(parameters["factor"])}, {}
    keys["rope.scaling.original_context_length"] = int(original)
    if kind == "longrope":
        lists = {LONG: parameters["long_factor"], SHORT: parameters["short_factor"]}
        divisors = {name: numpy.array(values, numpy.float32) for name, values in lists.items()}
        return keys | {"rope.scaling.attn_factor": float(attention)}, divisors
    if not parameters.get("truncate", True):
        raise ModelError(
            "llama.cpp rounds the bounds of YaRN to whole dimensions, but this model's rope_parameters have "
            "'truncate' false. Export it to stock."
        )
    factor = float(parameters["factor"])
    return keys | {
        "rope.scaling.factor": factor,
        # llama.cpp multiplies what the paper suggests by this
        "rope.scaling.attn_factor": float(attention) / _suggested_by_yarn(factor),
        "rope.scaling.yarn_beta_fast": float(parameters.get("beta_fast") or 32.0),
        "rope.scaling.yarn_beta_slow": float(parameters.get("beta_slow") or 1.0),
    }, {}


def _suggested_by_yarn(factor: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1  # as in the paper


def _divisors(keys: ModelKeys, tensors: TensorReader, name: str, num_rotated: int) -> list[float] | None:
    if name not in tensors:
        return None
    values = [float(value) for value in tensors.read(name).reshape(-1)]
    if len(values) != num_rotated // 2 or not all(math.isfinite(value) and value > 0 for value in values):
        raise keys.error(
            "rope.dimension_count",
            f"the tensor {name} must hold {num_rotated // 2} numbers above 0, one for each pair that turns; it holds "
            f"{len(values)}",
        )
    return values


def _longrope(
    long: list[float], short: list[float], factor: float, original: int, attention: float
) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "long_factor": [divisor * factor for divisor in long],
        "short_factor": [divisor * factor for divisor in short],
        "original_max_position_embeddings": original,
        "attention_factor": attention,
    }


def _yarn(keys: ModelKeys, factor: float, original: int, attention: float) -> dict[str, Any]:
    keys.must_equal("rope.scaling.yarn_ext_factor", 1.0, "transformers has only the whole of YaRN's mixture")
    suggested = _suggested_by_yarn(factor)
    # Converters write transformers' attention_factor here, which stands for the whole; llama.cpp does not read it.
    whole = keys.number("rope.scaling.yarn_attn_factor", suggested)
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "attention_factor": float(whole * attention),
        "beta_fast": keys.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.number("rope.scaling.yarn_beta_slow", 1.0),
    }


def _llama3(divisors: list[float], base: float) -> dict[str, Any] | None:
    """The parameters of Llama 3.1's scaling that give these divisors; None if none do.

    The largest divisor is the factor. Between the two bounds 1 / divisor is a straight line over the frequency, which
    two points fix, or one where the bounds are the published ones, 1 and 4. The bounds are known only as ratios to the
    original context, so the low one is always 1.
    """
    factor = float(max(divisors))
    if factor <= 1:
        return None
    num_pairs = len(divisors)
    frequencies = [base ** (-pair / num_pairs) for pair in range(num_pairs)]
    points = [
        (frequency, (1 / divisor - 1 / factor) / (1 - 1 / factor))
        for frequency, divisor in zip(frequencies, divisors, strict=True)
        if 1 + _SAME < divisor < factor * (1 - _SAME)
    ]
    first_scaled = frequencies[divisors.index(factor)]
    candidates = [(4.0, 2**power) for power in range(5, 18)]  # usual contexts
    candidates.append((4.0, math.floor(2 * math.pi / first_scaled)))
    if points:
        candidates.append((4.0, round((3 * points[0][1] + 1) * 2 * math.pi / points[0][0])))
    if len(points) > 1 and points[0][0] != points[-1][0]:
        (x0, y0), (x1, y1) = points[0], points[-1]
        slope = (y0 - y1) / (x0 - x1)
        offset = y0 - slope * x0
        if slope > 0 and offset < 0:
            high = 1 - 1 / offset
            for digits in (0, 1, 4):
                rounded = round(high, digits)
                candidates.insert(0, (rounded, round(slope * 2 * math.pi * (rounded - 1))))
    for high, original in candidates:
        if high <= 1 or original <= 0:
            continue
        found = [_llama3_divisor(frequency, factor, high, original) for frequency in frequencies]
        if all(abs(a / b - 1) < _SAME for a, b in zip(found, divisors, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    return None


def _llama3_divisor(frequency: float, factor: float, high: float, original: int) -> float:
    wavelength = 2 * math.pi / frequency
    if wavelength < original / high:
        return 1.0
    if wavelength > original:
        return factor
    smooth = (original / wavelength - 1) / (high - 1)
    return 1 / ((1 - smooth) / factor + smooth)
