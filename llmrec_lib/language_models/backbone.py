"""One output per item: a language model's Transformer body reads a sequence of items and predicts the next item.

Every item is one vector in the place of a token; the vocabulary is the catalogue. In the manner of E4SRec (Li et al. 2023,
arXiv 2312.02443), which injects items into a language model as vectors and gives one output for each item.
"""

import copy
import functools
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import FloatTensor, LongTensor, Tensor, nn

from llmrec_lib import _recbole
from llmrec_lib.cache import cached_tensors, content_key
from llmrec_lib.language_models import catalog, low_rank
from llmrec_lib.language_models.encoder import choose_device, choose_dtype
from llmrec_lib.recommender import RecBoleRecommender, Recommender
from llmrec_lib.splits import Split

TUNING = ("frozen", "lora", "full")
ITEM_INPUTS = ("text", "id", "text+id")
DEFAULTS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("backbone.yaml").read_text(encoding="utf-8"))


def causal_body(model: nn.Module, pretrained: bool = True) -> tuple[nn.Module, float]:
    """A new float32 copy of a causal model's layers and its last norm, to be fed with ``inputs_embeds``.

    Parameters
    ----------
    model : a causal language model of transformers, such as one from `keep_layers`; stays as it is.
    pretrained : False leaves the weights as the same architecture initialises them.

    Returns
    -------
    body, length
        `length` is the mean L2 norm of the body's token embeddings, which themselves are left out.

    Raises
    ------
    ValueError
        A model that sees later positions; weights that are not the plain body's.
    """
    source = model.base_model
    config = copy.deepcopy(source.config)
    config.dtype = torch.float32
    body = type(source)(config).eval()
    with torch.no_grad():
        ends = body(input_ids=torch.tensor([[0, 1, 2], [0, 1, 3]])).last_hidden_state
        if not torch.allclose(ends[0, :2], ends[1, :2], atol=1e-5):
            raise ValueError(f"{type(model).__name__} sees later positions; a causal language model is needed")
        if pretrained:
            weights = source.state_dict()
            if other := sorted(body.state_dict().keys() ^ weights.keys()):
                raise ValueError(f"{other[0]} is not of a plain model: merge adapters first, quantise after training")
            body.load_state_dict(weights)
        tokens = body.get_input_embeddings()
        length = tokens(torch.arange(tokens.weight.shape[0])).norm(dim=1).mean().item()
    body.set_input_embeddings(nn.Identity())
    return body, length


@functools.lru_cache
def model_class() -> type[nn.Module]:
    """The RecBole model; a function, so that importing this file does not import RecBole."""
    from recbole.model.abstract_recommender import SequentialRecommender

    class LanguageModelBackbone(SequentialRecommender):
        """Item vectors → the body's layers → one vector per position → inner products with the table of outputs.

        Windows are filled up on the right, and a causal body's position sees nothing to its right: no mask is needed.
        """

        def __init__(self, config: Any, dataset: Any) -> None:
            super().__init__(config, dataset)
            texts, size = config["item_embeddings"], config["out_size"]
            self.frozen, self.body_learning_rate = config["tuning"] == "frozen", config["body_learning_rate"]
            self.reduced = choose_dtype("auto", self.device) == torch.bfloat16
            self.body, self.length = causal_body(config["language_model"], config["pretrained"])
            limit = getattr(self.body.config, "max_position_embeddings", None) or self.max_seq_length
            if self.max_seq_length > limit:
                raise ValueError(f"MAX_ITEM_LIST_LENGTH is {self.max_seq_length}; the language model reads {limit}")
            width = self.body.config.hidden_size
            self.input_table = _recbole.ItemTable(
                self.n_items, width, texts, config["item_input"] != "text", width**-0.5
            )
            self.dropout = nn.Dropout(config["dropout_prob"])
            self.project = nn.Linear(width, size)
            self.item_embedding = _recbole.ItemTable(self.n_items, size, texts, True, size**-0.5)  # of about length 1
            if config["tuning"] == "lora":
                low_rank.add_low_rank(self.body, config["rank"])
            else:
                self.body.requires_grad_(not self.frozen)

        def train(self, mode: bool = True) -> nn.Module:
            super().train(mode)
            self.body.train(mode and not self.frozen)
            return self

        def forward(self, sequence: LongTensor, length: LongTensor) -> FloatTensor:
            # Scores are made in float32, so that they do not depend on who else is in the batch.
            with torch.autocast(sequence.device.type, torch.bfloat16, enabled=self.training and self.reduced):
                vectors = nn.functional.normalize(self.input_table(sequence).float(), dim=-1) * self.length
                hidden = self.body(inputs_embeds=self.dropout(vectors), use_cache=False).last_hidden_state
                return self.gather_indexes(self.project(hidden), length - 1).float()

        def full_sort_predict(self, interaction: Any) -> FloatTensor:
            output = self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
            return output @ self.item_embedding.weight.T

        def parameter_groups(self) -> list[dict[str, Any]]:
            body = [parameter for parameter in self.body.parameters() if parameter.requires_grad]
            own = [parameter for name, parameter in self.named_parameters() if not name.startswith("body.")]
            return [{"params": own}, {"params": body, "lr": self.body_learning_rate}]

        def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
            """Without what is frozen: that is read from the language model again."""
            frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
            return {name: t for name, t in super().state_dict(*args, **kwargs).items() if name not in frozen}

        def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True) -> Any:
            frozen = {name: tensor for name, tensor in self.named_parameters() if not tensor.requires_grad}
            return super().load_state_dict({**frozen, **state_dict}, strict=strict)

    return LanguageModelBackbone


def train_backbone(
    split: Split, item_embeddings: FloatTensor | None, llm: str | catalog.LanguageModel = "smollm2-135m", *,
    tuning: Literal["frozen", "lora", "full"] = "frozen", pretrained: bool = True, rank: int = 16,
    item_input: Literal["text", "id", "text+id"] = "text", seed: int = 0, progress: bool = True,
    name: str | None = None, **settings: Any,
) -> Recommender:  # fmt: skip
    """Train a language model's body to predict the next item; a second call with equal inputs reads the cache.

    The input at each position is the item's text embedding, projected ("text"), or a learned vector ("id"), or the sum,
    scaled to the mean length of the model's token embeddings. Trained with RecBole's trainer on a softmax over all items
    at every position; the epoch that is best on validation is kept.

    Parameters
    ----------
    split : Split
    item_embeddings : FloatTensor [n_items, d]
        Such as whitened ones from `prs_based.embed_items`; row 0 (PAD) is ignored. None with ``item_input="id"``.
    llm : a name for `catalog.fetch`, or a loaded (model, tokenizer), such as a fine-tuned one,
        or one with fewer layers from `keep_layers`.
    tuning : {"frozen", "lora", "full"}
        What is trained beside projections and tables: nothing of the body, adapters of `rank`, or all of it.
    pretrained : False is the control: the same body randomly initialised from `seed`.
    item_input : {"text", "id", "text+id"}
        Outputs are learned vectors, with "text" plus a projection of the text.
    seed : seeds initialisation, dropout and batch order.
    name : how tables call it.
    **settings : replace `DEFAULTS`; or any other RecBole parameter.

    Raises
    ------
    ValueError
        Unknown `tuning` or `item_input`; embeddings of a wrong shape or not finite; `rank` or ``MAX_ITEM_LIST_LENGTH``
        out of range; a model that is not causal.

    Source: in the manner of Li et al. 2023, "E4SRec" (arXiv 2312.02443).
    """
    for parameter, value, known in (("tuning", tuning, TUNING), ("item_input", item_input, ITEM_INPUTS)):
        if value not in known:
            raise ValueError(f"{parameter} is {value!r}; it is one of {known}")
    texts = None if item_input == "id" else _recbole.unit_rows(item_embeddings, split.dataset.n_items)
    model_hash = catalog.name_hash(llm) if isinstance(llm, str) else catalog.weights_hash(llm[0])
    choices = {"tuning": tuning, "pretrained": pretrained, "rank": rank, "item_input": item_input}
    settings = {**DEFAULTS, **settings, **choices}
    made_by = [version(package) for package in ("recbole", "torch", "transformers")]
    made_by += [sys.modules[__name__], low_rank, _recbole, str(choose_dtype("auto", choose_device("auto")))]
    key = content_key(split.fingerprint, texts, model_hash, settings, seed, made_by)
    model = catalog.load_causal(llm)[0] if isinstance(llm, str) else llm[0]
    inputs = model_class(), split, {**settings, "language_model": model, "item_embeddings": texts}, seed
    state = cached_tensors("backbones", key, lambda: _recbole.fit(*inputs, progress=progress))
    recommender = RecBoleRecommender(_recbole.restore(*inputs, state), split, name or f"backbone, {tuning}")
    recommender.language_model = f"{model_hash}, pretrained {pretrained}"  # for `describe`
    return recommender
