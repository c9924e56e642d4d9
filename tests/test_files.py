"""Marks of what is whole, locks, links, and what a killed process leaves."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llm_adapters.errors import RequestError
from llm_adapters.files import (
    COMPLETE,
    append,
    damage,
    is_complete,
    lock,
    mark_complete,
    refuse_links,
    remove,
    remove_temporaries,
    write_text,
)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    folder = tmp_path / "whole"
    (folder / "inner").mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(range(256)))
    (folder / "inner" / "state").write_bytes(b"state")
    mark_complete(folder, step=7)
    return folder


def test_what_was_marked_is_whole(whole: Path) -> None:
    assert damage(whole) is None
    mark = json.loads((whole / COMPLETE).read_text())
    assert mark["step"] == 7
    assert mark["files"].keys() == {"weights", "inner/state"}
    mark_complete(whole)  # again: the mark is no part of it
    assert damage(whole) is None


@pytest.mark.parametrize("name", ["weights", "inner/state", COMPLETE])
def test_any_damage_is_found_and_named(name: str, whole: Path) -> None:
    file = whole / name
    content = file.read_bytes()
    for place in range(0, len(content), 7):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        file.write_bytes(changed)
        assert damage(whole), f"bit {place % 8} of byte {place}"
    for changed in (b"", content[: len(content) // 2], content + b"\0", b"\0" * len(content)):
        file.write_bytes(changed)
        assert Path(name).name in str(damage(whole))
    file.unlink()
    assert damage(whole)
    assert not is_complete(whole)
    file.mkdir()
    assert damage(whole)


def test_a_large_folder_may_be_looked_at_by_its_sizes_alone(whole: Path) -> None:
    (whole / "weights").write_bytes(bytes(256))
    assert is_complete(whole)
    assert damage(whole)


def test_a_lock_is_one_process_and_goes_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    hold = (
        "import sys, time\nfrom pathlib import Path\nfrom llm_adapters.files import lock\n"
        "with lock(Path(sys.argv[1]), ''):\n    print('held', flush=True)\n    time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(folder)], stdout=subprocess.PIPE, text=True, env=environment
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with pytest.raises(RequestError, match="somebody is there"), lock(folder, "somebody is there"):
            pass
        child.kill()
    with lock(folder, "somebody is there"):
        pass
    assert list(folder.iterdir()) == []


def test_a_lock_may_be_taken_again_inside_but_not_by_another_thread(tmp_path: Path) -> None:
    refused = []

    def other() -> None:
        try:
            with lock(tmp_path, "busy"):
                pass
        except RequestError:
            refused.append(True)

    with lock(tmp_path, "busy"), lock(tmp_path, "busy"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert refused == [True]


def test_a_folder_that_was_made_for_a_lock_and_is_empty_goes_with_it(tmp_path: Path) -> None:
    with lock(tmp_path / "a" / "b", ""):
        pass
    assert list(tmp_path.iterdir()) == []
    with lock(tmp_path / "a" / "b", ""):
        write_text(tmp_path / "a" / "b" / "file", "")
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["file"]


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "file/below", "link", "x" * 300):
        with pytest.raises(RequestError, match="cannot be a folder"), lock(tmp_path / name, ""):
            pass


def test_links_are_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    (tmp_path / "log").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="log"):
        append(tmp_path / "log", "line\n")
    with pytest.raises(RequestError, match="is a link"):
        refuse_links(tmp_path / "target", tmp_path / "log")
    write_text(tmp_path / "log", "new")
    assert (tmp_path / "target").read_text() == "mine"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    (tmp_path / "other").symlink_to(tmp_path / "folder")
    remove(tmp_path / "other")
    assert (tmp_path / "folder" / "file").exists()
    assert not (tmp_path / "other").exists()


def test_what_a_killed_process_has_left_goes_and_nothing_else(tmp_path: Path) -> None:
    for name in (".summary.json.x1_y2z3a.tmp", ".svamp.jsonl.abcd1234.tmp", ".hidden", "svamp.tmp", "summary.json"):
        (tmp_path / name).touch()
    (tmp_path / ".adapter.abcd1234.tmp").mkdir()
    (tmp_path / ".adapter.abcd1234.tmp" / "weights").touch()
    remove_temporaries(tmp_path, "adapter")
    assert not (tmp_path / ".adapter.abcd1234.tmp").exists()
    assert (tmp_path / ".summary.json.x1_y2z3a.tmp").exists()
    remove_temporaries(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".hidden", "summary.json", "svamp.tmp"]
