"""log p(title | prompt) of every title of a catalogue: the prompt is read once, shared beginnings of titles once."""

from __future__ import annotations

import inspect
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from llmrec_lib.cache import cached_tensors, content_key, versions
from llmrec_lib.language_models import catalog
from llmrec_lib.language_models._packed import pack_linears
from llmrec_lib.language_models.encoder import choose_device, choose_dtype, first_token, pad_right
from llmrec_lib.shards import in_shards

OVER = ("vocabulary", "catalogue")
HEAD_ROWS = 128  # positions per vocabulary projection: 128 x 49,152 logits stay near the cores' caches
_ANCHOR = ":"
Followers = dict[tuple[int, ...], list[int]]  # beginning of token sequences -> the tokens that some go on with


class TitleLikelihood:
    """Log-likelihood of each title of a catalogue as the continuation of a prompt.

    A title is scored as the tokens that a blank, the title and the suffix add to a text. The suffix makes it a complete
    sequence: without it "Alien" would get the probability of everything that begins with "Alien", "Aliens" included.
    An empty title is the suffix alone.

    The titles form a prefix tree. Each node that has children goes through the model once per prompt, with a 4-D
    attention mask that shows it the prompt and its own ancestors. Nodes are visited depth first and packed into chunks;
    a chunk repeats the ancestors of its first node, so it needs nothing of the chunks before it.
    Models that cannot do this (a small trial finds out) read prompt and title together, in padded batches.

    Parameters
    ----------
    model : str or (model, tokenizer)
        A name for `catalog.fetch`, or a loaded causal language model, which is moved to `device` and `dtype` in place.
    titles : list of str
        In the order of the scores.
    suffix : str
        Closes a title; by default that of the prompt templates.
    dtype, device : str
        See `choose_dtype` and `choose_device`.
    chunk_tokens : int, optional
        Nodes per forward, by default 256 on a CPU and 4,096 elsewhere; with the vocabulary it bounds the memory, and decides no
        score beyond rounding.

    Notes
    -----
    Blanks at the end of a prompt are dropped, since the title brings its own. An empty prompt is the first token alone
    (beginning of sequence, else end of sequence). With prompts longer than the model's context less the longest title,
    the last tokens are kept, and a beginning-of-sequence token if there was one. A title longer than half the context
    is cut there, with a warning; `n_tokens` tells.
    """

    def __init__(
        self, model: str | catalog.LanguageModel, titles: Sequence[str], suffix: str = ";", dtype: str = "auto",
        chunk_tokens: int | None = None, device: str = "auto",
    ) -> None:  # fmt: skip
        if not titles:
            raise ValueError("titles is empty: there is nothing to score")
        if chunk_tokens is not None and chunk_tokens < 1:
            raise ValueError(f"chunk_tokens is {chunk_tokens}; at least 1 is needed")
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        loaded, self.tokenizer = catalog.load_causal(model, self.dtype) if isinstance(model, str) else model
        self._name = model if isinstance(model, str) else None
        self.model = loaded.to(device=self.device, dtype=self.dtype).eval()
        pack_linears(self.model)
        self.chunk_tokens = chunk_tokens or (256 if self.device.type == "cpu" else 4096)
        self._read_titles(titles, suffix)
        renamed = "cache" in inspect.signature(self.model.forward).parameters  # within transformers 5
        self._cache_argument = "cache" if renamed else "past_key_values"
        self._split_head = False
        self.shares_prompt = self._can_share_prompt()
        self._split_head = self.shares_prompt and self._has_plain_head()
        self._prior: dict[str, Tensor] = {}

    def log_likelihood(self, prompt: str | Sequence[int], over: str = "vocabulary") -> Tensor:
        """Score all titles under one prompt, given as text or as token ids.

        Parameters
        ----------
        over : {"vocabulary", "catalogue"}
            What a token's probability is normalised over. "vocabulary": all tokens, as the model was trained. "catalogue":
            those with which some title of the catalogue goes on, so that the probabilities of the distinct titles add up to 1
            if none is the beginning of another, which the suffix sees to
            (constrained decoding as in De Cao et al. 2021, "Autoregressive Entity Retrieval", scored instead of searched).
            Where only one token can follow it has probability 1, and what lies behind the last fork needs no forward.

        Returns
        -------
        Tensor of float32 [n_titles]
            Natural logarithm of the probability of each title's tokens, closing suffix included; divided by `n_tokens` the
            mean per token.
        """
        if over not in OVER:
            raise ValueError(f"over is {over!r}; it must be one of {', '.join(OVER)}")
        ids = self.prompt_tokens(prompt)
        if not self.shares_prompt:
            batch_size = max(1, 4 * self.chunk_tokens // (len(ids) + int(self.n_tokens.max())))
            return naive_log_likelihood(self, ids, batch_size=batch_size, over=over)
        return self._tree_scores(ids, self._tree, over)

    def prior(self, over: str = "vocabulary") -> Tensor:
        """Scores under the empty prompt: how probable the titles are by themselves. Computed once."""
        if over not in self._prior:
            self._prior[over] = self.score_catalogue([""], progress=False, over=over)[0]
        return self._prior[over]

    def score_catalogue(self, prompts: Sequence[str], progress: bool = True, over: str = "vocabulary") -> Tensor:
        """Sums of `log_likelihood` for many prompts, each stored on disk as soon as it is known.

        Returns
        -------
        Tensor of float32 [n_prompts, n_titles]
        """
        base, scores = content_key(self.fingerprint, over), torch.empty(len(prompts), len(self.titles))
        rows = in_shards(TitleLikelihood._kept, self, ((self.prompt_tokens(prompt), over, base) for prompt in prompts))
        about = {"total": len(prompts), "desc": "scoring titles", "unit": "prompt", "disable": not progress}
        for row, found in enumerate(tqdm(rows, **about)):
            scores[row] = found
        return scores

    def _kept(self, shard: tuple[list[int], str, str]) -> Tensor:
        ids, over, base = shard
        kind, compute = f"likelihood/{base[:16]}", lambda: {"sum": self.log_likelihood(ids, over)}
        return cached_tensors(kind, content_key(base, ids), compute)["sum"]

    def prompt_tokens(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids under which the titles are scored; see Notes for blanks, empty and long prompts."""
        if isinstance(prompt, str):
            text = prompt.rstrip(" ")
            ids = list(self.tokenizer(text)["input_ids"]) if text else []
            eos = self.tokenizer.eos_token_id
            if len(ids) > 1 and ids[-1] == eos and not text.endswith(self.tokenizer.eos_token):
                ids.pop()  # some tokenizers close a text by themselves; here it goes on
        else:
            ids = [int(token) for token in prompt]
        ids = ids or [first_token(self.tokenizer)]
        room = self.context - int(self.n_tokens.max()) if self.context else len(ids)
        if len(ids) > room:
            has_bos = ids[0] == self.tokenizer.bos_token_id and room > 1
            ids = [ids[0], *ids[len(ids) - room + 1 :]] if has_bos else ids[len(ids) - room :]
        return ids

    def _read_titles(self, titles: Sequence[str], suffix: str) -> None:
        """What is known of the titles before the model reads anything."""
        self.titles, self.suffix = list(titles), suffix
        config = self.model.config
        self.context = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        self.title_tokens = self._tokenize_titles()
        self.n_tokens = torch.tensor([len(tokens) for tokens in self.title_tokens])
        self._tree = _Tree(self.title_tokens)

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides the scores of a prompt, the weights as they are now included."""
        model = catalog.name_hash(self._name) if self._name else catalog.weights_hash(self.model)
        return content_key("likelihood 2", versions(), model, self.title_tokens, str(self.dtype), self.context)

    def _tokenize_titles(self) -> list[list[int]]:
        def tokenize(texts: list[str]) -> list[list[int]]:
            return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

        # Tokenizers treat the very beginning of a text specially, so each title is read after another character.
        texts = [f" {title}{self.suffix}" if title else self.suffix for title in self.titles]
        anchor = tokenize([_ANCHOR])[0]
        tokens = []
        for text, ids in zip(texts, tokenize([_ANCHOR + text for text in texts]), strict=True):
            follows = ids[: len(anchor)] == anchor and len(ids) > len(anchor)
            tokens.append(ids[len(anchor) :] if follows else tokenize([text])[0])
        if not all(tokens):
            empty = self.titles[[bool(row) for row in tokens].index(False)]
            raise ValueError(f"title {empty!r} with suffix {self.suffix!r} has no tokens; give a suffix that has one")
        longest = max(1, self.context // 2) if self.context else max(map(len, tokens))
        if n_cut := sum(len(row) > longest for row in tokens):
            warnings.warn(f"{n_cut} title(s) have more than {longest} tokens, half the context; cut", stacklevel=3)
        return [row[:longest] for row in tokens]

    def _read(self, ids: Tensor, cache: Any, keep: int, **keywords: Any) -> tuple[Tensor, Any]:
        """Hidden states where the head can be applied separately, else logits, of the last `keep` tokens; the cache."""
        body = self.model.base_model if self._split_head else self.model
        outputs = body(input_ids=ids[None], use_cache=True, **{self._cache_argument: cache}, **keywords)
        states = outputs.last_hidden_state if self._split_head else outputs.logits
        return states[0, -keep:], getattr(outputs, self._cache_argument)

    @torch.inference_mode()
    def _tree_scores(self, prompt: list[int], tree: _Tree, over: str = "vocabulary") -> Tensor:
        log_p = torch.zeros(len(tree.tokens), dtype=torch.float64)  # of each node, given its parent
        states, cache = self._read(torch.tensor(prompt, device=self.device), None, keep=1)
        self._score_children(states, [0], tree, log_p, over)
        inner = tree.inner if over == "vocabulary" else tree.before_forks
        for nodes, parents, n_repeated in tree.chunks(self.chunk_tokens, inner):
            mask = _ancestor_mask(parents, len(prompt), self.dtype).to(self.device)
            positions = (tree.depth[nodes] + (len(prompt) - 1)).to(self.device)
            shown = {"attention_mask": mask[None, None], "position_ids": positions[None]}
            states, cache = self._read(tree.tokens[nodes].to(self.device), cache, len(nodes) - n_repeated, **shown)
            cache.crop(-len(nodes))
            self._score_children(states, nodes[n_repeated:].tolist(), tree, log_p, over)
        return tree.path_sums(log_p).float()

    def _score_children(self, states: Tensor, nodes: list[int], tree: _Tree, log_p: Tensor, over: str) -> None:
        """Write log p of each child of `nodes`, whose hidden states or logits are the rows of `states`."""
        if over == "catalogue":
            forks = [row for row, node in enumerate(nodes) if len(tree.children[node]) > 1]
            states, nodes = states[forks], [nodes[row] for row in forks]
        for start in range(0, len(nodes), HEAD_ROWS):
            block = states[start : start + HEAD_ROWS]
            children = [tree.children[node] for node in nodes[start : start + HEAD_ROWS]]
            rows = torch.repeat_interleave(torch.tensor([len(ids) for ids in children])).to(self.device)
            child_nodes = torch.tensor([child for ids in children for child in ids])
            tokens = tree.tokens[child_nodes].to(self.device)
            if over == "catalogue":
                found = _log_softmax_by_group(self._logits_of(block, rows, tokens), rows, len(children))
            else:
                logits = self.model.get_output_embeddings()(block) if self._split_head else block
                found = logits.log_softmax(1, dtype=torch.float32)[rows, tokens]
            log_p[child_nodes] = found.double().cpu()

    def _logits_of(self, states: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
        """Logits float32 [n] of single tokens, each after the state of its row, without the rest of the vocabulary."""
        if not self._split_head:
            return states[rows, tokens].float()
        head = self.model.get_output_embeddings()
        logits = (states[rows].float() * head.weight[tokens].float()).sum(1)
        return logits if getattr(head, "bias", None) is None else logits + head.bias[tokens].float()

    def _can_share_prompt(self) -> bool:
        """Try a small tree against the plain loop; what differs would be scored wrongly, so it is not used."""
        vocabulary = self.model.config.get_text_config().vocab_size
        ids = [(7 + 31 * i) % vocabulary for i in range(16)]
        prompt, titles = ids[:4], [ids[4:8], ids[4:6] + ids[8:11], ids[11:16]]
        right = _padded_scores(self, prompt, titles, 1, None)
        wrong = _padded_scores(self, prompt + titles[0], titles, 1, None)  # the size of an error that matters
        try:
            with torch.inference_mode():
                _, cache = self._read(torch.tensor(prompt, device=self.device), None, keep=1)
            # Sliding windows and recurrent states cannot be cut back to the prompt, or do not follow the mask.
            if not all(type(layer).__name__ == "DynamicLayer" for layer in cache.layers):
                return False
            found = self._tree_scores(prompt, _Tree(titles))
        except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
            return False
        rounded = self.dtype != torch.float32 or any(part.dtype == torch.int8 for part in self.model.buffers())
        tolerance = 0.3 if rounded else 0.02
        return bool((found - right).abs().max() <= tolerance * (wrong - right).abs().max())

    @torch.inference_mode()
    def _has_plain_head(self) -> bool:
        """Whether logits are the output embedding of the body's last hidden state, with nothing in between."""
        ids = torch.arange(min(8, self.model.config.get_text_config().vocab_size), device=self.device)[None]
        try:
            plain = self.model.get_output_embeddings()(self.model.base_model(input_ids=ids).last_hidden_state)
        except (AttributeError, TypeError, RuntimeError):
            return False
        logits = self.model(input_ids=ids).logits
        return plain.shape == logits.shape and torch.allclose(plain.float(), logits.float(), rtol=1e-3, atol=1e-4)


def naive_log_likelihood(
    scorer: TitleLikelihood, prompt: str | Sequence[int], batch_size: int = 1, over: str = "vocabulary"
) -> Tensor:
    """The reference: prompt and title are read together, for each distinct title anew.

    Parameters
    ----------
    scorer : TitleLikelihood
        Gives model, tokens and rules for prompts.
    prompt : str or token ids
    batch_size : int
        Titles of similar length read together, padded on the right.
    over : see `TitleLikelihood.log_likelihood`
    """
    allowed = followers(scorer.title_tokens) if over == "catalogue" else None
    return _padded_scores(scorer, scorer.prompt_tokens(prompt), scorer.title_tokens, batch_size, allowed)


def followers(sequences: Iterable[Sequence[int]]) -> Followers:
    """Every beginning of a token sequence -> the tokens with which some of the sequences go on, ascending."""
    found: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for tokens in sequences:
        for position, token in enumerate(tokens):
            found[tuple(tokens[:position])].add(token)
    return {beginning: sorted(tokens) for beginning, tokens in found.items()}


def _padded_scores(
    scorer: TitleLikelihood, prompt: list[int], titles: list[list[int]], batch_size: int, allowed: Followers | None
) -> Tensor:
    unique = sorted(set(map(tuple, titles)))
    batch_tokens = batch_size * (len(prompt) + max(map(len, unique)))
    sums: dict[tuple[int, ...], float] = {}
    for row, logits in logits_after(scorer.model, [(prompt, title) for title in unique], batch_tokens):
        title = unique[row]
        if allowed is not None:
            outside = torch.ones_like(logits, dtype=torch.bool)
            for position in range(len(title)):
                outside[position, allowed[title[:position]]] = False
            logits = logits.masked_fill(outside, -torch.inf)
        sums[title] = logits.log_softmax(1)[range(len(title)), title].double().sum().item()
    return torch.tensor([sums[tuple(title)] for title in titles], dtype=torch.float32)


@torch.inference_mode()
def logits_after(
    model: torch.nn.Module, rows: Sequence[tuple[Sequence[int], Sequence[int]]], batch_tokens: int
) -> Iterator[tuple[int, Tensor]]:
    """For each row (tokens before, tokens after): its number, and the logits float32 [n_after, vocabulary] that predict after.

    Rows of similar length are read together, padded on the right to `batch_tokens` at most; one without tokens after is left out.
    """
    sizes = [len(before) + len(after) for before, after in rows]
    order = sorted((row for row in range(len(rows)) if len(rows[row][1])), key=lambda row: -sizes[row])
    short = "logits_to_keep" in inspect.signature(model.forward).parameters
    while order:
        n = max(1, batch_tokens // sizes[order[0]])
        batch, order = order[:n], order[n:]
        tokens, mask = pad_right([[*rows[row][0], *rows[row][1]] for row in batch], model.device)
        first = min(len(rows[row][0]) for row in batch) - 1 if short else 0
        keep = {"logits_to_keep": tokens.shape[1] - first} if short else {}
        logits = model(input_ids=tokens, attention_mask=mask, use_cache=False, **keep).logits
        for row, own in zip(batch, logits, strict=True):
            start = len(rows[row][0]) - 1 - first
            yield row, own[start : start + len(rows[row][1])].float()


class _Tree:
    """Prefix tree of token lists. Node 0 is the prompt; the others are numbered depth first, so parents come first."""

    def __init__(self, titles: list[list[int]]) -> None:
        nodes: dict[tuple[int, ...], int] = {(): 0}
        for title in sorted(set(map(tuple, titles))):
            for length in range(1, len(title) + 1):
                nodes.setdefault(title[:length], len(nodes))
        self.tokens = torch.tensor([beginning[-1] if beginning else 0 for beginning in nodes])
        self.depth = torch.tensor([len(beginning) for beginning in nodes])
        self.parents = [nodes[beginning[:-1]] for beginning in nodes]
        self.ends = torch.tensor([nodes[tuple(title)] for title in titles])
        self.children: list[list[int]] = [[] for _ in nodes]
        for node, parent in enumerate(self.parents[1:], 1):
            self.children[parent].append(node)
        self.inner = [node for node in range(1, len(nodes)) if self.children[node]]
        """Nodes with children, the prompt left out: what a model has to read."""
        forks_below = [len(children) > 1 for children in self.children]
        for node in range(len(nodes) - 1, 0, -1):
            forks_below[self.parents[node]] |= forks_below[node]
        self.before_forks = [node for node in self.inner if forks_below[node]]
        """Nodes with several children, at them or below: all that decides between titles."""

    def chunks(self, size: int, inner: list[int]) -> Iterator[tuple[Tensor, list[int], int]]:
        """The nodes of `inner`, about `size` at a time: ids, place of each one's parent in the chunk (-1: the prompt),
        and how many ancestors at the beginning are repeated from earlier chunks."""
        while inner:
            ancestors: list[int] = []
            while (parent := self.parents[ancestors[-1] if ancestors else inner[0]]) != 0:
                ancestors.append(parent)
            n_chunks = -(-len(inner) // max(1, size - len(ancestors)))
            n_fresh = -(-len(inner) // n_chunks)  # equal chunks
            nodes = ancestors[::-1] + inner[:n_fresh]
            place = {node: i for i, node in enumerate(nodes)} | {0: -1}
            yield torch.tensor(nodes), [place[self.parents[node]] for node in nodes], len(ancestors)
            inner = inner[n_fresh:]

    def path_sums(self, values: Tensor) -> Tensor:
        """Sum of the node values from the prompt to the end of each title, float64 [n_titles]."""
        sums = values.tolist()
        for node in range(1, len(sums)):
            sums[node] += sums[self.parents[node]]
        return torch.tensor(sums, dtype=torch.float64)[self.ends]


def _log_softmax_by_group(values: Tensor, groups: Tensor, n_groups: int) -> Tensor:
    """log softmax of float32 `values` [n] among those with the same number in `groups` [n]."""
    highest = torch.full((n_groups,), -torch.inf, device=values.device).scatter_reduce(0, groups, values, "amax")
    shifted = values - highest[groups]
    return shifted - torch.zeros_like(highest).index_add(0, groups, shifted.exp()).log()[groups]


def _ancestor_mask(parents: list[int], n_prompt: int, dtype: torch.dtype) -> Tensor:
    """Additive attention mask [n, n_prompt + n]: each node sees the prompt, its ancestors and itself."""
    n = len(parents)
    visible = np.eye(n + 1, n, dtype=bool)  # the last row, −1, is the prompt's: no node is above it
    for node, parent in enumerate(parents):
        visible[node] |= visible[parent]
    mask = torch.zeros(n, n_prompt + n, dtype=dtype)
    mask[:, n_prompt:].masked_fill_(torch.from_numpy(~visible[:n]), torch.finfo(dtype).min)
    return mask
