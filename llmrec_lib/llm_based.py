"""LLM-based methods, ``S = f(M(E(U, I, N)))``: item scores come out of the language model's own output distribution."""

from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

import torch
from torch import FloatTensor, LongTensor
from tqdm import tqdm

from llmrec_lib.evaluation.evaluate import evaluate, mask_seen, tie_order, top_k
from llmrec_lib.fusion import masked_last
from llmrec_lib.language_models.catalog import LanguageModel
from llmrec_lib.language_models.compress import shorten
from llmrec_lib.language_models.finetune import FineTuned, finetune
from llmrec_lib.language_models.likelihood import TitleLikelihood, logits_after
from llmrec_lib.prompts import StatedNeeds, get_template, item_titles, user_prompts
from llmrec_lib.recommender import Recommender
from llmrec_lib.splits import Split

SCORES = ("sum", "mean", "prior_corrected")


def catalogue_likelihood(
    split: Split, llm: str | LanguageModel = "smollm2-135m", template: str = "history",
    titles: Sequence[str] | None = None, **options: Any,
) -> TitleLikelihood:  # fmt: skip
    """A `TitleLikelihood` over the catalogue of a split: items 1 … n_items − 1, spelled as the template's prompts spell them.

    Parameters
    ----------
    llm : name for `catalog.fetch`, or a loaded model with its tokenizer, such as a fine-tuned one.
    titles : sequence of str [n_items], instead of the data set's; item 0 is PAD.
    **options : of `TitleLikelihood`, such as dtype or chunk_tokens.
    """
    titles = item_titles(split.dataset.titles if titles is None else titles, template)[1:]
    return TitleLikelihood(llm, titles, suffix=get_template(template).suffix, **options)


class TitleLikelihoodRecommender(Recommender):
    """Ranks the whole catalogue by how likely the model finds each title after a prompt that tells the user's history.

    With ``L(i | u) = Σ_t log p(title_i,t | prompt_u, title_i,<t)``:

    - "sum": ``L(i | u)``, which favours short titles;
    - "mean": ``L(i | u) / tokens of the title``, which favours titles whose tokens follow from each other;
    - "prior_corrected": ``L(i | u) − prior_weight · L(i | no history)``, pointwise mutual information at weight 1
      (Holtzman et al. 2021, "Surface form competition"): what the history adds to a title.

    Parameters
    ----------
    likelihood : TitleLikelihood
        From `catalogue_likelihood`, with the same template.
    template : name in `prompts.TEMPLATES`.
    rule : one of `SCORES`.
    prior_weight : only for "prior_corrected"; choose on validation.
    over : "vocabulary" or "catalogue"
        What each token is normalised over, see `TitleLikelihood.log_likelihood`. "catalogue" is a distribution over the
        titles and many times faster, since only forks of the title tree are read.
    needs : what each user states, for a template with {need}.
    """

    def __init__(
        self, split: Split, likelihood: TitleLikelihood, template: str = "history", rule: str = "sum",
        prior_weight: float = 1.0, over: str = "vocabulary", needs: StatedNeeds | None = None, progress: bool = True,
        name: str | None = None,
    ) -> None:  # fmt: skip
        if rule not in SCORES:
            raise ValueError(f"no rule {rule!r}; there are {', '.join(SCORES)}")
        if len(likelihood.titles) != split.dataset.n_items - 1:
            raise ValueError(f"likelihood has {len(likelihood.titles)} titles for {split.dataset.n_items - 1} items")
        super().__init__(split, name or f"likelihood ({rule}{', catalogue' if over == 'catalogue' else ''})")
        self.likelihood, self.template, self.needs, self.progress = likelihood, template, needs, progress
        self.rule, self.prior_weight, self.over = rule, prior_weight, over

    def score(self, users: LongTensor) -> FloatTensor:
        need = self.needs.texts(users, self.phase) if self.needs else ""
        titles = ["", *self.likelihood.titles]
        prompts = user_prompts(self.split, users.numpy(), self.phase, self.template, titles, need)
        sums = self.likelihood.score_catalogue(prompts, progress=self.progress, over=self.over)
        if self.rule == "mean":
            sums = sums / self.likelihood.n_tokens.clamp(min=1)
        elif self.rule == "prior_corrected":
            sums = sums - self.prior_weight * self.likelihood.prior(self.over)
        return torch.cat([sums.amin(dim=1, keepdim=True) - 1.0, sums], dim=1)  # PAD first


class LetterRecommender(Recommender):
    """Shows the model another recommender's best unseen items as a list with letters, and asks for the letter of the next one.

    One forward for a whole list. An item's score is log p of its letter among the letters shown, averaged over shuffled lists,
    since models prefer some letters and places. What is not shown shares the lowest score: put it behind the same retriever in
    a `SequentialFusion` with as many candidates.

    Sources: Schick & Schütze 2021, "Exploiting Cloze-Questions for Few-Shot Text Classification and Natural Language Inference"
    (letters as a verbaliser); Hou et al. 2024, "Large Language Models are Zero-Shot Rankers for Recommender Systems".

    Parameters
    ----------
    likelihood : TitleLikelihood
        Lends its model, tokenizer and titles; from `catalogue_likelihood`, with the same template.
    n_shown : items in a list, 2 to 26.
    n_orders : lists for each user.
    """

    def __init__(
        self, retriever: Recommender, likelihood: TitleLikelihood, n_shown: int = 20, n_orders: int = 4,
        template: str = "history", name: str | None = None, progress: bool = True,
    ) -> None:  # fmt: skip
        if not 2 <= n_shown <= len(ascii_uppercase):
            raise ValueError(f"n_shown is {n_shown}; there are letters for 2 to {len(ascii_uppercase)} items")
        super().__init__(retriever.split, name or f"letters ({retriever.name})")
        self.retriever, self.likelihood, self.template = retriever, likelihood, template
        self.n_shown, self.n_orders, self._progress = n_shown, n_orders, progress

    def score(self, users: LongTensor) -> FloatTensor:
        masked = mask_seen(self.retriever.at(self.phase).score(users).float().clone(), self.split, users, self.phase)
        best = top_k(masked, min(self.n_shown, self.n_items - 1), tie_order(self.n_items))
        lm, titles, generator, asked = self.likelihood, ["", *self.likelihood.titles], torch.Generator(), []
        prompts = user_prompts(self.split, users.numpy(), self.phase, self.template, titles)
        for row, (user, prompt) in enumerate(zip(users.tolist(), prompts, strict=True)):
            generator.manual_seed(user)  # the same lists, whoever else is in the batch
            for _ in range(self.n_orders):
                items = best[row, torch.randperm(best.shape[1], generator=generator)]
                listed = "".join(f"\n{x}: {titles[i]}" for x, i in zip(ascii_uppercase, items.tolist(), strict=False))
                text = f"{prompt}\nOne of these comes next:{listed}\nIts letter is"
                asked.append((row, items, lm.prompt_tokens(text)))
        letters = [lm.tokenizer(f" {x}", add_special_tokens=False)["input_ids"][-1] for x in ascii_uppercase]
        found = torch.full_like(masked, -torch.inf).scatter(1, best, 0.0)
        readings = logits_after(lm.model, [(ids, letters[:1]) for *_, ids in asked], batch_tokens=2048)
        for place, logits in tqdm(readings, "asking for letters", len(asked), unit="list", disable=not self._progress):
            row, items, _ = asked[place]
            found[row, items] += logits[0, letters[: len(items)]].log_softmax(0).cpu() / self.n_orders
        return masked_last(found)


def finetune_shortened(
    split: Split, llm: str | LanguageModel = "smollm2-135m", n_layers: int = 8, template: str = "history",
    titles: Sequence[str] | None = None, valid_users: int = 50, **options: Any,
) -> FineTuned:  # fmt: skip
    """The study's recipe: keep a model's most influential layers, fine-tune it on the training histories, watch validation.

    Influence is measured on the validation prompts of 20 users. The curve has loss and NDCG@10 over the whole catalogue
    for `valid_users` validation users, before the first step and after each epoch.

    Parameters
    ----------
    n_layers : see `compress.shorten`.
    titles : as for `catalogue_likelihood`.
    **options : of `finetune`, such as epochs, train_users or pretrained.
    """

    def ndcg(model: torch.nn.Module, tokenizer: Any) -> float:
        likelihood = catalogue_likelihood(split, (model, tokenizer), template, titles)
        arm = TitleLikelihoodRecommender(split, likelihood, template, over="catalogue", progress=False)
        return evaluate(arm, split, "valid", users=split.eval_users("valid", valid_users), ks=[10]).mean("ndcg@10")

    prompts = user_prompts(split, split.eval_users("valid", 20), "valid", template)
    watched = {"valid_users": valid_users, "validate": ndcg}
    return finetune(split, shorten(llm, prompts, n_layers)[0], template=template, titles=titles, **watched, **options)
