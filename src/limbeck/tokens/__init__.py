"""Text to tokens: chat templates, target masks, data sets, tokenizer identity. No models."""
