"""Diagnose: which single mistake, or which two, explains that a drafter's file drafts badly.

Every explanation is tried on the spot: the drafter with it mended is asked on passages of a few texts, and the best
ones on all texts. With an original, what counts is how far a drafter's distributions are from it, because acceptance
does not feel every fault; without one, acceptance is all there is, and only a clear gain counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

from convert_drafter.converters.verdict import Cause, Diagnosis
from convert_drafter.converters.verify.diagnosis.explanations import explanations, layers_needed
from convert_drafter.converters.verify.diagnosis.trials import Measurement, Score, Trials
from convert_drafter.converters.verify.diagnosis.view import Explanation, Hints, View, changes
from convert_drafter.converters.verify.diagnosis.weight_explanations import (
    furthest_weights,
    largest_error,
    source_weights,
)
from convert_drafter.converters.verify.gates import ROUNDING_KL
from convert_drafter.converters.verify.in_torch.drafting import Variant
from convert_drafter.converters.verify.in_torch.target import TorchTarget
from convert_drafter.converters.verify.in_torch.texts import write_texts
from convert_drafter.converters.verify.measured import Watch
from convert_drafter.converters.verify.prompts import Encoded
from convert_drafter.converters.verify.statistics import compare

SPECIALS = ("mask", "pad", "eos", "bos")  # tokens a drafter's mask may have been taken for
TEXTS = 8  # their states are kept
CONTENDERS = 3  # measured on all texts: the best that was screened, and what may be as good
CLOSE = 0.05  # of the file's divergence; a fifth of the acceptance length where there is no divergence
CLOSE_LENGTH = 0.2
FEW = 6  # tensors that can be damage; more of them are quantization
RESTORED = 0.1  # of the divergence may be left
FLOOR = 1.2  # times what the file's quantization alone diverges
TIE = 0.5  # further than the best by this share is as good: the likelier explanation wins
SOUND = 0.25  # relative error up to which every tensor can be quantization, and none a fault
BETTER = 0.95  # of the divergence left: better, though not well
# Of the acceptance length, where that is all there is: a clear gain, one that makes other weights believable (right
# ones gained half or more, wrong ones up to a sixth), and what 8 texts cannot tell apart.
GAIN, WEIGHTS_GAIN, SAME_GAIN = 0.15, 0.3, 0.05


@dataclass(frozen=True)
class Trial:
    """An explanation, or two one after the other, measured on all texts."""

    names: tuple[str, ...]
    view: View
    found: Measurement

    def cause(self, file: View) -> Cause:
        return Cause("; ".join(self.names), self.found.length, self.found.kl, changes(file, self.view))


def diagnose(
    file: Variant, original: Variant | None, target: TorchTarget, prompts: Sequence[Encoded], new_tokens: int,
    watch: Watch = lambda phase, done, total: None,
) -> Diagnosis:  # fmt: skip
    """Try every explanation on the target's texts of the prompts, as far as they are needed.

    `found` is None where nothing explains it: another target's drafter, for one, or a file with nothing wrong.
    """
    view, hints = view_of(file), hints_of(target, original)
    layers = [layer for layer in layers_needed(view, hints) if layer < target.layer_count]
    written = write_texts(target, spread(prompts, TEXTS), new_tokens, layers)
    texts = [text for text in written if len(text.continuation) > 1]
    trials = Trials(target, texts, original)
    return _Search(trials, view, original, hints, watch).run()


def view_of(variant: Variant) -> View:
    return View(variant.spec, variant.weights, variant.captures)


def hints_of(target: TorchTarget, original: Variant | None) -> Hints:
    config = target.model.config.get_text_config(decoder=True)
    stated = [getattr(config, f"{name}_token_id", None) for name in SPECIALS]
    tokens = [*(token for token in stated if isinstance(token, int)), *sorted(target.end_tokens)]
    return Hints(target.theta, tuple(dict.fromkeys(tokens)), None if original is None else view_of(original))


def spread(prompts: Sequence[Encoded], most: int) -> list[Encoded]:
    """At most so many, short and long ones alike, in their order."""
    if len(prompts) <= most:
        return list(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i].tokens))
    chosen = {by_length[i * (len(prompts) - 1) // (most - 1)] for i in range(most)}
    return [prompt for i, prompt in enumerate(prompts) if i in chosen]


class _Search:
    """One diagnosis: rounds of trials from a view, what they found, and everything tried on the way."""

    def __init__(self, trials: Trials, file: View, original: Variant | None, hints: Hints, watch: Watch) -> None:
        self.trials, self.file, self.hints, self.watch = trials, file, hints, watch
        self.before = trials.measure(file)
        self.looked = trials.screen(file).length
        self.goal = None if original is None else trials.length(original)
        self.floor = self._floor()
        self.screened: list[Cause] = []
        self.measured: list[Trial] = []

    def run(self) -> Diagnosis:
        if self.before.kl is not None and self.before.kl <= ROUNDING_KL:  # it drafts as the original does
            return Diagnosis(self.before.length, self.goal, None, ())
        start = Trial((), self.file, self.before)
        found = self._round(start)
        base = self._best(self.measured) or start
        better = self._improves(base, start)
        if better and (found is None or self.goal is None):  # two faults hide each other
            found = self._round(base) or found
        ranked = sorted(self.measured, key=lambda trial: self._rank(trial.found.score))
        causes = [trial.cause(self.file) for trial in ranked]
        named = {cause.name for cause in causes}
        rest = sorted(self.screened, key=lambda cause: self._rank(Score(cause.length, cause.kl)))
        tried = (*causes, *(cause for cause in rest if cause.name not in named))
        return Diagnosis(self.before.length, self.goal, None if found is None else found.cause(self.file), tried)

    def _round(self, start: Trial) -> Trial | None:
        """The explanation that restores the drafter from here: a single mistake, else the weights as a whole."""
        contenders = self._contenders(start)
        found = self._chosen([self._measure(start, explanation) for explanation in contenders], start)
        return found or self._weights(start)

    def _contenders(self, start: Trial) -> list[Explanation]:
        """The best few by a look at a few passages, in the order of the table."""
        phase = f"diagnosing, {'another' if start.names else 'one'} fault"
        best: list[tuple[float, int, Explanation]] = []
        for number, explanation in enumerate(explanations(start.view, self.hints)):
            self.watch(phase, number, 0)  # how many there are is known at the end: each is made only to be tried
            score = self.trials.screen(explanation.view)
            names = "; ".join((*start.names, explanation.name))
            self.screened.append(
                Cause(names, self._expected(score.length), score.kl, changes(self.file, explanation.view))
            )
            entries = [*best, (self._rank(score), number, explanation)]
            best = sorted(entries, key=lambda entry: entry[:2])[:CONTENDERS]
        self.watch(phase, number + 1, number + 1)
        near = [entry for entry in best if entry[0] <= self._close_to(best[0][0])]
        return [explanation for _, _, explanation in sorted(near, key=lambda entry: entry[1])]

    def _expected(self, length: float) -> float:
        """On whole texts, from what it is on the passages, which are luckier or not: the file is known on both."""
        drafts = (self.before.length - 1) / (self.looked - 1) if self.looked > 1 else 1.0
        return 1 + (length - 1) * drafts

    def _close_to(self, rank: float) -> float:
        if self.before.kl is None:
            return rank * (1 - CLOSE_LENGTH)  # minus a length
        return rank * (1 + TIE) + self.before.kl * CLOSE

    def _weights(self, start: Trial) -> Trial | None:
        """The source's weights restore it: quantization, or damage of a few tensors where these are enough."""
        original = self.hints.original
        explanation = None if original is None else source_weights(start.view, original)
        if original is None or explanation is None:
            return None
        whole = self._measure(start, explanation)
        if not self._restores(whole, start):
            return None
        for few in islice(furthest_weights(start.view, original), FEW):
            trial = self._measure(start, few)
            if self._restores(trial, start):
                return trial
        return whole

    def _measure(self, start: Trial, explanation: Explanation) -> Trial:
        found = Trial((*start.names, explanation.name), explanation.view, self.trials.measure(explanation.view))
        self.measured.append(found)
        return found

    def _chosen(self, measured: Sequence[Trial], start: Trial) -> Trial | None:
        """Of those that restore the drafter, the first in the table that is as good as the best."""
        good = [trial for trial in measured if self._restores(trial, start)]
        best = self._best(good)
        return None if best is None else next(trial for trial in good if self._as_good(trial.found, best.found))

    def _best(self, trials: Sequence[Trial]) -> Trial | None:
        return min(trials, key=lambda trial: self._rank(trial.found.score), default=None)

    def _rank(self, score: Score) -> float:
        return -score.length if score.kl is None else score.kl

    def _restores(self, trial: Trial, start: Trial) -> bool:
        if trial.found.kl is None or self.before.kl is None:
            gain = compare(start.found.walks, trial.found.walks, 0)
            least = GAIN if trial.view.weights is start.view.weights else WEIGHTS_GAIN
            return gain.relative >= least and gain.low > 0
        return trial.found.kl <= max(RESTORED * self.before.kl, FLOOR * self.floor, ROUNDING_KL)

    def _improves(self, trial: Trial, start: Trial) -> bool:
        if trial.found.kl is None or start.found.kl is None:
            return self._restores(trial, start)
        return trial.found.kl < BETTER * start.found.kl

    def _as_good(self, one: Measurement, best: Measurement) -> bool:
        if one.kl is None or best.kl is None or self.before.kl is None:
            return one.length >= best.length * (1 - SAME_GAIN)
        return one.kl <= best.kl * (1 + TIE) + self.before.kl * 1e-3

    def _floor(self) -> float:
        """What the file's weights alone diverge with every fact right, if they can be the source's at all."""
        original = self.hints.original
        if original is None or not 0 < largest_error(self.file, original) <= SOUND:
            return 0.0
        return self.trials.measure(replace(original, weights=self.file.weights)).kl or 0.0
