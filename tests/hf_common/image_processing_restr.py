"""transformers' common image processor tests on ReSTR's; run by `run.py`."""

import unittest

from modeling_restr import ReSTRImageProcessor

from ...test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin


class ReSTRImageProcessingTester(ImageProcessingTester):
    def __init__(self, parent, **kwargs):
        super().__init__(parent, **{"size": {"height": 32, "width": 48}, **kwargs})

    def _get_image_processing_classes(self):
        return {"pil": ReSTRImageProcessor}


class ReSTRImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = ReSTRImageProcessingTester

    @unittest.skip(
        "PIL only, by choice: torchvision is not required, and PIL's resizing is what the model is trained with"
    )
    def test_new_models_require_torchvision_backend(self):
        pass
