"""jobs.toml: the jobs that the commands would build, or every problem with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from batches import JOBS

from convert_drafter.converters import ConvertJob, QuantizeJob, TypeOptions, VerifyJob
from convert_drafter.converters.batch.task import Task
from convert_drafter.converters.commands.jobs_file import COMMANDS, read_jobs
from convert_drafter.converters.commands.jobs_options import keys
from convert_drafter.converters.errors import Problems, WrongInput
from convert_drafter.converters.stamp import Verification

HEAD = """\
[defaults]
for = "lucebox"
out = "out/{name}-{quant}.gguf"
[[job]]
name = "a"
source = "drafter"
quant = "BF16"
"""


def read(folder: Path, text: str) -> list[Task]:
    (folder / "jobs.toml").write_text(text)
    return read_jobs(folder / "jobs.toml")


def problems(folder: Path, text: str) -> list[str]:
    with pytest.raises(Problems) as caught:
        read(folder, text)
    assert caught.value.where == str(folder / "jobs.toml")
    return list(caught.value.problems)


def test_a_job_for_each_recipe_in_the_file_s_order(tmp_path: Path) -> None:
    tasks = read(tmp_path, JOBS)
    assert [task.name for task in tasks] == ["first-BF16", "first-Q8_0", "second"]
    assert tasks[1].job == ConvertJob(
        tmp_path / "drafter", None, "lucebox", "Q8_0", tmp_path / "out" / "first-Q8_0.gguf"
    )
    assert [task.where for task in tasks] == ["job 'first', line 5", "job 'first', line 5", "job 'second', line 10"]


def test_runtimes_are_a_second_matrix(tmp_path: Path) -> None:
    text = HEAD.replace('"BF16"', '["F16", "Q8_0"]').replace('"lucebox"', '["lucebox", "llama.cpp"]')
    tasks = read(tmp_path, text.replace("{quant}", "{quant}-{for}"))
    assert [task.name for task in tasks] == [
        "a-F16-lucebox", "a-F16-llama.cpp", "a-Q8_0-lucebox", "a-Q8_0-llama.cpp",
    ]  # fmt: skip
    assert tasks[1].outputs == (tmp_path / "out" / "a-F16-llama.cpp.gguf",)


def test_every_option_becomes_what_the_command_line_makes_of_it(tmp_path: Path) -> None:
    more = """
target = "target"
strict = true
ignore-tensor = ["*.bias", "x"]
imatrix = "imatrix.gguf"
attach = "target.gguf"
tensor-type = { '.*fc\\.weight' = "Q8_0" }
pure = false
output-tensor-type = "Q8_0"
token-embedding-type = "F16"
no-fallback = true
threads = 3
report = true
set.rope_parameters.rope_theta = 10000.0
set.layer_types = ["full_attention"]
set.hidden_act = "silu"
"""
    (task,) = read(tmp_path, HEAD + more)
    assert task.job == ConvertJob(
        tmp_path / "drafter", tmp_path / "target", "lucebox", "BF16", tmp_path / "out" / "a-BF16.gguf", strict=True,
        ignore=("*.bias", "x"), importance=tmp_path / "imatrix.gguf", attach=tmp_path / "target.gguf", threads=3,
        settings={
            "rope_parameters.rope_theta": "10000.0", "layer_types": '["full_attention"]', "hidden_act": "silu"
        },
        measure=True,
        options=TypeOptions(False, ((".*fc\\.weight", "Q8_0"),), "Q8_0", "F16", True),
    )  # fmt: skip


def test_quantize_and_verify(tmp_path: Path) -> None:
    text = """
[[job]]
name = "q"
do = "quantize"
source = "in.gguf"
out = "{name}-{quant}.gguf"
quant = "q4_k_m"
allow-requantize = true
[[job]]
name = "v"
do = "verify"
file = "q-Q4_K_M.gguf"
target = ["folder", "target.gguf"]
source = "drafter"
contexts = [64, 16]
max-drop = 0.1
min-acceptance-length = 2
template.enable_thinking = false
html = "reports/{name}.html"
strict = true
"""
    quantized, verified = read(tmp_path, text)
    assert quantized.job == QuantizeJob(
        tmp_path / "in.gguf", tmp_path / "q-Q4_K_M.gguf", "Q4_K_M", allow_requantize=True
    )
    job = VerifyJob(
        tmp_path / "q-Q4_K_M.gguf", (tmp_path / "folder", tmp_path / "target.gguf"), tmp_path / "drafter",
        contexts=(16, 64), max_drop=0.1, least_length=2.0, template={"enable_thinking": False},
        command="convert-drafter batch jobs.toml",
    )  # fmt: skip
    reports = tmp_path / "q-Q4_K_M.verdict.json", tmp_path / "reports" / "v.html"
    assert verified.job == Verification(job, *reports, strict=True)
    assert verified.after == ("q",)


def test_a_verification_of_each_file_a_job_makes(tmp_path: Path) -> None:
    more = 'target = "target"\nverify = { max-prompts = 2 }\nset.rope_theta = 1\n[defaults.verify]\nnew-tokens = 8\n'
    made, verified = read(tmp_path, HEAD + more)
    assert isinstance(verified.job, Verification)
    job = verified.job.job
    assert (verified.name, verified.after) == ("a.verify", ("a",))
    assert (job.file, job.targets, job.source) == (made.outputs[0], (tmp_path / "target",), tmp_path / "drafter")
    assert (job.settings, job.max_prompts, job.new_tokens) == ({"rope_theta": "1"}, 2, 8)
    assert verified.outputs == (tmp_path / "out" / "a-BF16.verdict.json",)
    (alone,) = read(tmp_path, HEAD + 'target = "target"\nverify = false\n[defaults.verify]\nnew-tokens = 8\n')
    assert alone.name == "a"


def test_a_task_waits_for_what_it_reads(tmp_path: Path) -> None:
    more = '[[job]]\nname = "b"\ndo = "quantize"\nsource = "./out/../out/a-BF16.gguf"\nquant = "Q8_0"\n'
    assert [task.after for task in read(tmp_path, more + HEAD)] == [("a",), ()]


def test_one_default_may_serve_one_kind_of_job(tmp_path: Path) -> None:
    """A key that the job's command does not have is left aside in defaults, and refused in the job."""
    read(tmp_path, HEAD.replace("[[job]]", 'server = "x"\nprompts = "p"\n[[job]]'))
    assert problems(tmp_path, HEAD + 'server = "x"\n')[0].startswith("job 'a', line 4: server: found a key that nobody")


WRONG: list[tuple[str, str, str]] = [
    ('name = "a"', "", "job 1, line 4: name: found None, expected letters, digits, dots and dashes"),
    ('name = "a"', 'name = "../a"',
     "job '../a', line 4: name: found '../a', expected letters, digits, dots and dashes"),
    ('name = "a"', 'name = "a"\ndo = "convrt"',
     "job 'a', line 4: do: found 'convrt', expected one of convert, quantize, verify"),
    ('quant = "BF16"', "", "job 'a', line 4: quant: missing, expected in the job or in [defaults]"),
    ('"BF16"', '"Q9_0"',
     "job 'a', line 4: quant: found \"Q9_0\", expected a recipe; did you mean Q8_0 or Q5_0? (`list recipes` has all)"),
    ('"BF16"', '["BF16", 3]', "job 'a', line 4: quant: found 3, expected a text"),
    ('"BF16"', '["F16", "F16"]', "job 'a', line 4: quant: found ['F16', 'F16'], expected at least one, and each once"),
    ('"BF16"', "[]", "job 'a', line 4: quant: found [], expected at least one, and each once"),
    ('"lucebox"', '"vllm"', "job 'a', line 4: for: found \"vllm\", expected one of llama.cpp, ik_llama.cpp, lucebox"),
    ("{quant}", "{qaunt}", "job 'a', line 4: out: found {qaunt}, expected one of {name}, {quant}, {for}"),
    ('"drafter"', "7", "job 'a', line 4: source: found 7, expected a text"),
    ('"drafter"', '"drafter"\nsuorce = 1',
     "job 'a', line 4: suorce: found a key that nobody reads; did you mean source?"),
    ('"drafter"', '"drafter"\nstrict = "false"', "job 'a', line 4: strict: found \"false\", expected true or false"),
    ('"drafter"', '"drafter"\nthreads = 0', "job 'a', line 4: threads: found 0, but 0 is not in the range x>=1"),
    ('"drafter"', '"drafter"\nthreads = "4"', "job 'a', line 4: threads: found \"4\", expected a whole number"),
    ('"drafter"', '"drafter"\nthreads = true', "job 'a', line 4: threads: found true, expected a whole number"),
    ('"drafter"', '"drafter"\nset = "a=1"',
     "job 'a', line 4: set: found \"a=1\", expected a table of names and values"),
    ('"drafter"', '"drafter"\nignore-tensor = [1]',
     "job 'a', line 4: ignore-tensor: found [1], expected a text or a list of texts"),
    ('"drafter"', '"drafter"\ndry-run = true', "job 'a', line 4: dry-run: found a key that nobody reads"),
    ('"drafter"', '"drafter"\nverify = 3',
     "job 'a', line 4: verify: found 3, expected true, false or a table of options"),
    ('"drafter"', '"drafter"\nverify = true',
     "job 'a', line 4: verify.target: missing, expected the target that the drafter is run with"),
    ('"drafter"', '"drafter"\ntarget = "t"\nverify = { source = "x" }',
     "job 'a', line 4: verify.source: found a second one, expected none: it is the job's own"),
    ('"drafter"', '"drafter"\ntarget = "t"\nverify.set.x = 1',
     "job 'a', line 4: verify.set: found a second one, expected none: it is the job's own"),
    ('"drafter"', '"drafter"\ntarget = "t"\nverify.prompt = "x"',
     "job 'a', line 4: verify.prompt: found a key that nobody reads; did you mean prompts?"),
    ('"drafter"', '"drafter"\ntarget = "t"\nverify.max-drop = 2',
     "job 'a', line 4: verify.max-drop: found 2, but 2.0 is not in the range 0<=x<=1"),
    ('"drafter"', '"drafter"\ntarget = "t"\nverify.contexts = "64"',
     "job 'a', line 4: verify.contexts: found \"64\", expected a list of whole numbers, e.g. [64, 1024]"),
    ("[defaults]", "[defaults]\nqant = 1", "defaults: qant: found a key that nobody reads; did you mean quant?"),
    ("[defaults]", "[default]", "default: found a key that nobody reads; did you mean defaults?"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after", "message"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_problems_are_told_with_their_place(tmp_path: Path, before: str, after: str, message: str) -> None:
    assert before in HEAD
    assert any(problem.startswith(message) for problem in problems(tmp_path, HEAD.replace(before, after)))


def test_every_problem_at_once(tmp_path: Path) -> None:
    text = HEAD.replace('"BF16"', '["Q9", "Q8_0", "Q7"]\nthreads = 0') + '[[job]]\nname = "b"\nout = "b.gguf"\n'
    assert [problem.split(",")[0] + problem.split(":")[1] for problem in problems(tmp_path, text)] == [
        "job 'a' quant", "job 'a' threads", "job 'a' quant", "job 'b' source", "job 'b' quant",
    ]  # fmt: skip


def test_two_tasks_with_one_name_or_one_place(tmp_path: Path) -> None:
    again = HEAD[HEAD.index("[[job]]") :]
    assert problems(tmp_path, HEAD + again) == [
        "job 'a', line 8: task 'a' is one of job 'a', line 4 too, expected a name of its own"
    ]
    (found,) = problems(tmp_path, HEAD.replace("{name}", "x") + again.replace('"a"', '"b"'))
    assert found.startswith(f"job 'b', line 8: {tmp_path}/out/x-BF16.gguf: written by task 'a' too (job 'a', line 4)")


def test_a_circle_is_refused(tmp_path: Path) -> None:
    job = '[[job]]\nname = "{0}"\ndo = "quantize"\nsource = "{1}.gguf"\nout = "{0}.gguf"\nquant = "Q8_0"\n'
    text = job.format("a", "b") + job.format("b", "a")
    assert problems(tmp_path, text) == [
        "job 'a', line 1: reads what b makes, which in turn waits for it; expected no circle",
        "job 'b', line 7: reads what a makes, which in turn waits for it; expected no circle",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[[job]\n", r"jobs\.toml: not valid TOML: .* \(at line 1, column 6\); expected \[defaults\] and"),
        (b"name = '\xff'\n", r"jobs\.toml: not valid TOML: .*can't decode"),
        (b"", r"job: found none, expected at least one \[\[job\]\] table"),
        (b"job = 3", r"job: found none"),
        (b"defaults = 3\n[[job]]\nname = 'a'", r"defaults: expected a table, \[defaults\]"),
    ],
)
def test_what_is_no_jobs_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "jobs.toml").write_bytes(content)
    with pytest.raises(WrongInput, match=message):
        read_jobs(tmp_path / "jobs.toml")
    with pytest.raises(WrongInput, match="absent: cannot be read: No such file"):
        read_jobs(tmp_path / "absent")


def test_a_line_in_a_text_does_not_mislead(tmp_path: Path) -> None:
    """Where lines cannot be told from a text, none is named."""
    (task,) = read(tmp_path, HEAD + "set.note = '''\n[[job]]\n'''\n")
    assert task.where == "job 'a'"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_lists_every_key(name: str) -> None:
    """R2."""
    page = (Path(__file__).parent.parent / "docs" / "batch.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
    assert [word.strip(" `") for word in row.split("|")[2].split(",")] == list(keys(COMMANDS[name]))


def test_a_default_that_is_no_default(tmp_path: Path) -> None:
    wrong: dict[str, Any] = {"name": '"x"'}
    for key, value in wrong.items():
        text = HEAD.replace("[defaults]", f"[defaults]\n{key} = {value}")
        assert any("defaults: name" in problem for problem in problems(tmp_path, text))
