"""Tiny random models and a tokenizer made on the spot, so that tests of language models need no download."""

from __future__ import annotations

import string

import torch

WORDS = ["the", "story", "toy", "toys", "alien", "aliens", "night", "of", "a", "user", "chose", "items", "é", "夜"]


def tiny_tokenizer():
    """Byte-level BPE trained on a few words: any text can be read, blanks belong to the word that follows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3 + list(string.ascii_lowercase), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def tiny_llama(seed: int = 0, context: int = 256, tied: bool = True):
    """Llama with 2 layers, 4 heads in 2 groups; weights large enough that predictions differ between contexts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=context, initializer_range=0.3, tie_word_embeddings=tied,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tiny_bert(seed: int = 0):
    """BERT body with 2 layers."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return BertModel(config).eval()
