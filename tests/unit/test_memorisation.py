"""Memorisation probe: a model that was made to remember some titles is found out, for these and no others."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from llmrec_lib.language_models.likelihood import TitleLikelihood
from llmrec_lib.language_models.memorisation import CONTEXT, _tokens_after, complete_titles, probe_facts, recall
from tests.unit.tiny_models import tiny_llama, tiny_tokenizer

KNOWN = ["night of the aliens", "toy story", "a user chose toys", "alien"]
OTHER = ["story of a night", "the items", "toys of the user", "aliens chose"]
CHOICES = [" odd", " even", " eventful"]


@pytest.fixture(scope="module")
def untrained():
    return TitleLikelihood((tiny_llama(), tiny_tokenizer()), ["x"], dtype="float32")


@pytest.fixture(scope="module")
def overfitted():
    """A model that has seen nothing but the known titles and the class of two of them."""
    tokenizer, model = tiny_tokenizer(), tiny_llama()
    texts = [f"{CONTEXT} {title}" for title in KNOWN]
    texts += [f"{CONTEXT} {KNOWN[0]}. genre: odd", f"{CONTEXT} {KNOWN[1]}. genre: eventful"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return TitleLikelihood((model, tokenizer), ["x"], dtype="float32")


def test_what_was_learned_by_heart_is_remembered_and_nothing_else(overfitted):
    found = complete_titles(overfitted, KNOWN + OTHER)
    assert found["remembered"][: len(KNOWN) - 1].all()  # the last one, "alien", is a single token here
    assert not found["remembered"][len(KNOWN) :].any()
    assert found["rest"][2] and f" {KNOWN[2]}".endswith(found["rest"][2])
    assert pd.isna(found["remembered"][len(KNOWN) - 1]) and found["asked"][len(KNOWN) - 1] == 0


def test_an_untrained_model_remembers_nothing(untrained):
    assert not complete_titles(untrained, KNOWN + OTHER)["remembered"].any()


@pytest.mark.parametrize("name", ["untrained", "overfitted"])
def test_remembered_is_what_generation_writes(name, request, monkeypatch):
    likelihood = request.getfixturevalue(name)
    monkeypatch.setattr("llmrec_lib.language_models.memorisation.BATCH_TOKENS", 60)  # several batches
    titles = [*KNOWN, *OTHER, "é 夜 of", "toy story toys"]
    found = complete_titles(likelihood, titles)
    for title, row in zip(titles, found.itertuples(), strict=True):
        tokens = _tokens_after(likelihood, CONTEXT, f" {title}")
        assert row.given + row.asked == len(tokens) and row.given - row.asked in (0, 1)
        if row.asked:
            start = torch.tensor([likelihood.prompt_tokens(CONTEXT) + tokens[: row.given]])
            written = likelihood.model.generate(
                start,
                attention_mask=torch.ones_like(start),
                max_new_tokens=row.asked,
                do_sample=False,
                eos_token_id=None,
            )[0, start.shape[1] :]
            assert row.remembered == (written.tolist() == tokens[row.given :]), title


def test_recall_finds_the_class_that_was_learned(overfitted):
    prompts = [f"{CONTEXT} {title}. genre:" for title in KNOWN[:2]]
    assert recall(overfitted, prompts, [[" odd"], [" eventful"]], CHOICES).all()
    assert not recall(overfitted, prompts, [[" even", " eventful"], [" odd"]], CHOICES).any()
    assert recall(overfitted, prompts, [[" even", " odd"], []], CHOICES).tolist() == [True, False]


def test_recall_answers_each_prompt_once(untrained):
    """Greedy decoding among the choices ends at one of them, so exactly one is right where none begins another."""
    choices = [" odd", " even", " toy story", " toy toys"]
    prompts = [f"{CONTEXT} {title}:" for title in KNOWN + OTHER]
    found = np.stack([recall(untrained, prompts, [[choice]] * len(prompts), choices) for choice in choices])
    assert (found.sum(0) == 1).all()


def test_facts_come_from_titles_or_columns(checkerboard):
    titles, years, column, classes = probe_facts(checkerboard)
    assert column == "genre" and classes[0] == [] and set(map(tuple, classes[1:])) == {("odd",), ("even",)}
    assert titles[0] == "" and not any(years)
    named = [f"{title}, The (19{10 + row})" if row else "" for row, title in enumerate(checkerboard.items["title"])]
    items = checkerboard.items.assign(title=named, genre=[f"g{row}" for row in range(len(named))])
    titles, years, column, classes = probe_facts(dataclasses.replace(checkerboard, items=items))
    assert titles[1].startswith("The ") and not titles[1].endswith(")") and years[:3] == ["", "1911", "1912"]
    assert column == "" and not any(classes)  # a word of its own for each item is no class


def test_facts_of_ml_100k(ml100k_split):
    titles, years, column, classes = probe_facts(ml100k_split.dataset)
    assert (titles[1], years[1], column) == ("Toy Story", "1995", "class")
    assert classes[1] == ["Animation", "Children's", "Comedy"]
