"""A data set in RecBole's atomic files, read exactly as written, checked line by line, with its raw texts beside it."""

import csv
import difflib
import functools
import hashlib
import importlib.util
import io
import math
import os
import re
import shutil
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import NoReturn

import numpy as np
import pandas as pd
import yaml
from numpy.typing import ArrayLike

from llmrec_lib.cache import cache_dir, cached_folder

ATOMIC_TYPES = ("token", "token_seq", "float", "float_seq")
PAD = "[PAD]"
FORMAT_HELP = "the first line of an atomic file names its columns as field:type, separated by tabs"
_FILES = ("inter", "item", "user")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


class DataError(ValueError):
    """A data set cannot be used; the message names file, line and column, and what to do."""


class DataNotFoundError(DataError, FileNotFoundError):
    """There is no data set, or no file, where one was looked for."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Interactions, users and items under internal ids, where 0 is RecBole's PAD.

    `interactions` has one row per (user, item) in file order: int64 columns ``user`` and ``item`` (internal ids >= 1),
    then the other columns of the ``.inter`` file; ``timestamp`` is int64 where all values are whole numbers, else float64.
    `users` and `items` have ``n_users`` and ``n_items`` rows, the row is the internal id; columns of the ``.user`` and
    ``.item`` files, float as float64, all else as the text in the file.
    """

    name: str
    interactions: pd.DataFrame
    users: pd.DataFrame
    items: pd.DataFrame
    user_columns: dict[str, str]  # column -> atomic type
    item_columns: dict[str, str]
    user_ids: np.ndarray  # str objects: internal id -> id in the files; [0] is "[PAD]"
    item_ids: np.ndarray
    time: str | None  # "timestamp", or "position": it only counts the events of each user, or None
    fingerprint: str  # SHA-256 of the bytes of the files
    notes: tuple[str, ...] = ()  # what a reader of results should know, such as repeated pairs that were removed

    @property
    def n_users(self) -> int:
        """Number of users, PAD included."""
        return len(self.user_ids)

    @property
    def n_items(self) -> int:
        """Number of items, PAD included."""
        return len(self.item_ids)

    @property
    def title_column(self) -> str | None:
        """The item column that names an item: "title" is in its name, else it is ``name``, else the first token_seq."""
        return _title_column(self.item_columns)

    @functools.cached_property
    def titles(self) -> list[str]:
        """Title of each item as written in the file, ``[0]`` is empty; the item's id where there is no title."""
        titles = self.items[self.title_column] if self.title_column else [""] * self.n_items
        return _or_ids(titles, self.item_ids)

    @functools.cached_property
    def item_text(self) -> list[str]:
        """All that is known of each item in words, title first: ``"Toy Story. release year: 1995"``; PAD is empty."""
        columns = [column for column in _text_columns(self.item_columns) if column != self.title_column]
        texts = _sentences(self.items, columns, self.titles if self.title_column else [""] * self.n_items)
        return _or_ids(texts, self.item_ids)

    @functools.cached_property
    def user_text(self) -> list[str]:
        """The profile of each user in words, ``"age: 24. gender: M"``, without zip codes, which identify people."""
        columns = [c for c in _text_columns(self.user_columns) if not re.search("zip|post_?(al|code)", c.lower())]
        return _sentences(self.users, columns, [""] * self.n_users)


def load_dataset(name: str = "ml-100k", data_dir: str | Path = "") -> Dataset:
    """Find, read and check the data set ``NAME/NAME.inter`` and, where there are any, ``.item`` and ``.user``.

    `data_dir` is the folder that holds the folder NAME. Empty: ``$LLMREC_DATA``, then ``./dataset``, then the example
    inside the recbole package (ml-100k), then a download, for the names that RecBole knows. Raises DataNotFoundError if
    there is no such data set (also a FileNotFoundError), DataError, naming file, line and column, if one is damaged.
    """
    if not name or name in (".", "..") or re.search(r"[/\\\0]", name):
        raise DataError(f"dataset {name!r} is not a name: give the folder's name alone, and where it lies as data_dir")
    usual = [os.environ.get("LLMREC_DATA"), "dataset", _recbole_folder() / "dataset_example"]
    searched = [Path(place).expanduser() for place in ([data_dir] if str(data_dir) else usual) if place]
    for parent in searched:
        if (parent / name).is_dir():
            return load_folder(parent / name)
    if str(data_dir):
        found = sorted(file.stem for file in parent.glob("*/*.inter") if file.stem == file.parent.name)
        holds = ", ".join(found[:10]) or "no folder NAME with a file NAME.inter, or does not exist"
        raise DataNotFoundError(f"there is no {parent / name}: data_dir holds {holds}; give the folder above {name}")
    urls = download_urls()
    if name not in urls:
        close = difflib.get_close_matches(name, [*urls, "ml-100k"], n=3)
        raise DataNotFoundError(
            f"there is no data set {name!r} in {', '.join(map(str, searched))}, and RecBole offers none of this name "
            f"(similar: {', '.join(close) or 'none'}; ml-100k comes with the package recbole); give the folder that "
            f"holds {name}/{name}.inter as data_dir, or in the environment as LLMREC_DATA"
        )
    target = cache_dir() / "datasets" / name
    return load_folder(cached_folder(target, lambda work: _download(name, urls[name], work)))


def load_folder(path: str | Path) -> Dataset:
    """Read and check the data set in the folder ``DIR/NAME`` or of the file ``DIR/NAME.inter``; see `load_dataset`."""
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / f"{path.resolve().name}.inter"
    if not path.is_file() or path.suffix != ".inter":
        others = ", ".join(sorted(file.name for file in path.parent.glob("*.inter"))) or "none"
        found = f"{path} does not exist, or is no .inter file (.inter files there: {others})"
        raise DataNotFoundError(f"{found}; give a folder NAME that holds NAME.inter: both must have the same name")
    digest, tables = hashlib.sha256(), {}
    for kind in _FILES:
        if (file := path.with_suffix(f".{kind}")).is_file():
            content = file.read_bytes()
            digest.update(f"{kind}:{len(content)}:".encode() + content)
            tables[kind] = _Table(file, content)
    return _assemble(path.stem, tables["inter"], tables.get("user"), tables.get("item"), digest.hexdigest())


def describe(dataset: Dataset) -> pd.Series:
    """Basic facts by name; shares lie between 0 and 1; NaN for what needs real timestamps where there are none.

    same_instant_share: interactions that share user and timestamp with another; tied_last_*: users whose last timestamp
    belongs to several events; under_an_hour_share: users whose whole history spans less than 3,600 s; later_share and
    unseen_items_share: interactions later than a user's last timestamp (the leave-one-out test instant) and items that
    nobody has met until then, both averaged over users.
    """
    events = dataset.interactions
    users, items = dataset.n_users - 1, dataset.n_items - 1
    per_user = events["user"].value_counts().agg(["median", "min", "max"])
    size = {"users": users, "items": items, "interactions": len(events), "density": len(events) / (users * items)}
    facts = size | {
        **per_user.add_prefix("events_per_user_"),
        "events_per_item_median": events["item"].value_counts().median(),
        "distinct_titles": len(set(dataset.titles[1:])),
        "words_per_title": np.mean([len(title.split()) for title in dataset.titles[1:]]),
    }
    time = events["timestamp"] if dataset.time else pd.Series(0, index=events.index)
    by_user = time.groupby(events["user"])
    last = by_user.max()
    tied = (time == by_user.transform("max")).groupby(events["user"]).sum() > 1
    births = time.groupby(events["item"]).min()
    timed = {
        "same_instant_share": pd.DataFrame({"user": events["user"], "time": time}).duplicated(keep=False).mean(),
        "tied_last_users": tied.sum(),
        "tied_last_share": tied.mean(),
        "under_an_hour_share": (last - by_user.min() < 3600).mean(),
        "span_days": (time.max() - time.min()) / 86400,
        "later_share": 1 - np.searchsorted(np.sort(time), last, side="right").mean() / len(time),
        "unseen_items_share": 1 - np.searchsorted(np.sort(births), last, side="right").mean() / items,
    }
    timed = timed if dataset.time == "timestamp" else dict.fromkeys(timed, np.nan)
    return pd.Series(facts | timed, name=dataset.name)


class _Table:
    """One atomic file: its columns as text, their types, and the way to say where something is wrong."""

    def __init__(self, path: Path, content: bytes):
        self.path = path
        content = content.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").rstrip(b"\n")
        if b"\n" not in content.strip():
            raise DataError(f"{path}: the file is empty, or has no lines below its header; {FORMAT_HELP}")
        text = content.decode("utf-8", errors="surrogateescape")
        if broken := re.search(r"[\0\udc80-\udcff]", text):
            line = text.count("\n", 0, broken.start()) + 1
            raise DataError(f"{path}, line {line}: not UTF-8, or a NUL character; save the file as UTF-8 text")
        self.types: dict[str, str] = {}
        for field in text.partition("\n")[0].split("\t"):
            name, _, kind = field.partition(":")
            if not name or kind not in ATOMIC_TYPES:
                problem = f"{field[:80]!r} is not field:type with a type out of {', '.join(ATOMIC_TYPES)}"
                self.fail(1, name[:80], problem, FORMAT_HELP)
            if name in self.types:
                self.fail(1, name, "this name occurs twice", "rename or delete one of the two columns")
            self.types[name] = kind
        for number, line in enumerate(io.StringIO(text, newline="\n"), start=1):
            n_fields = line.count("\t") + 1
            if n_fields != len(self.types):
                found = f"{n_fields} field(s) instead of {len(self.types)} ({', '.join(self.types)}): {line[:80]!r}"
                remedy = "separate fields by single tabs, also empty ones" if line.strip() else "delete the empty line"
                raise DataError(f"{path}, line {number}: {found}; {remedy}")
        as_written = {"dtype": str, "na_filter": False, "quoting": csv.QUOTE_NONE, "skip_blank_lines": False}
        columns = {"names": list(self.types), "header": 0, "sep": "\t", "lineterminator": "\n"}
        self.frame = pd.read_csv(io.BytesIO(content), **columns, **as_written)

    def fail(self, line: int, column: str, problem: str, remedy: str) -> NoReturn:
        """Raise a DataError; the header is line 1."""
        raise DataError(f"{self.path}, line {line}, column {column!r}: {problem}; {remedy}")

    def refuse(self, column: str, wrong: ArrayLike, problem: str) -> None:
        """Fail at the first row that is `wrong`."""
        if np.any(wrong):
            row = int(np.argmax(wrong))
            self.fail(row + 2, column, f"{self.frame[column][row][:40]!r} {problem}", "correct it, or delete the row")

    def require(self, column: str, kind: str) -> None:
        """The file must have this column, of this type."""
        if self.types.get(column) != kind:
            found = ", ".join(f"{name}:{self.types[name]}" if name == column else name for name in self.types)
            raise DataError(f"{self.path}, line 1: no column {column}:{kind} (found: {found}); add or rename it")

    def ids(self, column: str) -> pd.Series:
        """The id of each row."""
        self.require(column, "token")
        ids = self.frame[column]
        self.refuse(column, ids.str.strip().isin(["", PAD]), f"is an empty id, or the reserved {PAD}")
        return ids

    def numbers(self, column: str, required: bool = False, whole: bool = False) -> np.ndarray:
        """The column as float64; with `whole` as int64 if all are whole numbers. Not `required`: empty means NaN."""
        codes, texts = pd.factorize(self.frame[column])
        limit, missing = 2.0**63 if whole else math.inf, () if required else ("", "nan")
        fits = [text.lower() in missing or _NUMBER.fullmatch(text) and abs(float(text)) < limit for text in texts]
        self.refuse(column, ~np.array(fits, dtype=bool)[codes], "is not a finite number within 64 bits")
        if whole and all(Decimal(text) == int(Decimal(text)) for text in texts):
            return np.array([int(Decimal(text)) for text in texts], dtype=np.int64)[codes]
        return np.array([float(text or "nan") for text in texts], dtype=np.float64)[codes]

    def values(self, column: str) -> np.ndarray:
        """The column under its type: float as numbers, where empty means NaN; all else as the text in the file."""
        if self.types[column] == "float":
            return self.numbers(column)
        if self.types[column] == "float_seq":
            wrong = [not all(map(_NUMBER.fullmatch, text.split())) for text in self.frame[column]]
            self.refuse(column, wrong, "does not hold numbers separated by blanks")
        return self.frame[column].to_numpy()


def _assemble(name: str, inter: _Table, user: _Table | None, item: _Table | None, fingerprint: str) -> Dataset:
    notes: list[str] = []
    for column in {"user", "item"}.intersection(inter.types):
        inter.fail(1, column, "this name is taken by the internal ids", "rename the column")
    users, user_ids, user_frame, user_columns = _entities(inter, "user_id", user, notes)
    items, item_ids, item_frame, item_columns = _entities(inter, "item_id", item, notes)
    columns: dict[str, np.ndarray] = {"user": users, "item": items}
    for column in inter.types:
        if column in ("rating", "timestamp"):
            inter.require(column, "float")
            columns[column] = inter.numbers(column, required=True, whole=column == "timestamp")
        elif column not in ("user_id", "item_id"):
            columns[column] = inter.values(column)
    events, time = pd.DataFrame(columns), None
    if "timestamp" in columns:
        events = events.sort_values("timestamp", kind="stable")
        start = events["timestamp"].iloc[0]
        counted = (events.groupby("user").cumcount() + start == events["timestamp"]).all()
        time = "position" if start in (0, 1) and counted else "timestamp"
    events = events.drop_duplicates(["user", "item"]).sort_index().reset_index(drop=True)
    if repeated := len(users) - len(events):
        notes.append(f"{repeated:,} repeated user-item pairs removed (earliest kept)")
    if time is None:
        notes.append("no timestamps: the order of events is unknown")
    elif time == "position":
        notes.append("timestamps only count the events of each user: they cannot be compared between users")
    elif events["timestamp"].nunique() == 1:
        notes.append("all timestamps are equal: the order of events is unknown")
    frames = (events, user_frame, item_frame, user_columns, item_columns)
    return Dataset(name, *frames, user_ids, item_ids, time, fingerprint, tuple(notes))


def _entities(
    inter: _Table, column: str, table: _Table | None, notes: list[str]
) -> tuple[np.ndarray, np.ndarray, pd.DataFrame, dict[str, str]]:
    """Internal id of each interaction, raw id of each internal id, rows of the .user or .item file in this order, types."""
    ids = inter.ids(column)
    known, frame, kinds = ids.unique(), {}, {}
    if table is not None:
        own = table.ids(column)
        table.refuse(column, own.duplicated(), "occurs twice")
        inter.refuse(column, ~ids.isin(own), f"does not occur in {table.path.name}")
        used = own.isin(known).to_numpy()
        if not used.all():
            notes.append(f"{(~used).sum():,} {column[:4]}s without interactions left out")
        known = own[used].to_numpy()
        kinds = {name: kind for name, kind in table.types.items() if name != column}
        for name, kind in kinds.items():
            frame[name] = np.insert(table.values(name)[used], 0, np.nan if kind == "float" else "")
        title = _title_column(kinds) if column == "item_id" else None
        if title and re.search("title|name", title.lower()):
            table.refuse(title, used & (table.frame[title].str.strip() == ""), "is an empty title")
    raw = np.array([PAD, *known], dtype=object)
    return pd.Index(raw).get_indexer(ids).astype(np.int64), raw, pd.DataFrame(frame, index=range(len(raw))), kinds


def _text_columns(types: dict[str, str]) -> list[str]:
    return [column for column, kind in types.items() if kind in ("token", "token_seq")]


def _title_column(types: dict[str, str]) -> str | None:
    columns = _text_columns(types)
    names = ("^title$", "title", "^((item|product)_)?name$")
    ranked = [column for name in names for column in columns if re.search(name, column.lower())]
    ranked += [c for c in columns if types[c] == "token_seq"] + [c for c in columns if "name" in c.lower()]
    return ranked[0] if ranked else None


def _sentences(frame: pd.DataFrame, columns: list[str], starts: list[str]) -> list[str]:
    """One text per row: its start, then ``column: value`` for each column that is not empty."""
    texts = list(starts)
    for column in columns:
        label = column.replace("_", " ")
        for row, value in enumerate(frame[column].str.strip()):
            if value:
                before = texts[row] and texts[row] + (" " if texts[row][-1] in ".!?" else ". ")
                texts[row] = f"{before}{label}: {value}"
    return texts


def _or_ids(texts: Iterable[str], ids: np.ndarray) -> list[str]:
    """The texts, the id in place of an empty one; PAD's stays empty."""
    return ["", *[text if text.strip() else key for text, key in zip(texts, ids, strict=True)][1:]]


def _recbole_folder() -> Path:
    """Where the recbole package lies, found without importing it."""
    return Path(importlib.util.find_spec("recbole").origin).parent


def download_urls() -> dict[str, str]:
    """Data sets that RecBole offers for download: name to the address of a zip file, listed in the recbole package."""
    return yaml.safe_load((_recbole_folder() / "properties/dataset/url.yaml").read_text(encoding="utf-8"))


class _OnlyHttps(urllib.request.BaseHandler):
    """Refuses every other address, also one that a redirection leads to; this machine itself may use http."""

    def default_open(self, req: urllib.request.Request) -> None:
        loopback = urllib.parse.urlsplit(req.full_url).hostname in ("localhost", "127.0.0.1", "::1")
        if req.type != "https" and not (req.type == "http" and loopback):
            raise DataError(f"{req.full_url} is not https")


def _download(name: str, url: str, work: Path) -> Path:
    archive, folder = work / Path(urllib.parse.urlsplit(url).path).name, work / "files"
    try:
        opener = urllib.request.build_opener(_OnlyHttps)
        with opener.open(url, timeout=30) as response, open(archive, "wb") as file:
            shutil.copyfileobj(response, file)
        _extract(archive, folder, name)
    except (OSError, zipfile.BadZipFile, DataError) as error:  # OSError: no network, time-out, HTTP status
        failed = f"data set {name!r} could not be downloaded from {url} ({error})"
        remedy = f"fetch it elsewhere, unpack it as {name}/{name}.inter (.item, .user), give the folder as data_dir"
        raise DataNotFoundError(f"{failed}; {remedy}") from error
    return folder


def _extract(archive: Path, folder: Path, name: str) -> None:
    """Write the atomic files of `archive` to `folder` as NAME.*; paths inside the archive never decide where."""
    with zipfile.ZipFile(archive) as package:
        members = {Path(member.filename).name: member for member in package.infolist()}
        stems = sorted(Path(file).stem for file in members if file.endswith(".inter"))
        chosen = [stem for stem in (archive.stem, name) if stem in stems] or stems
        if len(stems) != 1 and chosen is stems:
            raise DataError(f"it holds {', '.join(stems) + ' as' if stems else 'no'} .inter files, one is needed")
        for kind in _FILES:
            if member := members.get(f"{chosen[0]}.{kind}"):
                member.filename = f"{name}.{kind}"
                package.extract(member, folder)
