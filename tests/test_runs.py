"""The layout of a run folder, the marks of what is complete, and folders that appear whole or not at all."""

import json
import os
from pathlib import Path

import pytest

from llm_adapters.adapter_files import find_adapter, read_template, write_note
from llm_adapters.errors import RequestError
from llm_adapters.files import atomic_folder, is_complete, mark_complete, read_json
from llm_adapters.runs import RunFolder

CONFIG = "model: {name: some-model, dtype: float32}\ndata: {template: chat}\n"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    (tmp_path / "config.yaml").write_text(CONFIG)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    return RunFolder(tmp_path)


def test_the_layout_is_the_public_contract(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    places = [run.config, run.adapter, run.manifest, run.log, run.evaluation("strict"), run.checkpoint(7)]
    assert [place.relative_to(tmp_path).as_posix() for place in places] == [
        "config.yaml",
        "adapter",
        "manifest.json",
        "log.jsonl",
        "eval/strict",
        "checkpoints/checkpoint-7",
    ]
    assert Path(run) == tmp_path == Path(RunFolder(os.fspath(run)))
    assert RunFolder.around(run.adapter).path == tmp_path


def test_a_run_is_told_from_a_model(run: RunFolder, tmp_path: Path) -> None:
    assert run.is_run
    assert not run.finished
    run.manifest.write_text("{}")
    assert run.finished
    (tmp_path / "config.json").touch()
    assert not run.is_run
    assert not RunFolder(tmp_path / "none").is_run


def test_the_template_is_the_recipes_or_the_one_beside_the_adapter(run: RunFolder) -> None:
    write_note(run.adapter, "paper")
    assert run.template == "chat"
    run.config.write_text("model: {name: some-model}\n")
    assert run.template == read_template(run.adapter) == "paper"


@pytest.mark.parametrize("text", ["- 1\n", "model: x\n", "a: [", "", "model: {}\n"])
def test_a_config_that_is_none_is_an_error(run: RunFolder, text: str) -> None:
    run.config.write_text(text)
    with pytest.raises(RequestError, match=r"is not the config of a run|is not a YAML file"):
        run.read_config()


def test_the_manifest_of_an_earlier_version_has_todays_names(run: RunFolder) -> None:
    run.manifest.write_text(json.dumps({"acceleration": {"packing": "on"}, "versions": {"llm_adapters": "0.1"}}))
    assert run.read_manifest() == {"fast_paths": {"packing": "on"}, "versions": {"llm-adapters": "0.1"}}
    now = {"fast_paths": {"packing": "on"}, "versions": {"llm-adapters": "0.2"}}
    run.manifest.write_text(json.dumps(now))
    assert run.read_manifest() == now


def test_the_adapter_of_a_run_or_of_its_own_folder(run: RunFolder, tmp_path: Path) -> None:
    assert find_adapter(tmp_path) == find_adapter(run.adapter) == run.adapter
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="is not an adapter"):
        find_adapter(tmp_path / "empty")


def test_the_log_ends_before_the_first_line_that_is_no_record(run: RunFolder) -> None:
    assert run.read_log() == []
    whole = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    text = "".join(json.dumps(line) + "\n" for line in whole)
    for tail in ("", '{"step": 3, "lo', "\0" * 50, '[3]\n{"step": 4}\n', '{"loss": 1}\n', "\n\n", "[" * 100_000):
        run.log.write_text(text + tail)
        assert run.read_log() == whole
    run.log.write_bytes(text.encode() + b"\xff\xfe\n")
    assert run.read_log() == whole


def test_folders_of_other_names_are_no_checkpoints(run: RunFolder) -> None:
    for name in ("checkpoint-12", "checkpoint-3", "checkpoint-old", "checkpoint-", "checkpoint-²", "other-4"):
        (run.checkpoints / name).mkdir(parents=True)
    assert run.saved_steps() == [3, 12]


def test_a_model_converted_by_an_earlier_version_is_complete(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"1234")
    (tmp_path / "conversion.json").write_text('{"file": "x.gguf", "sha256": "0", "sizes": {"weights": 4}}')
    assert is_complete(tmp_path)
    (tmp_path / "weights").write_bytes(b"12345")
    assert not is_complete(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sizes": 3}'])
def test_a_damaged_mark_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "complete").write_text(text)
    assert not is_complete(tmp_path)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.rglob("*"))


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RequestError), atomic_folder(tmp_path / "new"):
        read_json(tmp_path / "none")
    assert names(tmp_path) == []
    with atomic_folder(tmp_path / "new") as made:
        (made / "whole").touch()
        assert not (tmp_path / "new").exists()
    assert names(tmp_path) == ["new", "whole"]
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o777 & ~umask


def test_what_is_there_is_replaced_only_if_allowed_and_not_complete(tmp_path: Path) -> None:
    target = tmp_path / "new"
    target.mkdir()
    (target / "mine").touch()
    with pytest.raises(OSError, match="not empty"), atomic_folder(target) as made:
        (made / "other").touch()
    assert names(tmp_path) == ["mine", "new"]
    with atomic_folder(target, replace=True) as made:
        (made / "other").touch()
    assert names(tmp_path) == ["new", "other"]
    mark_complete(target)  # by another process, which was faster
    with atomic_folder(target, replace=True) as made:
        (made / "late").touch()
    assert names(tmp_path) == ["complete", "new", "other"]
