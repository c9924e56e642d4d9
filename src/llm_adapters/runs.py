"""The layout of a run folder: everybody who wants to know what is where in one asks `RunFolder`."""

import json
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from llm_adapters.adapter_files import IN_RUN, read_template
from llm_adapters.documents import read_yaml
from llm_adapters.errors import RequestError, first_line
from llm_adapters.files import lock, read_json

_CHECKPOINT = "checkpoint-"  # as transformers' Trainer names them


class RunFolder:
    """A run folder; itself a path (`os.fspath`).

    Args:
        path: the folder, which need not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @classmethod
    def around(cls, adapter: Path) -> "RunFolder":
        """Folder of the run that the adapter in the folder `adapter` belongs to, if it belongs to one."""
        return cls(adapter.parent)

    @property
    def config(self) -> Path:
        """The resolved recipe (YAML)."""
        return self.path / "config.yaml"

    @property
    def adapter(self) -> Path:
        """Folder of the trained adapter, in PEFT's format."""
        return self.path / IN_RUN

    @property
    def manifest(self) -> Path:
        """Record of what ran, on what, how fast (JSON); written last."""
        return self.path / "manifest.json"

    @property
    def log(self) -> Path:
        """A JSON line per logged step."""
        return self.path / "log.jsonl"

    @property
    def sizes(self) -> Path:
        """Record of micro-batches that were made smaller because they did not fit (JSON); there only if some were."""
        return self.path / "sizes.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints; gone once the run is finished."""
        return self.path / "checkpoints"

    @property
    def begun(self) -> Path:
        """Fingerprints of what the run was begun with (JSON), as long as there are checkpoints."""
        return self.checkpoints / "begun.json"

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint after so many steps."""
        return self.checkpoints / f"{_CHECKPOINT}{step}"

    def evaluation(self, protocol: str) -> Path:
        """Folder of the results under `protocol`: records of each task and a summary."""
        return self.path / "eval" / protocol

    @property
    def is_run(self) -> bool:
        """True if the folder holds the config of a training, and not that of a model."""
        return self.config.is_file() and not (self.path / "config.json").exists()

    @property
    def finished(self) -> bool:
        """True if the run came to its end."""
        return self.manifest.is_file()

    @property
    def template(self) -> str | None:
        """Prompt template of the run's adapter; None where nothing says so."""
        data = self.read_config().get("data") or {}
        return data.get("template") or read_template(self.adapter)

    def saved_steps(self) -> list[int]:
        """Steps after which there is a checkpoint, whole or not, in order; folders of other names do not count."""
        found = (folder.name.removeprefix(_CHECKPOINT) for folder in self.checkpoints.glob(f"{_CHECKPOINT}*"))
        return sorted(int(step) for step in found if step.isdecimal() and step.isascii())

    def lock(self) -> AbstractContextManager[None]:
        """Hold the folder for this process alone (see `files.lock`)."""
        return lock(self.path, f"another process is training in {str(self.path)!r}: wait for it, or name a new folder")

    def read_log(self) -> list[dict[str, Any]]:
        """Read the log, up to the first line that is no record: what comes after is no log of this run."""
        try:
            lines = self.log.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        found: list[dict[str, Any]] = []
        for line in lines:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not isinstance(record, dict) or type(record.get("step")) is not int:
                break
            found.append(record)
        return found

    def read_config(self) -> dict[str, Any]:
        """Read the recipe that ran.

        Raises:
            RequestError: it is missing, is not YAML or no recipe: it has no section `model` with a name.
        """
        config = read_yaml(self.config, "config of a run")
        try:
            _ = config["model"]["name"], (config.get("data") or {}).get("template")
        except (KeyError, TypeError, AttributeError) as error:
            raise RequestError(f"{str(self.config)!r} is not the config of a run ({first_line(error)}).") from None
        return config

    def read_manifest(self) -> dict[str, Any]:
        """Read the manifest; what earlier versions called otherwise has its present name.

        Raises:
            RequestError: it is missing or not a JSON object.
        """
        manifest = read_json(self.manifest)
        if "acceleration" in manifest:
            manifest.setdefault("fast_paths", manifest.pop("acceleration"))
        versions = manifest.get("versions")
        if isinstance(versions, dict) and "llm_adapters" in versions:
            versions.setdefault("llm-adapters", versions.pop("llm_adapters"))
        return manifest
