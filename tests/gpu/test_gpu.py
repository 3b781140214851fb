"""On a GPU everything runs, and gives what the CPU gives. Skipped where there is no GPU that PyTorch can use."""

import copy

import pytest
import torch

from llmrec_lib.augment import Augmentation
from llmrec_lib.baselines import BASELINES, train
from llmrec_lib.language_models.backbone import train_backbone
from llmrec_lib.language_models.compress import compress
from llmrec_lib.language_models.encoder import TextEncoder, choose_device
from llmrec_lib.language_models.finetune import finetune
from llmrec_lib.language_models.likelihood import OVER, TitleLikelihood, naive_log_likelihood
from llmrec_lib.recommender import RecBoleRecommender
from tests.contract.test_recommenders import item_embeddings
from tests.unit.tiny_models import tiny_bert, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use")
SHORT = {"epochs": 2, "eval_step": 1}
TITLES = ["toy story", "toys of the night", "alien", "aliens", "", "夜", "a user of toys", "the night"]
USERS = torch.tensor([5, 1, 24, 2])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path))


def test_a_gpu_is_chosen_where_there_is_one():
    assert choose_device("auto").type == "cuda" and choose_device("cpu").type == "cpu"


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_train_on_it_and_score_like_the_same_weights_on_the_cpu(checkerboard_split, name):
    settings = {key: value for key, value in SHORT.items() if "epochs" in BASELINES[name].settings}
    before = torch.cuda.get_rng_state()
    arm = train(name, checkerboard_split, progress=False, **settings)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    scores = arm.score(USERS)
    assert scores.device.type == "cpu" and scores.shape == (4, checkerboard_split.dataset.n_items)
    again = train(name, checkerboard_split, progress=False, **settings).score(USERS)  # read from the cache
    torch.testing.assert_close(again, scores, rtol=1e-4, atol=1e-5)
    if isinstance(arm, RecBoleRecommender) and name not in ("pop", "lightgcn"):  # these keep tensors out of their state
        assert next(arm.model.parameters()).is_cuda
        arm.model.to("cpu")
        arm.model.device = torch.device("cpu")
        torch.testing.assert_close(arm.score(USERS), scores, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_embeddings(pooling):
    tokenizer = tiny_tokenizer()
    texts = [*TITLES, *(f"{title} {number}" for title in TITLES for number in range(40))]
    found = {
        device: TextEncoder((tiny_bert(), tokenizer), pooling, device=device, dtype="float32")._embed(
            tokenizer([text or "a" for text in texts])["input_ids"], False
        )
        for device in ("cpu", "cuda")
    }
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("recipe", ["", "layers1", "heads2+neurons50", "int8", "int8-weights", "int4-weights"])
@pytest.mark.parametrize("over", OVER)
def test_likelihood_of_whole_and_compressed_models(over, recipe):
    model = tiny_llama(), tiny_tokenizer()
    model = compress(model, recipe) if recipe else model
    prompt = "a user chose toys; night of the story;"
    found = {}
    for device in ("cpu", "cuda"):
        own = copy.deepcopy(model[0]), model[1]
        scorer = TitleLikelihood(own, TITLES, dtype="float32", device=device)
        assert scorer.shares_prompt
        found[device] = scorer.log_likelihood(prompt, over)
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found["cuda"], naive_log_likelihood(scorer, prompt, over=over), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("augmentation", [None, Augmentation("insert", 0.3), Augmentation("slice", 0.3, views=0.5)])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_finetuning(checkerboard_split, method, augmentation):
    small = {"window_tokens": 54, "batch_tokens": 192, "dtype": "float32", "progress": False, "valid_users": 4}
    found = {
        device: finetune(
            checkerboard_split, (tiny_llama(), tiny_tokenizer()), method=method, augmentation=augmentation, epochs=2,
            device=device, **small,
        )
        for device in ("cpu", "cuda")
    }  # fmt: skip
    assert next(found["cuda"].model.parameters()).is_cuda
    own, other = (found[device].curve[["loss", "valid_loss"]].to_numpy() for device in ("cuda", "cpu"))
    torch.testing.assert_close(torch.tensor(own), torch.tensor(other), rtol=1e-2, atol=1e-2, equal_nan=True)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_finetuning_goes_on_from_its_checkpoint(checkerboard_split, method, monkeypatch):
    from llmrec_lib.language_models import finetune as module

    small = {"window_tokens": 54, "batch_tokens": 192, "dtype": "float32", "progress": False, "epochs": 2}

    def trained(validate):
        own = tiny_llama(), tiny_tokenizer()
        return finetune(checkerboard_split, own, method=method, valid_users=4, validate=validate, seed=1, **small)

    calls = []

    def fails_once(model, tokenizer):
        calls.append(1)
        if len(calls) == 2:  # after the first epoch
            raise KeyboardInterrupt
        return 0.0

    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        trained(fails_once)
    resumed = trained(fails_once)
    monkeypatch.setenv("LLMREC_CACHE", f"{module.cache_dir()}-other")
    whole = trained(lambda model, tokenizer: 0.0)
    assert len(resumed.curve) == len(whole.curve)
    torch.testing.assert_close(resumed.curve["loss"].iloc[-1], whole.curve["loss"].iloc[-1], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("tuning", ["frozen", "lora", "full"])
def test_bodies(checkerboard_split, tuning):
    small = {"MAX_ITEM_LIST_LENGTH": 6, "out_size": 16, "train_batch_size": 8, "rank": 3, **SHORT}
    inputs = checkerboard_split, item_embeddings(checkerboard_split.dataset), (tiny_llama(), None)
    arm = train_backbone(*inputs, tuning=tuning, progress=False, **small)
    assert next(arm.model.parameters()).is_cuda
    scores = arm.score(USERS)
    torch.testing.assert_close(train_backbone(*inputs, tuning=tuning, progress=False, **small).score(USERS), scores)
    arm.model.to("cpu")
    torch.testing.assert_close(arm.score(USERS), scores, rtol=1e-3, atol=1e-3)
