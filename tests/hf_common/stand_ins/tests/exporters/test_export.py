import copy

import torch
from parameterized import parameterized
from transformers.exporters import DynamoConfig, DynamoExporter
from transformers.exporters.utils import get_leaf_tensors
from transformers.testing_utils import torch_device


class ExportTesterMixin:
    """torch.export through transformers' own exporter: the exported program returns what the model returns."""

    test_torch_exportable = True

    @parameterized.expand([("static", False), ("dynamic", True)])
    def test_torch_export(self, _, dynamic):
        for model_class in self.all_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            model = model_class(config).eval().to(torch_device)
            with torch.no_grad():
                expected = get_leaf_tensors(model(**copy.deepcopy(inputs)))
                exported = DynamoExporter().export(model, copy.deepcopy(inputs), config=DynamoConfig(dynamic=dynamic))
                if isinstance(exported, torch.export.ExportedProgram):  # what the exporter returned before 5.23
                    exported = exported.module()
                actual = get_leaf_tensors(exported(**copy.deepcopy(inputs)))
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
