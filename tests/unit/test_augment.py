"""What is put in, left out and shuffled, what may be predicted then, and that training and fine-tuning use just that."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmrec_lib import _recbole, baselines
from llmrec_lib.augment import OPERATIONS, Augmentation, contrast, with_copies
from llmrec_lib.language_models import finetune as finetune_module
from llmrec_lib.language_models.backbone import train_backbone
from llmrec_lib.language_models.finetune import finetune
from tests.unit.test_finetune import prepare
from tests.unit.tiny_models import tiny_llama, tiny_tokenizer

N_ITEMS = 40
ITEMS = np.arange(1, N_ITEMS)
SEQUENCES = st.lists(st.integers(1, N_ITEMS - 1), min_size=1, max_size=30, unique=True)
RATES = st.floats(0, 1)
SEEDS = st.integers(0, 2**32 - 1)


def neighbours(seed=0):
    """Five random neighbours of each item."""
    rng = np.random.default_rng(seed)
    columns = np.concatenate([rng.choice(ITEMS, 5, replace=False) for _ in range(N_ITEMS)])
    return sp.csr_matrix((np.ones(len(columns)), columns, np.arange(0, len(columns) + 1, 5)), shape=(N_ITEMS, N_ITEMS))


SIMILAR = neighbours()


@pytest.mark.parametrize("similar", [None, SIMILAR], ids=["random", "informed"])
@pytest.mark.parametrize("operation", OPERATIONS)
@given(sequence=SEQUENCES, rate=RATES, seed=SEEDS)
def test_lengths_and_elements(operation, similar, sequence, rate, seed):
    n, asked = len(sequence), min(round(rate * len(sequence)), len(sequence) - 1)
    events, real = Augmentation(operation, rate, similar)(sequence, np.random.default_rng(seed), ITEMS)
    assert len(events) == len(real) and real.dtype == bool and len(events)
    assert events.min() > 0  # no PAD inside
    own = np.isin(events, sequence)
    new = np.count_nonzero(~own)
    if operation in ("slice", "mask"):
        assert len(events) == n - asked and own.all() and real.all()
    elif operation == "reorder":
        assert sorted(events) == sorted(sequence)
        assert np.count_nonzero(~real) == (asked if asked > 1 else 0)
    else:
        assert new == asked if similar is None and n + asked < N_ITEMS else new <= asked
        assert (real == own).all()
        assert len(events) == n + (new if operation == "insert" else 0)
    if operation in ("slice", "mask", "insert"):  # what is its own keeps its order
        kept = [event for event in events if event in sequence]
        assert kept == [event for event in sequence if event in kept]
    if operation == "slice":
        assert any(list(events) == sequence[start : start + len(events)] for start in range(n))
    if operation == "replace":
        assert (events[real] == np.array(sequence)[real]).all()
        assert events[-1] == sequence[-1]


@pytest.mark.parametrize("operation", OPERATIONS)
@given(sequence=SEQUENCES, rate=RATES, seed=SEEDS)
def test_a_target_never_stands_before_itself_nor_after_what_came_later(operation, sequence, rate, seed):
    events, real = Augmentation(operation, rate)(sequence, np.random.default_rng(seed), ITEMS)
    place = {item: number for number, item in enumerate(sequence)}
    for at in np.flatnonzero(real):
        assert events[at] in place
        assert events[at] not in events[:at]
        assert all(place.get(before, -1) < place[events[at]] for before in events[:at])


@pytest.mark.parametrize("operation", OPERATIONS)
@given(sequence=SEQUENCES, seed=SEEDS)
def test_rate_zero_changes_nothing(operation, sequence, seed):
    events, real = Augmentation(operation, 0.0, SIMILAR)(sequence, np.random.default_rng(seed), ITEMS)
    assert list(events) == sequence
    assert real.all()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_at_a_positive_rate_something_changes_and_the_seed_decides(operation):
    sequence = list(range(1, 21))
    augmentation = Augmentation(operation, 0.3, copies=4)
    drawn = [augmentation(sequence, np.random.default_rng(seed), ITEMS) for seed in (0, 0, 1)]
    assert drawn[0][0].tolist() == drawn[1][0].tolist() != drawn[2][0].tolist()
    assert drawn[0][0].tolist() != sequence
    histories = [np.array(sequence), np.arange(21, 41)]
    rows, share = with_copies(histories, augmentation, np.random.default_rng(0))
    assert len(rows) == 10
    assert all((events == own).all() and real.all() for (events, real), own in zip(rows, histories, strict=False))
    assert share == pytest.approx(0.3)


@pytest.mark.parametrize("operation", ["insert", "replace"])
def test_informed_changes_take_neighbours_of_the_item_before_or_replaced(operation):
    sequence = list(range(1, 21))
    augmentation = Augmentation(operation, 0.5, SIMILAR)
    for seed in range(20):
        events, real = augmentation(sequence, np.random.default_rng(seed), ITEMS)
        for at in np.flatnonzero(~real):
            anchor = events[at - 1] if operation == "insert" else sequence[at]
            assert SIMILAR[anchor, events[at]]
    lonely = Augmentation(operation, 0.5, sp.csr_matrix((N_ITEMS, N_ITEMS)))
    assert list(lonely(sequence, np.random.default_rng(0), ITEMS)[0]) == sequence  # nobody to take


def test_words_of_a_text():
    words = np.array(["alpha", "a-much-longer-word", "gamma"], dtype=object)
    text = "the toys come alive when nobody looks"
    rng = np.random.default_rng(0)
    changed = {operation: Augmentation(operation, 0.5).text(text, rng, words) for operation in OPERATIONS}
    assert all(new != text for new in changed.values())
    assert set(changed["insert"].split()) - set(text.split()) <= set(words)
    assert "a-much-longer-word" in changed["insert"] or "a-much-longer-word" in changed["replace"]
    assert sorted(changed["reorder"].split()) == sorted(text.split())
    assert changed["slice"] in text
    assert Augmentation("slice").text("", rng, words) == ""
    assert Augmentation("slice", 0.0).text("two  blanks", rng, words) == "two blanks"


def test_errors_say_what_is_possible():
    with pytest.raises(ValueError, match="operation 'crop' must be one of slice, insert, replace, mask, reorder"):
        Augmentation("crop")
    for wrong in ({"rate": 1.5}, {"rate": -0.1}, {"rate": float("nan")}, {"copies": -1}, {"views": -1.0}):
        with pytest.raises(ValueError, match="rate must lie in"):
            Augmentation("slice", **wrong)


def test_fingerprint_knows_everything_that_decides():
    others = [{}, {"rate": 0.3}, {"similar": SIMILAR}, {"similar": neighbours(1)}, {"copies": 2}, {"views": 0.1}]
    prints = [Augmentation("insert", **other).fingerprint for other in others] + [Augmentation("slice").fingerprint]
    assert len(set(prints)) == len(prints)
    assert Augmentation("insert", similar=neighbours()).fingerprint == prints[2]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_windows_ask_for_the_users_own_events_alone(checkerboard_split, operation):
    split = checkerboard_split
    plain = _recbole.windows(split, 3)
    table = _recbole.windows(split, 3, Augmentation(operation, 0.5, copies=2), seed=3)
    assert table[: len(plain)].astype(str).equals(plain.astype(str))
    assert len(table) > len(plain)
    for row in table.itertuples():
        own = split.histories([row.user_id], "train")[0]
        assert len(row.item_id_list) == len(row.item_target_list) == row.item_length
        assert {*row.item_target_list} <= {0, *own}
        assert row.item_target_list.any()
        for place, target in enumerate(row.item_target_list):
            assert target == 0 or target not in row.item_id_list[: place + 1]
    again = _recbole.windows(split, 3, Augmentation(operation, 0.5, copies=2), seed=3)
    assert again.astype(str).equals(table.astype(str))


def test_copies_at_rate_zero_are_the_same_rows_again(checkerboard_split):
    plain = _recbole.windows(checkerboard_split, 3)
    table = _recbole.windows(checkerboard_split, 3, Augmentation("replace", 0.0, copies=2))
    assert table.astype(str).equals(pd.concat([plain] * 3, ignore_index=True).astype(str))


@pytest.mark.parametrize("name", ["sasrec", "gru4rec"])
def test_sequence_models_train_on_copies_and_on_views(checkerboard_split, tmp_path, monkeypatch, name):
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path))
    users = torch.arange(1, 5)
    size = {"epochs": 2, "eval_step": 1}

    def scores(augmentation):
        settings = {} if augmentation is None else {"augmentation": augmentation}
        return baselines.train(name, checkerboard_split, progress=False, **size, **settings).score(users)

    plain = scores(None)
    for augmentation in (Augmentation("replace", 0.5), Augmentation("slice", 0.5, views=0.5)):
        assert torch.isfinite(scores(augmentation)).all()
        assert not torch.equal(scores(augmentation), plain)
    assert torch.equal(scores(Augmentation("mask", 0.5, views=0.5)), scores(Augmentation("mask", 0.5, views=0.5)))


def test_views_pull_two_views_of_one_history_together(checkerboard_split):
    settings = {**baselines.BASELINES["sasrec"].settings, "dropout_prob": 0.0}
    with _recbole.contained(0):
        augmentation = Augmentation("mask", 0.0, views=1.0)  # equal views: each is most like its own
        built = _recbole.build("SASRec", checkerboard_split, {**settings, "augmentation": augmentation}, 0)
        built.model.eval()
        batch = next(iter(built.loader))
        sequence, length = batch["item_id_list"], batch["item_length"]
        same = built.model._contrast(sequence, length).item()
        built.model.augmentation = Augmentation("replace", 1.0, views=1.0)
        other = built.model._contrast(sequence, length).item()
        assert same < other
        whole = built.model.calculate_loss(batch)
        built.model.augmentation = None
        assert whole.item() > built.model.calculate_loss(batch).item()


def test_models_that_predict_only_the_last_item_refuse(checkerboard_split):
    with pytest.raises(ValueError, match="augmentation is for models trained with all_positions"):
        _recbole.fit("BPR", checkerboard_split, {"augmentation": Augmentation("slice"), "epochs": 1}, 0, progress=False)


def test_the_backbone_trains_on_copies(checkerboard_split, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path))
    model = tiny_llama(), tiny_tokenizer()
    options = {"item_input": "id", "epochs": 1, "progress": False}
    plain, copies = (
        train_backbone(checkerboard_split, None, model, augmentation=how, **options)
        for how in (None, Augmentation("insert", 0.5))
    )
    users = torch.arange(1, 5)
    assert not torch.equal(plain.score(users), copies.score(users))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_fine_tuning_reads_what_was_put_in_and_predicts_only_the_users_own(checkerboard_split, operation):
    split = checkerboard_split
    how = Augmentation(operation, 0.5, copies=2)
    scorer, texts = prepare(split, tiny_llama(), tiny_tokenizer(), augmentation=how)
    histories = {tuple(history) for history in split.histories(range(1, split.dataset.n_users), "train")}
    windows = texts.windows(np.random.default_rng(0))
    assert sum(n for _, _, n, _ in windows) > split.user_counts.sum()
    titles = {tuple(tokens): item for item, tokens in enumerate(scorer.title_tokens, 1)}
    asks = [nodes != [finetune_module._NONE] * len(nodes) for nodes in texts.nodes]
    assert all(asks[1:])
    for ids, nodes, n, _ in windows:
        rest, flags, items, predicted = ids[len(texts.preamble) :], nodes[len(texts.preamble) - 1 :], [], []
        while rest:
            size = next(size for size in range(1, len(rest) + 1) if tuple(rest[:size]) in titles)
            items.append(titles[tuple(rest[:size])])
            predicted.append(any(flag != finetune_module._NONE for flag in flags[:size]))
            assert flags[:size] == texts.nodes[items[-1]] or not predicted[-1]
            rest, flags = rest[size:], flags[size:]
        assert sum(predicted) == n
        asked = {item for item, flag in zip(items, predicted, strict=True) if flag}
        assert any(asked <= set(history) for history in histories)
    first, second = (texts.windows(np.random.default_rng(seed)) for seed in (1, 2))
    assert first != second  # drawn anew in each epoch


def test_a_fine_tuned_model_is_another_with_copies(checkerboard_split, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path))
    model = tiny_llama(), tiny_tokenizer()
    options = {"window_tokens": 96, "batch_tokens": 192, "progress": False}
    plain = finetune(checkerboard_split, model, **options)
    copies = finetune(checkerboard_split, model, augmentation=Augmentation("mask", 0.5), **options)
    assert copies.curve["step"].max() > plain.curve["step"].max()
    assert plain.settings["augmentation"] is None
    assert copies.settings["augmentation"] == Augmentation("mask", 0.5).fingerprint


def test_views_of_a_window_are_read_anew_each_epoch_and_fit(checkerboard_split):
    how = Augmentation("insert", 0.9, views=1.0)
    scorer, texts = prepare(checkerboard_split, tiny_llama(), tiny_tokenizer(), augmentation=how, window_tokens=54)
    windows = texts.windows(np.random.default_rng(0))
    assert sum(n for _, _, n, _ in windows) == checkerboard_split.user_counts.sum()  # and no copies
    assert any(views[0] != views[1] for *_, views in windows)
    for *_, views in windows:
        assert len(views) == 2
        for view in views:
            assert view[: len(texts.preamble)] == texts.preamble
            assert len(texts.preamble) < len(view) <= 54
    assert windows != texts.windows(np.random.default_rng(1))


def test_contrast_of_a_language_model_pulls_the_views_of_one_window_together(checkerboard_split):
    tokenizer, dtype = tiny_tokenizer(), torch.float32

    def gradients(augmentation, weight):
        model = tiny_llama()
        scorer, texts = prepare(checkerboard_split, model, tokenizer, augmentation=augmentation)
        trainable = finetune_module._trainable(model, "full", 1, 0)
        batch = texts.windows(np.random.default_rng(0))[:6]
        finetune_module._loss(model, finetune_module._Head(scorer, dtype), batch, dtype, True, weight)
        return {name: parameter.grad.clone() for name, parameter in trainable.items()}, batch, texts

    def slow(batch):
        """The contrast by one reading per view, without padding."""
        model = tiny_llama()
        trainable = finetune_module._trainable(model, "full", 1, 0)
        read = lambda ids: model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]  # noqa: E731
        first, second = (torch.stack([read(views[which]) for *_, views in batch]) for which in range(2))
        contrast(first, second).backward()
        return {name: parameter.grad for name, parameter in trainable.items()}

    how = Augmentation("mask", 0.5, views=1.0)
    without, _, _ = gradients(how, 0.0)
    with_views, batch, _ = gradients(how, 2.0)
    for name, expected in slow(batch).items():
        torch.testing.assert_close(with_views[name] - without[name], 2 * expected, atol=1e-4, rtol=1e-3)


def test_contrast_by_hand():
    first, second = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    assert contrast(first, second).item() == pytest.approx(np.log(1 + np.exp(-1 / 0.2)), rel=1e-5)
    assert contrast(first, second.flip(0)).item() == pytest.approx(np.log(1 + np.exp(1 / 0.2)), rel=1e-5)


def test_fine_tuning_on_views_changes_the_weights_and_is_seeded(checkerboard_split, tmp_path, monkeypatch):
    model = tiny_llama(), tiny_tokenizer()
    options = {"window_tokens": 96, "batch_tokens": 384, "progress": False}

    def weights(folder, augmentation):
        monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / folder))
        tuned = finetune(checkerboard_split, model, augmentation=augmentation, **options)
        return torch.cat([parameter.flatten() for parameter in tuned.model.parameters()]), tuned

    views = Augmentation("mask", 0.5, views=0.5)
    (plain, alone), (once, tuned), (again, _) = weights("a", None), weights("b", views), weights("c", views)
    assert torch.equal(once, again) and not torch.equal(once, plain)
    assert tuned.curve["step"].max() == alone.curve["step"].max()  # no copies: as many steps
    assert tuned.curve["tokens"].max() > 2 * alone.curve["tokens"].max()  # but more is read
