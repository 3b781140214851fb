"""Candidates as a list with letters: the scores by hand, what is not shown, in a fusion, errors."""

from __future__ import annotations

from string import ascii_uppercase

import pytest
import torch

from llmrec_lib.baselines import train
from llmrec_lib.fusion import SequentialFusion
from llmrec_lib.llm_based import LetterRecommender, catalogue_likelihood
from llmrec_lib.prompts import user_prompts
from tests.unit.tiny_models import tiny_llama, tiny_tokenizer

USERS = torch.tensor([7, 3])


@pytest.fixture
def scorer(checkerboard_split):
    return catalogue_likelihood(checkerboard_split, (tiny_llama(context=512), tiny_tokenizer()), dtype="float32")


def shown_to(retriever, user, n):
    return SequentialFusion([retriever, retriever], n).candidates(torch.tensor([user]))[0]


def test_scores_by_hand(checkerboard_split, scorer):
    ease = train("ease", checkerboard_split)
    found = LetterRecommender(ease, scorer, n_shown=5, n_orders=3).score(USERS)
    model, tokenizer, titles = scorer.model, scorer.tokenizer, ["", *scorer.titles]
    prompts = user_prompts(checkerboard_split, USERS.numpy(), "test", titles=titles)
    letters = [tokenizer(f" {letter}", add_special_tokens=False)["input_ids"][-1] for letter in ascii_uppercase[:5]]
    for row, user in enumerate(USERS.tolist()):
        best, generator = shown_to(ease, user, 5), torch.Generator().manual_seed(user)
        sums = dict.fromkeys(best.tolist(), 0.0)
        for _ in range(3):
            items = best[torch.randperm(5, generator=generator)].tolist()
            lines = [f"{letter}: {titles[item]}" for letter, item in zip("ABCDE", items, strict=True)]
            text = "\n".join([prompts[row], "One of these comes next:", *lines, "Its letter is"])
            with torch.no_grad():
                logits = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1, letters]
            for item, value in zip(items, logits.log_softmax(0).tolist(), strict=True):
                sums[item] += value / 3
        for item, value in sums.items():
            assert found[row, item].item() == pytest.approx(value, abs=1e-4)
        rest = [item for item in range(1, checkerboard_split.dataset.n_items) if item not in sums]
        assert len(set(found[row, rest].tolist())) == 1 and found[row, rest[0]] < min(sums.values())


def test_several_orders_are_not_one(checkerboard_split, scorer):
    ease = train("ease", checkerboard_split)
    one, four = (LetterRecommender(ease, scorer, 5, n).score(USERS) for n in (1, 4))
    assert not torch.allclose(one, four, atol=1e-3)


def test_behind_its_retriever_it_orders_what_is_shown_and_nothing_else(checkerboard_split, scorer):
    ease = train("ease", checkerboard_split)
    letters = LetterRecommender(ease, scorer, n_shown=5)
    alone = SequentialFusion([ease, letters], 5, 1000.0).score(USERS)
    untouched = SequentialFusion([ease, letters], 5, 0.0).score(USERS)
    for row, user in enumerate(USERS.tolist()):
        best = shown_to(ease, user, 5)
        by_letter = letters.score(USERS)[row, best].argsort(descending=True)
        order = alone[row].argsort(descending=True)
        assert order[:5].tolist() == best[by_letter].tolist()
        assert torch.equal(alone[row, order[5:]], untouched[row, order[5:]])


@pytest.mark.parametrize("n_shown", [1, 27])
def test_there_are_26_letters(checkerboard_split, scorer, n_shown):
    with pytest.raises(ValueError, match=f"n_shown is {n_shown}"):
        LetterRecommender(train("ease", checkerboard_split), scorer, n_shown=n_shown)
