"""PRS-based methods, ``S = f(g(M(E(U, I, N))))``: encode users and items, compare, filter, rank."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import FloatTensor, LongTensor

from llmrec_lib.baselines import keep_neighbours
from llmrec_lib.cache import cached_tensors, content_key
from llmrec_lib.fusion import SequentialFusion
from llmrec_lib.language_models.encoder import TextEncoder, Whitening
from llmrec_lib.prompts import StatedNeeds, Template, user_prompts
from llmrec_lib.recommender import PHASES, ItemSimilarityRecommender, Recommender
from llmrec_lib.splits import Split

# Encoders read about 128 tokens: the newest titles first in line, then the profile.
USER_TEXT = Template("user_text", "{history} {profile}", max_items=10)
USER_TEXT_WITH_NEED = Template("user_text_with_need", "{need}. {history} {profile}", max_items=10)


def embed_items(split: Split, encoder: TextEncoder, whiten: bool = True) -> tuple[FloatTensor, Whitening | None]:
    """M(I): embeddings of the item texts [n_items, d], whitened with what the items of the training part show.

    Returns
    -------
    embeddings, whitening
        `whitening` (None without) puts other texts into the same space.
    """
    raw = encoder.encode(split.dataset.item_text, progress=False)
    if not whiten:
        return raw, None
    whitening = Whitening().fit(raw[torch.from_numpy(split.item_counts > 0)])
    return whitening.transform(raw), whitening


def embed_users(
    split: Split, encoder: TextEncoder, users: Sequence[int], whitening: Whitening | None = None,
    needs: StatedNeeds | None = None,
) -> dict[str, FloatTensor]:  # fmt: skip
    """M(E(U, N)): embeddings of what is known of the users in words, and of what they state, for each phase.

    Returns
    -------
    dict phase -> FloatTensor [n_users, d]; rows of users who are not asked for are zero.
    """
    embeddings = {}
    for phase in PHASES:
        template, stated = (USER_TEXT, "") if needs is None else (USER_TEXT_WITH_NEED, needs.texts(users, phase))
        rows = encoder.encode(user_prompts(split, users, phase, template, need=stated), progress=False)
        rows = rows if whitening is None else whitening.transform(rows)
        embeddings[phase] = torch.zeros(split.dataset.n_users, rows.shape[1])
        embeddings[phase][torch.as_tensor(np.asarray(users, dtype=np.int64))] = rows
    return embeddings


def text_similarity(
    split: Split, item_embeddings: FloatTensor, neighbours: int = 50, name: str = "text"
) -> ItemSimilarityRecommender:
    """Items vote for items of similar text: g is the cosine, the filter keeps each item's nearest neighbours.

    Parameters
    ----------
    item_embeddings : FloatTensor [n_items, d]
        From `embed_items`; row 0 (PAD) is ignored.
    neighbours : int
        Neighbours of each item that get a vote.
    """
    unit = torch.nn.functional.normalize(item_embeddings.float(), dim=1).numpy()
    return ItemSimilarityRecommender(split, keep_neighbours(unit @ unit.T, neighbours), name)


def ease_with_text(
    split: Split, item_embeddings: FloatTensor, weight: float = 300.0, reg_weight: float = 250.0,
    name: str = "ease + text",
) -> ItemSimilarityRecommender:  # fmt: skip
    """EASE whose matrix has, below one row per user, one row per dimension of the text: X and √weight · Tᵀ.

    Closed form, ``P = (XᵀX + weight · T Tᵀ + reg_weight · I)⁻¹, B = −P / diag(P)`` with a zero diagonal. An item that
    nobody took in training can get votes, through its text. Source: Jeunen, Van Balen & Goethals 2020, "Closed-Form
    Models for Collaborative Filtering with Side-Information", Steck 2019. The inverse without text is made once and kept
    on disk; each text then changes it by its few dimensions (Woodbury's identity). Memory: about 3 · 4 · n_items² bytes.

    Parameters
    ----------
    item_embeddings : FloatTensor [n_items, d], whitened; row 0 (PAD) is ignored. Rows are scaled to length 1.
    weight : how much a unit of cosine counts, in users who took both items; 0 is EASE.
    """
    texts = torch.nn.functional.normalize(item_embeddings.float(), dim=1)
    texts[0] = 0.0

    def invert() -> dict[str, torch.Tensor]:
        gram = torch.from_numpy((split.matrix("train").T @ split.matrix("train")).toarray())
        gram.diagonal().add_(reg_weight)
        return {"inverse": torch.cholesky_inverse(torch.linalg.cholesky(gram))}

    key = content_key("inverse of ease", split.fingerprint, reg_weight, torch.__version__)
    inverse = cached_tensors("baselines", key, invert)["inverse"]
    if weight:
        projected = inverse @ texts
        core = texts.T @ projected + torch.eye(texts.shape[1]) / weight
        inverse = inverse.addmm_(projected, torch.linalg.solve(core, projected.T), alpha=-1)
    return ItemSimilarityRecommender(split, inverse.div_(-inverse.diagonal().clone()).fill_diagonal_(0), name)


def text_arms(
    split: Split, item_embeddings: FloatTensor, name: str = "text", half_lives: Sequence[float] = (0, 40, 5),
    weight: float = 300.0, neighbours: int = 50,
) -> list[ItemSimilarityRecommender]:  # fmt: skip
    """Both ways in which vectors of items help to recommend, as arms of a fusion: `ease_with_text` with each half-life of
    its votes (see `ItemSimilarityRecommender.recent`), and `text_similarity` with the last one."""
    similar = text_similarity(split, item_embeddings, neighbours, name)  # first: frees n_items²
    early = ease_with_text(split, item_embeddings, weight, name=f"EASE with {name}")
    return [*(early.recent(half_life) for half_life in half_lives), similar.recent(half_lives[-1])]


class UserTextRecommender(SequentialFusion):
    """A user described in words is compared with the items: similarity → filter → rank.

    ``g(u, i) = cos(M(E(u)), M(i))``; the `n_candidates` most similar unseen items pass the filter; they are ranked by
    ``z(g) + popularity_weight · z(log(1 + training events))``, z over the candidates; the others follow in the order of g.

    Parameters
    ----------
    user_embeddings : dict phase -> FloatTensor [n_users, d]
        Embeddings of the users' texts as they are known at that phase; rows of users who are not asked for may be zero.
    item_embeddings : FloatTensor [n_items, d]
    n_candidates : items that pass the filter.
    popularity_weight : 0 ranks by similarity alone; choose on validation.
    """

    def __init__(
        self, split: Split, user_embeddings: dict[str, FloatTensor], item_embeddings: FloatTensor,
        n_candidates: int = 200, popularity_weight: float = 0.0, name: str = "user text",
    ) -> None:  # fmt: skip
        arms = _UserItemCosine(split, user_embeddings, item_embeddings), _Popularity(split, "popularity")
        super().__init__(arms, n_candidates, popularity_weight, name)


class _UserItemCosine(Recommender):
    def __init__(self, split: Split, users: dict[str, FloatTensor], items: FloatTensor) -> None:
        super().__init__(split, "user-item cosine")
        self.users, self.items = users, torch.nn.functional.normalize(items.float(), dim=1)

    def score(self, users: LongTensor) -> FloatTensor:
        return torch.nn.functional.normalize(self.users[self.phase][users].float(), dim=1) @ self.items.T


class _Popularity(Recommender):
    def score(self, users: LongTensor) -> FloatTensor:
        return torch.from_numpy(np.log1p(self.split.item_counts)).float().expand(len(users), -1)


class NeedFilter(Recommender):
    """What a user states as a filter on any recommender: fitting items first, each group in the recommender's order."""

    def __init__(self, recommender: Recommender, needs: StatedNeeds, name: str | None = None) -> None:
        super().__init__(recommender.split, name or f"{recommender.name} | need")
        self.recommender, self.needs = recommender, needs

    def score(self, users: LongTensor) -> FloatTensor:
        scores = self.recommender.at(self.phase).score(users)
        step = scores.amax(1, keepdim=True) - scores.amin(1, keepdim=True) + 1.0
        return scores + step * torch.from_numpy(self.needs.fitting(users, self.phase))
