"""The capability table: which test cases prove what of which method on which family.

    @pytest.mark.proves("saves and loads")                    # method and family are the test's own parameters
    @pytest.mark.proves("merges", but="refused")              # what is proven is that it is refused
    @pytest.mark.proves("mixed batch", method=["series", "parallel"], family="{family}")

`pytest -m proves --capabilities docs/capabilities.md` runs these tests and writes the table of those that passed; with
`--collect-only` that of those that there are, which `test_capabilities.py` compares with the committed one.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from llm_adapters.architectures import FAMILIES
from llm_adapters.methods import METHODS

PROPERTIES = {
    "formula": "computes the paper's formula, run with forward hooks on the plain model",
    "starts as the base": "before training, the model's output is the base model's",
    "disabled is the base": "disabled, the output is the base model's, and the adapter's again afterwards",
    "unloads": "`unload` gives back the base model, with every tensor, class and hook as it was",
    "trains nothing else": "only the adapter's parameters have gradients and change in a step",
    "saves and loads": "a saved adapter, loaded under another name, gives the same output bit for bit",
    "stable keys": "the keys and shapes of a checkpoint are those of a stored list",
    "gradient checkpointing": "recomputing activations changes no gradient",
    "packs": "packs with a shared prefix give the loss and every gradient of the family's own forward",
    "half precision": "a bfloat16 base works, with the adapter in float32",
    "generates": "greedy generation with a cache is, token by token, that without",
    "engine": "in batches of the engine it answers what transformers' `generate` answers, token by token",
    "merges": "merged into the base weights, the output is the same up to rounding",
    "several adapters": "adapters on one model can be switched and deleted, and the inactive ones are left alone",
    "mixed batch": "each sequence of a batch has its own adapter or none (`adapter_names`), as if it were alone",
    "mixed batch generates": "the same token for token in `generate`",
    "modules_to_save": "whole modules can be trained and saved beside the adapter",
    "copies and pickles": "`copy.deepcopy` and `torch.save` of the whole model",
    "compiles": "`torch.compile` changes neither output nor gradients",
    "quantised base": "works on a bitsandbytes or torchao base (those tests run only where the package is installed)",
}
VARIANTS = {
    "both-learned": "series on both sub-layers, with a learned scale and biases",
    "linears": "before, after and parallel on chosen linear layers",
}
ROWS = (*METHODS, *VARIANTS)
# By nature and not for want of a test.
_NOT_APPLICABLE = {
    ("fusion", "starts as the base"),  # it starts as a mean of its adapters
    ("mam", "starts as the base"),  # any prefix takes a share of the attention
    *((method, "starts as the base") for method in ("prefix", "prompt", "p-tuning")),  # random tokens are before it
    *((method, "modules_to_save") for method in ("prefix", "prompt", "p-tuning")),
    *((row.name, "stable keys") for row in METHODS.values() if row.peft_type not in ("BOTTLENECK", "FUSION")),  # PEFT's
}
PROVEN, REFUSED, NOT = "", "refused", "no"


class Claim(NamedTuple):
    """What one test case proves."""

    method: str
    family: str
    property: str
    but: str = PROVEN


def claims_of(item: pytest.Item) -> Iterator[Claim]:
    """What the case says that it proves; a `ValueError` where the table has no such method, family or property."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    for marker in item.iter_markers("proves"):
        methods, families = (marker.kwargs.get(key, f"{{{key}}}") for key in ("method", "family"))
        for method in [methods] if isinstance(methods, str) else methods:
            for name in marker.args:
                claim = Claim(
                    method.format(**parameters), families.format(**parameters), name, marker.kwargs.get("but", PROVEN)
                )
                for value, known in zip(claim, (ROWS, FAMILIES, PROPERTIES, (PROVEN, REFUSED, NOT)), strict=True):
                    if value not in known:
                        raise ValueError(f"{item.nodeid} claims to prove {claim}, and the table has no {value!r}")
                yield claim


def table(claims: Iterable[Claim]) -> str:
    """The table in Markdown; the same claims give the same text."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for claim in sorted(set(claims)):
        outcomes = found.setdefault((claim.method, claim.property), {})
        if outcomes.setdefault(claim.family, claim.but) != claim.but:
            raise ValueError(f"{claim.method}: {claim.property} is both proven and not on {claim.family}")
    shown = {place: _by_outcome(outcomes) for place, outcomes in found.items()}
    sets = {names for outcomes in shown.values() for names in outcomes.values()}
    letters = {names: chr(ord("A") + i) for i, names in enumerate(sorted(sets, key=lambda names: (-len(names), names)))}

    def cell(method: str, name: str) -> str:
        if (method, name) not in shown:
            return "n/a" if (method, name) in _NOT_APPLICABLE else "untested"
        return ", ".join(f"{how} {letters[names]}".strip() for how, names in shown[method, name].items())

    lines = [
        "# What each method can do, and on which families that is proven",
        "",
        "Written by `pytest -m proves --capabilities docs/capabilities.md` from the tests that prove it; a test",
        "compares the two. All of it ran on a CPU, with tiny models of the real families.",
        "",
        "A letter: proven, on the families of that letter. *refused*: an error, and nothing has changed. *no*: does",
        "not work, which is tested too. *n/a*: has no meaning there. *untested*: nobody has looked.",
        "",
        f"| | {' | '.join(ROWS)} |",
        f"|---|{'---|' * len(ROWS)}",
        *(f"| {name} | {' | '.join(cell(method, name) for method in ROWS)} |" for name in PROPERTIES),
        "",
        *(
            f"- **{letter}**, {len(names)} {'families' if len(names) > 1 else 'family'}: {', '.join(names)}"
            for names, letter in letters.items()
        ),
        "",
        *(f"- **{name}**: {sentence}." for name, sentence in PROPERTIES.items()),
        "",
        *(f"- **{row.name}**: {row.summary}." for row in METHODS.values()),
        *(f"- **{name}**: {sentence}." for name, sentence in VARIANTS.items()),
    ]
    return "\n".join(lines) + "\n"


def _by_outcome(outcomes: dict[str, str]) -> dict[str, tuple[str, ...]]:
    return {how: tuple(f for f in FAMILIES if outcomes.get(f) == how) for how in sorted(set(outcomes.values()))}


def cells(text: str) -> dict[tuple[str, str], str]:
    """The cells of a table's text, by method and property."""
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {(method, row[0]): value for row in rows[2:] for method, value in zip(rows[0][1:], row[1:], strict=True)}


class Recorder:
    """Collects the claims of a run and writes their table at its end."""

    def __init__(self, file: Path, only_collected: bool) -> None:
        self.file, self.only_collected = file, only_collected
        self.claims: dict[str, list[Claim]] = {}
        self.proven: set[Claim] = set()
        self.failed: set[Claim] = set()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.claims = {item.nodeid: list(claims_of(item)) for item in session.items}
        if self.only_collected:
            self.proven = {claim for claims in self.claims.values() for claim in claims}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed or (report.when == "call" and report.passed):
            (self.failed if report.failed else self.proven).update(self.claims.get(report.nodeid, ()))

    def pytest_sessionfinish(self) -> None:
        self.file.write_text(table(self.proven - self.failed), encoding="utf-8")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--capabilities", type=Path, metavar="FILE", help="write the table of what the tests prove to FILE"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "proves(*properties, method, family, but): a claim of the capability table")
    if file := config.getoption("--capabilities"):
        config.pluginmanager.register(Recorder(file, config.getoption("collectonly")))
