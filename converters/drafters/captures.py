"""What a drafter's checkpoint says of its target: which layers it reads, how many there are, how wide they are."""

from __future__ import annotations

from convert_drafter.converters.config import ConfigReader
from convert_drafter.converters.drafters.kind import Headers
from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.target import Target

CAPTURES = ("dflash_config.target_layer_ids", "target_layer_ids")
# The same layers counted as indices of hidden_states, one higher; only ever a cross-check, because some exporters
# put zero-based ids under these keys too (the Laguna and Nemotron releases carry both lists).
CAPTURES_PLUS_ONE = ("eagle_aux_hidden_state_layer_ids", "aux_hidden_state_layer_ids")


def read_captures(reader: ConfigReader) -> tuple[int, ...]:
    """Zero-based capture layers in fc's column order; never guessed, never sorted."""
    captures = reader.find_list("capture_layers", int, *CAPTURES)
    if captures is None and reader.speculators:
        return read_speculators_captures(reader)
    if captures == ():
        raise reader.error(reader.origins["capture_layers"], "found an empty list", "zero-based layer ids")
    origin = reader.origins.get("capture_layers", "")
    shifted = reader.find_list("capture_layers", int, *CAPTURES_PLUS_ONE)
    if captures is None:
        if shifted is not None:
            found = f"only {reader.origins['capture_layers']} = {list(shifted)}, whose counting differs by exporter"
            raise reader.error(CAPTURES[0], found, "zero-based layer ids; give them with --set")
        raise reader.missing("capture layers", "a list of zero-based layer ids", *CAPTURES)
    if shifted is not None and shifted != tuple(k + 1 for k in captures):
        found = f"{list(captures)}, but {reader.origins['capture_layers']} = {list(shifted)}"
        raise reader.error(origin, found, "the second list to be one higher throughout; settle it with --set")
    reader.origins["capture_layers"] = origin
    reader.expect("num_aux_layers", len(captures), "it counts the capture layers")
    return captures


def read_speculators_captures(reader: ConfigReader) -> tuple[int, ...]:
    """Speculators count states, the embedding's output first: k is the input of layer k (its docs, and vLLM)."""
    ids = reader.find_list("capture_layers", int, *CAPTURES_PLUS_ONE)
    if not ids:
        raise reader.missing("capture layers", "a list of indices of hidden states", *reversed(CAPTURES_PLUS_ONE))
    if 0 in ids:
        found = f"found {list(ids)}"
        raise reader.error(reader.origins["capture_layers"], found, "indices from 1 on: 0 is the embedding's output")
    return tuple(k - 1 for k in ids)


def read_target_depth(reader: ConfigReader, target: Target | None) -> int:
    """The target's layers, not the number of capture layers; config and target have to agree."""
    paths = ("num_target_layers", "dflash_config.num_target_layers")
    depth = reader.find("target_layer_count", int, *paths)
    if target is None and depth is None:
        raise reader.missing("target_layer_count", "an integer, or the target itself (--target)", *paths)
    if target is None:
        return depth or 0
    if depth is not None and depth != target.layer_count:
        expected = f"{target.layer_count}, the layers of the target {target.name}; is it the target of this drafter?"
        raise reader.error(reader.origins["target_layer_count"], f"found {depth}", expected)
    if depth is None:
        reader.origins["target_layer_count"] = f"target {target.name}"
    return target.layer_count


def read_target_width(reader: ConfigReader, headers: Headers, target: Target | None, captures: int) -> int:
    """Hidden size of the target: its own, else fc's columns over the number of capture layers."""
    header = headers.get("fc.weight") or headers.get("model.fc.weight")
    if header is None or len(header.shape) != 2:
        if target is not None:
            return target.hidden_size  # the plan names fc.weight together with every other tensor that does not fit
        raise WrongInput(f"{reader.where}: fc.weight: missing or not a matrix, expected [hidden, captures * hidden]")
    width, rest = divmod(header.shape[1], captures)
    if rest or not width:
        raise reader.error("fc.weight", f"{header.shape[1]} columns", f"a multiple of {captures} capture layers")
    if target is not None and target.hidden_size != width:
        found = f"{header.shape[1]} columns = {captures} capture layers * {width}"
        expected = f"{captures} * {target.hidden_size}, the hidden size of the target {target.name}"
        raise reader.error("fc.weight", found, expected)
    for path in ("target_hidden_size", "dflash_config.target_hidden_size"):
        reader.expect(path, width, "fc.weight's columns / capture layers")
    reader.origins["target_hidden_size"] = "columns of fc.weight / capture layers"
    return width


def read_embedding_scale(reader: ConfigReader, target: Target | None) -> float | None:
    """The config's, else the target's: Gemma multiplies its embeddings, and the drafter reads the same table."""
    scale = reader.find("embedding_scale", float, "dflash_config.input_embedding_scale", "input_embedding_scale")
    if scale is None and target is not None and target.embedding_scale is not None:
        reader.origins["embedding_scale"] = f"target {target.name} scales its embeddings"
        return target.embedding_scale
    return scale
