"""What a Hub repository or a folder to share holds besides weights, and how it gets there."""

from .bundle import hash_weights, save_bundle
from .model_card import Example, write_model_card
from .push import push_to_hub


__all__ = ["Example", "hash_weights", "push_to_hub", "save_bundle", "write_model_card"]
