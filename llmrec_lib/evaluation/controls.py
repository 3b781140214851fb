"""Controls: what a fusion would reach if the text said nothing, or the language model knew nothing.

"Helps" may be written only where they are beaten.
"""

import torch
from torch import Tensor

from llmrec_lib.baselines import tfidf_vectors
from llmrec_lib.language_models import catalog
from llmrec_lib.language_models.encoder import TextEncoder, Whitening
from llmrec_lib.splits import Split


def shuffled_items(embeddings: Tensor, seed: int) -> Tensor:
    """The embeddings of the items given to other items at random; PAD (row 0) stays. [n_items, d]

    Keeps everything of the text arm (distribution, neighbours, number of votes) but which item says what.
    """
    generator = torch.Generator().manual_seed(seed)
    order = 1 + torch.randperm(len(embeddings) - 1, generator=generator)
    return embeddings[torch.cat([torch.zeros(1, dtype=torch.long), order])]


def random_items(embeddings: Tensor, seed: int) -> Tensor:
    """Gaussian vectors in the place of the embeddings. [n_items, d]"""
    return torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(seed))


def word_items(split: Split, n_components: int = 384) -> Tensor:
    """Text without a language model: TF-IDF vectors of the item texts, their main directions, whitened. [n_items, d]

    Source: Deerwester et al. 1990, "Indexing by Latent Semantic Analysis". Whitened with what the items of the training
    part show, as `embed_items` does, so that it can go wherever embeddings go.
    """
    from sklearn.decomposition import TruncatedSVD

    counted = tfidf_vectors(split)
    size = min(n_components, min(counted.shape) - 1)
    rows = torch.from_numpy(TruncatedSVD(size, random_state=0).fit_transform(counted)).float()
    return Whitening().fit(rows[torch.from_numpy(split.item_counts > 0)]).transform(rows)


def untrained_encoder(name: str, seed: int = 0) -> TextEncoder:
    """An encoder of the shape of the model `name`, with its tokenizer and random weights: a language model that never read."""
    model, tokenizer = catalog.load_encoder(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TextEncoder((type(model)(model.config), tokenizer), TextEncoder(name).pooling)
