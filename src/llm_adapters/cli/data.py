"""`llm-adapters data ...`: the catalogue, its files, and test questions in training sets."""

from llm_adapters.errors import WorkError


def list_sets(*, json: bool = False) -> None:
    """Show every data set of the catalogue: kind of answer, size, licence, and whether it is here.

    Args:
        json: print the result as one JSON document on stdout.
    """
    from llm_adapters.cli import tables
    from llm_adapters.tasks import catalog, download

    rows = []
    for task in catalog.CATALOG.values():
        here = "embedded" if task.embedded else ("here" if download.present(task) else "")
        rows.append({"name": task.name, "split": task.split, "kind": task.kind, "size": task.size, "here": here})
        rows[-1] |= {"licence": task.licence, "origin": task.url, "description": task.description}
    if json:
        tables.print_json({"datasets": rows})
    else:
        tables.show_catalogue(rows)


def fetch(names: list[str], *, json: bool = False) -> None:
    """Download data sets into the cache and verify them; what is there already is only verified.

    Args:
        names: data sets of the catalogue, or all.
        json: print the result as one JSON document on stdout.
    """
    from llm_adapters.cli import tables
    from llm_adapters.tasks import catalog, download

    chosen = list(catalog.CATALOG) if names == ["all"] else names
    fetched = download.fetch([catalog.get(name) for name in chosen], progress=True)
    if json:
        document = {
            item.name: {"status": item.status, "path": str(item.path) if item.path else None, "reason": item.reason}
            for item in fetched
        }
        tables.print_json({"datasets": document})
    else:
        tables.show_fetched(fetched)
    failed = [item for item in fetched if item.status == "failed"]
    if failed:
        raise WorkError(f"{len(failed)} of {len(fetched)} could not be fetched. {failed[0].name}: {failed[0].reason}")


def check(train: str, *, against: list[str], columns: dict[str, str] | None = None, json: bool = False) -> None:
    """Report which test questions occur in a training set, exactly or nearly.

    Args:
        train: a training set of the catalogue, or a file.
        against: test sets of the catalogue.
        columns: for a file, which column holds the question.
        json: print the result as one JSON document on stdout.
    """
    from llm_adapters.cli import tables
    from llm_adapters.tasks import contamination

    report = contamination.check(train, against, columns)
    repeated = contamination.duplicates(against)
    if json:
        tables.print_json({"train": train, "tasks": report, "duplicates": repeated})
    else:
        tables.show_contamination(train, report, repeated)
