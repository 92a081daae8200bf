class GenerationTesterMixin:
    """Nothing here generates; the common tests only look at whether a tester inherits from this class."""
