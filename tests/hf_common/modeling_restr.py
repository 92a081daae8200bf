"""transformers' common model and config tests on every ReSTR model class; run by `run.py`."""

import unittest

import torch
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers.testing_utils import torch_device

from modeling_restr import (
    ReSTRConfig,
    ReSTRForImageSegmentation,
    ReSTRModel,
    ReSTRTextConfig,
    ReSTRTextModel,
    ReSTRVisionConfig,
    ReSTRVisionModel,
)

from ...test_configuration_common import ConfigTester
from ...test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor


# The common tests find models without a loss here.
MODEL_MAPPING_NAMES.update(
    restr="ReSTRModel", restr_vision_model="ReSTRVisionModel", restr_text_model="ReSTRTextModel"
)


class ReSTRVisionModelTester:
    batch_size = 3
    image_size = 32
    patch_size = 8
    num_channels = 3
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    seq_length = encoder_seq_length = (image_size // patch_size) ** 2 + 1
    is_training = True

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return ReSTRVisionConfig(
            image_size=self.image_size,
            patch_size=self.patch_size,
            num_channels=self.num_channels,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=2 * self.hidden_size,
        )

    def prepare_config_and_inputs_for_common(self):
        pixel_values = floats_tensor([self.batch_size, self.num_channels, self.image_size, self.image_size])
        return self.get_config(), {"pixel_values": pixel_values}


class ReSTRTextModelTester:
    batch_size = 3
    vocab_size = 99
    hidden_size = projection_dim = 24  # the common tests look for `hidden_size` channels in the word features
    num_hidden_layers = 2
    num_attention_heads = 4
    seq_length = encoder_seq_length = 7
    is_training = True

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return ReSTRTextConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            projection_dim=self.projection_dim,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=2 * self.hidden_size,
            max_position_embeddings=self.seq_length,
        )

    def prepare_config_and_inputs_for_common(self):
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 1) + 1  # no padding
        attention_mask = torch.ones_like(input_ids)
        return self.get_config(), {"input_ids": input_ids, "attention_mask": attention_mask}


class ReSTRModelTester:
    num_attention_heads = 4
    # The visual-linguistic and the seed encoder have one block each.
    num_hidden_layers = 2
    is_training = True

    def __init__(self, parent):
        self.parent = parent
        self.vision_model_tester = ReSTRVisionModelTester(parent)
        self.text_model_tester = ReSTRTextModelTester(parent)
        self.batch_size = self.text_model_tester.batch_size
        self.image_size = self.vision_model_tester.image_size
        self.patch_size = self.vision_model_tester.patch_size
        self.hidden_size = self.vision_model_tester.hidden_size
        self.seq_length = self.text_model_tester.seq_length
        self.encoder_seq_length = self.vision_model_tester.seq_length - 1 + self.seq_length

    def get_config(self):
        return ReSTRConfig(
            vision_config=self.vision_model_tester.get_config(),
            text_config=self.text_model_tester.get_config(),
            num_attention_heads=self.num_attention_heads,
            num_fusion_layers=1,
            intermediate_size=2 * self.hidden_size,
        )

    def prepare_config_and_inputs_for_common(self):
        _, image_inputs = self.vision_model_tester.prepare_config_and_inputs_for_common()
        _, text_inputs = self.text_model_tester.prepare_config_and_inputs_for_common()
        return self.get_config(), {**image_inputs, **text_inputs}


class CommonModelTest(ModelTesterMixin):
    """Tests of all of ReSTR's models. Each has its tester and its config."""

    model_tester_class: type
    config_class: type
    has_text_modality = True
    test_can_init_all_missing_weights_before_2023 = True  # the test reads a date that our files do not carry

    def setUp(self):
        self.model_tester = self.model_tester_class(self)
        self.config_tester = ConfigTester(
            self, config_class=self.config_class, has_text_modality=self.has_text_modality
        )

    def test_config(self):
        self.config_tester.run_common_tests()


class ReSTRVisionModelTest(CommonModelTest, unittest.TestCase):
    all_model_classes = (ReSTRVisionModel,)
    model_tester_class, config_class = ReSTRVisionModelTester, ReSTRVisionConfig
    has_text_modality = False
    test_resize_embeddings = False  # it has no words

    def test_model_get_set_embeddings(self):
        # The input embedding is the patch convolution, where the common test expects an `nn.Embedding`.
        model = ReSTRVisionModel(self.model_tester.get_config())
        self.assertIs(model.get_input_embeddings(), model.embeddings.patch_embedding)
        model.set_input_embeddings(new_embedding := torch.nn.Conv2d(3, 4, kernel_size=8, stride=8))
        self.assertIs(model.get_input_embeddings(), new_embedding)


class ReSTRTextModelTest(CommonModelTest, unittest.TestCase):
    all_model_classes = (ReSTRTextModel,)
    model_tester_class, config_class = ReSTRTextModelTester, ReSTRTextConfig


class ReSTRModelTest(CommonModelTest, unittest.TestCase):
    all_model_classes = (ReSTRModel, ReSTRForImageSegmentation)
    model_tester_class, config_class = ReSTRModelTester, ReSTRConfig
    has_text_modality = False
    additional_model_inputs = ["input_ids", "attention_mask"]
    _is_composite = True

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs_dict = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class is ReSTRForImageSegmentation:
            shape = (self.model_tester.batch_size, self.model_tester.image_size, self.model_tester.image_size)
            inputs_dict["labels"] = torch.randint(2, shape, device=torch_device)
        return inputs_dict
