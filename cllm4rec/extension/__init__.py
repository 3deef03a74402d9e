"""Adds new items to a trained model: their rows are predicted from their texts."""
