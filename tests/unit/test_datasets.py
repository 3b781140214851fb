"""Data sets are read exactly as written, and everything that is wrong in a file is named with its place."""

from __future__ import annotations

import http.server
import importlib.util
import io
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmrec_lib import datasets
from llmrec_lib.datasets import DataError, DataNotFoundError, describe, load_dataset, load_folder
from tests.checkerboard import write_checkerboard

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
ROWS = "a\tx\t5\t100\na\ty\t4\t200\nb\tx\t3\t150\n"
ITEM = (
    "item_id:token\ttitle:token_seq\tyear:token\tprice:float\ny\tYoung Yak\t1990\t1.5\nx\tXylo\t\t\nz\tZoo\t2000\t2\n"
)
USER = "user_id:token\tage:token\tzip_code:token\nb\t30\t123\na\t20\t456\n"


def write(folder: Path, inter: str | bytes = INTER + ROWS, item: str | bytes = "", user: str | bytes = "") -> Path:
    path = folder / "shop"
    path.mkdir(parents=True, exist_ok=True)
    for kind, text in (("inter", inter), ("item", item), ("user", user)):
        if text or kind == "inter":
            (path / f"shop.{kind}").write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_everything_is_where_the_contract_says(tmp_path):
    data = load_folder(write(tmp_path, item=ITEM, user=USER))
    assert (data.name, data.n_users, data.n_items, data.time) == ("shop", 3, 3, "timestamp")
    assert data.user_ids.tolist() == ["[PAD]", "b", "a"]  # order of the .user file
    assert data.item_ids.tolist() == ["[PAD]", "y", "x"]  # order of the .item file, without z
    assert data.interactions.columns.tolist() == ["user", "item", "rating", "timestamp"]
    assert data.interactions["user"].tolist() == [2, 2, 1] and data.interactions["item"].tolist() == [2, 1, 2]
    assert data.interactions["timestamp"].dtype == np.int64 and data.interactions["rating"].dtype == np.float64
    assert data.title_column == "title" and data.titles == ["", "Young Yak", "Xylo"]
    assert data.item_text == ["", "Young Yak. year: 1990", "Xylo"]
    assert data.user_text == ["", "age: 30", "age: 20"]
    assert data.item_columns == {"title": "token_seq", "year": "token", "price": "float"}
    assert data.items["price"].iloc[1] == 1.5 and np.isnan(data.items["price"].iloc[[0, 2]]).all()
    assert data.notes == ("1 items without interactions left out",)


def test_without_item_user_and_time(tmp_path):
    inter = "item_id:token\tuser_id:token\tshop:token\nx\ta\tNA\nw\ta\tnull\n"
    data = load_folder(write(tmp_path, inter))
    assert data.time is None and data.titles == data.item_text == ["", "x", "w"] and data.title_column is None
    assert data.users.shape == (2, 0) and data.items.shape == (3, 0) and data.user_text == ["", ""]
    assert data.interactions["shop"].tolist() == ["NA", "null"]
    assert any("no timestamps" in note for note in data.notes)


def test_ids_and_texts_stay_as_written(tmp_path):
    ids = ["00", "0", "nan", "1e5", "NA", '"q', "ü 1", "None", "true", "#x", "1.0", " 7"]
    inter = INTER + "".join(f"{key}\t{key}\t1\t{n}\n" for n, key in enumerate(ids))
    item = "item_id:token\ttitle:token_seq\n" + "".join(f"{key}\t{key}\n" for key in ids)
    data = load_folder(write(tmp_path, inter, item))
    assert data.user_ids[1:].tolist() == data.item_ids[1:].tolist() == data.titles[1:] == ids


def test_line_ends_byte_order_mark_and_missing_last_newline_change_nothing(tmp_path):
    plain = load_folder(write(tmp_path / "a", item=ITEM, user=USER))
    odd = [b"\xef\xbb\xbf" + text.strip().replace("\n", "\r\n").encode() for text in (INTER + ROWS, ITEM, USER)]
    other = load_folder(write(tmp_path / "b", *odd))
    assert plain.interactions.equals(other.interactions) and plain.items.equals(other.items)
    assert plain.item_ids.tolist() == other.item_ids.tolist() and plain.fingerprint != other.fingerprint


def test_repeated_pairs_keep_the_earliest(tmp_path):
    rows = "a\tx\t1\t300\na\ty\t1\t50\na\tx\t2\t100\na\tx\t3\t100\n"
    data = load_folder(write(tmp_path, INTER + rows))
    assert data.interactions[["rating", "timestamp"]].to_numpy().tolist() == [[1, 50], [2, 100]]
    assert "2 repeated user-item pairs removed (earliest kept)" in data.notes
    data = load_folder(write(tmp_path / "untimed", "user_id:token\titem_id:token\tr:token\na\tx\t1\na\tx\t2\n"))
    assert data.interactions["r"].tolist() == ["1"]


@pytest.mark.parametrize(
    ("times", "time"),
    [
        ((0, 1, 0), "position"),
        ((2, 1, 1), "position"),
        ((0, 1, 1), "timestamp"),
        ((0, 2, 0), "timestamp"),
        ((5, 5, 5), "timestamp"),
        ((-1, 0, -1), "timestamp"),
    ],
)
def test_kind_of_time(tmp_path, times, time):
    rows = [("a", "x"), ("a", "y"), ("b", "x")]
    inter = INTER + "".join(f"{u}\t{i}\t1\t{t}\n" for (u, i), t in zip(rows, times, strict=True))
    assert load_folder(write(tmp_path, inter)).time == time


def test_timestamps_are_exact(tmp_path):
    stamps = [2**62 + 1, 2**62, 2**53 + 1]
    inter = INTER + "".join(f"a\t{n}\t1\t{t}\n" for n, t in enumerate(stamps))
    assert load_folder(write(tmp_path, inter)).interactions["timestamp"].tolist() == stamps
    data = load_folder(write(tmp_path, INTER + "a\tx\t1\t1.25\na\ty\t1\t3\n"))
    assert data.interactions["timestamp"].tolist() == [1.25, 3.0]
    data = load_folder(write(tmp_path, INTER + "a\tx\t1\t1e3\na\ty\t1\t3.0\n"))
    assert data.interactions["timestamp"].dtype == np.int64


@pytest.mark.parametrize(
    ("columns", "title"),
    [
        ("genre:token_seq\tmovie_title:token_seq\tsubtitle:token_seq", "movie_title"),
        ("subtitle:token_seq\tTitle:token", "Title"),
        ("title_length:float\tname:token\tgenre:token_seq", "name"),
        ("brand_name:token\tabout:token_seq", "about"),
        ("year:token\tartist_name:token", "artist_name"),
        ("year:token\tcode:token", None),
    ],
)
def test_title_column(tmp_path, columns, title):
    values = "\t".join("1" for _ in columns.split("\t"))
    item = f"item_id:token\t{columns}\nx\t{values}\ny\t{values}\n"
    assert load_folder(write(tmp_path, item=item)).title_column == title


def test_fingerprint_follows_the_bytes_of_each_file(tmp_path):
    contents = [(), (INTER + ROWS + "b\ty\t1\t9\n",), (INTER + ROWS, ITEM), (INTER + ROWS, "", USER)]
    prints = [load_folder(write(tmp_path / str(n), *content)).fingerprint for n, content in enumerate(contents)]
    assert len(set(prints)) == 4 and load_folder(write(tmp_path / "again")).fingerprint == prints[0]


FAULTS = {
    "empty file": ({"inter": ""}, ["shop.inter", "empty"]),
    "blank file": ({"inter": "\n\n"}, ["shop.inter", "empty"]),
    "no interactions": ({"inter": INTER}, ["shop.inter", "no lines below its header"]),
    "not UTF-8": ({"inter": (INTER + ROWS).encode() + b"\xff\tx\t1\t1\n"}, ["line 5", "UTF-8"]),
    "UTF-16": ({"inter": (INTER + ROWS).encode("utf-16")}, ["line 1", "UTF-8"]),
    "NUL": ({"inter": INTER + "a\0\tx\t1\t1\n"}, ["line 2", "NUL"]),
    "commas": ({"inter": (INTER + ROWS).replace("\t", ",")}, ["line 1", "'user_id'", "separated by tabs"]),
    "blanks": ({"inter": (INTER + ROWS).replace("\t", "  ")}, ["line 1", "'user_id'", "separated by tabs"]),
    "no type": ({"inter": INTER.replace("rating:float", "rating") + ROWS}, ["line 1", "'rating'", "field:type"]),
    "unknown type": (
        {"inter": INTER.replace("rating:float", "rating:int") + ROWS},
        ["line 1", "'rating'", "rating:int"],
    ),
    "no name": ({"inter": INTER.replace("rating:float", ":float") + ROWS}, ["line 1", "field:type"]),
    "twice": ({"inter": INTER.replace("rating:", "item_id:") + ROWS}, ["line 1", "'item_id'", "twice"]),
    "no user_id": ({"inter": INTER.replace("user_id", "uid") + ROWS}, ["line 1", "user_id:token", "uid, item_id"]),
    "no item_id": ({"inter": INTER.replace("item_id", "iid") + ROWS}, ["line 1", "item_id:token", "iid"]),
    "no item_id in .item": (
        {"item": ITEM.replace("item_id", "id")},
        ["shop.item, line 1", "item_id:token", "id, title"],
    ),
    "id of another type": (
        {"inter": INTER.replace("user_id:token", "user_id:float") + ROWS},
        ["line 1", "user_id:token"],
    ),
    "time of another type": (
        {"inter": INTER.replace("timestamp:float", "timestamp:token") + ROWS},
        ["timestamp:float"],
    ),
    "reserved column": ({"inter": INTER.replace("rating:float", "user:token") + ROWS}, ["line 1", "'user'"]),
    "few fields": ({"inter": INTER + ROWS + "a\tz\t1\n"}, ["line 5", "3 field(s) instead of 4", "timestamp"]),
    "many fields": ({"inter": INTER + "a\tz\t1\t1\t1\n" + ROWS}, ["line 2", "5 field(s) instead of 4"]),
    "empty line": ({"inter": INTER + "\n" + ROWS}, ["line 2", "empty line"]),
    "many title fields": ({"item": ITEM.replace("Xylo", "Xy\tlo")}, ["shop.item, line 3", "5 field(s)"]),
    "bad rating": ({"inter": INTER + ROWS + "b\ty\tgood\t1\n"}, ["line 5", "'rating'", "'good'"]),
    "no rating": ({"inter": INTER + ROWS + "b\ty\t\t1\n"}, ["line 5", "'rating'"]),
    "nan time": ({"inter": INTER + ROWS + "b\ty\t1\tnan\n"}, ["line 5", "'timestamp'", "'nan'"]),
    "inf time": ({"inter": INTER + ROWS + "b\ty\t1\tinf\n"}, ["line 5", "'timestamp'", "'inf'"]),
    "huge time": ({"inter": INTER + ROWS + "b\ty\t1\t1e999\n"}, ["line 5", "'timestamp'", "1e999"]),
    "time beyond int64": ({"inter": INTER + ROWS + f"b\ty\t1\t{2**63}\n"}, ["line 5", "'timestamp'", "64 bits"]),
    "date": ({"inter": INTER + ROWS + "b\ty\t1\t2020-01-01\n"}, ["line 5", "'timestamp'", "2020-01-01"]),
    "underscore": ({"inter": INTER + ROWS + "b\ty\t1\t1_0\n"}, ["line 5", "'timestamp'", "1_0"]),
    "bad price": ({"item": ITEM.replace("1.5", "1,5")}, ["shop.item, line 2", "'price'", "'1,5'"]),
    "infinite price": ({"item": ITEM.replace("1.5", "inf")}, ["shop.item, line 2", "'price'", "'inf'"]),
    "empty user": ({"inter": INTER + ROWS + "\ty\t1\t1\n"}, ["line 5", "'user_id'", "empty id"]),
    "empty item": ({"inter": INTER + ROWS + "b\t \t1\t1\n"}, ["line 5", "'item_id'", "empty id"]),
    "PAD": ({"inter": INTER + ROWS + "b\t[PAD]\t1\t1\n"}, ["line 5", "'item_id'", "reserved"]),
    "item twice": ({"item": ITEM + "x\tXylo\t1\t1\n"}, ["shop.item, line 5", "'x' occurs twice"]),
    "user twice": ({"user": USER + "b\t1\t1\n"}, ["shop.user, line 4", "'b' occurs twice"]),
    "unknown item": (
        {"inter": INTER + ROWS + "b\tq\t1\t1\n", "item": ITEM},
        ["shop.inter, line 5", "'q'", "shop.item"],
    ),
    "unknown user": (
        {"inter": INTER + ROWS + "c\tx\t1\t1\n", "user": USER},
        ["shop.inter, line 5", "'c'", "shop.user"],
    ),
    "empty title": ({"item": ITEM.replace("Xylo", " ")}, ["shop.item, line 3", "'title'", "empty title"]),
    "bad float_seq": (
        {"item": "item_id:token\tv:float_seq\nx\t1 2\ny\t1 b\n"},
        ["shop.item, line 3", "'v'", "'1 b'"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_with_their_place(tmp_path, fault):
    files, expected = FAULTS[fault]
    with pytest.raises(DataError) as caught:
        load_folder(write(tmp_path, **files))
    for part in expected:
        assert part in str(caught.value)


def test_paths_that_hold_no_data_set(tmp_path, monkeypatch):
    folder = write(tmp_path)
    assert load_folder(folder / "shop.inter").fingerprint == load_dataset("shop", tmp_path).fingerprint
    (tmp_path / "other").mkdir()
    for path, word in ((tmp_path / "nothing", "does not exist"), (tmp_path / "other", "other.inter")):
        with pytest.raises(FileNotFoundError, match=word):
            load_folder(path)
    with pytest.raises(DataNotFoundError, match="data_dir holds shop"):
        load_dataset("shoe", str(tmp_path))
    with pytest.raises(DataNotFoundError, match="folder above"):
        load_dataset("shop", str(folder))
    with pytest.raises(DataNotFoundError, match="does not exist"):
        load_dataset("shop", str(tmp_path / "nothing"))
    for name in ("", "..", "a/b", "/etc"):
        with pytest.raises(DataError, match="not a name"):
            load_dataset(name, str(tmp_path))
    (tmp_path / "other" / "shop.inter").write_text(INTER + ROWS)
    with pytest.raises(DataNotFoundError, match="same name"):
        load_folder(tmp_path / "other")


def test_search_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "download_urls", lambda: {"ml-1m": "https://localhost/none.zip"})
    with pytest.raises(DataNotFoundError, match="LLMREC_DATA"):
        load_dataset("shop")
    with pytest.raises(DataNotFoundError, match="similar: ml-1m"):
        load_dataset("ml1m")
    write(tmp_path / "dataset")
    assert load_dataset("shop").n_users == 3
    monkeypatch.setenv("LLMREC_DATA", str(tmp_path / "elsewhere"))
    write(tmp_path / "elsewhere", INTER + "a\tx\t1\t1\n")
    assert load_dataset("shop").n_users == 2


@pytest.mark.skipif(importlib.util.find_spec("recbole") is None, reason="recbole carries ml-100k")
def test_ml_100k_has_its_known_facts_and_imports_nothing_heavy():
    code = (
        "import sys; from llmrec_lib.datasets import *; d = load_dataset('ml-100k'); f = describe(d);"
        "print(*(m for m in ('torch', 'recbole', 'transformers') if m in sys.modules), '|',"
        "d.n_users, d.n_items, len(d.interactions), d.titles[1], '|', d.item_text[1], '|', d.user_text[1], '|',"
        "int(f.tied_last_users), int(f.distinct_titles), *(f'{f[k]:.3f}' for k in"
        "('same_instant_share', 'under_an_hour_share', 'later_share', 'unseen_items_share')))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == (
        "| 944 1683 100000 Toy Story | Toy Story. release year: 1995. class: Animation Children's Comedy | "
        "age: 24. gender: M. occupation: technician | 415 1659 0.758 0.528 0.414 0.117"
    )


def test_describe_counts_by_hand(tmp_path):
    rows = "a\tx\t1\t0\na\ty\t1\t7200\na\tz\t1\t7200\nb\tx\t1\t86400\n"
    facts = describe(load_folder(write(tmp_path, INTER + rows)))
    assert (facts.users, facts["items"], facts.interactions, facts.density) == (2, 3, 4, 4 / 6)
    assert (facts.events_per_user_median, facts.tied_last_users, facts.same_instant_share) == (2, 1, 0.5)
    assert (facts.under_an_hour_share, facts.span_days, facts.later_share, facts.unseen_items_share) == (
        0.5,
        1,
        0.125,
        0,
    )
    untimed = describe(load_folder(write_checkerboard(tmp_path, with_time=False)))
    assert untimed.users == 24 and np.isnan(untimed.tied_last_users)


def pack(**members: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as package:
        for name, text in members.items():
            package.writestr(name, text)
    return buffer.getvalue()


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A loopback server: path to content; a content that is text redirects there."""
    content: dict[str, bytes | str] = {}
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            answer = content.get(self.path)
            self.send_response(404 if answer is None else 302 if isinstance(answer, str) else 200)
            if isinstance(answer, str):
                self.send_header("Location", answer)
            self.end_headers()
            if isinstance(answer, bytes):
                self.wfile.write(answer)

        def log_message(self, *_):
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        base = f"http://127.0.0.1:{running.server_port}"
        names = ("shop", "slip", "many", "none", "text", "away", "gone")
        urls = {name: f"{base}/{name}.zip" for name in names} | {"plain": "http://example.org/plain.zip"}
        monkeypatch.setattr(datasets, "download_urls", lambda: urls)
        content["asked"] = asked  # type: ignore[assignment]
        yield content
        running.shutdown()


def test_download(server, tmp_path):
    server["/shop.zip"] = pack(
        **{"S/Shop.inter": INTER + ROWS, "S/Shop.item": ITEM, "S/Shop.kg": "", "README": "hello"}
    )
    data = load_dataset("shop")
    folder = tmp_path / "cache" / "datasets" / "shop"
    assert data.n_users == 3 and sorted(file.name for file in folder.iterdir()) == ["shop.inter", "shop.item"]
    assert load_dataset("shop").fingerprint == data.fingerprint and server["asked"] == ["/shop.zip"]
    assert [f.name for f in folder.parent.iterdir() if f.is_dir()] == ["shop"]  # nothing temporary is left


def test_download_writes_nowhere_else(server, tmp_path):
    server["/slip.zip"] = pack(**{"../../../evil/slip.inter": INTER + ROWS, "/abs/slip.item": ITEM})
    assert load_dataset("slip").n_users == 3
    assert sorted(p.name for p in tmp_path.rglob("*.i*")) == ["slip.inter", "slip.item"]
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("name", "answer", "word"),
    [
        ("many", pack(**{"a.inter": INTER, "b.inter": INTER}), "a, b as .inter files"),
        ("none", pack(readme="hello"), "no .inter file"),
        ("text", b"<html>not a zip</html>", "not a zip"),
        ("away", "http://example.org/away.zip", "not https"),
        ("gone", None, "404"),
        ("plain", None, "not https"),
    ],
)
def test_downloads_that_fail_leave_nothing_and_say_what_to_do(server, tmp_path, name, answer, word):
    if answer is not None:
        server[f"/{name}.zip"] = answer
    with pytest.raises(DataError) as caught:
        load_dataset(name)
    assert word in str(caught.value) and "download" in str(caught.value)
    assert not (tmp_path / "cache" / "datasets" / name).exists()


def test_offline(monkeypatch, tmp_path):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets, "download_urls", lambda: {"shop": "http://127.0.0.1:1/shop.zip"})
    with pytest.raises(FileNotFoundError, match=r"'shop' could not be downloaded.*shop/shop\.inter.*data_dir"):
        load_dataset("shop")


ALPHABET = "\t\t\t\n\n\r:,.0123456789abxyz [PAD]_-+enN\0\ufeffé夜\u202e\x1f" + '"'
LINES = st.lists(st.text(ALPHABET, max_size=12), max_size=5).map("\t".join)


def mutated(good: str) -> st.SearchStrategy[bytes]:
    """A good file with a piece cut out, put in, doubled or replaced, anywhere."""
    content = good.encode()
    places = st.tuples(st.integers(0, len(content)), st.integers(0, len(content))).map(sorted)
    pieces = st.one_of(st.binary(max_size=6), st.text(ALPHABET, max_size=6).map(lambda text: text.encode()))
    changed = st.builds(lambda at, piece: content[: at[0]] + piece + content[at[1] :], places, pieces)
    return st.one_of(changed, places.map(lambda at: content + content[at[0] : at[1]]))


GOOD = {"inter": INTER + ROWS, "item": ITEM, "user": USER}
ROW = st.tuples(
    *[
        st.sampled_from(good)
        for good in ("ab", "xyz", ["1", "5", "4.5", "x", "1e5", "nan"], ["1", "150", "0", "-3", "7.25", "z"])
    ]
)
FEW_ROWS = st.lists(ROW.map("\t".join), min_size=1, max_size=6).map(lambda rows: (INTER + "\n".join(rows)).encode())
ANYTHING = st.lists(LINES, max_size=6).map(lambda rows: "\n".join(rows).encode())
# One of the files is changed, and the others are good or not there.
FILES = st.builds(
    lambda kind, content, absent: {
        name: content[kind] if name == kind else text.encode()
        for name, text in GOOD.items()
        if name in (kind, "inter") or name not in absent
    },
    st.sampled_from([*GOOD]),
    st.fixed_dictionaries(
        {
            "inter": st.one_of(FEW_ROWS, mutated(GOOD["inter"]), ANYTHING),
            "item": st.one_of(mutated(ITEM), ANYTHING),
            "user": st.one_of(mutated(USER), ANYTHING),
        }
    ),
    st.sets(st.sampled_from(["item", "user"])),
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=FILES)
def test_whatever_the_files_hold_they_are_read_whole_or_refused_with_their_name(tmp_path, files):
    folder = tmp_path / "shop"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for kind, content in files.items():
        (folder / f"shop.{kind}").write_bytes(content)
    try:
        dataset = load_folder(folder)
    except DataError as error:
        assert "shop." in str(error)
        assert "\n" not in str(error)  # one line, whatever the file holds
        return
    rows = files["inter"].decode().lstrip("\ufeff").replace("\r\n", "\n").rstrip("\n").split("\n")[1:]
    assert 0 < len(dataset.interactions) <= len(rows)
    for ids, column in ((dataset.user_ids, "user"), (dataset.item_ids, "item")):
        assert ids[0] == "[PAD]" and len(set(ids)) == len(ids)
        assert set(dataset.interactions[column]) == set(range(1, len(ids)))
    written = {tuple(field for field in row.split("\t")) for row in rows}
    place = [name.split(":")[0] for name in files["inter"].decode().lstrip("\ufeff").split("\n")[0].split("\t")]
    for user, item in dataset.interactions[["user", "item"]].to_numpy():
        own = dataset.user_ids[user], dataset.item_ids[item]
        assert any((row[place.index("user_id")], row[place.index("item_id")]) == own for row in written)
    assert len(dataset.titles) == dataset.n_items and len(dataset.user_text) == dataset.n_users


STRANGE = {
    "control": "a\x01b\x1bc\x7fd",
    "long": "long " * 2000,
    "right to left": "\u202eעברית العربية\u202c",
    "emoji": "👩‍👩‍👧‍👦 🎬",
    "html": "<script>alert('x')</script><b>&amp;",
    "blanks": "  two  blanks   ",
    "quotes": "\"quoted\" 'and' \\n %s {history}",
    "suffix": "a; b;; c",
    "combining": "e\u0301 \u200b\u200b",
    "nan": "nan",
    "None": "None",
    "number": "1e5",
}


def test_strange_texts_and_ids_go_all_the_way(tmp_path, monkeypatch):
    """From the file to a ranking by text and by likelihood: nothing breaks, ids and titles stay as written."""
    import torch

    from llmrec_lib.evaluation import evaluate
    from llmrec_lib.language_models.encoder import TextEncoder
    from llmrec_lib.llm_based import TitleLikelihoodRecommender, catalogue_likelihood
    from llmrec_lib.prompts import user_prompts
    from llmrec_lib.prs_based import embed_items, text_similarity
    from llmrec_lib.splits import split
    from tests.unit.tiny_models import tiny_bert, tiny_llama, tiny_tokenizer

    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "cache"))
    ids = ["00", "0", "nan", "1e5", "NULL", "-0", "1.0", "é", "inf", "#1", "true", "007"]
    rows = [
        f"u{user}\t{ids[(user + place) % len(ids)]}\t5\t{place}.{user}\n" for user in range(20) for place in range(6)
    ]
    titles = "".join(f"{key}\t{text}\t\t\n" for key, text in zip(ids, STRANGE.values(), strict=True))
    dataset = load_folder(write(tmp_path, inter=INTER + "".join(rows), item=ITEM.split("\n")[0] + "\n" + titles))
    assert set(dataset.item_ids[1:]) == set(ids)
    told = dict(zip(dataset.item_ids[1:], dataset.titles[1:], strict=True))
    assert told == dict(zip(ids, STRANGE.values(), strict=True))
    parts = split(dataset, "leave_one_out")
    for prompt in user_prompts(parts, parts.eval_users("test"), "test"):
        assert len(prompt) < 6 * 250
        assert not any(ord(character) < 32 or character in "\u202e\u202c\u200b" for character in prompt)
    model = tiny_llama(), tiny_tokenizer()
    likelihood = catalogue_likelihood(parts, model, dtype="float32")
    by_title = TitleLikelihoodRecommender(parts, likelihood, over="catalogue", progress=False)
    items = embed_items(parts, TextEncoder((tiny_bert(), tiny_tokenizer()), dtype="float32", max_tokens=64))[0]
    assert torch.isfinite(items).all()
    for arm in (by_title, text_similarity(parts, items)):
        assert 0 <= evaluate(arm, parts, ks=[5]).mean("ndcg@5") <= 1
