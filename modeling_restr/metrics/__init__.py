"""The metric; never imported by the model files. Needs the extra `train`."""

from .referring_iou import ReferringIoU


__all__ = ["ReferringIoU"]
