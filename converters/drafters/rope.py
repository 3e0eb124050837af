"""RoPE as configs spell it: theta, scaling and rotated dimensions, from their many places.

Source of the rules: transformers 5 (`rope_parameters`), transformers 4 (`rope_theta`, `rope_scaling`) and the 12 cases
published drafters show. There is no default: a drafter with a wrong theta loads and drafts, and is rarely right.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeVar

import numpy as np

from convert_drafter.converters.config import ConfigReader
from convert_drafter.converters.spec import MROPE_SECTIONS, PAPER, Llama3Bands, Rope, RopeScaling, yarn_attention

T = TypeVar("T")
TOP_LEVEL = ("rope_theta", "global_rope_theta", "rope_global_theta", "rope_theta_global", "rotary_emb_base")
# A base of the sliding layers' own; it may be there, but not differ: no runtime's DFlash has two.
LOCAL = (
    "local_rope_theta", "rope_local_theta", "rope_theta_local", "swa_rope_theta", "rope_local_base_freq",
    "swa_rope_parameters.rope_theta",
)  # fmt: skip
LAYER_TYPES = ("full_attention", "sliding_attention")
SCALING_KEYS = {
    "factor": "factor",
    "original_max_position_embeddings": "original_context_length",
    "extrapolation_factor": "extrapolation_factor",
    "attention_factor": "attention_factor",
    "attn_factor": "attention_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
}
LLAMA3 = "llama3"
BOTH, SETTLE = "rope_parameters and rope_scaling disagree", "one of them; settle with --set"
NOT_SCALING = {"rope_theta", "rope_type", "type", "partial_rotary_factor", "mrope_section", "mrope_interleaved"}


def read_rope(
    reader: ConfigReader,
    head_dim: int,
    layer_types: Iterable[str],
    target_uses_mrope: bool | None,
    scalings: tuple[str, ...] = ("linear", "yarn"),
) -> Rope:
    """`target_uses_mrope` is None where the target is not known; `scalings` are those of the drafter's kind."""
    in_use = [name for name in LAYER_TYPES if name in set(layer_types)] or list(LAYER_TYPES)
    reader.ignore(*(f"rope_parameters.{name}" for name in LAYER_TYPES if name not in in_use))
    theta = read_theta(reader, in_use)
    dimensions = _read_dimensions(reader, head_dim, in_use)
    scaling, sections = read_scaling(reader, scalings), _read_sections(reader, dimensions, target_uses_mrope)
    return Rope(theta, dimensions, scaling, sections, read_llama3(reader) if LLAMA3 in scalings else None)


def read_half_split(reader: ConfigReader) -> bool:
    """True where a rotated pair is dimensions (k, k + half), False where it is (2k, 2k + 1)."""
    return reader.find("rope layout", bool, "rope_is_neox_style", "dflash_config.rope_is_neox_style") is not False


def _read_dimensions(reader: ConfigReader, head_dim: int, in_use: list[str]) -> int:
    nested = [f"rope_parameters.{name}.partial_rotary_factor" for name in in_use]
    top = ("partial_rotary_factor", "rope_pct", "rope_percent")
    factor = reader.find("rope.dimensions", float, "rope_parameters.partial_rotary_factor", *nested, *top)
    if factor is None:
        reader.note("rope.dimensions", "head_dim (no partial rotary factor)")
        return head_dim
    origin = reader.origins["rope.dimensions"]
    if not 0 < factor <= 1:
        raise reader.error(origin, f"found {factor}", "a fraction of the head, in (0, 1]")
    if factor < 1 and not read_half_split(reader):
        raise reader.error(origin, f"found {factor} on interleaved rotary pairs", "1: both together are not converted")
    return int(head_dim * factor)


def read_theta(reader: ConfigReader, in_use: list[str]) -> float:
    """From `rope_parameters` (flat or per layer type) or `rope_scaling`, else from the top level (A1-1).

    Nested beats a different top-level value with a warning naming both: newer exports leave the old key behind.
    `in_use` are the layer types the drafter has; the others' parameters are dead.
    """
    per_type = [f"rope_parameters.{name}.rope_theta" for name in in_use]
    paths = ("rope_parameters.rope_theta", *per_type, "rope_scaling.rope_theta")
    nested = reader.find("rope.theta", float, *paths)
    origin = reader.origins.get("rope.theta")
    top = reader.find("rope.theta", float, *TOP_LEVEL)
    theta = top if nested is None else nested
    if theta is None:
        raise reader.missing("rope theta", "a number", *paths, TOP_LEVEL[0])
    if nested is not None and origin is not None:
        if top is not None and top != nested:
            _prefer(reader, f"{origin} = {nested:g}", reader.origins["rope.theta"], f"{top:g}")
        reader.origins["rope.theta"] = origin
    if theta <= 0:
        raise reader.error(reader.origins["rope.theta"], f"found {theta:g}", "a theta above 0")
    if "sliding_attention" in in_use:
        local = reader.find("rope.theta of sliding layers", float, *LOCAL)
        if local not in (None, theta):
            expected = f"{theta:g}, the theta of the other layers: no runtime's DFlash has two"
            raise reader.error(reader.origins["rope.theta of sliding layers"], f"found {local:g}", expected)
    return theta


def _prefer(reader: ConfigReader, nested: str, top: str, value: str) -> None:
    if top.startswith("--set"):
        raise reader.error(top, f"found {value}, but {nested} goes before it", "the nested key to be set")
    reader.warn(f"{nested} is used, {top} = {value} is not")


def read_llama3(reader: ConfigReader) -> Llama3Bands | None:
    """Llama 3's bands, each number of them stated: transformers has no defaults for them, and llama.cpp has."""
    homes = [home for home in ("rope_parameters", "rope_scaling") if _rope_type(reader, home) is not None]
    bands = [home for home in homes if _rope_type(reader, home) == LLAMA3]
    if not bands:
        return None
    if bands != homes:
        raise reader.error("rope scaling", BOTH, SETTLE)

    def number(field: str, kind: type[T], key: str, *more: str) -> T:
        return reader.get(f"rope.llama3.{field}", kind, *(f"{home}.{key}" for home in bands), *more)

    original = "original_max_position_embeddings"
    return Llama3Bands(
        number("factor", float, "factor"),
        number("low_freq_factor", float, "low_freq_factor"),
        number("high_freq_factor", float, "high_freq_factor"),
        number("original_context_length", int, original, original),
    )


def llama3_factors(theta: float, dimensions: int, bands: Llama3Bands) -> tuple[float, ...]:
    """What each rotated pair's frequency is divided by, in f32 as transformers' `_compute_llama3_parameters` has it."""
    low, high, factor = (np.float32(x) for x in (bands.low_freq_factor, bands.high_freq_factor, bands.factor))
    frequencies = 1 / np.float32(theta) ** (np.arange(0, dimensions, 2, dtype=np.float32) / np.float32(dimensions))
    fits = np.float32(bands.original_context_length) / (np.float32(2 * math.pi) / frequencies)
    kept = (fits - low) / (high - low)
    factors = np.where(fits > high, 1, np.where(fits < low, factor, 1 / ((1 - kept) / factor + kept)))
    return tuple(map(float, factors))


def read_scaling(reader: ConfigReader, scalings: tuple[str, ...], also: tuple[str, ...] = ()) -> RopeScaling | None:
    """The scaling of `rope_parameters` or `rope_scaling`; a type no runtime can express is refused by name.

    `also` are parameters that the caller reads.

    Both may state one, but not different ones: transformers and llama.cpp choose differently between them.
    """
    homes = [home for home in ("rope_parameters", "rope_scaling") if reader.section(home)]
    found = {home: _scaling_at(reader, home, scalings, also) for home in homes}
    stated = {found[home] for home in homes if _rope_type(reader, home) is not None}
    if len(stated) > 1:
        raise reader.error("rope scaling", BOTH, SETTLE)
    return stated.pop() if stated else None


def _rope_type(reader: ConfigReader, home: str) -> str | None:
    return reader.find("rope.scaling.method", str, f"{home}.rope_type", f"{home}.type")


def _scaling_at(
    reader: ConfigReader, home: str, scalings: tuple[str, ...], also: tuple[str, ...]
) -> RopeScaling | None:
    nested = [f"{home}.{name}" for name in LAYER_TYPES if reader.section(f"{home}.{name}")]
    for path in nested:
        kind = _rope_type(reader, path)
        if kind not in (None, "default"):
            raise reader.error(f"{path}.rope_type", f"found {kind!r}", "no scaling per layer type: no runtime has one")
    kind = _rope_type(reader, home)
    if kind is None and reader.section(home).get("factor") is not None:
        raise reader.missing("rope scaling", "the type that the factor beside it belongs to", f"{home}.rope_type")
    if kind in (None, "default", "mrope") or (kind == LLAMA3 and LLAMA3 in scalings):
        return None
    if kind not in scalings:
        expected = f"default, {' or '.join(scalings)}: no runtime's drafters of this kind have another scaling"
        raise reader.error(f"{home}.rope_type", f"found {kind!r}", expected)
    assert kind is not None
    return _stretch(reader, home, kind, also)


def _stretch(reader: ConfigReader, home: str, kind: str, also: tuple[str, ...]) -> RopeScaling:
    reader.expect(f"{home}.truncate", True, "ggml always rounds the correction range; accept it with --set")
    known = set(SCALING_KEYS) | NOT_SCALING | {"truncate", *also}
    for key in sorted(set(reader.section(home)) - known):
        if reader.section(home)[key] is not None:
            raise reader.error(f"{home}.{key}", "a scaling parameter no runtime's GGUF key carries", "none of it")
    factor = reader.get("rope.scaling.factor", float, f"{home}.factor")
    original = "original_max_position_embeddings"
    paths = (f"{home}.{original}", original, "initial_context_length")  # the last is gpt-oss's name of it
    length = reader.find("rope.scaling.original_context_length", int, *paths)
    if kind == "yarn" and length is None:
        raise reader.missing("rope.scaling.original_context_length", "an integer", *paths)
    parameters = {name: _yarn_parameter(reader, home, kind, name, paper) for name, paper in PAPER.items()}
    attention = _yarn_parameter(reader, home, kind, "attention_factor", yarn_attention(factor))
    return RopeScaling(kind, factor, length, attention_factor=attention, **parameters)


def _yarn_parameter(reader: ConfigReader, home: str, kind: str, name: str, paper: float) -> float | None:
    """One of YaRN's optional parameters, None where it is the paper's."""
    aliases = [key for key, field in SCALING_KEYS.items() if field == name]
    value = reader.find(f"rope.scaling.{name}", float, *(f"{home}.{key}" for key in aliases))
    if value is None or math.isclose(value, paper, rel_tol=1e-6):
        return None
    if kind != "yarn":
        raise reader.error(reader.origins[f"rope.scaling.{name}"], f"found {value:g}", "none: only YaRN has it")
    return value


def _read_sections(reader: ConfigReader, dimensions: int, target_uses_mrope: bool | None) -> tuple[int, ...] | None:
    """For an M-RoPE target the drafter rotates by the temporal position alone: all pairs are in the first section."""
    own = reader.find_list("rope.sections", int, "rope_parameters.mrope_section", "rope_scaling.mrope_section")
    if own is not None and target_uses_mrope is False:
        raise reader.error(
            reader.origins["rope.sections"], f"found {list(own)}", "none: the target does not position with M-RoPE"
        )
    if own is None and not target_uses_mrope:
        return None
    if target_uses_mrope:
        reader.origins["rope.sections"] = "the target positions with M-RoPE"
    return (dimensions // 2, *[0] * (MROPE_SECTIONS - 1))
