"""Invented verdicts, one of each shape a verification can take. No test takes their numbers for measured ones."""

from __future__ import annotations

import math

from convert_drafter.converters.verdict import Cause, Diagnosis, Gate, Outcome, Verdict

PASS, FAIL, UNDECIDED, SKIPPED, ADVICE = Outcome

ORIGINAL = (0.796, 0.589, 0.43, 0.3, 0.149, 0.086, 0.069)
CLOSE = (0.801, 0.594, 0.428, 0.307, 0.155, 0.084, 0.071)
BROKEN = (0.212, 0.061, 0.014, 0.004, 0.001, 0.0, 0.0)
SETTINGS = {
    "command": "convert-drafter verify tiny.gguf --target fixtures/pair/target --source fixtures/pair/drafter",
    "prompts": "16 of prompts.jsonl",
    "new_tokens": 128,
    "draft_length": 7,
    "sampling": {"temperature": 0, "seed": 20},
    "margin": 0.02,
    "versions": {"convert-drafter": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
}
NAMES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def tensors(layers: int, bad: tuple[str, ...] = ()) -> list[dict[str, object]]:
    """Errors as a K recipe makes them: alike within a type, a little different between tensors."""
    out: list[dict[str, object]] = [
        {"name": "output_norm.weight", "type": "F32", "relative": 0.0, "allowed": 0.0, "max": 0.0}
    ]
    for i, (layer, name) in enumerate((layer, name) for layer in range(layers) for name in NAMES):
        kind, allowed = ("Q6_K", 0.012) if name in ("attn_v", "ffn_down") else ("Q4_K", 0.082)
        full = f"blk.{layer}.{name}.weight"
        relative = 0.45 if full in bad else allowed * (0.78 + 0.17 * math.sin(1.7 * i) ** 2)
        out.append({"name": full, "type": kind, "relative": relative, "allowed": allowed, "max": relative * 0.11})
    return out


def walk(length: float, by_position: tuple[float, ...], steps: int) -> dict[str, object]:
    return {
        "length": length,
        "length_interval": [length - 0.2, length + 0.2],
        "rate": sum(by_position) / len(by_position),
        "steps": steps,
        "by_position": list(by_position),
        "by_position_interval": [[0.9 * share, min(1.0, 1.1 * share)] for share in by_position],
    }


def acceptance(
    outcome: Outcome,
    file: dict[str, object],
    interval: tuple[float, float],
    needed: int | None = None,
    prompts: int = 16,
) -> Gate:
    original = walk(3.375, ORIGINAL, 602)
    difference = file["length"] / 3.375 - 1  # type: ignore[operator]
    summary = f"{file['length']:.2f} tokens per verify step vs 3.38 ({difference:+.1%}), {prompts} prompts"
    figures = {
        "prompts": prompts, "original": original, "file": file, "difference": difference, "interval": list(interval),
        "needed": needed, "max_drop": 0.02,
    }  # fmt: skip
    return Gate("acceptance", outcome, summary, (), figures)


def sweep(outcome: Outcome, file: tuple[float, ...], summary: str, details: tuple[str, ...] = ()) -> Gate:
    contexts, original = (32, 64, 128, 256, 512, 1024), (3.31, 3.42, 3.39, 3.30, 3.21, 3.02)
    rows = zip(contexts, original, file, strict=True)
    points = [{"context": c, "prompts": 8, "original": o, "file": f} for c, o, f in rows]
    return Gate("length sweep", outcome, summary, details, {"window": 48, "context_length": 1024, "points": points})


def pays(speedup: tuple[float, ...], best: int, measured: float | None = None) -> Gate:
    figures = {
        "draft_ms": 3.1, "verify_ms": 14.8, "plain_ms": 12.9, "break_even": 1.39, "best_length": best,
        "speedup": list(speedup), "measured_speedup": measured,
    }  # fmt: skip
    summary = f"best with {best} drafted tokens: {speedup[best - 1]:.2f} times as fast as without a drafter"
    return Gate("does it pay", ADVICE, summary, (), figures)


def same_drafts(outcome: Outcome, top1: float, kl: float, details: tuple[str, ...] = ()) -> Gate:
    by_position = [top1 - 0.004 * i for i in range(7)]
    figures = {
        "positions": 1843, "top1": top1, "kl": kl, "kl_allowed": 0.02, "top1_by_position": by_position,
        "steps": [27, 44, 40], "engine_steps": [27, 44, 41],
    }  # fmt: skip
    return Gate("same drafts", outcome, f"{top1:.1%} of 1,843 first choices agree, KL {kl:.4f} nats", details, figures)


LOSSLESS = Gate("lossless", PASS, "16 of 16 texts are the target's own", (), {"prompts": 16, "same": 16, "ties": 0})
PAIRING = Gate("pairing", PASS, "vocabulary, depth and width fit fixtures/pair/target")


def structure(layers: int = 2, bad: tuple[str, ...] = ()) -> Gate:
    if not bad:
        return Gate(
            "structure",
            PASS,
            f"{7 * layers + 1} tensors hold the checkpoint's weights",
            (),
            {"tensors": tensors(layers)},
        )
    details = tuple(f"{name}: relative error 45.00 %, allowed 8.20 %: not this checkpoint's weights" for name in bad)
    return Gate(
        "structure", FAIL, f"{len(bad)} tensors are not the checkpoint's", details, {"tensors": tensors(layers, bad)}
    )


SLOW_SWEEP = "from 32 to 1,024 tokens at most 1.1 % below the original"
PASSING = Verdict(
    "dflash-tiny-Q8_0.gguf", "fixtures/pair/target", "fixtures/pair/drafter", "torch", SETTINGS,
    (
        structure(), PAIRING, LOSSLESS, same_drafts(PASS, 0.993, 0.0011),
        acceptance(PASS, walk(3.41, CLOSE, 596), (-0.012, 0.029)),
        sweep(PASS, (3.33, 3.41, 3.40, 3.28, 3.19, 3.04), SLOW_SWEEP),
        pays((1.28, 1.49, 1.61, 1.66, 1.64, 1.59, 1.53), 4),
    ),
)  # fmt: skip

THETA = Cause("RoPE theta 10000 -> 10000000", 3.371, 0.0004, {"rope.theta": 10000000.0})
FAILING = Verdict(
    "dflash-tiny-theta.gguf", "fixtures/pair/target", "fixtures/pair/drafter", "torch", SETTINGS,
    (
        structure(), PAIRING, LOSSLESS,
        same_drafts(FAIL, 0.214, 2.83, ("KL 2.83 nats, at most 0.02 allowed", "worst at draft position 7")),
        acceptance(FAIL, walk(1.301, BROKEN, 1561), (-0.641, -0.588)),
        sweep(FAIL, (1.92, 1.55, 1.34, 1.22, 1.13, 1.08), "64.2 % below the original at 1,024 tokens",
              ("falls with the length: a wrong position or window",)),
        pays((0.86, 0.81, 0.75, 0.70, 0.66, 0.62, 0.59), 1),
    ),
    Diagnosis(1.301, 3.375, THETA, (
        THETA, Cause("RoPE theta 10000 -> 1000000", 1.662, 1.71, {"rope.theta": 1000000.0}),
        Cause("sliding window off", 1.318, 2.79, {"window.size": None}), Cause("capture layers + 1", 1.204, 3.02),
        Cause("weights of the checkpoint", 1.301, 2.83),
    )),
)  # fmt: skip
REPAIRED = Verdict(**{**vars(FAILING), "repaired": "dflash-tiny-theta-repaired.gguf"})

WRONG_WEIGHTS = Verdict(
    "drafter-27b-Q4_K_M.gguf", "org/target-27b", "org/drafter-27b", "torch", SETTINGS,
    (
        structure(43, ("blk.7.ffn_up.weight", "blk.31.attn_k.weight")), PAIRING,
        *(Gate(name, SKIPPED, "the structure has to hold first") for name in ("lossless", "same drafts", "acceptance")),
    ),
)  # fmt: skip
UNEXPLAINED = Verdict(**{**vars(FAILING), "diagnosis": Diagnosis(1.301, None, None, (
    Cause("weights of the checkpoint", 1.301, 2.83), Cause("RoPE theta 10000 -> 1000000", 1.288, None),
))})  # fmt: skip

UNSURE = Verdict(
    "dflash-tiny-Q4_K_M.gguf", "fixtures/pair/target", "fixtures/pair/drafter", "torch",
    {**SETTINGS, "prompts": "6 of prompts.jsonl"},
    (
        structure(), PAIRING, LOSSLESS, same_drafts(PASS, 0.968, 0.0121),
        acceptance(UNDECIDED, walk(3.33, CLOSE, 231), (-0.047, 0.021), 24, 6),
        Gate("length sweep", SKIPPED, "no prompt is longer than 64 tokens: give longer ones with --prompts"),
        Gate("does it pay", SKIPPED, "not asked (--no-timing)"),
    ),
)  # fmt: skip
TOO_FEW = Verdict(
    "dflash-tiny-Q4_K_M.gguf", "fixtures/pair/target", "fixtures/pair/drafter", "torch", {},
    (acceptance(UNDECIDED, walk(3.33, CLOSE, 61), (-math.inf, math.inf), 2, 2),),
)  # fmt: skip

ALONE = Verdict(
    "dflash-tiny-Q8_0.gguf", "fixtures/pair/target", None, "torch", SETTINGS,
    (
        Gate("structure", PASS, "25 tensors, every one a drafter needs"), PAIRING, LOSSLESS,
        Gate("same drafts", SKIPPED, "no original: give the checkpoint with --source"),
        Gate("acceptance", PASS, "3.41 tokens per verify step, 16 prompts", (), {
            "prompts": 16, "original": None, "file": walk(3.41, CLOSE, 596), "difference": None, "interval": None,
            "needed": None,
        }),
        Gate("length sweep", PASS, "no fall from 32 to 256 tokens", (), {
            "window": None, "context_length": 262144,
            "points": [{"context": c, "prompts": 4, "original": None, "file": f} for c, f in ((32, 3.4), (256, 3.3))],
        }),
        pays((1.28, 1.49, 1.61, 1.66, 1.64, 1.59, 1.53), 4),
    ),
)  # fmt: skip

LLAMA_CPP = Verdict(
    "dflash-tiny-Q8_0.gguf", "target-BF16.gguf", "fixtures/pair/drafter", "llama.cpp",
    {**SETTINGS, "server": "llama-server --spec-type draft-dflash --spec-draft-n-max 7 -fa on",
     "versions": {"convert-drafter": "0.1.0", "llama-server": "b11434"}},
    (
        structure(), PAIRING,
        Gate("lossless", PASS, "14 of 16 texts are the target's own, 2 part at a tie", (
            "prompt 3: token 57 is a tie of the target (0.0001 apart)", "prompt 11: token 8 is a tie of the target"),
            {"prompts": 16, "same": 14, "ties": 2}),
        same_drafts(PASS, 0.991, 0.0013), acceptance(PASS, walk(3.38, CLOSE, 601), (-0.006, 0.009)),
        sweep(PASS, (3.33, 3.41, 3.40, 3.28, 3.19, 3.04), SLOW_SWEEP),
        pays((1.28, 1.49, 1.61, 1.66, 1.64, 1.59, 1.53), 4, 1.58),
    ),
)  # fmt: skip

MARKUP = "<script>alert(1)</script><img src=x onerror=alert(2)>[bold]{{ 7*7 }}$x_$&amp;\"'"
CONTROL = "\x1b[31mred\x00\x07\u202edesrever\ufeff\udcff\x9b2J"
LONG = "models/" + "very-long-folder-name/" * 7 + "drafter-with-a-name-that-does-not-end-" * 3 + "Q4_K_M.gguf"
HOSTILE = Verdict(
    MARKUP + CONTROL, LONG, f"日本語/{MARKUP}", "torch",
    {"command": f"verify '{MARKUP}' {CONTROL}", MARKUP: {CONTROL: MARKUP, "list": [1, math.inf, None]}},
    (
        Gate("structure", FAIL, f"{MARKUP} is not a weight", (CONTROL, LONG + MARKUP), {"tensors": [
            {"name": MARKUP, "type": "Q4_K", "relative": 0.3, "allowed": 0.08, "max": 0.2},
            {"name": "日本語" + CONTROL, "type": "<b>", "relative": math.nan, "allowed": math.inf, "max": None},
            {"name": "$\\frac{1}{0}$", "type": "F16", "relative": 1e-4, "allowed": 0.0, "max": 1.0},
            {"name": LONG, "type": "Q4_K", "relative": 0.08, "allowed": 0.081, "max": 1.0},
        ]}),
        acceptance(FAIL, walk(math.nan, (math.nan, 0.2), 0), (math.nan, math.nan)),
        sweep(UNDECIDED, (math.nan, 1.5, math.inf, 1.2, 1.1, 1.0), MARKUP, (CONTROL,)),
    ),
    Diagnosis(math.nan, math.nan, Cause(MARKUP, math.nan, math.inf, {MARKUP: CONTROL}), (Cause(CONTROL, 1.0, None),)),
    MARKUP,
)  # fmt: skip

BOTH = Verdict(**{**vars(PASSING), "engine": "torch and llama.cpp", "gates": (*PASSING.gates, Gate(
    "llama.cpp", PASS, "601 verify steps in llama.cpp, 602 in torch, on 16 prompts with the same text",
    ("prompt 3: 41 verify steps, 42 in torch",), {"steps": [27, 44, 42], "engine_steps": [27, 44, 41]},
))})  # fmt: skip
EMPTY = Verdict("a.gguf", "b", None, "torch", {}, ())

SAMPLES = {
    "passing": PASSING, "failing": FAILING, "repaired": REPAIRED, "wrong weights": WRONG_WEIGHTS,
    "unexplained": UNEXPLAINED, "unsure": UNSURE, "too few": TOO_FEW, "alone": ALONE, "llama.cpp": LLAMA_CPP,
    "both engines": BOTH, "hostile": HOSTILE, "empty": EMPTY,
}  # fmt: skip
