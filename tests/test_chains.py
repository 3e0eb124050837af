"""Many anchors at once: the same drafts as one anchor after the other, in chains and in blocks that choose by turns."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make_mtp
import pytest
from make_checkpoints import make
from published import FIXTURES, PAIR

from convert_drafter.converters.convert import read_published

pytestmark = pytest.mark.engine
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from test_eagle3_reference import TEXT, VARIANTS, inputs, made  # noqa: E402

from convert_drafter.converters.verify.diagnosis import trials  # noqa: E402
from convert_drafter.converters.verify.diagnosis.diagnose import hints_of, view_of  # noqa: E402
from convert_drafter.converters.verify.diagnosis.explanations import explanations, same_weights  # noqa: E402
from convert_drafter.converters.verify.diagnosis.trials import Trials, blocks  # noqa: E402
from convert_drafter.converters.verify.diagnosis.view import View, with_facts  # noqa: E402
from convert_drafter.converters.verify.in_torch import drafting  # noqa: E402
from convert_drafter.converters.verify.in_torch.chains import draft_chains  # noqa: E402
from convert_drafter.converters.verify.in_torch.drafting import Drafting, variant  # noqa: E402
from convert_drafter.converters.verify.in_torch.reference.drafter import Tables  # noqa: E402
from convert_drafter.converters.verify.in_torch.target import TorchTarget  # noqa: E402
from convert_drafter.converters.verify.in_torch.texts import Text, write_texts  # noqa: E402
from convert_drafter.converters.verify.in_torch.weights import checkpoint_weights, reference  # noqa: E402
from convert_drafter.converters.verify.prompts import Encoded  # noqa: E402

LINES = (PAIR / "prompts.jsonl").read_text().splitlines()[::3]
PROMPTS = [Encoded(f"prompt {n}", tuple(json.loads(line)["tokens"])) for n, line in enumerate(LINES)]
COUNT, NEW_TOKENS = 3, 64
WRONG = {"eagle3": {"norm_before_residual": True}, "mtp": {"rope.theta": 1e4}, "dspark": {"mask_token_id": 2044}}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("follow", [None, ((5, 6, 7), (8,), (), (9, 10, 11), (1, 2))], ids=["free", "told"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_chain_does_not_feel_the_others(name: str, follow: tuple[tuple[int, ...], ...] | None) -> None:
    """EAGLE-3 of every kind, from the second position on to the last."""
    embedding, head, captured = (torch.from_numpy(array) for array in inputs())
    drafter, tables, anchors = reference(*made(name)), Tables(embedding, head), [1, 2, 5, 6, 3]
    context = drafter.read(None, captured, TEXT, tables)
    every = draft_chains(drafter, context, TEXT, anchors, COUNT, tables, follow)
    for i, p in enumerate(anchors):
        told = None if follow is None else follow[i]
        alone = drafter.draft(drafter.until(context, p), TEXT[p], COUNT, tables, told)
        assert every.tokens[i].tolist() == alone.tokens.tolist()
        torch.testing.assert_close(every.logits[i], alone.logits, atol=1e-4, rtol=1e-4)


class Case:
    """A trained drafter, its target, the target's texts, and the drafter with one fact wrong."""

    def __init__(self, kind: str, folder: Path) -> None:
        place = {"eagle3": FIXTURES / "pair-eagle3", "mtp": folder / "mtp", "dspark": folder / "dspark"}[kind]
        source = {"mtp": make_mtp.trained, "dspark": lambda path: make(kind, path)}.get(kind, lambda path: path)(place)
        where = source if kind == "mtp" else PAIR / "target"
        published = read_published(source, None if kind == "mtp" else where)
        self.target = TorchTarget(where)
        self.original = variant("source", published.spec, checkpoint_weights(published))
        self.texts: list[Text] = list(write_texts(self.target, PROMPTS, NEW_TOKENS, self.original.captures))
        wrong = with_facts(view_of(self.original), WRONG[kind])
        assert wrong is not None
        self.wrong: View = wrong

    def at_once(self, text: Text, anchors: range) -> Any:
        return blocks(Drafting(self.original, self.target), text, anchors)

    def in_trial(self) -> tuple[Any, Any, float]:
        """Screened and measured, and the seconds it took."""
        begun = time.perf_counter()
        found = Trials(self.target, self.texts, self.original)
        screened, measured = found.screen(self.wrong), found.measure(self.wrong)
        return screened, measured, time.perf_counter() - begun


@pytest.fixture(scope="module", params=WRONG)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Switches to an anchor after the other."""

    def switch() -> None:
        for module in (trials, drafting):
            monkeypatch.setattr(module, "in_chains", lambda drafter: False)
        monkeypatch.setattr(trials, "DFlash", type(None))

    return switch


def test_a_passage_is_drafted_the_same(case: Case, one_by_one: Callable[[], None]) -> None:
    text = max(case.texts, key=lambda text: len(text.tokens))
    anchors = range(text.prompt_length + 3, text.prompt_length + 19)
    every = case.at_once(text, anchors)
    one_by_one()
    alone = case.at_once(text, anchors)
    assert every.tokens.tolist() == alone.tokens.tolist()
    torch.testing.assert_close(every.logits, alone.logits, atol=2e-3, rtol=1e-3)


def test_a_trial_finds_the_same_and_takes_less_time(
    case: Case, one_by_one: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """The same acceptance in every text, the same divergence but for rounding."""
    screened, measured, seconds = case.in_trial()
    one_by_one()
    screened_alone, measured_alone, seconds_alone = case.in_trial()
    assert screened.length == screened_alone.length and measured.walks == measured_alone.walks
    assert screened.kl == pytest.approx(screened_alone.kl, rel=1e-4)
    assert measured.kl == pytest.approx(measured_alone.kl, rel=1e-4)
    with capsys.disabled():
        kind = case.original.spec.kind
        print(f"\n{kind}: {seconds_alone:.2f} s one by one, {seconds:.2f} at once: {seconds_alone / seconds:.1f} times")
    assert kind == "dspark" or seconds < seconds_alone / 2  # only its trunk is drafted at once, which is the least


def test_what_a_drafter_does_not_have_is_no_explanation(case: Case) -> None:
    """Norms of queries in EAGLE-3, a fusion in MTP: nothing to mend, and no time to lose."""
    file = View(case.wrong.spec, case.wrong.weights, case.wrong.captures)
    hints = hints_of(case.target, case.original)
    for explanation in explanations(file, hints):
        facts = (explanation.view.spec, explanation.view.captures) != (file.spec, file.captures)
        assert facts or not same_weights(explanation.view, file), explanation.name
