"""transformers' common processor tests on ReSTR's; run by `run.py`."""

import unittest

from modeling_restr import ReSTRImageProcessor, ReSTRProcessor, build_tokenizer

from ...test_processing_common import ProcessorTesterMixin


class ReSTRProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = ReSTRProcessor

    @classmethod
    def _setup_image_processor(cls):
        return ReSTRImageProcessor(size={"height": 32, "width": 48})

    @classmethod
    def _setup_tokenizer(cls):
        words = ["<pad>", "<go>", "<eos>", "<unk>", "lower", "newer", "upper", "older", "longer", "string"]
        return build_tokenizer({word: index for index, word in enumerate(words)})

    def test_processor_text_has_no_visual(self):
        # The common test leaves one sentence of a batch without image, which is an error here.
        with self.assertRaisesRegex(ValueError, "as many sentences as images"):
            self.get_processor()(images=self.prepare_images_inputs(batch_size=2), text=self.prepare_text_inputs(3))
