"""Tensors in, logits out: the vision encoder, the projector and Qwen2.5; knows no file and no tokenizer."""
