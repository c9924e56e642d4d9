"""The CPU backend: what C would read or write wrongly is refused, and what cannot be compiled is told."""

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from llm_adapters.errors import WorkError
from llm_adapters.ops import backends
from llm_adapters.ops.cpu import build, functions, prototypes
from llm_adapters.ops.rms_norm import rms_norm


@pytest.fixture(autouse=True)
def functions_once(functions: str) -> None:
    """Once, and not both ways as the other tests here."""
    if functions == "reference":
        pytest.skip("of the backend alone")


@pytest.fixture
def compiled() -> None:
    if reason := functions.unsupported_reason(torch.float32):
        pytest.skip(reason)


@pytest.fixture
def nothing_loaded() -> Iterator[None]:
    """As in a new process; afterwards, too."""
    for cache in (build.load, prototypes.library):
        cache.cache_clear()
    yield
    for cache in (build.load, prototypes.library):
        cache.cache_clear()


# --- what is passed to C


@pytest.mark.usefixtures("compiled")
def test_tensors_of_another_precision_are_refused(dtype: torch.dtype) -> None:
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    x = torch.ones(1, 4).to(dtype)
    with pytest.raises(TypeError, match=f"a tensor of {other}, where {dtype} is needed"):
        functions.swiglu(x, x.to(other))
    with pytest.raises(TypeError, match=r"a tensor of torch\.bfloat16, where torch\.float32 is needed"):
        functions.rms_norm_backward(x, x, x[0], torch.ones(1, 1, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match=r"a tensor of torch\.int32, where torch\.int64 is needed"):
        functions.cross_entropy_(x, torch.zeros(1, dtype=torch.int32))


@pytest.mark.usefixtures("compiled")
def test_what_is_changed_in_place_must_be_contiguous(dtype: torch.dtype) -> None:
    probs = torch.ones(4, 2).to(dtype)
    with pytest.raises(ValueError, match="not contiguous"):
        functions.softmax_backward_(torch.ones(4, 4).to(dtype)[:, :2], probs)


@pytest.mark.usefixtures("compiled")
def test_other_shapes_are_refused(dtype: torch.dtype) -> None:
    """Each of them would be read or written beyond its end."""
    x, ids = torch.ones(70, 64).to(dtype), torch.zeros(3, dtype=torch.int64)
    pages, heads = torch.ones(4, 2, 8, 16).to(dtype), torch.ones(3, 4, 16).to(dtype)
    rows = torch.ones(32, 2, 32).to(dtype)
    table, positions = torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 1, dtype=torch.int64)
    cos = torch.ones(1, 1, 5, 8).to(dtype)
    bounds = torch.tensor([0, 3, 40], dtype=torch.int32)
    for wrong in (
        lambda: functions.rms_norm(x, x[0, :63], 1e-5),
        lambda: functions.rms_norm_backward(x[:69], x, x[0], torch.ones(70, 1)),
        lambda: functions.swiglu(x, x[:69]),
        lambda: functions.swiglu_backward(x[:69], x, x, False),
        lambda: functions.dropout_add_(x, x[:69], torch.tensor(1), 0.1),
        lambda: functions.rotary(torch.ones(1, 5, 2, 8).to(dtype).transpose(1, 2), cos, cos[..., :4], False),
        lambda: functions.masked_softmax_(torch.ones(3, 2, 4, 5).to(dtype), ids, 2, 0, None),
        lambda: functions.masked_softmax_(torch.ones(3, 2, 4, 6).to(dtype), ids[:2], 2, 0, None),
        lambda: functions.softmax_backward_(x, x[:69]),
        lambda: functions.cross_entropy_(x, ids),
        lambda: functions.pack_lora(torch.ones(65, 3), 1.0, torch.ones(64, 32).to(dtype)),
        lambda: functions.lora_add_(x, x, ids, torch.ones(1, 64, 32).to(dtype), torch.ones(1, 32, 64).to(dtype)),
        lambda: functions.store_kv(heads[:, :2], pages, ids[:2], ids),
        lambda: functions.paged_attention(heads, pages, pages, None, ids[:2], table, ids, positions, 1.0, None),
        lambda: functions.varlen_attention(rows, rows, rows, bounds, 3, 37, 1.0, None),
        lambda: functions.varlen_attention(rows, rows[:, :1], rows, bounds.clamp(max=32), 3, 29, 1.0, None),
    ):
        with pytest.raises(ValueError, match=r"is needed|more than|does not fit|segments that end"):
            wrong()


@pytest.mark.usefixtures("compiled")
def test_a_scale_may_be_an_int(dtype: torch.dtype) -> None:
    """Prototypes are declared: C would take the bits of an int for another number."""
    x, seed = torch.randn(3, 50).to(dtype), torch.tensor(12345)
    assert torch.equal(functions.dropout(x, seed, 0.2, 2), functions.dropout(x, seed, 0.2, 2.0))
    pages, ids = torch.randn(4, 2, 8, 16).to(dtype), torch.tensor([1, 2])
    asked = torch.randn(2, 4, 16).to(dtype), pages, pages, None, ids * 0, ids[:, None], ids - 1, ids[:, None] + 2
    assert torch.equal(*(functions.paged_attention(*asked, scale, None) for scale in (1, 1.0)))
    packed = [functions.pack_lora(torch.randn(9, 9), scale, torch.ones(32, 32).to(dtype)) for scale in (0, 0.0)]
    assert not packed[0].any()
    assert not packed[1].any()


def test_every_exported_function_has_a_prototype_and_a_comment() -> None:
    """Exported are the C functions that are not static; each comment above one says what its arguments are."""
    exported = {}
    for file in sorted(build.SOURCES.glob("*.c")):
        lines = file.read_text("utf-8").splitlines()
        for number, line in enumerate(lines):
            if line.startswith(("void ", "index_t ")) and "(" in line:
                exported[line.split("(")[0].split()[-1]] = lines[number - 1]
    assert exported.keys() == prototypes.PROTOTYPES.keys()
    assert all(above.startswith("//") for above in exported.values()), exported


def test_c_takes_no_memory_of_its_own_and_does_not_end_the_process() -> None:
    text = " ".join(file.read_text("utf-8") for file in build.SOURCES.glob("*.[ch]"))
    assert not [word for word in ("malloc(", "aligned_alloc(", "calloc(", "abort(", "exit(") if word in text]


# --- building


@pytest.mark.usefixtures("compiled")
def test_compiled_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLM_ADAPTERS_CACHE", str(tmp_path))
    path = build.compiled(torch.bfloat16)
    assert sorted(path.parent.iterdir()) == [path.with_suffix(".sha256"), path]  # and nothing half-made beside them
    made = path.stat().st_mtime_ns
    assert build.compiled(torch.bfloat16) == path
    assert path.stat().st_mtime_ns == made
    assert build.compiled(torch.float32) != path


def _damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "a bit flipped":
        path.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "no digest":
        path.with_suffix(".sha256").unlink()
    elif how == "writable by others":
        path.chmod(0o666)
    elif how == "a link to a whole one":
        path.rename(path.with_name("else"))
        path.symlink_to("else")


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    "how", ["a bit flipped", "emptied", "no digest", "writable by others", "a link to a whole one"]
)
def test_a_library_that_is_not_whole_or_not_ours_is_compiled_anew(
    how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LLM_ADAPTERS_CACHE", str(tmp_path))
    path = build.compiled(torch.float32)
    whole = path.read_bytes()
    _damage(path, how)
    monkeypatch.setattr(build, "_compile", lambda command, file: file.write_bytes(b"anew"))
    assert build.compiled(torch.float32) == path
    assert path.read_bytes() == b"anew" != whole


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("what", ["others may write to it", "it is a file", "it cannot be made"])
def test_a_cache_that_will_not_do_is_done_without(what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("LLM_ADAPTERS_CACHE", str(cache))
    if what == "it is a file":
        cache.write_text("")
    elif what == "it cannot be made":
        monkeypatch.setenv("LLM_ADAPTERS_CACHE", "/dev/null/cache")
    else:
        (cache / "kernels").mkdir(parents=True)
        (cache / "kernels").chmod(0o777)
    path = build.compiled(torch.float32)
    assert tmp_path not in path.parents
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert build.compiled(torch.float32) == path  # once in a process


@pytest.mark.usefixtures("nothing_loaded")
def test_no_compiler_is_told_and_torch_does_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLM_ADAPTERS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert backends.unsupported_reason(torch.float32) == "there is no C compiler (cc, gcc or clang)"
    x = torch.randn(3, 8)
    assert backends.for_tensor(x) is None
    torch.testing.assert_close(rms_norm(x, torch.ones(8), 1e-5), functional.rms_norm(x, (8,), eps=1e-5))
    with pytest.raises(TypeError, match="no compiled functions"):
        functions.swiglu(x, x)


@pytest.mark.usefixtures("nothing_loaded")
def test_a_compiler_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'no such option' >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("LLM_ADAPTERS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", str(broken))
    assert backends.unsupported_reason(torch.bfloat16) == "the C compiler failed: no such option"
    assert not list((tmp_path / "cache").rglob("*.so"))
    with pytest.raises(WorkError, match="no such option"):
        build.compiled(torch.bfloat16)


def test_other_precisions_and_devices_are_torchs() -> None:
    assert backends.for_tensor(torch.zeros(3, dtype=torch.float64)) is None
    assert backends.unsupported_reason(torch.float16) == "there are none for float16"
    assert backends.for_tensor(torch.zeros(3, device="meta")) is None
    assert backends.unsupported_reason(torch.float32, "meta") == "there is none for meta"
