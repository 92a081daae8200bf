"""Sharing of models: complete folders, model cards, pushes to the Hub, and an Inference Endpoint's handler."""

from .bundle import hash_weights, save_bundle
from .model_card import Example, write_model_card
from .push import push_page_to_hub, push_to_hub


__all__ = ["Example", "hash_weights", "push_page_to_hub", "push_to_hub", "save_bundle", "write_model_card"]
