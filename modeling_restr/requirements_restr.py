"""
The version of transformers that ReSTR needs, checked on import. Every model file imports this module before anything
in transformers, so that whichever file is loaded first reports an old version.
"""

import transformers
from packaging.version import Version


TRANSFORMERS = "transformers>=5.17,<6"  # in pip's form; setup.py and saved models take it from this line
MIN_TRANSFORMERS = TRANSFORMERS.partition(">=")[2].partition(",")[0]

if Version(transformers.__version__) < Version(MIN_TRANSFORMERS):
    raise ImportError(
        f"ReSTR needs transformers {MIN_TRANSFORMERS} or later, found {transformers.__version__}: run `pip install "
        f'--upgrade "{TRANSFORMERS}"` and start Python again.'
    )


__all__ = ["MIN_TRANSFORMERS", "TRANSFORMERS"]
