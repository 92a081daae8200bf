"""
The version of transformers that ReSTR needs, checked on import. Every model file imports this one before anything else
of transformers: whichever is loaded first says what is missing.
"""

import transformers
from packaging.version import Version


MIN_TRANSFORMERS = "5.17"
TRANSFORMERS = f"transformers>={MIN_TRANSFORMERS},<6"  # as pip reads it

if Version(transformers.__version__) < Version(MIN_TRANSFORMERS):
    raise ImportError(
        f"ReSTR needs transformers {MIN_TRANSFORMERS} or later, found {transformers.__version__}: run `pip install "
        f'--upgrade "{TRANSFORMERS}"` and start Python again.'
    )


__all__ = ["MIN_TRANSFORMERS", "TRANSFORMERS"]
