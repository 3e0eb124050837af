"""A catalog: the drafters it names, and what they are marked with where nothing is said yet."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from scan_tree import small_gguf

from convert_drafter.converters import WrongInput, WrongUsage, scan
from convert_drafter.converters.scan import catalog as catalogs
from convert_drafter.converters.scan.catalog import (
    annotate_models_from_catalog,
    drafters_named,
    read_catalog,
    speculative_draft_model_keys,
)

PARENT = "qwen3.6-35b-a3b"


def variant(model: Any, name: str = "vllm") -> dict[str, Any]:
    return {"name": name, "default_config": {"speculative_config": {"method": "dflash", "model": model}}}


def asset(*variants: Any, name: str = PARENT) -> dict[str, Any]:
    return {"metadata": {"name": name, "type": "llm"}, "variants": list(variants)}


CATALOG = {
    "assets": [
        asset(variant("/models/Qwen3.6-35B-A3B-DFlash"), {"name": "plain", "default_config": {"port": 1}}),
        asset(variant("D:\\models\\Other-DFlash-Q4_K_M"), name="other"),
    ]
}


# --- which drafters ---


@pytest.mark.parametrize("empty", [None, {}, [], "", 3, {"assets": None}])
def test_an_empty_catalog(empty: Any) -> None:
    """A0-9."""
    assert speculative_draft_model_keys(empty) == frozenset()


def test_every_asset_and_every_variant() -> None:
    """A0-10."""
    many = [asset(variant("a-dflash"), variant("b-dflash-q8_0"), variant("c")), asset(variant("d"), name="x")]
    assert speculative_draft_model_keys(many) == {"a-dflash", "b-dflash", "c", "d"}


@pytest.mark.parametrize(
    ("model", "key"),
    [
        ("/models/Qwen3.6-35B-A3B-DFlash", "qwen3.6-35b-a3b-dflash"),
        ("D:\\models\\Qwen3.6-35B-A3B-DFlash", "qwen3.6-35b-a3b-dflash"),
        ("z-lab/Qwen3.6-35B-A3B-DFlash", "qwen3.6-35b-a3b-dflash"),
        (" Qwen3.6-35B-A3B-DFlash-Q4_K_M.gguf ", "qwen3.6-35b-a3b-dflash"),
        ("/models/X/", "x"),
    ],
)
def test_paths_and_names(model: str, key: str) -> None:
    """A0-11."""
    assert speculative_draft_model_keys(asset(variant(model))) == {key}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"speculative_config": None},
        {"speculative_config": "dflash"},
        {"speculative_config": ["model"]},
        {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}},
        {"speculative_config": {"model": ""}},
        {"speculative_config": {"model": "  "}},
        {"speculative_config": {"model": 7}},
        {"speculative_config": {"model": None}},
        {"speculative_config": {"model": "/"}},
    ],
)
def test_what_names_no_drafter(config: dict[str, Any]) -> None:
    """A0-12: passed over without an error."""
    assert speculative_draft_model_keys(asset({"name": "v", "default_config": config})) == frozenset()


def test_a_parent_is_not_its_own_drafter() -> None:
    """A0-13: `method: mtp` is often given with the target itself."""
    own = variant("/models/Qwen3.6-35B-A3B-bf16")
    assert speculative_draft_model_keys(asset(own)) == frozenset()
    assert speculative_draft_model_keys({PARENT: {"variants": {"a": own}}}) == frozenset()
    assert speculative_draft_model_keys(asset(own, name="another")) == {PARENT}


def test_parents_are_known() -> None:
    (first, second) = drafters_named(CATALOG)
    assert first.drafter == "qwen3.6-35b-a3b-dflash" and PARENT in first.parents
    assert second.drafter == "other-dflash" and "other" in second.parents


# --- annotating rows ---


def test_drafters_are_marked_and_parents_are_not() -> None:
    """A0-14, A0-17, A0-18: on copies."""
    rows = [{"name": "Qwen3.6-35B-A3B-DFlash-Q4_K_M"}, {"name": f"{PARENT}-q4_k_m"}, {"name": "glm-4.7-flash"}, {}]
    before = copy.deepcopy(rows)
    found = annotate_models_from_catalog(rows, CATALOG)
    assert found[0] == {**rows[0], "standalone_deploy": False, "ui": {"role": "draft"}}
    assert found[1:] == rows[1:] and rows == before


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"standalone_deploy": True}, {"standalone_deploy": True, "ui": {"role": "draft"}}),
        ({"ui": {"role": "component"}}, {"standalone_deploy": False, "ui": {"role": "component"}}),
        ({"ui": {"icon": "x"}}, {"standalone_deploy": False, "ui": {"icon": "x", "role": "draft"}}),
        ({"ui": None, "standalone_deploy": None}, {"standalone_deploy": False, "ui": {"role": "draft"}}),
    ],
)
def test_what_is_set_survives(row: dict[str, Any], expected: dict[str, Any]) -> None:
    """A0-15."""
    name = {"name": "qwen3.6-35b-a3b-dflash"}
    assert annotate_models_from_catalog([{**name, **row}], CATALOG) == [{**name, **expected}]


def test_without_a_catalog_rows_stay_as_they_are() -> None:
    """A0-16."""
    rows = [None, {"name": "qwen3.6-35b-a3b-dflash"}]
    assert annotate_models_from_catalog(rows, None) == rows
    assert annotate_models_from_catalog([None], CATALOG) == [None]


# --- beside a scan ---


def write(path: Path, catalog: Any) -> Path:
    path.write_text(yaml.safe_dump(catalog) if path.suffix == ".yaml" else json.dumps(catalog))
    return path


def roles(root: Path, catalog: Path | None = None) -> dict[str, tuple[bool | None, str | None]]:
    return {each.name: (each.standalone_deploy, each.ui_role) for each in scan(root, catalog).artifacts}


def test_a_scan_with_a_catalog(tmp_path: Path) -> None:
    """A0-14, A0-19: a plain small model is known as a drafter by its parent alone, and what is a drafter by itself."""
    for name in ("Qwen3-0.6B-Q8_0", "Qwen3-32B-Q4_0"):
        small_gguf(tmp_path / f"{name}.gguf")
    small_gguf(tmp_path / "Qwen3-32B-DSpark.gguf", "dspark")
    catalog = write(tmp_path / "c.yaml", asset(variant("/models/Qwen3-0.6B"), variant("/x/Gone"), name="Qwen3-32B"))
    assert roles(tmp_path)["Qwen3-0.6B"] == (True, "model")
    assert roles(tmp_path, catalog) == {
        "Qwen3-0.6B": (False, "draft"),
        "Qwen3-32B": (True, "model"),
        "Qwen3-32B-DSpark": (False, "draft"),
    }
    assert scan(tmp_path, catalog).notes == ("gone: the catalog names it as a drafter, and it is not here",)


def test_what_a_catalog_says_outright_survives(tmp_path: Path) -> None:
    """A0-15, A0-20: an explicit flag, then a role, then the type."""
    for name in ("One", "Two", "Three"):
        small_gguf(tmp_path / f"{name}-DSpark.gguf", "dspark")
        small_gguf(tmp_path / f"{name}.gguf")
    said = [
        {"name": "One-DSpark", "standalone_deploy": True},
        {"name": "Two-DSpark", "ui": {"role": "component"}},
        {"name": "Two", "ui": {"role": "component"}},
        {"name": "Three", "standalone_deploy": True, "ui": {"role": "component"}},
    ]
    found = roles(tmp_path, write(tmp_path / "c.json", said))
    assert found["One-DSpark"] == (True, "draft") and found["Two-DSpark"] == (False, "component")
    assert found["Two"] == (False, "component") and found["Three"] == (True, "component")
    assert found["One"] == (True, "model") and found["Three-DSpark"] == (False, "draft")


def test_a_catalog_pairs_where_several_fit(tmp_path: Path) -> None:
    small_gguf(tmp_path / "Helper.gguf", "dspark")
    for name in ("One", "Two"):
        small_gguf(tmp_path / f"{name}.gguf")
    (pair,) = scan(tmp_path).pairs
    assert pair.target is None
    (pair,) = scan(tmp_path, write(tmp_path / "c.yaml", asset(variant("Helper"), name="Two"))).pairs
    assert pair.target is not None and (pair.target.name, pair.basis) == ("Two", "catalog")


# --- reading it ---


def test_the_same_from_yaml_toml_and_json(tmp_path: Path) -> None:
    toml = "[[assets]]\nname='a'\n[assets.default_config.speculative_config]\nmodel='X-DFlash'\n"
    (tmp_path / "c.toml").write_text(toml)
    data = {"assets": [{"name": "a", "default_config": {"speculative_config": {"model": "X-DFlash"}}}]}
    for name in ("c.yaml", "c.json"):
        write(tmp_path / name, data)
    (tmp_path / "c.yml").write_text((tmp_path / "c.yaml").read_text())
    for name in ("c.yaml", "c.yml", "c.toml", "c.json"):
        assert read_catalog(tmp_path / name) == data


@pytest.mark.parametrize("suffix", [".yaml", ".toml", ".json"])
def test_an_empty_file(tmp_path: Path, suffix: str) -> None:
    """A0-9."""
    (tmp_path / f"c{suffix}").write_text("")
    assert not speculative_draft_model_keys(read_catalog(tmp_path / f"c{suffix}"))
    (note,) = scan(tmp_path, tmp_path / f"c{suffix}").notes
    assert "names no drafter" in note and not scan(tmp_path).notes


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("c.yaml", "a: [", "not valid YAML"),
        ("c.yaml", "a: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("c.yaml", "[" * 5000, "not valid YAML"),
        ("c.toml", "a =", "not valid TOML"),
        ("c.json", "{", "not valid JSON"),
        ("c.json", "[" * 100_000, "not valid JSON"),
    ],
)
def test_a_catalog_that_cannot_be_read(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(WrongInput, match=says):
        read_catalog(tmp_path / name)


def test_other_files_are_no_catalogs(tmp_path: Path) -> None:
    with pytest.raises(WrongUsage, match=r"\.yaml, \.yml, \.toml, \.json, found \.txt"):
        read_catalog(tmp_path / "c.txt")
    with pytest.raises(WrongInput, match="cannot be read"):
        read_catalog(tmp_path / "c.yaml")


def test_anchors_that_go_in_a_circle_or_multiply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of a kilobyte can stand for more values than a machine counts."""
    (tmp_path / "c.yaml").write_text("&a\nname: x\nself: *a\nspeculative_config: {model: y}\n")
    assert speculative_draft_model_keys(read_catalog(tmp_path / "c.yaml")) == {"y"}
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    monkeypatch.setattr(catalogs, "MOST_NODES", 10_000)
    with pytest.raises(WrongInput, match="more than 10000 values"):
        speculative_draft_model_keys(read_catalog(tmp_path / "c.yaml"))
