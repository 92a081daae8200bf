from .referring_iou import ReferringIoU


__all__ = ["ReferringIoU"]
