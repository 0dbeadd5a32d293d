"""The one reader of rows: JSON lines, JSON, CSV and TSV, each also as .gz, and Parquet.

A byte order mark, Windows line ends and empty lines are taken as they come. A mistake is told with file and line, and
the mistakes of a file together.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from adept_ds.errors import UserError, did_you_mean_path
from adept_ds.formats.rows import Mistakes, Row

T = TypeVar("T")

Found = Row | UserError
"""What stands in one place of a file: a record or a mistake."""


def read_rows(path: str | Path) -> list[Row]:
    """Return the records of a file. UserError as `read_each`."""
    return read_each(path, lambda row: row)


def read_each(path: str | Path, make: Callable[[Row], T], repair: bool = False) -> list[T]:
    """Return what `make` makes of each record of a file.

    Args:
        path: The file.
        make: Called with each record.
        repair: Take records with halves of characters, with U+FFFD in their place: what a model has written is scored
            as it is, where it would be a mistake in what is trained on.

    Raises:
        UserError: The file is unreadable or empty, or has mistakes, those that `make` finds included: the first ten of
            them and the number of further ones.
    """
    found = scan(Path(path))
    if repair:
        found = (one.repaired() if isinstance(one, HalfCharacter) else one for one in found)
    made = list(made_of(found, path, make))
    if not made:
        raise UserError(f"{path}: holds no records")
    return made


def iterate_rows(path: str | Path, make: Callable[[Row], T]) -> Iterator[T]:
    """As `read_each`, as they are asked for; a file of none is no mistake here. Mistakes are raised at the end."""
    return made_of(scan(Path(path)), path, make)


def made_of(rows: Iterable[Found], source: str | Path, make: Callable[[Row], T]) -> Iterator[T]:
    """Yield what `make` makes of each row; the mistakes, those that it finds included, are raised at the end."""
    mistakes = Mistakes(source)
    for found in rows:
        made = []
        with mistakes.collected():
            if isinstance(found, UserError):
                raise found
            made.append(make(found))
        yield from made
    mistakes.check()


def scan(path: Path) -> Iterator[Found]:
    """Yield what stands in a file. UserError if it cannot be read at all."""
    return READERS.get(suffix_of(path) or "", _json_lines)(path)


def suffix_of(path: Path) -> str | None:
    """The suffix that says how a file is read, without `.gz`; None if it says nothing."""
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    return suffix if suffix in READERS and not (suffix == ".parquet" and name.endswith(".gz")) else None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines with their numbers. Only \\n ends one: a bare \\r in a line of JSON is white space."""
    try:
        with (gzip.open if path.name.lower().endswith(".gz") else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise UserError(f"{path}: is UTF-16 text; expected UTF-8 (save it as that, or run iconv)")
                yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{did_you_mean_path(str(path))}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {line[error.start]:#04x} at {error.start + 1})") from None


def read_text(path: str | Path) -> str:
    """Return the text of a file. UserError if it is unreadable or no UTF-8."""
    return "".join(_decoded(line, f"{path}:{number}") for number, line in _lines(Path(path)))


LONE_SURROGATE = re.compile("[\ud800-\udfff]")
"""JSON can write one half of a pair; no text has it, no encoding, and no tokenizer takes it."""
REPLACEMENT = "\ufffd"


class _Json:
    """Parses JSON, and notes keys that an object has twice, and halves of characters."""

    def __init__(self) -> None:
        self._twice: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def decode(self, text: str) -> Any:
        """As the decoder's `decode`; a `json.JSONDecodeError` for what Python cannot hold, too."""
        return self._told(self._decoder.decode, text, 0)

    def decode_at(self, text: str, at: int) -> tuple[Any, int]:
        """As the decoder's `raw_decode`; errors as those of `decode`."""
        return self._told(lambda whole: self._decoder.raw_decode(whole, at), text, at)

    def _told(self, decode: Callable[[str], T], text: str, at: int) -> T:
        try:
            return decode(text)
        except RecursionError:
            raise json.JSONDecodeError("nested too deeply", text, at) from None
        except json.JSONDecodeError:
            raise
        except ValueError:
            raise json.JSONDecodeError("an integer with too many digits", text, at) from None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            self._twice.append(next(name for name in names if names.count(name) > 1))
        return values

    def record(self, value: Any, where: str) -> Found:
        """Return the record that a parsed value is, or what is wrong with it."""
        if self._twice:
            name, self._twice = self._twice[0], []
            return UserError(f"{where}: {name!r} is given twice")
        if not isinstance(value, dict):
            return UserError(f"{where}: expected a JSON object, found {type(value).__name__}")
        try:
            broken = next((name for name, one in value.items() if _has_lone_surrogate([name, one])), None)
        except RecursionError:
            return UserError(f"{where}: nested too deeply")
        if broken is not None:
            return HalfCharacter(where, broken, value)
        return Row(where, value)


class HalfCharacter(UserError):
    """A record with one half of a surrogate pair in it."""

    def __init__(self, where: str, field: str, values: dict[str, Any]) -> None:
        super().__init__(
            f"{where}: {LONE_SURROGATE.sub(REPLACEMENT, field)} holds half of a character (a lone surrogate such as "
            "\\ud800), which is no text; take it out, or write U+FFFD in its place"
        )
        self._where, self._values = where, values

    def repaired(self) -> Row:
        """The record with U+FFFD in the place of each half."""
        return Row(self._where, whole_characters(self._values))


def _has_lone_surrogate(value: Any) -> bool:
    if isinstance(value, str):
        return not value.isascii() and LONE_SURROGATE.search(value) is not None
    if isinstance(value, dict):
        return any(_has_lone_surrogate([name, one]) for name, one in value.items())
    return isinstance(value, list) and any(map(_has_lone_surrogate, value))


def whole_characters(value: Any) -> Any:
    """Return a text, or all texts in a JSON value, with U+FFFD in the place of halves of characters."""
    if isinstance(value, str):
        return LONE_SURROGATE.sub(REPLACEMENT, value)
    if isinstance(value, dict):
        return {whole_characters(name): whole_characters(one) for name, one in value.items()}
    return [whole_characters(one) for one in value] if isinstance(value, list) else value


def _json_lines(path: Path) -> Iterator[Found]:
    parser = _Json()
    for number, line in _lines(path):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            yield parser.record(parser.decode(_decoded(line.rstrip(), where)), where)
        except json.JSONDecodeError as error:
            yield _not_json(error, where)
        except UserError as error:
            yield error


def _not_json(error: json.JSONDecodeError, where: str) -> UserError:
    return UserError(f"{where}: not valid JSON, {error.msg} (column {error.colno})")


BLANK = re.compile(r"[ \t\r\n]*")


def _json(path: Path) -> Iterator[Found]:
    """A list of objects, or an object with such a list as `data`; also JSON lines, which are often called so."""
    text = read_text(path)
    start = _skip_blank(text, 0)
    first, _, rest = text[start:].partition("\n")
    if first.startswith("{") and first.rstrip().endswith("}") and rest.strip():
        yield from _json_lines(path)
        return
    parser = _Json()
    try:
        if first.startswith("["):
            for at, value in _elements(text, start, parser):
                yield parser.record(value, f"{path}:{_line_of(text, at)}")
        elif first:
            record = parser.record(parser.decode(text), f"{path}:{_line_of(text, start)}")
            data = record.values.get("data") if isinstance(record, Row) else None
            if isinstance(data, list):
                yield from (parser.record(value, f"{path} data[{number}]") for number, value in enumerate(data))
            else:
                yield record
    except json.JSONDecodeError as error:
        yield _not_json(error, f"{path}:{error.lineno}")


def _elements(text: str, at: int, parser: _Json) -> Iterator[tuple[int, Any]]:
    """Yield the elements of the list that begins at `at`, each with its place in the text."""
    at = _skip_blank(text, at + 1)
    while text[at : at + 1] != "]":
        value, end = parser.decode_at(text, at)
        yield at, value
        at = _skip_blank(text, end)
        if text[at : at + 1] == ",":
            at = _skip_blank(text, at + 1)
        elif text[at : at + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
    if _skip_blank(text, at + 1) < len(text):
        raise json.JSONDecodeError("Extra data", text, at + 1)


def _skip_blank(text: str, at: int) -> int:
    found = BLANK.match(text, at)
    return found.end() if found else at


def _line_of(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _csv(path: Path, delimiter: str) -> Iterator[Found]:
    """Every cell is a text: "null", "NA" and "007" are what they are."""
    csv.field_size_limit(sys.maxsize)  # The usual limit of 128 KiB is below the length of a document.
    bad_lines: list[UserError] = []
    lines = _csv_lines(path, bad_lines)
    blank, first = _until_text(lines)
    if delimiter == "," and "," not in first:
        # So do spreadsheets write it where the comma is the decimal point.
        delimiter = next((other for other in ";\t" if other in first), delimiter)
    reader = csv.reader(chain(blank, [first], lines), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            is_open = "; is a quotation mark left open?" if "unexpected end" in str(error) else ""
            yield UserError(f"{path}:{start}: not valid CSV ({error}){is_open}")
            continue
        if bad_lines:
            if header is None:
                raise bad_lines[0]
            yield from bad_lines
            bad_lines.clear()
        elif not cells:
            continue
        elif header is None:
            header = _header(cells, f"{path}:{start}")
        elif len(cells) != len(header):
            there, named = len(cells), ", ".join(header)
            yield UserError(f"{path}:{start}: {there} cells, and the header has {len(header)} ({named})")
        else:
            yield Row(f"{path}:{start}", dict(zip(header, cells, strict=True)))


def _csv_lines(path: Path, bad_lines: list[UserError]) -> Iterator[str]:
    for number, line in _lines(path):
        try:
            text = _decoded(line, f"{path}:{number}")
        except UserError as error:
            bad_lines.append(error)
            text = line.decode(errors="replace")
        yield text


def _until_text(lines: Iterator[str]) -> tuple[list[str], str]:
    """Return the blank lines at the start and the line after them."""
    blank: list[str] = []
    for line in lines:
        if line.strip():
            return blank, line
        blank.append(line)
    return blank, ""


def _header(cells: list[str], where: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{where}: two columns are called {twice!r}")
    return names


def _parquet(path: Path) -> Iterator[Found]:
    import pyarrow
    import pyarrow.parquet

    if not path.is_file():
        raise UserError(f"{path}: no such file{did_you_mean_path(str(path))}")
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1_000):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path} row {number}", values)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


READERS: dict[str, Callable[[Path], Iterator[Found]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": lambda path: _csv(path, ","),
    ".tsv": lambda path: _csv(path, "\t"),
    ".parquet": _parquet,
}
"""By the end of a file's name, `.gz` aside. A file with another end is taken for JSON lines."""
