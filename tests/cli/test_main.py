"""The command line as a process among others: signals, pipes that close, streams that cannot show everything."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from llm_adapters import cli

# A command line whose one verb does what the test says.
VERB = """
import sys, types
from llm_adapters import cli
verb = types.ModuleType("verb")
exec({body!r}, vars(verb))
sys.modules["verb"] = verb
cli.VERBS.clear()
cli.VERBS["go"] = "verb:go"
sys.exit(cli.main(["go"]))
"""


def call(body: str, shell: str = "{}", **options: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CODE": VERB.format(body=body), "PYTHON": sys.executable, **options}
    words = ["bash", "-c", shell.format('"$PYTHON" -c "$CODE"')]
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60)  # type: ignore[arg-type]


def test_sigterm_is_as_ctrl_c() -> None:
    done = call("import os, signal, time\ndef go() -> None:\n os.kill(os.getpid(), signal.SIGTERM)\n time.sleep(30)")
    assert (done.returncode, done.stderr) == (130, "llm-adapters: interrupted\n")


def test_a_character_that_the_stream_lacks_is_replaced() -> None:
    done = call("def go() -> None:\n print('3 \\u2192 \\u00e9 \\ud800')", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout, done.stderr) == (0, "3 ? ? ?\n", "")


def test_words_that_are_no_text_are_replaced() -> None:
    body = "import sys\ndef go() -> None:\n print(ascii(sys.stdin.read()))"
    done = call(body, "printf 'a\\xff' | {}", PYTHONIOENCODING="utf-8")
    assert done.stdout == "'a\\ufffd'\n"


def test_a_reader_that_goes_away_ends_it_quietly() -> None:
    done = call("def go() -> None:\n for n in range(100000): print(n)", "{} | head -1")
    assert (done.stdout, done.stderr) == ("0\n", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a device that is always full")
def test_a_full_disk_below_stdout_is_told() -> None:
    done = call("def go() -> None:\n print('x')", "{} > /dev/full")
    assert done.returncode == 1
    assert done.stderr.startswith("llm-adapters: a file could not be written: no space left on device")
    assert "Traceback" not in done.stderr


def test_streams_that_are_closed_do_no_harm() -> None:
    done = call("import sys\ndef go() -> None:\n print(repr(sys.stdin.read()), file=sys.stderr)", "{} <&- >&-")
    assert (done.returncode, done.stderr) == (0, "''\n")


def test_a_system_error_in_any_verb_is_a_sentence() -> None:
    done = call("def go() -> None:\n open('/dev/null/x')")
    assert done.returncode == 2
    assert (
        done.stderr == "llm-adapters: '/dev/null/x' cannot be used: not a directory. Check the path, or name another\n"
    )


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    done = call("def go() -> None:\n {}['x']")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_main_leaves_signals_as_they_were_and_works_in_a_thread() -> None:
    before, codes = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=lambda: codes.append(cli.main(["no-such-verb"])))
    thread.start()
    thread.join()
    codes.append(cli.main(["no-such-verb"]))
    assert codes == [2, 2]
    assert signal.getsignal(signal.SIGTERM) is before
