"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "convert_drafter."
FLOORS = {
    0: ["quant"],
    1: ["errors", "roles", "spec", "spec_kinds", "spec_parts", "spec_streams", "verdict", "model_key"],
    2: [
        *("config", "weight_files", "checkpoint", "gguf_file", "gguf_read", "pre_tokenizers", "tokenizer", "target"),
        *("importance", "encoding", "destination", "json_text", "packed", "quantized", "quantized_config", "experts"),
        *("hub", "hub_gguf", "holes", "repository", "excerpt", "latent", "matrices", "file_hash", "gguf_model"),
    ],
    3: [
        *("dimensions", "ops", "shared_cache", "recipe_rules", "recipes", "type_choice", "plan", "provenance"),
        "token_ids",
    ],
    4: ["drafters", "dialects"],
    5: [
        *("convert", "attach", "launch", "inspection", "drafter_file", "quantize", "redialect", "verify", "scan"),
        *("structure", "loader_keys", "tokenizer_faults", "tensor_errors", "source_facts"),
        *("against_source", "pairing", "doctor", "preflight", "card", "card_page", "stamp"),
    ],
    6: ["batch", "commands"],
    7: ["cli"],
    8: ["entry"],
}
# A package on one floor may use itself, but `drafters` and `dialects` do not know each other.
STRANGERS = {("drafters", "dialects"), ("dialects", "drafters")}
ALONE = ("quant", "entry")  # packages beside `converters`, each one floor's
FILES = sorted((*ROOT.glob("converters/**/*.py"), *(path for name in ALONE for path in ROOT.glob(f"{name}/*.py"))))
FILE_LINES, FUNCTION_LINES = 320, 45


def home(path: Path) -> str:
    """The floor's name of a file: its module, or the package it lies in."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] in ALONE else parts[1]


def floor(name: str) -> int:
    return next(number for number, names in FLOORS.items() if name in names)


def imports(path: Path) -> list[str]:
    tree = ast.parse(path.read_text())
    out = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            out += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            out += [f"{node.module}.{alias.name}" for alias in node.names]
    return out


def ours(path: Path) -> list[str]:
    """Homes of our own modules that a file imports."""
    found = []
    for name in imports(path):
        if name.startswith(PACKAGE):
            parts = name.removeprefix(PACKAGE).split(".")
            found.append(parts[0] if parts[0] in ALONE else parts[1])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downward(path: Path) -> None:
    if path == ROOT / "converters" / "__init__.py":
        return  # the public face stands above everything but the command line
    me = home(path)
    for other in ours(path):
        if other != me:
            assert floor(other) <= floor(me), f"{me} imports {other} from a higher floor"
            assert (me, other) not in STRANGERS


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_torch_only_under_verify(path: Path) -> None:
    heavy = [n for n in imports(path) if n.split(".")[0] in ("torch", "transformers")]
    assert not heavy or "verify" in path.parts


def test_every_module_has_a_floor() -> None:
    modules = {home(path) for path in FILES if path.stem != "__init__" or len(path.relative_to(ROOT).parts) > 2}
    named = {name for names in FLOORS.values() for name in names}
    assert modules | set(ALONE) == named


def test_importing_loads_neither_torch_nor_transformers() -> None:
    """T-7: the whole package and its command line come up with both blocked."""
    blocked = "import sys; sys.modules.update(torch=None, transformers=None); "
    code = f"{blocked}import convert_drafter.converters.cli, convert_drafter.quant"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_no_test_hides_an_installed_package() -> None:
    """T-32: a stub in sys.modules stays for the tests after it; a blocked import is tried in a process of its own."""
    for path in ROOT.glob("tests/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else []
            call = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            hidden = call in ("sys.modules.update", "sys.modules.setdefault", "sys.modules.pop") or (
                isinstance(node, ast.Call)
                and call.endswith((".setitem", ".delitem"))
                and ast.unparse(node.args[0]) == "sys.modules"
            )
            assert not hidden and not any(ast.unparse(t).startswith("sys.modules[") for t in targets), path.name


def test_no_two_modules_share_a_scratch_array() -> None:
    """One would spoil what the other still needs."""
    owners: dict[str, str] = {}
    for path in ROOT.glob("quant/*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        arguments = [a.value for call in calls for a in call.args if isinstance(a, ast.Constant)]
        for name in {a for a in arguments if isinstance(a, str) and re.fullmatch(r"\w+\.\w+(\.\w+)*", a)}:
            assert owners.setdefault(name, path.name) == path.name, f"{name}: {owners[name]} and {path.name}"
    assert len(owners) > 40


def test_quant_imports_nothing_of_ours() -> None:
    for path in ROOT.glob("quant/*.py"):
        assert set(ours(path)) <= {"quant"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_command_line_prints_or_exits(path: Path) -> None:
    """R4: the library raises and returns."""
    if home(path) in ("cli", "entry", "commands"):
        return
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    names = {call.id for call in calls if isinstance(call, ast.Name)}
    assert not names & {"print", "exit", "quit"}
    assert "sys.exit" not in path.read_text()


def test_no_pickle_is_ever_opened() -> None:
    """R7."""
    for path in FILES:
        assert not {"pickle", "shelve", "dill", "joblib"} & {n.split(".")[0] for n in imports(path)}
        assert "torch.load" not in path.read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    """R9."""
    text = path.read_text()
    assert len(text.splitlines()) <= FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < FUNCTION_LINES, f"{path.name}: {node.name} is too long"


@pytest.mark.parametrize("path", sorted(ROOT.glob("converters/commands/*.py")), ids=lambda path: path.name)
def test_command_bodies_are_short(path: Path) -> None:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and any("click.command" in ast.unparse(d) for d in node.decorator_list):
            assert len(ast.unparse(ast.Module(node.body[1:], [])).splitlines()) <= 15, node.name


def test_packaging_lists_every_folder() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in FILES}
    assert set(config["packages"]) == {PACKAGE + folder for folder in folders}


def test_the_project_names_no_place_of_its_makers() -> None:
    """No absolute path and no registry host in anything that is published."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.split():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".txt", ".json", ".mk", "") and path.is_file():
            text = path.read_text(errors="replace")
            for word in ("/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/", "pypi." + "org", "npmjs." + "org"):
                assert word not in text, f"{name} mentions {word}"
