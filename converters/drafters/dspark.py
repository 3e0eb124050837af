"""DSpark: DFlash with a Markov head, which lets each draft depend on the one before, and a confidence of each draft.

Config and tensor names as DeepSpec, SpecForge and speculators publish them.
"""

from __future__ import annotations

from convert_drafter.converters.config import ConfigReader, lookup
from convert_drafter.converters.drafters import dflash
from convert_drafter.converters.drafters.captures import CAPTURES_PLUS_ONE
from convert_drafter.converters.drafters.kind import Headers, Kind
from convert_drafter.converters.plan import TensorRule
from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import DrafterSpec
from convert_drafter.converters.target import Target

RANKS = ("markov_rank", "dflash_config.markov_rank", "dspark_markov_rank")
CONFIDENCES = (
    "enable_confidence_head", "dflash_config.enable_confidence_head", "use_confidence_head",
    "dflash_config.use_confidence_head",
)  # fmt: skip
IGNORED = (
    *dflash.IGNORED, "dflash_config.projector_type", "dflash_config.attention_mode", "projector_type",
    "dflash_config.confidence_head_alpha", "confidence_head_alpha", "dflash_config.shift_label", "lm_head_source",
)  # fmt: skip


def read_spec(reader: ConfigReader, headers: Headers, target: Target | None) -> DrafterSpec:
    """Every fact of a DSpark checkpoint. Raises `WrongInput` naming the key that is missing or wrong."""
    dflash.check_assumptions(reader)
    confidence = read_heads(reader, headers)
    return dflash.read_block_spec(
        "dspark",
        reader,
        headers,
        target,
        markov_rank=reader.get("markov_rank", int, *RANKS),
        sample_from_anchor=read_sample_from_anchor(reader),
        confidence_head=confidence,
    )


def read_heads(reader: ConfigReader, headers: Headers) -> bool:
    """Whether there is a confidence head; what config and tensors say of it and of the Markov head has to agree."""
    for path in ("markov_head_type", "dflash_config.markov_head_type"):
        reader.expect(path, "vanilla", "no runtime has another Markov head")
    confidence = any("confidence" in name for name in headers)
    for path in ("confidence_head_with_markov", "dflash_config.confidence_head_with_markov") * confidence:
        reader.expect(path, True, "runtimes show the confidence head the Markov row as well")
    if confidence and reader.find("confidence_head", bool, *CONFIDENCES) is False:
        raise reader.error(reader.origins["confidence_head"], "found False", "true: there are tensors of one")
    reader.ignore("confidence_head_with_markov", "dflash_config.confidence_head_with_markov")
    reader.note("confidence_head", "tensor names")
    return confidence


def read_sample_from_anchor(reader: ConfigReader) -> bool:
    """Whether the anchor's own place drafts the first token: DSpark's definition, but speculators have to say it."""
    paths = dflash.FROM_ANCHOR
    stated = reader.find("sample_from_anchor", bool, *paths)
    bonus = reader.find("dspark_bonus_anchor", bool, "dspark_bonus_anchor")
    states = any(lookup(reader.raw, path) is not None for path in CAPTURES_PLUS_ONE)
    if stated is None and (bonus is not None or states or reader.speculators):
        raise reader.missing("sample_from_anchor", "true or false", *paths)
    if stated is None:
        reader.origins["sample_from_anchor"] = "DSpark's definition (no key says otherwise)"
    elif bonus is stated:
        raise reader.error("dspark_bonus_anchor", f"found {bonus}", f"{not stated}: sample_from_anchor is {stated}")
    return stated is not False


def rules(reader: ConfigReader) -> tuple[TensorRule, ...]:
    return (*dflash.rules(reader), *head_rules(reader))


def head_rules(reader: ConfigReader) -> tuple[TensorRule, ...]:
    """The Markov head, and the confidence head where there is one."""
    no_confidence = not reader.find("confidence head", bool, *CONFIDENCES)
    first, second, weight = ("vocab", "markov_rank"), ("draft_vocab", "markov_rank"), ("one", "confidence")
    bias = Role.CONFIDENCE_BIAS
    spellings = (("markov_head.", "confidence_head.proj"), ("", "confidence_proj"))  # ModelOpt writes the second
    return (
        *(TensorRule(f"{markov}markov_w1.weight", Role.MARKOV_IN, first) for markov, _ in spellings),
        *(TensorRule(f"{markov}markov_w2.weight", Role.MARKOV_OUT, second) for markov, _ in spellings),
        *(
            TensorRule(
                f"{name}.weight", Role.CONFIDENCE, weight, optional=no_confidence, required_with=Role.CONFIDENCE_BIAS
            )
            for _, name in spellings
        ),
        *(TensorRule(f"{name}.bias", bias, ("one",), optional=True) for _, name in spellings),
    )


DSPARK = Kind(
    name="dspark",
    summary="DSpark: DFlash with a Markov head over each draft's predecessor, and a confidence",
    architectures=(
        "DSparkDraftModel",
        "Qwen3DSparkModel",
        "DSparkSpeculator",
        "Lfm2DSparkDraftModel",
        "LingDSparkModel",
        "DFlashDraftModel",
    ),
    read_spec=read_spec,
    rules=rules,
    dropped=dflash.dropped,
    ignored=IGNORED,
)
