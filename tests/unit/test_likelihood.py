"""Title likelihood: the prefix tree gives what one forward per title gives, for any model and any title."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec_lib.language_models import catalog
from llmrec_lib.language_models import likelihood as likelihood_module
from llmrec_lib.language_models.likelihood import TitleLikelihood, _ancestor_mask, _Tree, naive_log_likelihood
from llmrec_lib.llm_based import TitleLikelihoodRecommender, catalogue_likelihood
from tests.unit.tiny_models import tiny_llama, tiny_tokenizer

TITLES = [
    "toy story",
    "toy",
    "toys",
    "alien",
    "aliens",
    "night of the alien",
    "toy story",
    "",
    "é 夜 \U0001f600",
    "a b c",
]
PROMPT = "a user chose the items: the night;"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def make(model, tokenizer, titles=TITLES, **keywords):
    return TitleLikelihood((model, tokenizer), titles, **{"dtype": "float32", **keywords})


def other_models():
    import transformers as t

    torch.manual_seed(0)
    small = {"vocab_size": 320, "initializer_range": 0.3}
    body = {**small, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    wide = {**body, "intermediate_size": 64, "max_position_embeddings": 256}
    yield "gpt2", t.GPT2LMHeadModel(t.GPT2Config(**small, n_embd=32, n_layer=2, n_head=4, n_positions=256)), True
    yield "gpt_neox", t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**wide)), True
    yield "qwen2", t.Qwen2ForCausalLM(t.Qwen2Config(**wide, num_key_value_heads=2)), True
    # A window the tree's mask knows nothing of; Alibi takes positions from the mask; Mamba has no cache to cut.
    window = t.MistralConfig(**wide, num_key_value_heads=2, sliding_window=8)
    yield "mistral", t.MistralForCausalLM(window), False
    yield "bloom", t.BloomForCausalLM(t.BloomConfig(**small, hidden_size=32, n_layer=2, n_head=4)), False
    yield "mamba", t.MambaForCausalLM(t.MambaConfig(**small, hidden_size=32, num_hidden_layers=2, state_size=4)), False
    # Logits are not head(hidden): scaled, soft-capped.
    yield "cohere", t.CohereForCausalLM(t.CohereConfig(**wide, num_key_value_heads=2, logit_scale=0.3)), True
    yield "granite", t.GraniteForCausalLM(t.GraniteConfig(**wide, num_key_value_heads=2, logits_scaling=3.0)), True


@pytest.mark.parametrize("chunk_tokens", [1, 2, 5, 512])
@pytest.mark.parametrize("tied", [True, False])
def test_tree_equals_naive_loop(tokenizer, chunk_tokens, tied):
    scorer = make(tiny_llama(tied=tied), tokenizer, chunk_tokens=chunk_tokens)
    assert scorer.shares_prompt
    for prompt in (PROMPT, "", "x", [5, 6, 7]):
        scores, reference = scorer.log_likelihood(prompt), naive_log_likelihood(scorer, prompt)
        torch.testing.assert_close(scores, reference, atol=1e-4, rtol=0)
        assert scores.dtype == torch.float32


@pytest.mark.parametrize(("model", "shares"), [pytest.param(m, s, id=n) for n, m, s in other_models()])
def test_every_causal_model_is_scored_exactly(tokenizer, model, shares):
    scorer = make(model, tokenizer, chunk_tokens=7)
    assert scorer.shares_prompt == shares
    torch.testing.assert_close(scorer.log_likelihood(PROMPT), naive_log_likelihood(scorer, PROMPT), atol=2e-4, rtol=0)


def test_scores_by_hand(tokenizer):
    """The definition, without any of our tokenisation: log p of each token that a title adds to the prompt."""
    model = tiny_llama()
    scorer = make(model, tokenizer)
    before = tokenizer(PROMPT)["input_ids"]
    whole = tokenizer(f"{PROMPT} night of the alien;")["input_ids"]
    assert whole[: len(before)] == before
    with torch.inference_mode():
        log_p = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    expected = sum(log_p[i - 1, whole[i]].item() for i in range(len(before), len(whole)))
    scores = scorer.log_likelihood(PROMPT)
    assert scores[5].item() == pytest.approx(expected, abs=1e-4)
    assert scorer.n_tokens[5] == len(whole) - len(before)


def test_probabilities_of_all_one_token_titles_add_up_to_one(tokenizer):
    scorer = make(tiny_llama(), tokenizer)
    scorer.title_tokens = [[token] for token in range(320)]
    scorer._tree, scorer.n_tokens = _Tree(scorer.title_tokens), torch.ones(320, dtype=torch.int64)
    assert scorer.log_likelihood(PROMPT).exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("model", [pytest.param(m, id=n) for n, m, _ in other_models()])
def test_over_the_catalogue_equals_the_naive_loop_and_adds_up_to_one(tokenizer, model):
    scorer = make(model, tokenizer, chunk_tokens=5)
    scores = scorer.log_likelihood(PROMPT, over="catalogue")
    torch.testing.assert_close(
        scores, naive_log_likelihood(scorer, PROMPT, batch_size=4, over="catalogue"), atol=2e-4, rtol=0
    )
    distinct = [TITLES.index(title) for title in dict.fromkeys(TITLES)]
    assert scores[distinct].exp().sum().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(scorer.prior("catalogue"), scorer.log_likelihood("", over="catalogue"))


def test_over_the_catalogue_reads_only_what_decides(tokenizer):
    """Behind the last fork every token is certain: of these three titles, only the common beginning of two is read."""
    scorer = make(tiny_llama(), tokenizer, ["night of the toy", "night of the alien of the night", "a b c d e f g"])
    read = []
    scorer.model.model.register_forward_hook(
        lambda module, _, keywords, __: read.append(keywords["input_ids"].shape[1]), with_kwargs=True
    )
    scorer.log_likelihood("x", over="catalogue")
    n_prompt = len(scorer.prompt_tokens("x"))
    shared = [a == b for a, b in zip(scorer.title_tokens[0], scorer.title_tokens[1], strict=False)].index(False)
    assert shared > 2
    assert read == [n_prompt, shared]
    with pytest.raises(ValueError, match="over is 'items'"):
        scorer.log_likelihood("x", over="items")


def test_equal_titles_get_equal_scores_and_order_does_not_matter(tokenizer):
    model = tiny_llama()
    scores = make(model, tokenizer).log_likelihood(PROMPT)
    assert scores[0] == scores[6]
    order = np.random.default_rng(0).permutation(len(TITLES))
    shuffled = make(model, tokenizer, [TITLES[i] for i in order]).log_likelihood(PROMPT)
    torch.testing.assert_close(shuffled, scores[order], atol=1e-5, rtol=0)


def test_blanks_at_the_end_of_a_prompt_change_nothing(tokenizer):
    scorer = make(tiny_llama(), tokenizer)
    assert torch.equal(scorer.log_likelihood(PROMPT), scorer.log_likelihood(PROMPT + "  "))


def test_the_empty_prompt_is_the_prior(tokenizer):
    scorer = make(tiny_llama(), tokenizer)
    assert scorer.prompt_tokens("") == [tokenizer.bos_token_id]
    assert torch.equal(scorer.prior(), scorer.log_likelihood([tokenizer.bos_token_id]))
    assert scorer.prior() is scorer.prior()


def test_long_prompts_keep_their_end_and_long_titles_their_beginning(tokenizer):
    with pytest.warns(UserWarning, match=r"1 title\(s\) have more than 16 tokens"):
        scorer = make(tiny_llama(context=32), tokenizer, ["toy", "x y " * 40])
    assert scorer.n_tokens.max() == 16
    ids = list(range(10, 100))
    assert scorer.prompt_tokens(ids) == ids[-16:]
    assert scorer.prompt_tokens([0, *ids]) == [0, *ids[-15:]]  # 0: beginning of sequence
    assert scorer.prompt_tokens(scorer.prompt_tokens(ids)) == ids[-16:]
    reference = naive_log_likelihood(scorer, ids)
    torch.testing.assert_close(scorer.log_likelihood(ids), reference, atol=1e-4, rtol=0)


def test_batches_of_the_reference(tokenizer):
    scorer = make(tiny_llama(), tokenizer)
    single = naive_log_likelihood(scorer, PROMPT)
    torch.testing.assert_close(naive_log_likelihood(scorer, PROMPT, batch_size=4), single, atol=1e-4, rtol=0)


def test_bfloat16_is_close(tokenizer):
    exact = make(tiny_llama(), tokenizer).log_likelihood(PROMPT)
    scorer = make(tiny_llama(), tokenizer, dtype="bfloat16")
    assert scorer.model.dtype == torch.bfloat16
    assert (scorer.log_likelihood(PROMPT) - exact).abs().max() < 0.1 * exact.abs().max()


def test_catalogue_scores_are_kept_prompt_by_prompt(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path))
    scorer = make(tiny_llama(), tokenizer)
    prompts = [f"prompt {i};" for i in range(4)]
    real, calls = scorer.log_likelihood, []

    def counted(prompt, over, stop=2):
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(prompt)
        return real(prompt, over)

    monkeypatch.setattr(scorer, "log_likelihood", counted)
    with pytest.raises(KeyboardInterrupt):
        scorer.score_catalogue(prompts, progress=False)
    monkeypatch.setattr(scorer, "log_likelihood", lambda prompt, over: counted(prompt, over, stop=99))
    scores = scorer.score_catalogue(prompts, progress=False)
    assert len(calls) == 4
    assert torch.equal(scores, torch.stack([real(prompt) for prompt in prompts]))
    assert torch.equal(scorer.score_catalogue(prompts[::-1], progress=False), scores.flip(0))
    assert len(calls) == 4
    with torch.no_grad():
        scorer.model.get_input_embeddings().weight += 0.1
    assert not torch.equal(scorer.score_catalogue(prompts[:1], progress=False), scores[:1])  # another model by now
    known = scorer.fingerprint
    monkeypatch.setattr(likelihood_module, "versions", lambda: {"torch": "another"})
    assert scorer.fingerprint != known


def test_wrong_input_is_named(tokenizer):
    model = tiny_llama()
    with pytest.raises(ValueError, match="titles is empty"):
        make(model, tokenizer, [])
    with pytest.raises(ValueError, match="chunk_tokens is 0"):
        make(model, tokenizer, chunk_tokens=0)
    with pytest.raises(ValueError, match="dtype 'float64'"):
        make(model, tokenizer, dtype="float64")
    with pytest.raises(ValueError, match="title '' with suffix ''"):
        make(model, tokenizer, ["a", ""], suffix="")


@settings(max_examples=60, deadline=None)
@given(
    titles=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=20),
    size=st.integers(1, 12),
)
def test_chunks_cover_the_tree_and_know_all_ancestors(titles, size):
    tree = _Tree(titles)
    ones = torch.ones(len(tree.tokens), dtype=torch.float64)
    ones[0] = 0
    assert tree.path_sums(ones).tolist() == [len(title) for title in titles]
    fresh = []
    for nodes, parents, n_repeated in tree.chunks(size, tree.inner):
        fresh += nodes[n_repeated:].tolist()
        assert len(nodes) <= max(size, n_repeated + 1)
        visible = _ancestor_mask(parents, 2, torch.float32) == 0
        for row, node in enumerate(nodes.tolist()):
            path = set()
            while node:
                path.add(node)
                node = tree.parents[node]
            assert visible[row, :2].all()
            assert {nodes[i].item() for i in visible[row, 2:].nonzero()[:, 0]} == path
    assert fresh == [node for node in range(1, len(tree.tokens)) if tree.children[node]]


@pytest.fixture(scope="module")
def smollm2():
    return catalog.load_causal("smollm2-135m")


def test_smollm2_knows_the_capital_of_france(smollm2):
    scorer = TitleLikelihood(smollm2, ["Paris", "banana", "London"], suffix=".", dtype="float32")
    scores = scorer.log_likelihood("The capital of France is")
    assert scores.argmax() == 0
    assert scores[1] < scores[0] - 5


def test_smollm2_tree_equals_naive_loop(smollm2):
    titles = [
        "Toy Story", "GoldenEye", "Four Rooms", "Get Shorty", "Copycat", "Shanghai Triad", "Twelve Monkeys", "Babe",
        "Toy Story", "Toys", "The Net", "The Cérémonie",
    ]  # fmt: skip
    scorer = TitleLikelihood(smollm2, titles, dtype="float32", chunk_tokens=16)
    assert scorer.shares_prompt
    prompt = "A user chose these items, from oldest to newest: Alien; Aliens; The Terminator;"
    scores, reference = scorer.log_likelihood(prompt), naive_log_likelihood(scorer, prompt)
    torch.testing.assert_close(scores, reference, atol=2e-4, rtol=0)
    assert scores[0] == scores[8]


def test_rules_of_the_recommender_by_hand(checkerboard_split):
    """Sum, mean over a title's tokens, and what the history adds to the title's own likelihood."""
    parts, users = checkerboard_split, torch.tensor([1, 5, 9])
    scorer = catalogue_likelihood(parts, (tiny_llama(), tiny_tokenizer()), dtype="float32")

    def scores(**rule):
        return TitleLikelihoodRecommender(parts, scorer, progress=False, **rule).score(users)[:, 1:]

    for over in ("vocabulary", "catalogue"):
        sums, alone = scores(over=over), scorer.log_likelihood("", over)
        tokens = torch.tensor([len(tokens) for tokens in scorer.title_tokens])
        torch.testing.assert_close(scores(rule="mean", over=over), sums / tokens)
        corrected = scores(rule="prior_corrected", prior_weight=0.5, over=over)
        torch.testing.assert_close(corrected, sums - 0.5 * alone, atol=1e-4, rtol=0)
