"""RoPE as configs spell it: theta, scaling and rotated dimensions, from their many places.

Source of the rules: transformers 5 (`rope_parameters`), transformers 4 (`rope_theta`, `rope_scaling`) and the 12 cases
published drafters show. There is no default: a drafter with a wrong theta loads and drafts, and is rarely right.
"""

from __future__ import annotations

from collections.abc import Iterable

from convert_drafter.converters.config import ConfigReader
from convert_drafter.converters.spec import MROPE_SECTIONS, Rope, RopeScaling

TOP_LEVEL = ("rope_theta", "global_rope_theta", "rope_global_theta", "rope_theta_global", "rotary_emb_base")
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
NOT_SCALING = {"rope_theta", "rope_type", "type", "partial_rotary_factor", "mrope_section", "mrope_interleaved"}


def read_rope(reader: ConfigReader, head_dim: int, layer_types: Iterable[str], target_uses_mrope: bool) -> Rope:
    theta = read_theta(reader, set(layer_types))
    factor = reader.find(
        "rope.dimensions", float, "rope_parameters.partial_rotary_factor", "partial_rotary_factor", "rope_pct"
    )
    if factor is not None and not 0 < factor <= 1:
        raise reader.error(reader.origins["rope.dimensions"], f"found {factor}", "a fraction of the head, in (0, 1]")
    dimensions = head_dim if factor is None else int(head_dim * factor)
    if factor is None:
        reader.note("rope.dimensions", "head_dim (no partial rotary factor)")
    return Rope(theta, dimensions, read_scaling(reader), _read_sections(reader, dimensions, target_uses_mrope))


def read_theta(reader: ConfigReader, layer_types: set[str]) -> float:
    """Nested `rope_parameters` (flat, then per layer type), then `rope_scaling`, then the top level (A1-1).

    Nested beats a different top-level value with a warning naming both: newer exports leave the old key behind.
    """
    in_use = [name for name in LAYER_TYPES if name in layer_types] or list(LAYER_TYPES)
    flat = "rope_parameters.rope_theta"
    per_type = [f"rope_parameters.{name}.rope_theta" for name in in_use]
    nested = reader.find("rope.theta", float, flat)
    nested = reader.find("rope.theta", float, *per_type) if nested is None else nested
    nested = reader.find("rope.theta", float, "rope_scaling.rope_theta") if nested is None else nested
    origin = reader.origins.get("rope.theta")
    top = reader.find("rope.theta", float, *TOP_LEVEL)
    theta = top if nested is None else nested
    if theta is None:
        raise reader.missing("rope theta", "a number", flat, *per_type, "rope_scaling.rope_theta", TOP_LEVEL[0])
    if nested is not None and origin is not None:
        if top is not None and top != nested:
            reader.warn(f"{origin} = {nested:g} is used, {reader.origins['rope.theta']} = {top:g} is not")
        reader.origins["rope.theta"] = origin
    if theta <= 0:
        raise reader.error(reader.origins["rope.theta"], f"found {theta:g}", "a theta above 0")
    return theta


def read_scaling(reader: ConfigReader) -> RopeScaling | None:
    """The scaling of `rope_parameters`, else of `rope_scaling`; a type no runtime can express is refused by name."""
    homes = [home for home in ("rope_parameters", "rope_scaling") if reader.section(home)]
    found = [scaling for home in homes if (scaling := _scaling_at(reader, home)) is not None]
    if len(found) == 2 and found[0] != found[1]:
        raise reader.error(
            "rope scaling", "rope_parameters and rope_scaling disagree", "one of them; settle with --set"
        )
    return found[0] if found else None


def _scaling_at(reader: ConfigReader, home: str) -> RopeScaling | None:
    nested = [f"{home}.{name}" for name in LAYER_TYPES if reader.section(f"{home}.{name}")]
    for path in nested:
        kind = reader.find("rope.scaling", str, f"{path}.rope_type", f"{path}.type")
        if kind not in (None, "default"):
            raise reader.error(f"{path}.rope_type", f"found {kind!r}", "no scaling per layer type: no runtime has one")
    kind = reader.find("rope.scaling", str, f"{home}.rope_type", f"{home}.type")
    if kind in (None, "default", "mrope"):
        return None
    if kind not in ("linear", "yarn"):
        expected = "default, linear or yarn: no runtime's DFlash has another scaling"
        raise reader.error(f"{home}.rope_type", f"found {kind!r}", expected)
    assert kind is not None
    return _stretch(reader, home, kind)


def _stretch(reader: ConfigReader, home: str, kind: str) -> RopeScaling:
    reader.expect(f"{home}.truncate", True, "ggml always rounds the correction range; accept it with --set")
    known = set(SCALING_KEYS) | NOT_SCALING | {"truncate"}
    for key in sorted(set(reader.section(home)) - known):
        if reader.section(home)[key] is not None:
            raise reader.error(f"{home}.{key}", "a scaling parameter no runtime's GGUF key carries", "none of it")
    factor = reader.get("rope.scaling.factor", float, f"{home}.factor")
    original = "original_max_position_embeddings"
    paths = (f"{home}.{original}", original)
    length = reader.find("rope.scaling.original_context_length", int, *paths)
    if kind == "yarn" and length is None:
        raise reader.missing("rope.scaling.original_context_length", "an integer", *paths)
    return RopeScaling(
        method=kind,
        factor=factor,
        original_context_length=length,
        extrapolation_factor=reader.find("rope.scaling.extrapolation_factor", float, f"{home}.extrapolation_factor"),
        attention_factor=reader.find(
            "rope.scaling.attention_factor", float, f"{home}.attention_factor", f"{home}.attn_factor"
        ),
        beta_fast=reader.find("rope.scaling.beta_fast", float, f"{home}.beta_fast"),
        beta_slow=reader.find("rope.scaling.beta_slow", float, f"{home}.beta_slow"),
    )


def _read_sections(reader: ConfigReader, dimensions: int, target_uses_mrope: bool) -> tuple[int, ...] | None:
    """For an M-RoPE target the drafter rotates by the temporal position alone: all pairs are in the first section."""
    own = reader.find_list("rope.sections", int, "rope_parameters.mrope_section", "rope_scaling.mrope_section")
    if own is not None and not target_uses_mrope:
        raise reader.error(
            reader.origins["rope.sections"], f"found {list(own)}", "none: the target does not position with M-RoPE"
        )
    if not target_uses_mrope:
        return None
    reader.origins["rope.sections"] = "the target positions with M-RoPE"
    return (dimensions // 2, *[0] * (MROPE_SECTIONS - 1))
