"""Makes torchvision importable beside a CPU build of torch, for one more run of the suite.

    mkdir stub && cp tests/torchvision_stub.py stub/sitecustomize.py
    PYTHONPATH=stub python -m pytest -m "not slow"

torchvision's wheels from PyPI bring operators built for CUDA; without them its import stops at two operators
whose schemas are missing. Defining the schemas is enough for what transformers imports; the operators are never
called here.
"""

import torch

_LIBRARY = torch.library.Library("torchvision", "DEF")
_LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_LIBRARY.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import torchvision  # noqa: E402, F401
