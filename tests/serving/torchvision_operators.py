"""Copied by install.sh beside a torchvision whose operators do not load: declares them, so that its import passes."""

import importlib.abc
import sys


class _Declare(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            globals()["library"] = library  # the declarations live as long as it does


sys.meta_path.insert(0, _Declare())
