"""What a causal language model remembers of a catalogue: titles it completes, years and classes it recalls."""

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from llmrec_lib.datasets import Dataset
from llmrec_lib.language_models.likelihood import TitleLikelihood, followers, logits_after
from llmrec_lib.prompts import item_titles

CONTEXT = "Titles of movies and products:"  # the same words for every title of every data set
MAX_CLASSES = 40  # distinct words of a column that may count as classes
BATCH_TOKENS = 512  # padded tokens per forward, each with a row of logits over the vocabulary
_YEAR = re.compile(r"(?:1[89]|20)\d\d")
_WITH_YEAR = re.compile(rf"(.*\S)\s*\(({_YEAR.pattern})\)")


def probe_facts(dataset: Dataset) -> tuple[list[str], list[str], str, list[list[str]]]:
    """What is known of each item that a model might know too; each list has a row per item, PAD's is empty.

    Returns
    -------
    titles : as prompts write them, without a year in brackets at the end
    years : "1995", from the title's brackets or else the column with "year" in its name; empty where there is none
    class_column : the first text column of 2 to `MAX_CLASSES` words, on average in two items at least; "" if none is
    classes : the words in it; a column of type token is one word
    """
    titles = item_titles(dataset.titles)
    found = [_WITH_YEAR.fullmatch(title) for title in titles]
    column = next((name for name in dataset.item_columns if "year" in name.lower()), None)
    values = dataset.items[column] if column else [""] * len(titles)
    texts = [m[2] if m else str(v).removesuffix(".0").strip() for m, v in zip(found, values, strict=True)]
    years = [text if _YEAR.fullmatch(text) else "" for text in texts]
    titles = [match[1] if match else title for title, match in zip(titles, found, strict=True)]
    for name, kind in dataset.item_columns.items():
        if kind not in ("token", "token_seq") or name in ("item_id", dataset.title_column, column):
            continue
        values = dataset.items[name].tolist()
        classes = [value.split() if kind == "token_seq" else [value.strip()] * bool(value.strip()) for value in values]
        n_distinct = len({word for row in classes for word in row})
        if 2 <= n_distinct <= min(MAX_CLASSES, sum(map(len, classes)) // 2):
            return titles, years, name, classes
    return titles, years, "", [[] for _ in titles]


def complete_titles(likelihood: TitleLikelihood, titles: Sequence[str]) -> pd.DataFrame:
    """Given `CONTEXT` and the first half of a title's tokens: is each later token the most probable one?

    Right and next token are compared in one reading of the whole title, which is right exactly where greedy generation
    would write the title's second half. Verbatim completion as in Carlini et al. 2023, "Quantifying Memorization Across
    Neural Language Models". The end of the title is not asked for. `likelihood` lends its model and tokenizer.

    Returns
    -------
    DataFrame, a row per title: given, asked, right (numbers of tokens), rest (text of the tokens asked for), remembered
    (boolean; missing for a title of a single token, of which nothing can be asked)
    """
    given = likelihood.prompt_tokens(CONTEXT)
    tokens = [_tokens_after(likelihood, CONTEXT, f" {title}") for title in titles]
    halves = [(len(ids) + 1) // 2 for ids in tokens]
    rows = [([*given, *ids[:half]], ids[half:]) for ids, half in zip(tokens, halves, strict=True)]
    right = np.zeros(len(rows), dtype=int)
    for row, logits in logits_after(likelihood.model, rows, BATCH_TOKENS):
        right[row] = int((logits.argmax(1).cpu() == torch.tensor(rows[row][1])).sum())
    frame = pd.DataFrame({"given": halves, "asked": [len(after) for _, after in rows], "right": right})
    rest = likelihood.tokenizer.batch_decode([after for _, after in rows])
    remembered = (frame["right"] == frame["asked"]).astype("boolean")
    return frame.assign(rest=rest, remembered=remembered.mask(frame["asked"] == 0))


def recall(
    likelihood: TitleLikelihood, prompts: Sequence[str], answers: Sequence[Sequence[str]], choices: Sequence[str]
) -> np.ndarray:
    """Does the model answer a prompt with one of its right answers, if it may only write one of the choices?

    Greedy decoding among the choices: at each token the most probable of those with which a choice goes on. A right
    answer that would be written passes each of its own tokens, so one reading per answer tells.

    Parameters
    ----------
    prompts : one or more texts, all with the same last character, which the answer follows without a gap
    answers : the right ones of each prompt, all in `choices`; none is never right
    choices : with a blank at the beginning where one belongs

    Returns
    -------
    bool array [n_prompts]
    """
    tokens = {choice: tuple(_tokens_after(likelihood, prompts[0], choice)) for choice in choices}
    allowed = followers(tokens.values())
    asked = [(row, answer) for row, right in enumerate(answers) for answer in right]
    rows = [(likelihood.prompt_tokens(prompts[row]), list(tokens[answer])) for row, answer in asked]
    written = np.zeros(len(prompts), dtype=bool)
    for place, logits in logits_after(likelihood.model, rows, BATCH_TOKENS):
        ids = tokens[asked[place][1]]
        options = [allowed[ids[:step]] for step in range(len(ids))]
        best = [ways[int(logits[step, ways].argmax())] for step, ways in enumerate(options)]
        written[asked[place][0]] |= tuple(best) == ids
    return written


def _tokens_after(likelihood: TitleLikelihood, before: str, text: str) -> list[int]:
    """Tokens of `text` behind the last character of `before`: the beginning of a text is a special place."""
    start, whole = likelihood.tokenizer([before[-1], before[-1] + text], add_special_tokens=False)["input_ids"]
    return whole[next((i for i, (a, b) in enumerate(zip(start, whole, strict=False)) if a != b), len(start)) :]
