"""What llama-server's --help says of drafting, in versions that differ; the common part is `fake_llama_server`'s."""

from __future__ import annotations

from fake_llama_server import DRAFTING, HELP, LEGACY

from convert_drafter.converters.verify.in_llama_cpp.probe import Abilities, parse_help

LIST = (
    "none,draft-simple,draft-eagle3,draft-mtp,draft-dflash,draft-dspark,"
    "ngram-simple,ngram-map-k,ngram-map-k4v,ngram-mod,ngram-cache"
)
TYPES = f"""--spec-type {LIST}
                                        comma-separated list of types of speculative decoding to use
"""
GONE = """--draft, --draft-n, --draft-max N       the argument has been removed. use --spec-draft-n-max
--draft-min, --draft-n-min N            the argument has been removed. use --spec-draft-n-min
--spec-ngram-size-n N                   the argument has been removed. use --spec-ngram-mod-n-match
"""
DRAFT = """--spec-draft-n-max N                    number of tokens to draft (default: 3)
--spec-draft-n-min N                    minimum number of draft tokens (default: 0)
--spec-draft-p-min, --draft-p-min P     minimum probability (default: 0.00)
--spec-draft-model, -md, --model-draft FNAME
                                        draft model for speculative decoding (default: unused)
"""
NGRAM = """--spec-ngram-mod-n-min N                minimum number of ngram tokens (default: 48)
--spec-ngram-mod-n-max N                maximum number of ngram tokens (default: 64)
--spec-ngram-mod-n-match N              ngram-mod lookup length (default: 24)
"""
DEFAULT = "--spec-default                          enable default speculative decoding config\n"
DEVICES = "--list-devices                          print list of available devices and exit\n"
CURRENT = HELP + DRAFT + NGRAM + TYPES + DEFAULT + DEVICES + GONE
# Before ngram-mod had options of its own; types had no prefix yet, and chains were there already.
SHARED = """--spec-ngram-size-n N                   ngram size N (default: 12)
--draft-p-min P                         minimum probability (default: 0.75)
--draft, --draft-n, --draft-max N       number of tokens to draft (default: 16)
--draft-min, --draft-n-min N            minimum number of draft tokens (default: 0)
-md,   --model-draft FNAME              draft model for speculative decoding (default: unused)
"""
OLD_TYPES = """--spec-type none,eagle3,mtp,ngram-simple,ngram-map-k,ngram-mod,ngram-cache
                                        comma-separated list of types
"""
ONE_TYPE = """--spec-type [none|ngram-cache|ngram-simple|ngram-map-k|ngram-map-k4v|ngram-mod]
                                        type of speculative decoding to use when no draft model is provided
"""
HELPS = {
    "current": CURRENT,
    "current without MTP": CURRENT.replace("draft-mtp,", ""),
    "current without ngram-mod": CURRENT.replace("ngram-mod,", "").replace("--spec-ngram-mod", "--spec-other"),
    "without --spec-default": CURRENT.replace(DEFAULT, ""),
    "verify's": HELP + DRAFTING,
    "legacy": HELP + SHARED + OLD_TYPES,
    "legacy, one type": HELP + SHARED + ONE_TYPE,
    "legacy, no type": HELP + LEGACY,
    "neither": HELP,
}


def abilities(name: str) -> Abilities:
    return Abilities(True, flags=parse_help(HELPS[name]))
