"""A data set in RecBole's atomic files, read exactly as written, checked line by line, with its raw texts beside it."""

from __future__ import annotations

import csv
import difflib
import functools
import hashlib
import importlib.util
import io
import os
import re
import shutil
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import pandas as pd
from filelock import FileLock

from llmrec_lib.cache import cache_dir

ATOMIC_TYPES = ("token", "token_seq", "float", "float_seq")
PAD = "[PAD]"
FORMAT_HELP = "the first line of an atomic file names its columns as field:type, separated by tabs"
_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_NAMES_OF_NAMES = ("name", "item_name", "product_name")


class DataError(ValueError):
    """A data set cannot be used; the message names file, line and column, and what to do."""


class DataNotFoundError(DataError, FileNotFoundError):
    """There is no data set, or no file, where one was looked for."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Interactions, users and items under internal ids, where 0 is RecBole's PAD.

    Attributes
    ----------
    name : str
        Name of the data set and of its files.
    interactions : pandas.DataFrame
        One row per (user, item) in file order; int64 columns ``user`` and ``item`` (internal ids >= 1), then the other
        columns of the ``.inter`` file. ``timestamp`` is int64 where all values are whole numbers, else float64.
    users, items : pandas.DataFrame
        ``n_users`` and ``n_items`` rows; the row is the internal id, row 0 is PAD; columns of the ``.user`` and
        ``.item`` files (float as float64, all else as the text in the file). Without the file: no columns.
    user_columns, item_columns : dict of str to str
        Column to atomic type: token, token_seq, float or float_seq.
    user_ids, item_ids : numpy.ndarray of str objects
        Internal id to the id in the files; ``[0]`` is ``"[PAD]"``.
    time : {"timestamp", "position", None}
        ``"position"``: the timestamps only count the events within each user (0, 1, 2 … or 1, 2, 3 …), so that they
        cannot be compared between users. None: there are no timestamps.
    fingerprint : str
        SHA-256 of the bytes of the atomic files.
    notes : tuple of str
        What a reader of results should know, such as repeated pairs that were removed.
    """

    name: str
    interactions: pd.DataFrame
    users: pd.DataFrame
    items: pd.DataFrame
    user_columns: dict[str, str]
    item_columns: dict[str, str]
    user_ids: np.ndarray
    item_ids: np.ndarray
    time: str | None
    fingerprint: str
    notes: tuple[str, ...] = ()

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
        if self.title_column is None:
            return ["", *self.item_ids[1:]]
        return _or_ids(self.items[self.title_column], self.item_ids)

    @functools.cached_property
    def item_text(self) -> list[str]:
        """All that is known of each item in words, title first: ``"Toy Story. release year: 1995"``; PAD is empty."""
        columns = [column for column in _text_columns(self.item_columns) if column != self.title_column]
        return _or_ids(_sentences(self.items, columns, self.titles if self.title_column else None), self.item_ids)

    @functools.cached_property
    def user_text(self) -> list[str]:
        """The profile of each user in words, ``"age: 24. gender: M"``, without zip codes, which identify people."""
        columns = [c for c in _text_columns(self.user_columns) if not re.search("zip|post_?(al|code)", c.lower())]
        return _sentences(self.users, columns)


def load_dataset(name: str = "ml-100k", data_dir: str | Path = "") -> Dataset:
    """Find, read and check a data set.

    Parameters
    ----------
    name : str
        The files are ``NAME/NAME.inter`` and, where there are any, ``NAME/NAME.item`` and ``NAME/NAME.user``.
    data_dir : str or Path
        Folder that holds the folder NAME. Empty: ``$LLMREC_DATA``, then ``./dataset``, then the example inside the
        recbole package (ml-100k), then a download, for the names that RecBole knows.

    Raises
    ------
    DataNotFoundError
        If there is no such data set (also a FileNotFoundError).
    DataError
        If a file is damaged: the message names file, line and column.
    """
    if not name or name in (".", "..") or re.search(r"[/\\\0]", name):
        raise DataError(f"dataset {name!r} is not a name: give the folder's name alone, and where it lies as data_dir")
    if str(data_dir):
        parent = Path(data_dir).expanduser()
        if not (parent / name).is_dir():
            raise DataNotFoundError(f"there is no folder {parent / name}; {_what_is_there(parent, name)}")
        return load_folder(parent / name)
    searched = [Path(os.environ["LLMREC_DATA"]).expanduser()] if os.environ.get("LLMREC_DATA") else []
    searched.append(Path("dataset"))
    if package := _recbole_folder():
        searched.append(package / "dataset_example")
    for parent in searched:
        if (parent / name).is_dir():
            return load_folder(parent / name)
    urls = download_urls()
    if name not in urls:
        close = difflib.get_close_matches(name, [*urls, "ml-100k"], n=3)
        raise DataNotFoundError(
            f"there is no data set {name!r} in {', '.join(map(str, searched))}, and "
            + ("RecBole offers none of this name" if urls else "the package recbole, which carries ml-100k, is missing")
            + (f" (similar: {', '.join(close)})" if close else "")
            + f"; give the folder that holds {name}/{name}.inter as data_dir, or in the environment as LLMREC_DATA"
        )
    return load_folder(_download(name, urls[name]))


def load_folder(path: str | Path) -> Dataset:
    """Read and check the atomic files in the folder ``DIR/NAME``, or those beside the file ``DIR/NAME.inter``.

    Raises
    ------
    DataNotFoundError, DataError
        As `load_dataset`.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        name, folder = path.resolve().name, path
    elif path.suffix == ".inter":
        name, folder = path.stem, path.parent
    else:
        what = "is not a data set" if path.exists() else "does not exist"
        raise DataNotFoundError(f"{path} {what}: give a folder NAME with the file NAME.inter in it, or the .inter file")
    files = {kind: folder / f"{name}.{kind}" for kind in ("inter", "item", "user")}
    if not files["inter"].is_file():
        others = sorted(file.name for file in folder.glob("*.inter")) if folder.is_dir() else []
        raise DataNotFoundError(
            f"there is no file {files['inter']}; "
            + (f"the folder holds {', '.join(others)}: " if others else "")
            + "folder and file must have the same name, NAME/NAME.inter"
        )
    contents = {kind: file.read_bytes() for kind, file in files.items() if file.is_file()}
    digest = hashlib.sha256()
    for kind, content in contents.items():
        digest.update(f"{kind}:{len(content)}:".encode() + content)
    tables = {kind: _Table(files[kind], content) for kind, content in contents.items()}
    return _assemble(name, tables["inter"], tables.get("user"), tables.get("item"), digest.hexdigest())


def describe(dataset: Dataset) -> pd.Series:
    """Basic facts of a data set, by name; shares lie between 0 and 1; NaN for what needs real timestamps without them.

    Returns
    -------
    pandas.Series
        users, items, interactions (PAD not counted); density; events_per_user_median, _min, _max;
        events_per_item_median; distinct_titles; words_per_title (mean); same_instant_share (interactions that share
        user and timestamp with another); tied_last_users and tied_last_share (users whose last timestamp belongs to
        several events); under_an_hour_share (users whose whole history spans less than 3,600 s); span_days;
        later_share and unseen_items_share: of all interactions, those later than a user's last timestamp (the
        leave-one-out test instant), and of all items, those nobody has met until then, both averaged over users.
    """
    user, item = (dataset.interactions[column].to_numpy() for column in ("user", "item"))
    per_user = np.bincount(user, minlength=dataset.n_users)[1:]
    users, items = dataset.n_users - 1, dataset.n_items - 1
    facts: dict[str, float] = {
        "users": users,
        "items": items,
        "interactions": len(user),
        "density": len(user) / (users * items),
        "events_per_user_median": float(np.median(per_user)),
        "events_per_user_min": int(per_user.min()),
        "events_per_user_max": int(per_user.max()),
        "events_per_item_median": float(np.median(np.bincount(item, minlength=dataset.n_items)[1:])),
        "distinct_titles": len(set(dataset.titles[1:])),
        "words_per_title": float(np.mean([len(title.split()) for title in dataset.titles[1:]])),
    }
    timed = ("same_instant_share", "tied_last_users", "tied_last_share", "under_an_hour_share", "span_days")
    timed += ("later_share", "unseen_items_share")
    if dataset.time != "timestamp":
        return pd.Series(facts | dict.fromkeys(timed, np.nan), name=dataset.name)
    time = dataset.interactions["timestamp"]
    by_user = time.groupby(user)
    first, last = by_user.min(), by_user.max()
    tied = (time.to_numpy() == last.loc[user].to_numpy()).astype(int)
    tied_users = int((np.bincount(user, weights=tied, minlength=dataset.n_users) > 1).sum())
    births = np.sort(time.groupby(item).min().to_numpy())
    moments = np.sort(time.to_numpy())
    values = (
        float(dataset.interactions.duplicated(["user", "timestamp"], keep=False).mean()),
        tied_users,
        tied_users / users,
        float(((last - first) < 3600).mean()),
        float(time.max() - time.min()) / 86400,
        1 - float(np.searchsorted(moments, last, side="right").mean()) / len(moments),
        1 - float(np.searchsorted(births, last, side="right").mean()) / items,
    )
    return pd.Series(facts | dict(zip(timed, values, strict=True)), name=dataset.name)


class _Table:
    """One atomic file: its columns as text, their types, and the way to say where something is wrong."""

    def __init__(self, path: Path, content: bytes):
        self.path = path
        content = content.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").rstrip(b"\n")
        if not content.strip():
            raise DataError(f"{path}: the file is empty; {FORMAT_HELP}")
        try:
            content.decode("utf-8")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise DataError(f"{path}, line {line}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
        if b"\0" in content:
            line = content.count(b"\n", 0, content.index(b"\0")) + 1
            raise DataError(f"{path}, line {line}: holds a NUL character, so it is no text file; save it as UTF-8 text")
        header, _, body = content.partition(b"\n")
        self.types = self._columns(header.decode())
        self._count_fields(body)
        self.frame = pd.read_csv(
            io.BytesIO(body or b"\n"),
            sep="\t",
            header=None,
            names=list(self.types),
            index_col=False,
            dtype=str,
            na_filter=False,
            quoting=csv.QUOTE_NONE,
            lineterminator="\n",
            skip_blank_lines=False,
            encoding="utf-8",
            nrows=None if body else 0,
        )

    def fail(self, row: int | None, column: str, problem: str, remedy: str) -> NoReturn:
        """Raise a DataError for data row `row` (0 is the line after the header; None: the header itself)."""
        raise DataError(f"{self.path}, line {1 if row is None else row + 2}, column {column!r}: {problem}; {remedy}")

    def _columns(self, header: str) -> dict[str, str]:
        fields = header.split("\t")
        if len(fields) == 1 and header.count(":") > 1:
            raise DataError(
                f"{self.path}, line 1: no tab in the header {header[:80]!r}; {FORMAT_HELP}, not by commas or blanks"
            )
        types: dict[str, str] = {}
        for field in fields:
            name, colon, kind = field.partition(":")
            if not colon or not name or kind not in ATOMIC_TYPES:
                problem = f"{field[:80]!r} is not field:type with a type out of {', '.join(ATOMIC_TYPES)}"
                self.fail(None, name[:80], problem, FORMAT_HELP)
            if name in types:
                self.fail(None, name, "this name occurs twice", "rename or delete one of the two columns")
            types[name] = kind
        return types

    def _count_fields(self, body: bytes) -> None:
        if not body:
            return
        characters = np.frombuffer(body, dtype=np.uint8)
        ends = np.append(np.flatnonzero(characters == ord("\n")), len(characters))
        tabs = np.diff(np.searchsorted(np.flatnonzero(characters == ord("\t")), ends), prepend=0)
        wrong = np.flatnonzero(tabs != len(self.types) - 1)
        if len(wrong):
            row = int(wrong[0])
            line = body.split(b"\n", row + 1)[row].decode()
            found = f"{tabs[row] + 1} field(s) instead of {len(self.types)} ({', '.join(self.types)}): {line[:80]!r}"
            problem = found if line.strip() else "an empty line"
            remedy = "fields are separated by single tabs, an empty field is written as nothing between two tabs"
            raise DataError(f"{self.path}, line {row + 2}: {problem}; {remedy if line.strip() else 'delete it'}")

    def require(self, column: str, kind: str) -> None:
        """The file must have this column, of this type."""
        if column not in self.types:
            found = ", ".join(self.types)
            raise DataError(
                f"{self.path}, line 1: no column {column}:{kind} (found: {found}); add it, or rename the column"
            )
        if self.types[column] != kind:
            self.fail(None, column, f"has type {self.types[column]}", f"it must be {column}:{kind}")

    def codes(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """Each row's number of its id, and the distinct ids in order of appearance; no id may be empty."""
        self.require(column, "token")
        codes, ids = pd.factorize(self.frame[column].to_numpy())
        for code, text in enumerate(ids):
            if not text.strip() or text == PAD:
                problem = f"the name {PAD} is reserved" if text == PAD else "empty id"
                self.fail(_first(codes, code), column, problem, "give each row an id, or delete the row")
        return codes, ids

    def numbers(self, column: str, required: bool = True, whole: bool = False) -> np.ndarray:
        """The column as float64; with `whole` as int64 if all are whole numbers. Not `required`: empty means NaN."""
        codes, texts = pd.factorize(self.frame[column].to_numpy())
        values: list[float] = []
        for code, text in enumerate(texts):
            if _INTEGER.fullmatch(text) and whole:
                value: float = int(text)
            elif _NUMBER.fullmatch(text):
                value = float(text)
            else:
                value = float("nan") if not required and text.lower() in ("", "nan") else float("inf")
            if value in (float("inf"), float("-inf")) or not -(2**63) <= value < 2**63 and whole:
                problem = f"{text[:40]!r} is not a finite number" + (" within 64 bits" if whole else "")
                self.fail(_first(codes, code), column, problem, "correct the value, or delete the row")
            values.append(value)
        if whole and all(value == int(value) for value in values):
            return np.array([int(value) for value in values], dtype=np.int64)[codes]
        return np.array(values, dtype=np.float64)[codes]

    def values(self, column: str) -> np.ndarray:
        """The column under its type: float as numbers, where empty means NaN; all else as the text in the file."""
        if self.types[column] == "float":
            return self.numbers(column, required=False)
        values = self.frame[column].to_numpy()
        if self.types[column] == "float_seq":
            codes, texts = pd.factorize(values)
            for code, text in enumerate(texts):
                if not all(_NUMBER.fullmatch(part) for part in text.split()):
                    remedy = "separate numbers by blanks, and correct the value"
                    self.fail(_first(codes, code), column, f"{text[:40]!r} holds something else than numbers", remedy)
        return values


def _assemble(name: str, inter: _Table, user: _Table | None, item: _Table | None, fingerprint: str) -> Dataset:
    notes: list[str] = []
    for column in ("user", "item"):
        if column in inter.types:
            inter.fail(None, column, "this name is taken by the internal ids", "rename the column")
    users, user_ids, user_frame = _entities(inter, "user_id", user, notes)
    items, item_ids, item_frame = _entities(inter, "item_id", item, notes)
    if not len(users):
        raise DataError(f"{inter.path}: there are no interactions below the header; add at least one line")
    columns: dict[str, np.ndarray] = {"user": users, "item": items}
    for column in inter.types:
        if column in ("rating", "timestamp"):
            inter.require(column, "float")
            columns[column] = inter.numbers(column, whole=column == "timestamp")
        elif column not in ("user_id", "item_id"):
            columns[column] = inter.values(column)
    interactions = pd.DataFrame(columns)
    time = None
    if "timestamp" in columns:
        time = "position" if _only_counts(users, columns["timestamp"]) else "timestamp"
    order = np.arange(len(users)) if time is None else np.argsort(columns["timestamp"], kind="stable")
    repeated = interactions.iloc[order].duplicated(["user", "item"]).to_numpy()
    if repeated.any():
        interactions = interactions.iloc[np.sort(order[~repeated])].reset_index(drop=True)
        notes.append(f"{int(repeated.sum()):,} repeated user-item pairs removed (earliest kept)")
    if time is None:
        notes.append("no timestamps: the order of events is unknown")
    elif time == "position":
        notes.append("timestamps only count the events of each user: they cannot be compared between users")
    elif columns["timestamp"].min() == columns["timestamp"].max():
        notes.append("all timestamps are equal: the order of events is unknown")
    return Dataset(
        name=name,
        interactions=interactions,
        users=user_frame,
        items=item_frame,
        user_columns={c: kind for c, kind in user.types.items() if c != "user_id"} if user else {},
        item_columns={c: kind for c, kind in item.types.items() if c != "item_id"} if item else {},
        user_ids=user_ids,
        item_ids=item_ids,
        time=time,
        fingerprint=fingerprint,
        notes=tuple(notes),
    )


def _entities(
    inter: _Table, column: str, table: _Table | None, notes: list[str]
) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
    """Internal id of each interaction, raw id of each internal id, rows of the .user or .item file in this order."""
    codes, ids = inter.codes(column)
    if table is None:
        raw = np.array([PAD, *ids], dtype=object)
        return codes.astype(np.int64) + 1, raw, pd.DataFrame(index=pd.RangeIndex(len(raw)))
    own_codes, own_ids = table.codes(column)
    repeated = np.flatnonzero(pd.Series(own_codes).duplicated().to_numpy())
    if len(repeated):
        row = int(repeated[0])
        first = int(np.argmax(own_codes == own_codes[row])) + 2
        remedy = "delete one of the two lines"
        table.fail(row, column, f"{own_ids[own_codes[row]]!r} occurs twice, first in line {first}", remedy)
    row_of = pd.Index(own_ids).get_indexer(pd.Index(ids))
    if (row_of < 0).any():
        code = int(np.argmax(row_of < 0))
        problem = f"{ids[code]!r} does not occur in {table.path.name} ({int((row_of < 0).sum()):,} such ids in all)"
        inter.fail(_first(codes, code), column, problem, f"add it to {table.path.name}, or delete its interactions")
    used = np.sort(row_of)
    raw = np.array([PAD, *own_ids[used]], dtype=object)
    frame = {}
    for name, kind in table.types.items():
        if name != column:
            values = table.values(name)[used]
            frame[name] = (
                np.concatenate(([np.nan], values)) if kind == "float" else np.array(["", *values], dtype=object)
            )
    if column == "item_id":
        title = _title_column({name: kind for name, kind in table.types.items() if name != column})
        if title and re.search("title|name", title.lower()):
            for row, text in zip(used, frame[title][1:], strict=True):
                if not text.strip():
                    table.fail(int(row), title, "empty title", "write a title, for instance the item's id")
    if len(own_ids) > len(used):
        what = "items" if column == "item_id" else "users"
        notes.append(f"{len(own_ids) - len(used):,} {what} without interactions left out")
    return np.searchsorted(used, row_of)[codes].astype(np.int64) + 1, raw, pd.DataFrame(frame, index=range(len(raw)))


def _first(codes: np.ndarray, code: int) -> int:
    """The first row with this code."""
    return int(np.argmax(codes == code))


def _only_counts(users: np.ndarray, time: np.ndarray) -> bool:
    """Are the timestamps of each user 0, 1, 2 …, or those of each user 1, 2, 3 …?"""
    if time.min() not in (0, 1):
        return False
    order = np.lexsort((time, users))
    sizes = np.bincount(users)[1:]
    position = np.arange(len(users)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return bool(np.array_equal(time[order] - time.min(), position))


def _text_columns(types: dict[str, str]) -> list[str]:
    return [column for column, kind in types.items() if kind in ("token", "token_seq")]


def _title_column(types: dict[str, str]) -> str | None:
    columns = _text_columns(types)
    ranked = [column for column in columns if column.lower() == "title"]
    ranked += [column for column in columns if "title" in column.lower()]
    ranked += [column for column in columns if column.lower() in _NAMES_OF_NAMES]
    ranked += [column for column in columns if types[column] == "token_seq"]
    ranked += [column for column in columns if "name" in column.lower()]
    return ranked[0] if ranked else None


def _sentences(frame: pd.DataFrame, columns: list[str], start: list[str] | None = None) -> list[str]:
    """One text per row: `start`, then ``column: value`` for each column that is not empty; row 0 (PAD) is empty."""
    texts = list(start) if start else [""] * len(frame)
    for column in columns:
        label = column.replace("_", " ")
        for row, value in enumerate(frame[column]):
            if value.strip():
                join = "" if not texts[row] else " " if texts[row][-1] in ".!?" else ". "
                texts[row] += f"{join}{label}: {value.strip()}"
    return texts


def _or_ids(texts: Iterable[str], ids: np.ndarray) -> list[str]:
    """The texts, the id in place of an empty one; PAD's stays empty."""
    filled = [text if text.strip() else key for text, key in zip(texts, ids, strict=True)]
    return ["", *filled[1:]]


def _what_is_there(parent: Path, name: str) -> str:
    if (parent / f"{name}.inter").is_file():
        return f"{name}.inter lies in {parent} itself: move it into a folder {name}, data_dir is the folder above that"
    if not parent.is_dir():
        return "data_dir itself does not exist: correct it"
    found = sorted(folder.name for folder in parent.iterdir() if (folder / f"{folder.name}.inter").is_file())
    return f"data_dir holds {', '.join(found[:10]) if found else 'no folder NAME with a file NAME.inter'}"


def _recbole_folder() -> Path | None:
    """Where the recbole package lies, found without importing it."""
    spec = importlib.util.find_spec("recbole")
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def download_urls() -> dict[str, str]:
    """Data sets that RecBole offers for download: name to the address of a zip file, listed in the recbole package."""
    package = _recbole_folder()
    if package is None:
        return {}
    import yaml

    with open(package / "properties" / "dataset" / "url.yaml", encoding="utf-8") as file:
        return {str(name): str(url) for name, url in yaml.safe_load(file).items()}


def _check_address(url: str) -> None:
    address = urllib.parse.urlsplit(url)
    loopback = address.hostname in ("localhost", "127.0.0.1", "::1")
    if address.scheme != "https" and not (address.scheme == "http" and loopback):
        raise DataError(
            f"the address {url} is not https: nothing is downloaded from it; download the data set yourself"
        )


class _OnlyHttps(urllib.request.HTTPRedirectHandler):
    """A redirection must not lead from https to anything else."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        _check_address(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(name: str, url: str) -> Path:
    """Folder of the downloaded data set below `cache_dir`; it appears whole or not at all, once for all processes."""
    _check_address(url)
    target = cache_dir() / "datasets" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    manual = (
        f"download it elsewhere, unpack it as {name}/{name}.inter (.item, .user), and give the folder above as data_dir"
    )
    with FileLock(target.parent / f".{name}.lock"):
        if target.is_dir():
            return target
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}.") as temporary:
            archive, folder = Path(temporary) / "archive.zip", Path(temporary) / name
            try:
                opener = urllib.request.build_opener(_OnlyHttps)
                with opener.open(url, timeout=30) as response, open(archive, "wb") as file:
                    shutil.copyfileobj(response, file)
            except OSError as error:  # no network, no such address, time-out, HTTP status
                raise DataNotFoundError(
                    f"data set {name!r} could not be downloaded from {url} ({error}); {manual}"
                ) from error
            folder.mkdir()
            try:
                _extract(archive, Path(urllib.parse.urlsplit(url).path).stem, folder, name)
            except (zipfile.BadZipFile, DataError) as error:
                raise DataError(f"data set {name!r}: the file at {url} cannot be used ({error}); {manual}") from error
            os.replace(folder, target)
    return target


def _extract(archive: Path, stem: str, folder: Path, name: str) -> None:
    """Write the atomic files of `archive` to `folder` as NAME.*; paths inside the archive never decide where."""
    with zipfile.ZipFile(archive) as package:
        members: dict[tuple[str, str], zipfile.ZipInfo] = {}
        for member in package.infolist():
            file = Path(member.filename)
            if not member.is_dir() and file.suffix in (".inter", ".item", ".user"):
                members.setdefault((file.stem, file.suffix), member)
        stems = sorted({own for own, suffix in members if suffix == ".inter"})
        chosen = next((s for s in (stem, name) if s in stems), stems[0] if len(stems) == 1 else None)
        if chosen is None:
            raise DataError(f"it holds {', '.join(stems) + ' as' if stems else 'no'} .inter files, one is needed")
        for suffix in (".inter", ".item", ".user"):
            if (chosen, suffix) in members:
                with package.open(members[chosen, suffix]) as source, open(folder / f"{name}{suffix}", "wb") as file:
                    shutil.copyfileobj(source, file)
