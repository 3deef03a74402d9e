"""CLLM4Rec: a recommender that joins a pretrained language model with user and item IDs. Importing this starts nothing."""

__version__ = "0.1.0"
