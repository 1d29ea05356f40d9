"""Weights, configurations and Hub folders between the layouts."""
