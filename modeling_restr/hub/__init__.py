"""What a Hub repository or a folder to share holds besides weights."""

from .bundle import save_bundle


__all__ = ["save_bundle"]
