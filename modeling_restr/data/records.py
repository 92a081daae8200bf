"""Reading of JSON annotation files, checks of their records field by field, and a collection of problems found."""

import json
import reprlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """A kind of value that a field must have."""

    description: str
    matches: Callable[[Any], bool]


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_text(value: Any) -> bool:
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold
        return False


def _one_or_list(is_kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: is_kind(value) or (isinstance(value, list) and all(map(is_kind, value)))


ID = Kind("a whole number of 64 bits", _is_id)
COUNT = Kind("a whole number above 0", lambda value: _is_id(value) and value > 0)
ID_OR_IDS = Kind("a whole number of 64 bits or a list of them", _one_or_list(_is_id))
TEXT = Kind("text", _is_text)
TEXT_OR_TEXTS = Kind("text or a list of texts", _one_or_list(_is_text))
TEXTS = Kind("a list of texts", lambda value: isinstance(value, list) and all(map(_is_text, value)))
LIST = Kind("a list", lambda value: isinstance(value, list))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
ANYTHING = Kind("anything", lambda value: True)


def read_json(path: Path, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Read a JSON file, with a hook as for `json.loads`; `ValueError` if it is missing, damaged or nested too deeply."""
    if not path.is_file():
        raise ValueError(f"Expected a file {path}, found none.")
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=object_pairs_hook)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}.") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; `ValueError` as in [`read_json`], or if it holds something else."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"Expected a JSON object in {path}, got {reprlib.repr(content)}.")
    return content


def check_fields(record: Any, kinds: Mapping[str, Kind], place: str) -> None:
    """
    Check that a record has certain fields of certain kinds. Otherwise the message of the `ValueError` begins with
    `place`, which names the file and the record.
    """
    if not isinstance(record, dict) or not record.keys() >= kinds.keys():
        raise ValueError(f"{place}: expected the fields {sorted(kinds)}, got {reprlib.repr(record)}.")
    for name, kind in kinds.items():
        if not kind.matches(record[name]):
            raise ValueError(f"{place}: expected {name} to be {kind.description}, got {reprlib.repr(record[name])}.")


def index_records(content: Any, table: str, path: Path) -> dict[int, dict[str, Any]]:
    """
    The records of a table in COCO's format ("images", "annotations" or "categories") by their ids. `ValueError` if the
    table is missing, or if an id is missing, of another kind or repeated.
    """
    records = content.get(table) if isinstance(content, dict) else None
    if not isinstance(records, list):
        raise ValueError(f"{path} is not in COCO's format: expected a list of {table}, each with its id.")
    indexed: dict[int, dict[str, Any]] = {}
    for number, record in enumerate(records):
        check_fields(record, {"id": ID}, f"{path}, record {number} of the {table}")
        if record["id"] in indexed:
            raise ValueError(f"{path}: the ids of {table} must be unique, got {record['id']} twice.")
        indexed[record["id"]] = record
    return indexed


class Problems(dict[str, list[str]]):
    """
    Records that were dropped or are doubtful: {kind of problem, in the plural: names of the records}.

        problems = Problems()
        problems.add("annotations without a mask", "annotation 7")
        print(problems.summary())  # annotations without a mask: 1 (annotation 7)
    """

    def add(self, problem: str, *names: str) -> None:
        if names:
            self.setdefault(problem, []).extend(names)

    def extend(self, others: Mapping[str, Iterable[str]]) -> None:
        for problem, names in others.items():
            self.add(problem, *names)

    def summary(self, num_names: int = 10) -> str:
        """One line per kind of problem: how often it occurs, and the first names."""
        return "\n".join(
            f"{problem}: {len(names):,} ({', '.join(names[:num_names])}{', ...' if len(names) > num_names else ''})"
            for problem, names in self.items()
        )
