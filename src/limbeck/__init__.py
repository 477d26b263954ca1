"""Limbeck: knowledge distillation of language models."""
