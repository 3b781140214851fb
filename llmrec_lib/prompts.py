"""E(U, I, N): what is known of a user, the items and a stated need, written as text."""

import re
import string
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import yaml
from numpy.typing import ArrayLike

from llmrec_lib.cache import content_key
from llmrec_lib.splits import Split

MAX_CHARACTERS = 200
_ARTICLES = "The|An|A|Les|Las|Los|Le|La|Lo|L'|Il|I|Der|Die|Das|El|Un|Une|Det|Den|O"
_ARTICLE_LAST = re.compile(rf"(\s*)([^()]+), ({_ARTICLES})(?= \(|\)|$)")


@dataclass(frozen=True)
class Template:
    """Wording of a prompt. The next title follows it directly, so `text` ends where an item is expected."""

    name: str
    text: str  # with any of the fields {history}, {profile}, {need}
    max_items: int = 25  # newest items of the history that are written
    suffix: str = ";"  # closes every title, in the history and as a candidate; inside titles it becomes a comma
    nothing: str = "not stated"  # stands for an empty profile or need

    def __post_init__(self) -> None:
        fields = {field for _, field, _, _ in string.Formatter().parse(self.text) if field is not None}
        if unknown := fields - {"history", "profile", "need"}:
            raise ValueError(f"template {self.name!r} has unknown fields {sorted(unknown)}; use history, profile, need")
        if not self.suffix.strip(" ") or self.max_items < 0:
            raise ValueError(f"template {self.name!r}: suffix must not be blank, max_items not negative")

    @property
    def fingerprint(self) -> str:
        """Hash of the wording."""
        return content_key(vars(self))


_TEXTS = yaml.safe_load(Path(__file__).with_name("prompts.yaml").read_text(encoding="utf-8"))
TEMPLATES = {name: Template(name, text) for name, text in _TEXTS.items()}


def clean_text(text: str) -> str:
    """Text that cannot break a prompt: NFC, control and invisible characters and all blanks as single blanks, cut."""
    text = unicodedata.normalize("NFC", text)
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in text)
    return " ".join(text.split())[:MAX_CHARACTERS].rstrip()


def natural_title(title: str) -> str:
    """Put a trailing article where it is read: "Matrix, The (1999)" becomes "The Matrix (1999)"."""
    return _ARTICLE_LAST.sub(lambda found: found[1] + f"{found[3]} ".replace("' ", "'") + found[2], title)


def item_titles(titles: Sequence[str], template: str | Template = "history") -> list[str]:
    """Titles as prompts write them: natural, clean, free of the template's suffix. Use the same for candidates."""
    suffix = get_template(template).suffix
    return [clean_text(natural_title(clean_text(title)).replace(suffix, ",")) for title in titles]


def get_template(template: str | Template) -> Template:
    """The template itself, or the one of that name."""
    if isinstance(template, str) and template not in TEMPLATES:
        raise ValueError(f"template {template!r} is unknown; use one of {', '.join(TEMPLATES)}, or make a Template")
    return TEMPLATES.get(template, template)


def render(template: str | Template, history_titles: Sequence[str], profile: str = "", need: str = "") -> str:
    """One prompt of the newest `max_items` of the titles (oldest first), each closed by the template's suffix.

    There are no blanks at its end: a candidate follows as a blank, its title and the suffix.
    """
    template = get_template(template)
    titles = item_titles(history_titles[max(0, len(history_titles) - template.max_items) :], template)
    history = " ".join(title + template.suffix for title in titles)
    profile, need = clean_text(profile) or template.nothing, clean_text(need) or template.nothing
    return template.text.format(history=history, profile=profile, need=need).rstrip(" ")


def user_prompts(
    split: Split, users: ArrayLike, phase: str, template: str | Template = "history",
    titles: Sequence[str] | None = None, need: str | Sequence[str] = "",
) -> list[str]:  # fmt: skip
    """Prompts of users [n] from their histories in a phase ("train", "valid" or "test"), see `Split.histories`.

    `titles` [n_items] are the data set's by default; `need` is one text for all users or one for each. Raises a
    LeakError if a prompt would contain a held-out event of its user.
    """
    template = get_template(template)
    user_list = np.asarray(users, dtype=np.int64)
    titles = split.dataset.titles if titles is None else titles
    if len(titles) != split.dataset.n_items:
        raise ValueError(f"{len(titles)} titles for {split.dataset.n_items} items (item 0 is PAD)")
    needs = [need] * len(user_list) if isinstance(need, str) else list(need)
    if len(needs) != len(user_list):
        raise ValueError(f"{len(needs)} needs for {len(user_list)} users")
    histories = split.histories(user_list, phase)
    owners = np.repeat(user_list, [len(history) for history in histories])
    split.guard(owners, np.concatenate([[], *histories]), phase, "prompt history")
    told = zip(user_list, histories, needs, strict=True)
    return [render(template, [titles[i] for i in items], split.dataset.user_text[user], n) for user, items, n in told]


class StatedNeeds:
    """N: one word per user that says what is looked for, the same for every method, with the items that it fits.

    A simulated statement: for each phase, a random word of a random item among those that the user really takes next.
    Words are the values of `column`, or words of the titles; each fits at least `min_items` and at most half of the
    catalogue's items, so that it tells something and does not give the answer away.

    Parameters
    ----------
    split : Split
    column : an item column such as "class"; by default the item column whose words repeat most, else the title.
    seed : which item and which word.
    min_items : a rarer word would name the item.

    Attributes
    ----------
    words : list of str [n_words]; the last is "", which nobody states.
    items : csr_matrix [n_words, n_items], where a word fits an item.
    """

    def __init__(self, split: Split, column: str = "", seed: int = 0, min_items: int = 10) -> None:
        from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer

        self.column = column or _category_column(split)
        if self.column not in split.dataset.items:
            raise ValueError(f"no item column {column!r}; there are {', '.join(split.dataset.items)}")
        counter = CountVectorizer(binary=True, lowercase=False, token_pattern=r"[^\s|,;]*[^\W\d_]{2}[^\s|,;]*")
        fits = counter.fit_transform(split.dataset.items[self.column].astype(str)).tocsc()
        n_fitting = np.diff(fits.indptr)
        words = counter.get_feature_names_out()
        usable = (n_fitting >= min_items) & (n_fitting <= (len(split.dataset.items) - 1) / 2)
        if self.column == split.dataset.title_column:
            usable &= [word.lower() not in ENGLISH_STOP_WORDS for word in words]
        self.words = [*words[usable], ""]
        self.items = sp.hstack([fits[:, usable], sp.csc_matrix((fits.shape[0], 1))]).T.tocsr()
        self._word_of = {phase: self._choose(split.targets(phase), seed) for phase in ("valid", "test")}
        self.fingerprint = content_key(self.column, self.words, self._word_of)

    def _choose(self, targets: sp.csr_matrix, seed: int) -> np.ndarray:
        rng, words_of = np.random.default_rng(seed), self.items.T.tocsr()
        chosen = np.full(targets.shape[0], len(self.words) - 1)
        for user in np.flatnonzero(np.diff(targets.indptr)):
            for item in rng.permutation(targets[user].indices):
                if len(words := words_of[item].indices):
                    chosen[user] = rng.choice(words)
                    break
        return chosen

    def texts(self, users: ArrayLike, phase: str) -> list[str]:
        """The word that each user [n] states in a phase, "" where none of the items has a usable one."""
        return [self.words[word] for word in self._word_of[phase][np.asarray(users)]]

    def fitting(self, users: ArrayLike, phase: str) -> np.ndarray:
        """Which items the words of users [n] fit, bool [n, n_items]."""
        return self.items[self._word_of[phase][np.asarray(users)]].toarray() > 0


def _category_column(split: Split) -> str:
    """The token_seq column, other than the title, with the fewest distinct words; the title if there is none."""
    dataset = split.dataset
    columns = [c for c, kind in dataset.item_columns.items() if kind == "token_seq" and c != dataset.title_column]
    distinct = {c: len(set(" ".join(dataset.items[c]).split())) for c in columns}
    return min(distinct, key=distinct.get, default=dataset.title_column or "")
