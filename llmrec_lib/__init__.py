"""llmrec_lib: fusing language models with personalised recommender systems, on top of RecBole."""

__version__ = "0.1.0"
