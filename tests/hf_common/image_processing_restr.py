"""transformers' common image processor tests on ReSTR's; run by `run.py`."""

import unittest

from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from modeling_restr import ReSTRImageProcessor

from ...test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin


# The common tests find the classes to test here.
IMAGE_PROCESSOR_MAPPING_NAMES["restr"] = {"pil": "ReSTRImageProcessor"}


class ReSTRImageProcessingTester(ImageProcessingTester):
    batch_size = 7
    num_channels = 3
    min_resolution = 30
    max_resolution = 400
    size = {"height": 32, "width": 48}

    def __init__(self, parent):  # that of the base class differs between the versions of the common tests
        self.parent = parent
        self.image_processing_classes = {"pil": ReSTRImageProcessor}

    def prepare_image_processor_dict(self):
        return {"size": self.size}


class ReSTRImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = ReSTRImageProcessingTester

    # Older versions of the common tests leave these two to the test class.
    def setUp(self):
        super().setUp()
        self.image_processor_tester = ReSTRImageProcessingTester(self)

    @property
    def image_processor_dict(self):
        return self.image_processor_tester.prepare_image_processor_dict()

    @unittest.skip(
        "PIL only, by choice: torchvision is not required, and PIL's resizing is what the model is trained with"
    )
    def test_new_models_require_torchvision_backend(self):
        pass
