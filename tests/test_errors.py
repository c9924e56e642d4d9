"""What the system refuses becomes a sentence for a person, whoever wrapped it."""

import errno
import os
from pathlib import Path

import pytest

from llm_adapters.errors import RequestError, WorkError, from_system, unknown
from llm_adapters.files import check_folder


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (errno.ENOSPC, WorkError, "'some.file' could not be written.*Make room"),
        (errno.EDQUOT, WorkError, "could not be written"),
        (errno.EROFS, RequestError, "'some.file' cannot be used.*Check the path"),
        (errno.ENOTDIR, RequestError, "Check the path"),
        (errno.ENAMETOOLONG, RequestError, "too long"),
        (errno.EIO, WorkError, "'some.file': input/output error"),
    ],
)
def test_the_file_and_the_reason_are_named(code: int, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        raise from_system(OSError(code, os.strerror(code), "some.file"))  # type: ignore[misc]


def test_what_libraries_make_of_a_full_disk_is_known(tmp_path: Path) -> None:
    """safetensors and torch, made to fail for real: by a device that is full, and by a file that may not grow."""
    import resource

    import safetensors.torch
    import torch

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    tensors = {"a": torch.zeros(100_000)}
    for save in (
        lambda: torch.save(tensors, tmp_path / "x.pt"),
        lambda: safetensors.torch.save_file(tensors, tmp_path / "x.safetensors"),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
        try:
            with pytest.raises(Exception, match=r".+") as caught:
                save()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert isinstance(told := from_system(caught.value), WorkError)
        assert "Make room" in str(told)


def test_a_link_to_itself_is_told(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises((RuntimeError, OSError)) as caught:
        (tmp_path / "loop").resolve(strict=True)
    assert isinstance(from_system(caught.value), RequestError)


def test_too_little_memory_is_told_with_what_was_tried() -> None:
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, dtype=torch.uint8)
    assert "there is not enough memory (tried to allocate" in str(from_system(caught.value))
    assert isinstance(from_system(MemoryError()), WorkError)


def test_the_home_of_nobody_is_told() -> None:
    with pytest.raises(RuntimeError) as caught:
        Path("~nobody-of-that-name/x").expanduser()
    assert isinstance(from_system(caught.value), RequestError)


def test_a_fault_of_the_program_is_not_the_systems() -> None:
    for fault in (TypeError("a fault"), RuntimeError("a fault")):
        fault.__context__ = FileNotFoundError(errno.ENOENT, "no such file", "x")  # it came up while that was handled
        assert from_system(fault) is None
    assert from_system(KeyError("x")) is None


def test_the_nearest_names_come_first_and_each_once() -> None:
    message = str(unknown("method", "lorra", ["vera", "lora", "ia3", "lora", "dora"]))
    assert "choose one of lora, dora, ia3, vera." in message
    assert "Did you mean 'lora'?" in message


def test_a_folder_that_cannot_be_made_is_found_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in (
        "file",
        "file/below",
        "link",
        "link/below",
        "loop/below",
        "a" * 300,
        "a/" + "b" * 300,
        "nul\0",
        "\ud800",
    ):
        with pytest.raises(RequestError, match=r"the output '.*' cannot be"):
            check_folder(tmp_path / name, "the output")
    for name in ("new", "new/below/it", "."):
        check_folder(tmp_path / name, "the output")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "loop"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_others_is_found_before(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RequestError, match="not yours to write to"):
        check_folder(tmp_path / "new", "the output")
