"""One place picks the kernels, and only a CUDA device brings triton in."""

from tests.model.kernels.processes import python

CODE = """
import sys
sys.modules["triton"] = None  # as where it is not installed: importing it fails
import torch
import engrid.model.generate
from engrid.model import kernels
from engrid.model.engram import EngramLayer
layer = EngramLayer(16, 32, 3)
layer(torch.ones(1, 2, 1, 16), torch.ones(1, 2, 4, 8), layer.start(1))[0].sum().backward()
print(kernels.on(torch.device("cpu")).__name__)
try:
    kernels.on(torch.device("cuda", 1))
except ImportError as error:
    print("no", error.name)
del sys.modules["triton"]
print(kernels.on(torch.device("cuda", 1)).__name__)
"""


def test_a_cpu_needs_no_triton_and_cuda_gets_its_kernels():
    assert python("-c", CODE).splitlines() == [
        "engrid.model.kernels.reference",
        "no triton",
        "engrid.model.kernels.cuda",
    ]
