"""What `scan` finds below a folder, and what it says each artifact is."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import make_mtp_glm
import pytest
from mtp_checkpoints import reconfigure, small, without
from published import PAIR, dflash_shapes, small_config
from scan_tree import REVISION, drafter_gguf, everything, hub, small_folder, small_gguf

from convert_drafter.converters import ConvertJob, WrongUsage, convert, scan
from convert_drafter.converters.scan.found import Artifact, By, Scan, What
from convert_drafter.converters.scan.in_folder import is_helper_config

LAYER = ("model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight", "lm_head.weight")
LLAMA = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "hidden_size": 32, "vocab_size": 4}
DFLASH = tuple(dflash_shapes(small_config()))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Scan:
    return scan(everything(tmp_path_factory.mktemp("models")))


def by_name(found: Scan) -> dict[str, Artifact]:
    return {each.path.name: each for each in found.artifacts}


def only(root: Path) -> Artifact:
    """The one artifact below a folder."""
    (artifact,) = scan(root).artifacts
    return artifact


# --- grouping ---


def test_every_quant_of_a_model_stands_under_one_entry(found: Scan) -> None:
    """A0-22, D0: grouped, and none of them hidden."""
    (target,) = [model for model in found.models if model.what is What.TARGET]
    assert (target.key, target.name) == ("qwen3-tiny", "Qwen3-Tiny")
    assert sorted(each.quant for each in target.variants) == ["BF16", "F32", "Q8_0"]
    drafter = next(model for model in found.models if model.kind == "dflash" and len(model.variants) > 1)
    assert {each.quant for each in drafter.variants} == {"BF16", "Q8_0", "Q4_K_M"}  # one of them cut short
    assert {each.format for each in drafter.variants} == {"gguf", "safetensors"}
    listed = {path for each in found.artifacts for path in each.files}
    here = [path for path in found.root.rglob("*") if path.suffix in (".gguf", ".safetensors") and path.exists()]
    assert listed == {path for path in here if "loop" not in path.parts}


def test_drafters_are_marked(found: Scan) -> None:
    """A0-14, A0-17, T-45: every drafter whatever its type and format, and no target."""
    drafters = [each for each in found.artifacts if each.what is What.DRAFTER]
    assert len(drafters) == 6
    assert all((each.standalone_deploy, each.ui_role) == (False, "draft") for each in drafters)
    targets = [each for each in found.artifacts if each.what is What.TARGET]
    assert all((each.standalone_deploy, each.ui_role) == (True, "model") for each in targets)
    part = by_name(found)["mmproj-F16.gguf"]
    assert (part.what, part.kind, part.standalone_deploy) == (What.PART, "projector", False)


def test_copies_of_one_name_and_other_shapes_are_other_models(tmp_path: Path) -> None:
    for i, width in enumerate((32, 64)):
        small_gguf(tmp_path / str(i) / "m-Q8_0.gguf", arch__embedding_length=width, arch__block_count=1)
    small_gguf(tmp_path / "2" / "m-F32.gguf", arch__embedding_length=64, arch__block_count=1)
    assert sorted(len(model.variants) for model in scan(tmp_path).models) == [1, 2]


def test_a_name_that_everybody_has_is_not_a_model_s(tmp_path: Path) -> None:
    for name in ("one", "two"):
        small_gguf(tmp_path / name / "model.gguf")
    small_gguf(tmp_path / "three" / "ggml-model-Q8_0.gguf", general__name="The Third")
    assert sorted(model.name for model in scan(tmp_path).models) == ["The Third", "one", "two"]


# --- what it is ---


def test_the_header_goes_before_the_name(tmp_path: Path) -> None:
    """T-47, D0: a drafter under a model's name, and a model under a drafter's."""
    drafter_gguf(tmp_path / "Qwen3-Tiny.gguf")
    small_gguf(tmp_path / "dflash" / "Other-DFlash-Q4_K_M.gguf")
    small_folder(tmp_path / "Third-MTP", LLAMA, LAYER)
    found = by_name(scan(tmp_path))
    assert (found["Qwen3-Tiny.gguf"].what, found["Qwen3-Tiny.gguf"].told_by) == (What.DRAFTER, By.HEADER)
    for name in ("Other-DFlash-Q4_K_M.gguf", "Third-MTP"):
        assert found[name].what is What.TARGET and "its name is a drafter's" in found[name].notes[0]


def test_the_name_decides_where_nothing_else_does(tmp_path: Path) -> None:
    (tmp_path / "X-DFlash-Q4_K_M.gguf").write_bytes(b"GGUF")
    (tmp_path / "Y.gguf").write_bytes(b"")
    found = by_name(scan(tmp_path))
    assert [(found[name].what, found[name].told_by) for name in sorted(found)] == [
        (What.DRAFTER, By.NAME),
        (What.UNKNOWN, By.NAME),
    ]
    assert all("download it again" in each.faults[0] for each in found.values())


@pytest.mark.parametrize(
    ("config", "says"),
    [
        pytest.param({"model_type": "gemma4_assistant"}, True, id="type"),
        pytest.param({"model_type": "Qwen_MTP"}, True, id="any case"),
        pytest.param({"dflash_config": {"block_size": 8}, "model_type": "qwen3"}, True, id="A4-11 block"),
        pytest.param({"architectures": ["LlamaDraftModel"]}, True, id="class"),
        pytest.param({"architectures": "Gemma4AssistantForCausalLM"}, True, id="a string"),
        pytest.param({"architectures": ["QwenMTP"]}, True, id="mtp"),
        pytest.param({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, False, id="a target"),
        pytest.param({"model_type": 3, "architectures": [None, 4], "dflash_config": 1}, False, id="odd types"),
        pytest.param({}, False, id="empty"),
        pytest.param([], False, id="a list"),
        pytest.param(None, False, id="nothing"),
    ],
)
def test_a_helper_s_config(config: object, says: bool) -> None:
    """A4-10."""
    assert is_helper_config(config) is says


def test_tensors_go_before_the_config(tmp_path: Path) -> None:
    """A4-11: a DFlash drafter that calls itself an ordinary Qwen3."""
    config = {**small_config(), "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    small_folder(tmp_path / "a", config, DFLASH)
    small_folder(tmp_path / "b", {"model_type": "gemma4_assistant"}, LAYER)
    found = by_name(scan(tmp_path))
    assert (found["a"].what, found["a"].told_by, found["a"].kind) == (What.DRAFTER, By.TENSORS, "dflash")
    assert (found["b"].what, found["b"].told_by) == (What.DRAFTER, By.CONFIG)


def test_kinds_that_are_not_converted_are_drafters_too(tmp_path: Path) -> None:
    """T-45."""
    small_folder(tmp_path / "d", {"architectures": ["X"]}, (*DFLASH, "prefix_gru.weight_ih_l0"))
    small_gguf(tmp_path / "g.gguf", "gemma9-assistant")
    found = by_name(scan(tmp_path))
    assert found["d"].kind == "Domino" and "not converted yet" in found["d"].notes[0]
    assert found["g.gguf"].what is What.DRAFTER and "an unknown dialect" in found["g.gguf"].faults[0]


# --- heads inside targets ---


def test_a_head_inside_a_checkpoint(tmp_path: Path) -> None:
    """A5-1: under mtp.*, and as one layer more."""
    small(tmp_path / "Qwen3.5-Tiny")
    make_mtp_glm.random(tmp_path / "GLM-Tiny")
    found = scan(tmp_path)
    heads = {each.path.name: (each.what, each.head and each.head.kind) for each in found.artifacts}
    assert heads == {"Qwen3.5-Tiny": (What.TARGET, "mtp-qwen35"), "GLM-Tiny": (What.TARGET, "mtp-glm4moe")}
    assert all(pair.basis == "inside" and pair.target is not None for pair in found.pairs) and len(found.pairs) == 2


def test_a_head_that_is_only_counted(tmp_path: Path) -> None:
    """A5-2, T-34: in a config, and in a GGUF."""
    without(small(tmp_path / "a"), "mtp.")
    small_gguf(tmp_path / "b.gguf", "qwen35", arch__block_count=2, arch__nextn_predict_layers=1)
    found = by_name(scan(tmp_path))
    assert all(each.what is What.TARGET and each.head is None for each in found.values())
    assert "no tensor of an MTP head" in found["a"].faults[0] and "original release" in found["a"].faults[0]
    assert "nextn_predict_layers: found 1, but no tensor" in found["b.gguf"].faults[0]


def test_a_head_that_is_not_counted(tmp_path: Path) -> None:
    """A5-2."""
    head = only(reconfigure(small(tmp_path / "a"), mtp_num_hidden_layers=0).parent).head
    assert head is not None and not head.kind and "--set" in head.note


def test_a_head_in_a_gguf(tmp_path: Path) -> None:
    """A5-1, A6-9: alone it is a drafter; behind its target's layers it is a part of that."""
    convert(ConvertJob(small(tmp_path / "src"), None, "llama.cpp", "BF16", tmp_path / "mtp-Qwen3.5-Tiny-BF16.gguf"))
    counts = {"arch__block_count": 2, "arch__nextn_predict_layers": 1}
    names = ("blk.0.attn_q.weight", "blk.1.nextn.eh_proj.weight")
    small_gguf(tmp_path / "whole.gguf", "qwen35", names, **counts)
    small_gguf(tmp_path / "other.gguf", "unheard_of", names, **counts)
    small_gguf(tmp_path / "other-head.gguf", "unheard_of", names[1:], **counts)
    found = by_name(scan(tmp_path))
    alone = found["mtp-Qwen3.5-Tiny-BF16.gguf"]
    assert (alone.what, alone.kind, alone.told_by) == (What.DRAFTER, "mtp-qwen35", By.TENSORS) and not alone.faults
    assert found["whole.gguf"].what is What.TARGET and found["whole.gguf"].head.kind == "mtp-qwen35"  # type: ignore[union-attr]
    assert found["other.gguf"].what is What.TARGET and "unheard_of" in found["other.gguf"].head.note  # type: ignore[union-attr]
    assert found["other-head.gguf"].what is What.DRAFTER


def test_a_head_in_a_file_beside_the_index(tmp_path: Path) -> None:
    """A5-3: odd names, and two of them."""
    folder = without(small(tmp_path / "m"), "mtp.")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    raw = (folder / "model-00001-of-00001.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    shards = {name: "model-00001-of-00001.safetensors" for name in header if name != "__metadata__"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    small_folder(tmp_path / "x", None, ["mtp.fc.weight"])
    head = (tmp_path / "x" / "model.safetensors").read_bytes()
    (folder / "mtp.safetensors").write_bytes(head)
    found = by_name(scan(tmp_path))["m"]
    assert found.head is not None and "mtp.safetensors, which the index does not name" in found.head.note
    (folder / "model-mtp.safetensors").write_bytes(head)
    assert (
        "MTP heads in model-mtp.safetensors, mtp.safetensors: expected one" in by_name(scan(tmp_path))["m"].faults[-1]
    )


def test_drafters_shards_of_odd_names(tmp_path: Path) -> None:
    """A5-3: whatever a file is called."""
    folder = small_folder(tmp_path / "d", small_config(), DFLASH)
    (folder / "model.safetensors").rename(folder / "dflash_draft_model-00001-of-00001.safetensors")
    assert (only(tmp_path).kind, only(tmp_path).what) == ("dflash", What.DRAFTER)


# --- layouts ---


def test_the_hub_s_cache(tmp_path: Path) -> None:
    hub(tmp_path, "Qwen/Qwen3-Tiny", PAIR / "target")
    hub(tmp_path, "Qwen/Qwen3-Tiny", PAIR / "target", "f" * 40)
    found = scan(tmp_path)
    (model,) = found.models
    assert model.key == "qwen3-tiny" and not found.skipped
    (artifact,) = model.variants
    assert (artifact.repository, artifact.revision) == ("Qwen/Qwen3-Tiny", REVISION)
    assert artifact.n_bytes == (PAIR / "target" / "model.safetensors").stat().st_size
    assert [path.name for path in artifact.also] == ["f" * 40]  # the same blobs, under another revision


def test_ollama_s_blobs(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / f"sha256-{'a' * 64}"
    small_gguf(blob)
    (tmp_path / "blobs" / f"sha256-{'b' * 64}").write_text("{}")
    manifest = tmp_path / "manifests" / "registry.ollama.ai" / "library" / "qwen3" / "8b-q8_0"
    manifest.parent.mkdir(parents=True)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{'a' * 64}"}
    manifest.write_text(json.dumps({"layers": [{"mediaType": "x"}, None, layer]}))
    (manifest.parent / "bad").write_text("{")
    assert (only(tmp_path).name, only(tmp_path).quant) == ("qwen3-8b", "q8_0")


def test_parts_of_a_gguf(tmp_path: Path) -> None:
    for number in (1, 3):
        small_gguf(tmp_path / f"big-Q4_K_M-0000{number}-of-00003.gguf", names=(f"blk.{number}.a",))
    artifact = only(tmp_path)
    assert len(artifact.files) == 2 and not artifact.complete and artifact.name == "big"
    assert "'big-Q4_K_M-00002-of-00003.gguf' is missing: download it" in artifact.faults[0]
    small_gguf(tmp_path / "big-Q4_K_M-00002-of-00003.gguf", names=("blk.2.a",))
    assert only(tmp_path).complete and only(tmp_path).weights == 3 * 128


def test_shards_with_an_index(tmp_path: Path) -> None:
    """T-70, and A5-3: the index tells what there should be."""
    folder = small_folder(tmp_path / "m", LLAMA, LAYER)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = dict.fromkeys(LAYER, "model-00001-of-00002.safetensors") | {
        "mtp.fc.weight": "model-00002-of-00002.safetensors"
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    artifact = only(tmp_path)
    assert artifact.what is What.TARGET and artifact.head is not None
    assert "shard 'model-00002-of-00002.safetensors': not found" in artifact.faults[0]


# --- what stands in the way ---


def test_broken_things_are_entries_with_the_reason(found: Scan) -> None:
    reasons = {each.path.name: each.reason for each in found.skipped}
    assert reasons["loop"] == f"a link back to {found.root}"
    assert "a link to nothing" in reasons["nothing.gguf"] and "not finished" in reasons["big.gguf.part"]


def test_unreadable_folders_and_links_in_a_circle(tmp_path: Path) -> None:
    small_gguf(tmp_path / "a" / "m.gguf")
    shut = tmp_path / "shut"
    small_gguf(shut / "n.gguf")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "self.gguf").symlink_to(tmp_path / "self.gguf")
    (tmp_path / "again").symlink_to(tmp_path / "a")
    shut.chmod(0)
    try:
        found = scan(tmp_path)
    finally:
        shut.chmod(0o755)
    reasons = {each.path.name: each.reason for each in found.skipped}
    assert [each.path.name for each in found.artifacts if each.path.parent.name != "shut"] == ["m.gguf"]
    assert ("Permission denied" in reasons.get("shut", "")) == (os.geteuid() != 0)  # root reads everything
    assert "whose models are listed there" in reasons["again"] and "a link to nothing" in reasons["self.gguf"]


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("p.gguf", "p.safetensors", f"sha256-{'0' * 64}"):
        os.mkfifo(tmp_path / name)
    found = scan(tmp_path)
    assert not found.artifacts and {each.reason for each in found.skipped} == {"a device or a pipe, expected a file"}


def test_a_folder_that_may_be_listed_and_not_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_gguf(tmp_path / "m.gguf")

    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", refuse)
    found = scan(tmp_path)
    assert [each.reason for each in found.skipped] == ["cannot be read: Permission denied"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(b"", "truncated", id="empty"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull", id="git-lfs"),
        pytest.param(struct.pack("<Q", 2**60) + b"{}", "truncated or foreign", id="T-25 header length"),
        pytest.param(struct.pack("<Q", 2) + b"[]", "expected a JSON object", id="no object"),
        pytest.param(b"\xff" * 64, "truncated or foreign", id="noise"),
    ],
)
def test_broken_safetensors(tmp_path: Path, content: bytes, says: str) -> None:
    folder = small_folder(tmp_path / "m", LLAMA, LAYER)
    (folder / "model.safetensors").write_bytes(content)
    assert says in only(tmp_path).faults[0]


@pytest.mark.parametrize("config", ["", "[]", "{", '{"architectures": 3, "dflash_config": [], "model_type": {}}'])
def test_broken_configs(tmp_path: Path, config: str) -> None:
    folder = small_folder(tmp_path / "m", None, DFLASH)
    (folder / "config.json").write_text(config)
    artifact = only(tmp_path)
    assert artifact.what is What.DRAFTER and (*artifact.faults, *artifact.notes)


def test_checkpoints_cut_short(tmp_path: Path) -> None:
    """T-70."""
    folder = small_folder(tmp_path / "m", LLAMA, LAYER)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert "truncated" in only(tmp_path).faults[0] and only(tmp_path).what is What.TARGET


# --- sizes and dialects ---


def test_a_head_of_a_few_kilobytes(tmp_path: Path) -> None:
    """T-20: 0.3 MB beside 0.9 GB; metadata only, or most of it missing."""
    drafter_gguf(tmp_path / "Qwen3-Tiny-DFlash-BF16.gguf")
    small_gguf(tmp_path / "Qwen3-Tiny-DFlash-Q8_0.gguf", "dflash", ("fc.weight",))
    small_gguf(tmp_path / "Other-DFlash-Q4_K_M.gguf", "dflash", ())
    found = by_name(scan(tmp_path))
    assert any("most of the model is missing" in fault for fault in found["Qwen3-Tiny-DFlash-Q8_0.gguf"].faults)
    assert ["only metadata" in fault for fault in found["Other-DFlash-Q4_K_M.gguf"].faults] == [True]
    assert not found["Qwen3-Tiny-DFlash-BF16.gguf"].faults


def test_a_model_of_metadata_only(tmp_path: Path) -> None:
    """T-20."""
    small_gguf(tmp_path / "m-Q4_K_M.gguf", "llama", ())
    assert "only metadata" in only(tmp_path).faults[0]


def test_a_name_that_promises_other_weights(tmp_path: Path) -> None:
    small_gguf(tmp_path / "m-Q4_K_M.gguf")
    small_gguf(tmp_path / "m-F32.gguf")
    found = by_name(scan(tmp_path))
    assert "called Q4_K_M, but a weight takes 32.0 bits" in found["m-Q4_K_M.gguf"].faults[0]
    assert not found["m-F32.gguf"].faults


def test_another_dialect_and_the_line_that_mends_it(tmp_path: Path) -> None:
    for runtime in ("llama.cpp", "ik_llama.cpp", "lucebox"):
        drafter_gguf(tmp_path / f"{runtime}.gguf", runtime)
    found = by_name(scan(tmp_path))
    assert not found["llama.cpp.gguf"].mend
    for runtime in ("ik_llama.cpp", "lucebox"):
        artifact = found[f"{runtime}.gguf"]
        assert artifact.mend.startswith("convert-drafter redialect ") and f"{runtime}'s" in artifact.notes[0]
        assert artifact.runtime == runtime and not artifact.faults
    assert "takes more than it says" in found["lucebox.gguf"].notes[0]  # it has no tokenizer
    assert "takes more" not in found["ik_llama.cpp.gguf"].notes[0]


def test_a_dialect_nobody_knows(found: Scan) -> None:
    artifact = by_name(found)["Qwen3-Tiny-DSpark.gguf"]
    assert (
        "found 'dspark', an unknown dialect" in artifact.faults[0] and "convert-drafter convert" in artifact.faults[0]
    )


# --- how much is read ---


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not count what a process reads")
def test_ten_thousand_files_are_scanned_by_their_headers(tmp_path: Path) -> None:
    """Bytes read are bounded by the headers', whatever lies behind them: each file here has a megabyte of nothing."""
    small = small_gguf(tmp_path / "s.gguf").read_bytes()
    (tmp_path / "s.gguf").unlink()
    for i in range(10_000):
        folder = tmp_path / f"{i // 500}"
        folder.mkdir(exist_ok=True)
        with (folder / f"m{i}-F32.gguf").open("wb") as file:
            file.write(small)
            file.truncate(2**20)
    before = _bytes_read()
    found = scan(tmp_path)
    assert len(found.artifacts) == 10_000 and not any(each.faults for each in found.artifacts)
    assert (_bytes_read() - before) / 10_000 <= 2**14 + 64


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@pytest.mark.parametrize("place", ["file.gguf", "nothing"])
def test_what_is_no_folder(tmp_path: Path, place: str) -> None:
    (tmp_path / "file.gguf").touch()
    with pytest.raises(WrongUsage, match=r"expected a folder|no such folder"):
        scan(tmp_path / place)
