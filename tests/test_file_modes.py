"""Files that others write into a folder of ours."""

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llm_adapters.files import atomic_folder, mark_complete


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_every_file_has_the_mode_that_the_umask_says(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "made") as made:
            (made / "inside").mkdir()
            save_file({"weight": torch.zeros(1)}, made / "inside" / "model.safetensors")
            torch.save({}, made / "optimizer.pt")
        (tmp_path / "marked").mkdir()
        save_file({"weight": torch.zeros(1)}, tmp_path / "marked" / "model.safetensors")
        mark_complete(tmp_path / "marked")
    finally:
        os.umask(before)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == 4
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {mode}
