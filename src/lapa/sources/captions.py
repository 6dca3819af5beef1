"""Captions of videos, or of folders of images, from JSON, JSONL or CSV."""

from __future__ import annotations

import csv
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from lapa.console import say, warn
from lapa.data.source import Reading
from lapa.errors import UserError
from lapa.files import as_path, read_json, whole_characters
from lapa.sources.folder_scan import short_names, stop_or_skip

# Names by which captions are found in the folder of the clips.
CAPTIONS_FILES = ("captions.json", "captions.jsonl", "captions.csv")
TEXT_COLUMNS = ("text", "caption", "instruction")


@dataclass(frozen=True)
class CaptionedReading(Reading):
    """Reading options of a folder of clips with captions."""

    folder: Annotated[str, tyro.conf.Positional]
    """Folder with the clips; folders inside it are searched too."""
    captions: str | None = None
    """JSON {clip: text}, JSONL or CSV with the columns file and text (or caption, or instruction); by default
    captions.json, .jsonl or .csv in the folder, where there is one and no --caption."""
    caption: str | None = None
    """One text for every clip; with --captions, for those that have none there."""
    skip_bad: bool = False
    """Leave out, and count, clips that cannot be read, clips without caption and captions without clip."""

    @property
    def captions_file(self) -> Path | None:
        """The file of the captions: the one that is given, or without any, the one in the folder."""
        if self.captions is not None:
            return Path(self.captions)
        return self._captions_inside() if self.caption is None else None

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files that are read in addition to the folder."""
        return () if self.captions_file is None else (self.captions_file,)

    def settings(self, folder: str, **others: Any) -> dict[str, Any]:
        """Returns the options as a converted dataset records them. folder: its name; others: of the source."""
        captions = self.captions_file and self.captions_file.name
        values = {"folder": folder, "captions": captions, "caption": self._text, **others}
        return {name: value for name, value in values.items() if value}

    def find_captions(self, names: Sequence[str], what: str, notes: Counter[str]) -> tuple[dict[str, str], int]:
        """Returns the text of each clip that has one, and how many problems were skipped.

        names: the clips, which a caption may name with their folders or, where that is unique, without; what: what a
        clip is called in messages. Of several captions of a clip the first counts, and an empty one is none. What is
        skipped is also added to `notes`.
        Raises UserError for clips without caption and captions without clip, unless `skip_bad`.
        """
        path, inside = self.captions_file, self._captions_inside()
        if path is None and self.caption is None:
            raise UserError(f'{self.folder}: no captions; give --captions FILE, or --caption "what the {what}s show"')
        if self.captions is None and inside is not None:
            use = "not used, --caption is given; --captions takes it" if path is None else "used as the captions"
            say(f"{inside}: {use}")
        found = dict.fromkeys(names, self._text) if self._text is not None else {}
        if path is None:
            return found, 0
        # macOS writes the accents of names apart from their letters.
        known, ambiguous = ({_composed(key): name for key, name in each.items()} for each in short_names(names))
        missing, unclear, captioned, again = [], [], set(), 0
        for written, text in read_captions(path):
            key = _composed(written.removeprefix("./"))
            name = known.get(key)
            if key in ambiguous:
                unclear.append(f"{path}: {written} may be {ambiguous[key]}")
            elif name is None:
                missing.append(f"{path}: has a caption for {written}, which is not in {self.folder}")
            elif name in captioned:
                again += 1
            elif text.strip():
                found[name] = whole_characters(text.strip())
                captioned.add(name)
        if again:
            warn(f"{path}: further captions of a {what} that has one, not used: {again}")
        lost = stop_or_skip(missing, f"add the {what}, or remove the entry, or give --skip-bad", self.skip_bad)
        vague = stop_or_skip(unclear, "put the folder before the name, or give --skip-bad", self.skip_bad)
        notes[f"further captions of a {what}, not used"] = again
        notes[f"captions without a {what}"], notes[f"captions that fit several {what}s"] = lost, vague
        bare = [f"{self.folder}/{name}: has no caption in {path}" for name in names if name not in found]
        fix = "add one, or give --caption TEXT for those without, or --skip-bad to leave them out"
        num_bare = notes[f"{what}s without a caption, left out"] = stop_or_skip(bare, fix, self.skip_bad)
        return found, lost + vague + num_bare

    @property
    def _text(self) -> str | None:
        return self.caption and whole_characters(self.caption)

    def _captions_inside(self) -> Path | None:
        found = (as_path(self.folder) / name for name in CAPTIONS_FILES)
        return next((path for path in found if path.is_file()), None)


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def read_captions(path: Path) -> list[tuple[str, str]]:
    """(file name, caption) in order, from JSON, JSONL or CSV. Raises UserError naming the file and the line."""
    suffix = path.suffix.lower()
    if not path.is_file():
        raise UserError(f"{path}: no such captions file")
    if suffix == ".json":
        captions = read_json(path)
        if isinstance(captions, Mapping):
            wrong = next((name for name, text in captions.items() if not isinstance(text, str)), None)
            if wrong is not None:
                raise UserError(f'{path}: the caption of {wrong!r} is not text; expected {{"file": "text"}}')
            return list(captions.items())
        return _rows(path, captions if isinstance(captions, list) else [captions])
    try:
        if suffix in (".jsonl", ".ndjson"):
            # Not splitlines: a caption may contain what Unicode regards as the end of a line.
            lines = enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1)
            return _rows(path, (_json_line(path, number, line) for number, line in lines if line.strip()))
        if suffix == ".csv":
            with path.open(newline="", encoding="utf-8-sig") as table:
                return _rows(path, csv.DictReader(table))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}); save it as UTF-8 text") from None
    raise UserError(f"{path}: captions are .json, .jsonl or .csv, not {suffix or 'a file without a suffix'}")


def _rows(path: Path, rows: Iterable[Any]) -> list[tuple[str, str]]:
    captions = []
    for number, row in enumerate(rows, 1):
        columns = [name for name in TEXT_COLUMNS if isinstance(row, Mapping) and name in row]
        if not columns or not row.get("file"):
            raise UserError(f"{path}: entry {number} needs `file` and one of {', '.join(TEXT_COLUMNS)}")
        captions.append((str(row["file"]), str(next((row[name] for name in columns if row[name]), ""))))
    return captions


def _json_line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: line {number} is not valid JSON ({error})") from None
