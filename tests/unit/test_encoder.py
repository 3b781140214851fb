"""Text embeddings: order, pooling, batches, cache; whitening."""

from __future__ import annotations

import pytest
import torch

from llmrec_lib.language_models import encoder as encoder_module
from llmrec_lib.language_models.encoder import TextEncoder, Whitening
from tests.unit.tiny_models import tiny_bert, tiny_llama, tiny_tokenizer

TEXTS = ["toy story", "", "a", "night of the alien " * 40, "toy story", "é 夜"]


@pytest.fixture(autouse=True)
def cache(request, tmp_path, monkeypatch):
    if "minilm" not in request.fixturenames:
        monkeypatch.setenv("LLMREC_CACHE", str(tmp_path))
    return tmp_path


def make(model=None, **keywords):
    return TextEncoder((model or tiny_bert(), tiny_tokenizer()), dtype="float32", **keywords)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("model", [tiny_bert, lambda: tiny_llama().base_model], ids=["bert", "llama"])
def test_batches_give_what_single_texts_give(pooling, model):
    body, tokenizer = model(), tiny_tokenizer()
    encoder = make(body, pooling=pooling, max_tokens=50)
    embeddings = encoder.encode(TEXTS, normalize=False, progress=False)
    assert embeddings.shape == (len(TEXTS), 32)
    assert embeddings.dtype == torch.float32
    assert torch.isfinite(embeddings).all()
    assert torch.equal(embeddings[0], embeddings[4])
    for row, text in enumerate(TEXTS):
        ids = tokenizer(text)["input_ids"][:50] or [tokenizer.bos_token_id]
        with torch.inference_mode():
            hidden = body(torch.tensor([ids])).last_hidden_state[0]
        expected = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
        torch.testing.assert_close(embeddings[row], expected, atol=1e-5, rtol=1e-4)


def test_rows_have_length_one_and_keep_their_order():
    encoder = make()
    embeddings = encoder.encode(TEXTS, progress=False)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(len(TEXTS)))
    backwards = encoder.encode(TEXTS[::-1], progress=False)
    torch.testing.assert_close(backwards, embeddings.flip(0), atol=1e-5, rtol=0)
    assert encoder.encode([], progress=False).shape == (0, 32)


def test_small_batches_change_nothing(monkeypatch):
    expected = make()._embed([[1, 2, 3], [4], [5, 6]], False)
    monkeypatch.setattr(encoder_module, "BATCH_TOKENS", 1)
    torch.testing.assert_close(make()._embed([[1, 2, 3], [4], [5, 6]], False), expected, atol=1e-5, rtol=1e-4)


def test_a_batch_holds_texts_of_one_length_and_few_enough(monkeypatch):
    """Nothing is padded, so that the model needs no mask: each batch is a full rectangle of real tokens."""
    encoder, seen = make(), []
    forward = encoder_module.TextEncoder._forward
    noted = lambda self, tokens: seen.append(tokens.tolist()) or forward(self, tokens)  # noqa: E731
    monkeypatch.setattr(encoder_module.TextEncoder, "_forward", noted)
    monkeypatch.setattr(encoder_module, "BATCH_TOKENS", 6)
    ids = [[5, 6], [7, 8, 9], [10], [11, 12], [13, 14], [15, 16], [17] * 7]
    embeddings = encoder._embed(ids, False)
    assert sorted(sum(seen, [])) == sorted(ids)
    assert [len(tokens) for tokens in seen] == [1, 1, 3, 1, 1]  # by length 7, 3, 2 (three texts fill a batch), 2, 1
    for row, tokens in enumerate(ids):
        torch.testing.assert_close(embeddings[row], make()._embed([tokens], False)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch packs nothing")
def test_the_model_reads_packed_weights_and_keeps_its_hash():
    body = tiny_bert()
    before = make(body)._hash
    encoder = make(body)
    assert encoder._hash == before
    encoder._embed([[1, 2, 3]], False)
    assert any("_packed" in vars(part) for part in encoder.model.modules())


def test_results_are_kept_by_model_and_settings(monkeypatch):
    first = make().encode(TEXTS, progress=False)
    monkeypatch.setattr(TextEncoder, "_forward", lambda *_: pytest.fail("computed again"))
    assert torch.equal(make().encode(TEXTS, progress=False), first)
    monkeypatch.undo()
    for other in (make(tiny_bert(seed=1)), make(pooling="cls"), make(max_tokens=1)):
        assert not torch.allclose(other.encode(TEXTS, progress=False), first)


def test_another_version_of_a_package_makes_embeddings_anew(monkeypatch):
    first = make().encode(TEXTS, progress=False)
    monkeypatch.setattr(encoder_module, "versions", lambda: {"torch": "another"})
    monkeypatch.setattr(TextEncoder, "_embed", lambda self, ids, progress: torch.zeros(len(ids), first.shape[1]))
    assert not make().encode(TEXTS, normalize=False, progress=False).any()


def test_pooling_is_found():
    assert make().pooling == "mean"
    assert make(tiny_llama().base_model).pooling == "last"
    with pytest.raises(ValueError, match="pooling 'max'"):
        make(pooling="max")
    with pytest.raises(ValueError, match="max_tokens is 0"):
        make(max_tokens=0)


def test_a_causal_language_model_in_a_folder_is_an_encoder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    encoder = TextEncoder(str(tmp_path / "tiny"), dtype="float32")
    assert encoder.pooling == "last"
    same = make(tiny_llama().base_model)
    torch.testing.assert_close(encoder.encode(TEXTS, progress=False), same.encode(TEXTS, progress=False))


def test_whitening_gives_uncorrelated_equal_variances():
    torch.manual_seed(0)
    rows = torch.randn(500, 8) @ torch.randn(8, 8) + 5
    white = Whitening().fit(rows, shrinkage=0).transform(rows)
    torch.testing.assert_close(white.mean(0), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cov(white.T), torch.eye(8), atol=1e-4, rtol=0)


def test_whitening_with_fewer_rows_than_dimensions():
    torch.manual_seed(0)
    rows, new = torch.randn(10, 32), torch.randn(5, 32)
    for shrinkage in (0, 0.01, 1):
        white = Whitening().fit(rows, shrinkage=shrinkage)
        assert torch.isfinite(white.transform(new)).all()
    plain = Whitening().fit(rows, shrinkage=0)
    assert (plain.matrix.norm(dim=0) > 0).sum() == 9  # rank of 10 centred rows; no noise is blown up
    assert torch.equal(Whitening().fit(torch.ones(4, 3)).transform(torch.ones(2, 3)), torch.zeros(2, 3))


def test_whitening_reads_only_the_rows_it_is_given():
    torch.manual_seed(0)
    rows, changed = torch.randn(50, 6), torch.randn(50, 6)
    changed[:30] = rows[:30]
    new = torch.randn(4, 6)
    assert torch.equal(Whitening().fit(rows[:30]).transform(new), Whitening().fit(changed[:30]).transform(new))


def test_whitening_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match="at least 2 rows"):
        Whitening().fit(torch.ones(1, 3))
    with pytest.raises(ValueError, match="NaN"):
        Whitening().fit(torch.full((3, 3), torch.nan))
    with pytest.raises(ValueError, match="shrinkage is 2"):
        Whitening().fit(torch.ones(3, 3), shrinkage=2)


@pytest.fixture(scope="module")
def minilm():
    return TextEncoder("minilm", dtype="float32")


def test_minilm_puts_similar_texts_together(minilm):
    assert minilm.pooling == "mean"
    texts = ["A cat sits on the mat", "A kitten lies on a rug", "Interest rates rose by half a percent", ""]
    embeddings = minilm.encode(texts, progress=False)
    assert embeddings.shape == (4, 384)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(4))
    assert embeddings[0] @ embeddings[1] > 0.4
    assert embeddings[0] @ embeddings[2] < 0.2
    raw = minilm.encode(texts[:1], normalize=False, progress=False)
    torch.testing.assert_close(raw[0] / raw[0].norm(), embeddings[0], atol=1e-5, rtol=0)
