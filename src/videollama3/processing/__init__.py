"""Media files and conversations in, model tensors out; knows no model."""
