"""From raw ratings to batches: sources, interactions, splits, prompts, tokenised datasets and loaders."""
