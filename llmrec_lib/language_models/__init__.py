"""Language models: pinned weights, text embeddings, title likelihoods, sequence backbones."""
