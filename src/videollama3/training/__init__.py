"""Conversations -> labelled, packed batches -> steps."""
