import http.server
import threading
from pathlib import Path

import pytest

from llm_adapters.errors import RequestError, WorkError
from llm_adapters.files import cache_folder
from llm_adapters.tasks import download
from llm_adapters.tasks.catalog import CATALOG
from llm_adapters.tasks.examples import Task

CONTENT = b'[{"question": "1 + 1?", "answer": "2"}]\n' * 5000
# `git hash-object` on a file with CONTENT
BLOB = "2c363654ca330d1db110501abafdc8c506841f86"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        if self.path == "/broken":
            self.wfile.write(CONTENT[: len(CONTENT) // 2])  # and then the connection closes
        elif self.path == "/wrong":
            self.wfile.write(CONTENT[:-2] + b"?\n")
        else:
            self.wfile.write(CONTENT)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def running_server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(running_server):
    running_server.asked = []
    return running_server


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_ADAPTERS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def task(server, path="file", **other):
    url = f"http://127.0.0.1:{server.server_port}/{path}" if server else "http://127.0.0.1:9/file"
    return Task(path, path, "number", **{"url": url, "local": f"Repo/{path}.json", "blob": BLOB, **other})


def files_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_blob_id_is_gits(tmp_path):
    assert download.blob_id(CONTENT) == BLOB
    assert download.blob_id(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"  # git's well-known empty blob


def test_a_file_is_fetched_once_and_verified_every_time(server, cache):
    path = download.locate(task(server))
    assert path == cache / "Repo" / "file.json"
    assert path.read_bytes() == CONTENT
    assert download.locate(task(server)) == path
    assert server.asked == ["/file"]
    assert files_in(cache) == ["file.json"]

    damaged = bytearray(CONTENT)
    damaged[1234] ^= 1
    path.write_bytes(damaged)
    found = download.blob_id(bytes(damaged))
    with pytest.raises(WorkError) as caught:
        download.locate(task(server))
    for part in (str(path), BLOB, found, "llm-adapters data fetch file"):
        assert part in str(caught.value)
    assert server.asked == ["/file"]


@pytest.mark.parametrize("path", ["broken", "wrong", "missing"])
def test_no_half_or_wrong_file_is_ever_left(server, cache, path):
    with pytest.raises(WorkError) as caught:
        download.locate(task(server, path))
    message = str(caught.value)
    assert f"/{path} " in message
    assert str(cache / "Repo" / f"{path}.json") in message
    assert path != "wrong" or (BLOB in message and download.blob_id(CONTENT[:-2] + b"?\n") in message)
    assert not cache.exists() or files_in(cache) == []


def test_a_failed_replacement_leaves_the_old_file(server, cache):
    old = cache / "Repo" / "broken.json"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"old")
    assert download.fetch([task(server, "broken")])[0].status == "failed"
    assert old.read_bytes() == b"old"


def test_offline_says_what_from_where_and_three_ways_out(cache):
    with pytest.raises(WorkError) as caught:
        download.locate(task(None))
    message = str(caught.value)
    assert "http://127.0.0.1:9/file" in message
    assert "Run again" in message
    assert "LLM_ADAPTERS_MIRROR to a folder that holds Repo/file.json" in message
    assert f"by hand at {cache / 'Repo' / 'file.json'}" in message
    assert "\n" not in message


def test_a_cache_that_cannot_be_written(server, cache):
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    with pytest.raises(WorkError, match=r"cannot write .*file\.json \(.*Set LLM_ADAPTERS_CACHE"):
        download.locate(task(server))


def test_a_file_placed_by_hand_is_taken(cache):
    place = cache / "Repo" / "file.json"
    place.parent.mkdir(parents=True)
    place.write_bytes(CONTENT)
    assert download.locate(task(None)) == place


def test_the_mirror_goes_before_the_cache(server, cache, tmp_path, monkeypatch):
    download.locate(task(server))
    mirrored = tmp_path / "mirror" / "Repo" / "file.json"
    monkeypatch.setenv("LLM_ADAPTERS_MIRROR", str(tmp_path / "mirror"))
    with pytest.raises(RequestError, match=r"LLM_ADAPTERS_MIRROR names '.*mirror', which is not a folder"):
        download.locate(task(server))
    mirrored.parent.mkdir(parents=True)
    assert download.locate(task(server)) == cache / "Repo" / "file.json"
    mirrored.write_bytes(CONTENT)
    assert download.locate(task(server)) == mirrored
    mirrored.write_bytes(CONTENT + b" ")
    with pytest.raises(WorkError, match=r"mirror/Repo/file\.json does not hold.*unset LLM_ADAPTERS_MIRROR"):
        download.locate(task(server))
    (result,) = download.fetch([task(server)])
    assert result.status == "failed"
    assert mirrored.read_bytes() == CONTENT + b" "


def test_fetch_many_resumes_and_goes_on_after_a_failure(server, cache, capsys):
    tasks = [task(server, name) for name in ("a", "missing", "b", "broken", "c")] + [CATALOG["wordproblems"]]
    first = download.fetch(tasks, progress=True)
    assert [result.status for result in first] == ["fetched", "failed", "fetched", "failed", "fetched", "embedded"]
    assert "404" in first[1].reason
    assert files_in(cache) == ["a.json", "b.json", "c.json"]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "broken" in printed.err

    (cache / "Repo" / "b.json").write_bytes(b"damaged")
    server.asked = []
    again = download.fetch(tasks)
    assert [result.status for result in again] == ["present", "failed", "fetched", "failed", "present", "embedded"]
    assert sorted(server.asked) == ["/b", "/broken", "/missing"]
    assert capsys.readouterr() == ("", "")


def test_a_persons_own_file(tmp_path):
    path = tmp_path / "own.json"
    own = Task("own", "own", "number", file=str(path), blob=BLOB)
    with pytest.raises(RequestError, match=r"own\.json' of task 'own' does not exist"):
        download.locate(own)
    path.write_bytes(b"else")
    with pytest.raises(WorkError, match=r"own\.json does not hold.*Correct"):
        download.locate(own)
    path.write_bytes(CONTENT)
    assert download.locate(own) == path


def test_cache_folder_without_the_variable_is_the_platforms(monkeypatch):
    monkeypatch.delenv("LLM_ADAPTERS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    folder = cache_folder("data")
    assert folder.name == "data"
    assert "llm-adapters" in folder.parts


@pytest.mark.shared
def test_blob_ids_of_the_catalogue_are_those_of_the_repository(shared_data):
    table = (shared_data / "LLM-Adapters" / "git-blobs.tsv").read_text().splitlines()
    ids = dict(line.split("\t") for line in table)
    paper = [task for task in CATALOG.values() if task.repository == "AGI-Edgerunners/LLM-Adapters"]
    assert len(paper) == 25
    for task in paper:
        assert task.blob == ids[task.path], task.name


@pytest.mark.shared
def test_the_shared_mirror_verifies(shared_data, monkeypatch):
    monkeypatch.setenv("LLM_ADAPTERS_MIRROR", str(shared_data))
    located = [download.present(task) for task in CATALOG.values() if not task.embedded]
    assert Path(shared_data / "grade-school-math" / "train.jsonl") in located
    assert sum(path is not None for path in located) >= 17
