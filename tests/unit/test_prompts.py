"""Prompts: clean text, the right items, no held-out event."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from llmrec_lib.datasets import load_dataset
from llmrec_lib.prompts import (
    TEMPLATES,
    StatedNeeds,
    Template,
    clean_text,
    item_titles,
    natural_title,
    render,
    user_prompts,
)
from llmrec_lib.splits import LeakError, split
from tests.checkerboard import write_checkerboard


@pytest.mark.parametrize(
    ("stored", "read"),
    [
        ("Matrix, The (1999)", "The Matrix (1999)"),
        ("Matrix, The", "The Matrix"),
        ("Kid in King Arthur's Court, A (1995)", "A Kid in King Arthur's Court (1995)"),
        ("Enfer, L' (1994)", "L'Enfer (1994)"),
        ("Eye of Vichy, The (Oeil de Vichy, L') (1993)", "The Eye of Vichy (L'Oeil de Vichy) (1993)"),
        ("Crow, The: City of Angels", "Crow, The: City of Angels"),
        ("Good, the Bad and the Ugly", "Good, the Bad and the Ugly"),
        ("Good, The Bad and The Ugly, The (1966)", "The Good, The Bad and The Ugly (1966)"),
        ("", ""),
    ],
)
def test_natural_title(stored, read):
    assert natural_title(stored) == read


def test_clean_text_keeps_one_line_and_composes():
    assert clean_text("  Toy\tStory\r\n\x00 II\u2028x\u202e ") == "Toy Story II x"
    assert clean_text("Cafe\u0301") == "Caf\u00e9"
    assert len(clean_text("ab " * 1000)) <= 200
    assert clean_text("\n\t") == ""


def test_titles_cannot_close_an_item_or_open_a_field():
    assert item_titles(["Cats; Dogs {history}\nUser: {need}"]) == ["Cats, Dogs {history} User: {need}"]
    prompt = render("need", ["{profile}; {0}"], need="{history}")
    assert prompt.endswith("{profile}, {0};")
    assert prompt.count(";") == 1


def test_render_writes_the_newest_items_oldest_first():
    template = dataclasses.replace(TEMPLATES["history"], max_items=2)
    assert render(template, ["a", "b", "Net, The"]).endswith("from oldest to newest: b; The Net;")
    assert render("history", []).endswith("from oldest to newest:")
    assert render(dataclasses.replace(template, max_items=0), ["a"]).endswith(":")
    assert "(age: 24)" in render("profile_history", ["a"], profile="age: 24")
    assert "not stated" in render("need", ["a"])
    assert "a quiet evening" in render("need", ["a"], need="a quiet\nevening")


def test_unknown_names_say_what_exists():
    with pytest.raises(ValueError, match="history, profile_history, need"):
        render("histroy", [])
    with pytest.raises(ValueError, match="unknown fields \\['items'\\]"):
        Template("mine", "{items}")
    with pytest.raises(ValueError, match="suffix"):
        Template("mine", "{history}", suffix=" ")


@pytest.fixture(scope="module")
def checkerboard(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_checkerboard(folder)
    return split(load_dataset("checkerboard", data_dir=str(folder)), "leave_one_out")


def test_user_prompts_hold_exactly_the_readable_history(checkerboard):
    users = checkerboard.eval_users("test")[:5]
    titles = checkerboard.dataset.titles
    for phase in ("train", "valid", "test"):
        prompts = user_prompts(checkerboard, users, phase)
        for prompt, history in zip(prompts, checkerboard.histories(users, phase), strict=True):
            assert prompt == render("history", [titles[item] for item in history])
    assert user_prompts(checkerboard, [], "test") == []


def test_user_prompts_take_profiles_and_needs(checkerboard):
    users = checkerboard.eval_users("test")[:2]
    assert "taste: " in user_prompts(checkerboard, users, "test", "profile_history")[0]
    first, second = user_prompts(checkerboard, users, "test", "need", need=["something odd", "something even"])
    assert "something odd" in first
    assert "something even" in second
    with pytest.raises(ValueError, match="1 needs for 2 users"):
        user_prompts(checkerboard, users, "test", need=["one"])
    with pytest.raises(ValueError, match="2 titles for 17 items"):
        user_prompts(checkerboard, users, "test", titles=["a", "b"])


def test_a_target_in_a_prompt_is_an_error(checkerboard, monkeypatch):
    users = checkerboard.eval_users("test")[:3]
    targets = [checkerboard.targets("test")[int(user)].indices for user in users]
    monkeypatch.setattr(type(checkerboard), "histories", lambda *_: [np.asarray(t, dtype=np.int64) for t in targets])
    with pytest.raises(LeakError, match="prompt history"):
        user_prompts(checkerboard, users, "test")


def test_a_need_is_a_word_of_a_target_and_fits_the_items_that_have_it(checkerboard):
    needs = StatedNeeds(checkerboard, min_items=4)
    assert (needs.column, needs.words) == ("genre", ["even", "odd", ""])
    users = np.array([3, 1, 8])  # internal ids: "u2", "u0", "u7"
    assert needs.texts(users, "test") == ["even", "even", "odd"]
    items = checkerboard.dataset.items["genre"].to_numpy()
    assert np.array_equal(needs.fitting(users, "test"), [items == "even", items == "even", items == "odd"])
    assert needs.texts([0], "valid") == [""]  # PAD takes nothing
    assert not needs.fitting([0], "valid").any()
    assert StatedNeeds(checkerboard, "title", min_items=9).words == [""]  # "story" is in all titles
    with pytest.raises(ValueError, match="no item column 'colour'; there are .*genre"):
        StatedNeeds(checkerboard, "colour")


def test_needs_differ_by_seed_and_not_by_call(ml100k_split):
    users = ml100k_split.eval_users("valid")
    texts = [StatedNeeds(ml100k_split, seed=seed).texts(users, "valid") for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    fitting = StatedNeeds(ml100k_split).fitting(users, "valid")
    hit = (ml100k_split.targets("valid")[users].toarray() > 0) & fitting
    stated = np.array([text != "" for text in texts[0]])
    assert stated.mean() > 0.9
    assert (hit.any(axis=1) == stated).all()  # the word is true of at least one item that is taken next


def test_templates_of_ones_own_are_told_apart():
    one, other = Template("mine", "I saw: {history}"), Template("mine", "Seen: {history}")
    assert one.fingerprint == Template("mine", "I saw: {history}").fingerprint != other.fingerprint
