"""The contract that every recommender of the library passes, on a data set where the right ranking is known."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from llmrec_lib.baselines import BASELINES, train
from llmrec_lib.datasets import load_folder
from llmrec_lib.evaluation.evaluate import evaluate
from llmrec_lib.fusion import NORMALISERS, HybridFusion, LearnedFusion, ParallelFusion, SequentialFusion
from llmrec_lib.language_models.backbone import train_backbone
from llmrec_lib.llm_based import LetterRecommender, TitleLikelihoodRecommender, catalogue_likelihood
from llmrec_lib.prs_based import UserTextRecommender, ease_with_text, text_similarity
from llmrec_lib.recommender import ItemSimilarityRecommender, Recommender, ScoreTable
from llmrec_lib.splits import split
from tests.checkerboard import write_checkerboard
from tests.unit.tiny_models import tiny_llama, tiny_tokenizer

SHORT = {"bpr": 120, "lightgcn": 20, "gru4rec": 6, "sasrec": 9, "fm": 60}  # epochs
USERS = torch.tensor([5, 1, 24, 2, 13, 8, 7])  # in no order


def parities(data) -> np.ndarray:
    return np.array([-1, *(int(token[1:]) % 2 for token in data.item_ids[1:])])


def item_embeddings(data) -> torch.Tensor:
    """Two directions for the parities, and a little noise that is the item's own."""
    noise = 0.1 * np.random.default_rng(1).standard_normal((data.n_items, 6))
    noise[:, :2] += np.stack([parities(data) == 0, parities(data) == 1], axis=1)
    return torch.from_numpy(noise).float()


def user_embeddings(parts) -> dict[str, torch.Tensor]:
    """The mean embedding of the items in each history, as the phase knows it."""
    items = item_embeddings(parts.dataset)
    return {
        phase: torch.from_numpy(parts.history_matrix(phase) @ items.numpy() / 4.0).float()
        for phase in ("valid", "test")
    }


def baseline(name):
    settings = {"epochs": SHORT[name], "stopping_step": 99} if name in SHORT else {}
    return lambda parts: train(name, parts, progress=False, **settings)


def with_vectors(name):
    settings = {"epochs": SHORT[name], "stopping_step": 99}
    return lambda parts: train(name, parts, progress=False, item_vectors=item_embeddings(parts.dataset), **settings)


def plain_similarity(parts):
    generator = np.random.default_rng(3)
    return ItemSimilarityRecommender(
        parts, torch.from_numpy(generator.standard_normal((parts.dataset.n_items,) * 2)).float(), "random similarity"
    )


def text(parts):
    return text_similarity(parts, item_embeddings(parts.dataset), neighbours=7)


def backbone(parts):
    model = tiny_llama(), None
    settings = {"epochs": 20, "eval_step": 5, "learning_rate": 0.005, "train_batch_size": 8}
    return train_backbone(parts, item_embeddings(parts.dataset), model, progress=False, **settings)


def likelihood(parts, **rule):
    scorer = catalogue_likelihood(parts, (tiny_llama(), tiny_tokenizer()), dtype="float32")
    return TitleLikelihoodRecommender(parts, scorer, progress=False, **rule)


def arms(parts):
    return [train("ease", parts), text(parts)]


def letters(parts):
    scorer = catalogue_likelihood(parts, (tiny_llama(), tiny_tokenizer()), dtype="float32")
    return LetterRecommender(text(parts), scorer, n_shown=6, n_orders=2, progress=False)


def gate(users):
    return torch.stack([users.float(), 30.0 - users.float()], dim=1) / 30.0


FACTORIES = {
    **{name: baseline(name) for name in BASELINES},
    **{f"{name} with vectors": with_vectors(name) for name in ("bpr", "lightgcn", "gru4rec", "sasrec")},
    "similarity": plain_similarity,
    "text": text,
    "user text": lambda parts: UserTextRecommender(
        parts, user_embeddings(parts), item_embeddings(parts.dataset), 5, 0.1
    ),
    "backbone": backbone,
    "likelihood": likelihood,
    "likelihood, prior": lambda parts: likelihood(parts, rule="prior_corrected", prior_weight=0.5, over="catalogue"),
    "letters": letters,
    "letters behind their retriever": lambda parts: SequentialFusion([text(parts), letters(parts)], 6, 0.5),
    "table": lambda parts: ScoreTable(train("ease", parts), range(1, parts.dataset.n_users), batch_size=5),
    **{f"parallel {rule}": lambda parts, rule=rule: ParallelFusion(arms(parts), rule) for rule in NORMALISERS},
    "hybrid learned": lambda parts: LearnedFusion(arms(parts)),
    "hybrid learned, no gate": lambda parts: LearnedFusion(arms(parts), gated=False),
    "hybrid": lambda parts: HybridFusion(arms(parts), [1.0, 0.3]),
    "fading votes": lambda parts: train("ease", parts).recent(4),
    "ease + text": lambda parts: ease_with_text(parts, item_embeddings(parts.dataset), 30.0),
    "hybrid per user": lambda parts: HybridFusion(arms(parts), gate, rule="minmax"),
    "sequential": lambda parts: SequentialFusion(arms(parts), n_candidates=6, weights=0.5),
    "sequential, whole catalogue": lambda parts: SequentialFusion(arms(parts), n_candidates=100, weights=0.5),
    "sequential, three stages": lambda parts: SequentialFusion(
        [*arms(parts), plain_similarity(parts)], (8, 4), (0.5, 0.2)
    ),
    "nested": lambda parts: ParallelFusion([SequentialFusion(arms(parts), 6), HybridFusion(arms(parts), [0.0, 1.0])]),
}
READS_NO_HISTORY = {
    "pop",
    "bpr",
    "lightgcn",
    "fm",
    "bpr with vectors",
    "lightgcn with vectors",
}  # what training gave is all they know
FINDS_PARITY = {"itemknn", "ease", "slim", "tfidf", "text", "user text", "table", "lightgcn", "fm"} | {
    name for name in FACTORIES if name.startswith(("parallel", "hybrid", "nested", "fading", "ease +"))
}


@pytest.fixture(scope="module")
def other_split(tmp_path_factory):
    """The checkerboard whose users took something else last: the test events differ, and nothing else."""
    path = write_checkerboard(tmp_path_factory.mktemp("other"))
    file = path / "checkerboard.inter"
    header, *rows = [line.split("\t") for line in file.read_text().splitlines()]
    last = {user: place for place, (user, *_) in enumerate(rows)}
    for user, place in last.items():
        number = int(user[1:])
        rows[place][1] = f"i{2 * ((number // 2 + 6) % 8) + number % 2}"
    file.write_text("".join("\t".join(row) + "\n" for row in [header, *rows]))
    return split(load_folder(path))


@pytest.fixture(scope="module")
def built(checkerboard_split, other_split):
    """Each recommender, made once per split."""
    made = {}

    def get(name: str, other: bool = False) -> Recommender:
        if (name, other) not in made:
            made[name, other] = FACTORIES[name](other_split if other else checkerboard_split)
        return made[name, other]

    return get


def same_scores(a: torch.Tensor, b: torch.Tensor, tolerance: float = 0.0) -> bool:
    return torch.allclose(a[:, 1:], b[:, 1:], rtol=0, atol=tolerance)


def blind_to_test(recommender: Recommender, other: Recommender) -> bool:
    """Whether two recommenders, of data that differ in the test items only, agree."""
    return all(
        same_scores(recommender.at(phase).score(USERS), other.at(phase).score(USERS)) for phase in ("valid", "test")
    )


@pytest.mark.parametrize("name", FACTORIES)
class TestContract:
    def test_shape_and_values(self, built, name):
        recommender = built(name)
        assert recommender.phase == "test"
        assert (recommender.n_users, recommender.n_items) == (25, 17)
        for phase in ("valid", "test"):
            scores = recommender.at(phase).score(USERS)
            assert scores.shape == (len(USERS), recommender.n_items)
            assert scores.dtype == torch.float32
            assert torch.isfinite(scores[:, 1:]).all()
            assert not scores.requires_grad

    def test_a_user_s_scores_do_not_depend_on_the_others_in_the_batch(self, built, name):
        for phase in ("valid", "test"):
            view = built(name).at(phase)
            together = view.score(USERS)
            alone = torch.cat([view.score(USERS[[row]]) for row in range(len(USERS))])
            assert same_scores(together, alone, 1e-5)
            backwards = view.score(USERS.flip(0))
            assert same_scores(together, backwards.flip(0), 1e-5)

    def test_users_are_told_apart(self, built, name):
        scores = built(name).score(USERS)
        different = not same_scores(scores, scores[:1].expand_as(scores), 1e-6)
        assert different == (name != "pop")

    def test_asking_changes_nothing(self, built, name):
        recommender = built(name)
        users, parts = USERS.clone(), recommender.split
        before = {part: parts.matrix(part).copy() for part in ("train", "valid", "test", "train+valid")}
        first = recommender.score(users)
        expected = first.clone()
        first.fill_(-7.0)  # what is handed out belongs to the caller
        description = recommender.describe()
        recommender.at("valid").score(users)
        assert torch.equal(recommender.score(users)[:, 1:], expected[:, 1:])
        assert torch.equal(users, USERS)
        assert recommender.describe() == description
        assert all((parts.matrix(part) != matrix).nnz == 0 for part, matrix in before.items())

    def test_a_view_reads_the_histories_of_its_phase(self, built, name):
        recommender = built(name)
        test, valid = recommender.score(USERS), recommender.at("valid").score(USERS)
        assert recommender.phase == "test"
        assert recommender.at("valid").phase == "valid"
        assert recommender.at("valid").at("test").phase == "test"
        assert torch.equal(recommender.at("valid").at("test").score(USERS)[:, 1:], test[:, 1:])
        assert same_scores(test, valid, 1e-6) == (name in READS_NO_HISTORY)
        with pytest.raises(ValueError, match="phase is 'train'.*valid.*test"):
            recommender.at("train")

    def test_valid_views_read_training_only(self, built, name, monkeypatch):
        """Whatever a recommender asks of the split at validation, it asks for that phase."""
        recommender = built(name)
        asked = set()
        history, sequences = type(recommender.split).history_matrix, type(recommender.split).histories
        monkeypatch.setattr(
            type(recommender.split),
            "history_matrix",
            lambda self, phase, *how: asked.add(phase) or history(self, phase, *how),
        )
        monkeypatch.setattr(
            type(recommender.split),
            "histories",
            lambda self, users, phase: asked.add(phase) or sequences(self, users, phase),
        )
        recommender.at("valid").score(USERS)
        assert asked <= {"valid"}

    def test_description_is_plain_data(self, built, name):
        description = built(name).describe()
        assert json.loads(json.dumps(description)) == description
        assert description["class"]
        assert FACTORIES[name](built(name).split).describe() == description

    def test_never_reads_what_it_has_to_predict(self, built, name):
        assert blind_to_test(built(name), built(name, other=True))

    def test_ranks_by_parity(self, built, name, checkerboard_split):
        recommender = built(name)
        parity = parities(checkerboard_split.dataset)
        for phase in ("valid", "test"):
            seen = checkerboard_split.seen(phase).toarray() > 0
            users = torch.arange(1, recommender.n_users)
            scores = recommender.at(phase).score(users).numpy()
            separated = []
            for user, row in zip(users.tolist(), scores, strict=True):
                mine = parity == int(checkerboard_split.dataset.user_ids[user][1:]) % 2
                others = ~mine & (parity >= 0)
                separated.append(row[mine & ~seen[user]].min() > row[others].max())
            if name in FINDS_PARITY:
                assert all(separated)
            elif name in ("pop", "similarity"):
                assert not any(separated)

    @pytest.mark.parametrize("phase", ["valid", "test"])
    def test_is_judged_like_all_others(self, built, name, phase):
        judged = evaluate(built(name), built(name).split, phase, ks=(3, 5))
        assert len(judged.per_user) == 24
        # At most four items of the user's parity are unseen: the first five places hold all of them.
        if name in FINDS_PARITY:
            assert judged.mean("recall@5") == 1.0


@pytest.mark.parametrize("name", ["bpr", "lightgcn", "gru4rec", "sasrec", "fm", "backbone"])
def test_a_short_training_beats_popularity(built, name, checkerboard_split):
    learned, popular = (evaluate(built(method), checkerboard_split, "valid", ks=(3,)) for method in (name, "pop"))
    assert learned.mean("ndcg@3") > popular.mean("ndcg@3") + 0.15


def test_the_split_s_rule_for_test_histories_reaches_the_method(checkerboard):
    parts = split(checkerboard, test_history="train")
    recommender = text(parts)
    assert torch.equal(recommender.score(USERS), recommender.at("valid").score(USERS))


class Peeking(Recommender):
    def score(self, users):
        return torch.from_numpy(self.split.targets(self.phase)[users.numpy()].toarray())


def test_the_contract_notices_a_method_that_peeks(checkerboard_split, other_split):
    assert not blind_to_test(Peeking(checkerboard_split, "peeking"), Peeking(other_split, "peeking"))


def test_the_two_splits_differ_in_test_only(checkerboard_split, other_split):
    for part in ("train", "valid"):
        assert (checkerboard_split.matrix(part) != other_split.matrix(part)).nnz == 0
    assert (checkerboard_split.matrix("test") != other_split.matrix("test")).nnz == 48


def test_wrong_similarity_shape(checkerboard_split):
    with pytest.raises(ValueError, match=r"\(3, 3\).*\(17, 17\)"):
        ItemSimilarityRecommender(checkerboard_split, torch.zeros(3, 3), "wrong")


def test_tables_know_only_their_users(checkerboard_split):
    table = ScoreTable(plain_similarity(checkerboard_split), [3, 1, 3])
    assert torch.equal(
        table.score(torch.tensor([3, 1])), plain_similarity(checkerboard_split).score(torch.tensor([3, 1]))
    )
    with pytest.raises(KeyError, match="user 2 is not among the 2 users"):
        table.score(torch.tensor([1, 2]))


def test_tables_ask_once_per_phase(checkerboard_split):
    asked = []

    class Counting(Recommender):
        def score(self, users):
            asked.append((self.phase, users.tolist()))
            return torch.zeros(len(users), self.n_items)

    table = ScoreTable(Counting(checkerboard_split, "counting"), [4, 2, 9], batch_size=2)
    for _ in range(3):
        table.at("valid").score(torch.tensor([9]))
        table.score(torch.tensor([2, 4]))
    assert sorted(asked) == [("test", [2, 4]), ("test", [9]), ("valid", [2, 4]), ("valid", [9])]
