"""A data set whose right ranking is obvious: even users like even items, odd users odd ones, and titles say so."""

from __future__ import annotations

from pathlib import Path


def write_checkerboard(folder: str | Path, n_users: int = 24, n_items: int = 16, with_time: bool = True) -> Path:
    """Write ``folder/checkerboard/checkerboard.inter``, ``.item`` and ``.user``; returns ``folder/checkerboard``.

    User k ("u<k>") meets three quarters of the items of the same parity ("i<k>", "even story 2"), in an order that
    differs between users. The right ranking of what a user has not met: all items of the same parity before all others.
    Event p of user k happens at 1,000,000 + 86,400 p + 7,001 k seconds: all timestamps differ (7,001 is prime).
    """
    path = Path(folder) / "checkerboard"
    path.mkdir(parents=True)
    per_parity = n_items // 2
    events = []
    for user in range(n_users):
        start = user // 2
        for place in range(per_parity - per_parity // 4):
            item = 2 * ((start + place) % per_parity) + user % 2
            events.append((f"u{user}", f"i{item}", "5", str(1_000_000 + 86_400 * place + 7_001 * user)))
    header = ["user_id:token", "item_id:token", "rating:float", "timestamp:float"]
    columns = len(header) if with_time else len(header) - 1
    _write(path / "checkerboard.inter", [row[:columns] for row in (header, *events)])
    items = [(f"i{item}", f"{_parity(item)} story {item}", _parity(item)) for item in range(n_items)]
    _write(path / "checkerboard.item", [("item_id:token", "title:token_seq", "genre:token_seq"), *items])
    users = [(f"u{user}", _parity(user), str(20 + user)) for user in range(n_users)]
    _write(path / "checkerboard.user", [("user_id:token", "taste:token", "age:token"), *users])
    return path


def _parity(number: int) -> str:
    return "odd" if number % 2 else "even"


def _write(path: Path, rows: list) -> None:
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
