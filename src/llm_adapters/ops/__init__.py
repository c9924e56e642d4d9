"""Operators: tensors in, tensors out. Knows neither transformers nor PEFT."""
