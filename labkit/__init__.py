"""labkit: from a bit pattern to a quantized language model behind an endpoint.

The subpackages, lowest first (each imports only those before it):

- ``labkit.quant``    one tensor: numbers in, codes and scales out
- ``labkit.kernels``  the same arithmetic, fast
- ``labkit.models``   a whole model: load, calibrate, quantize, evaluate, save
- ``labkit.serving``  the engine and its OpenAI-compatible API
- ``labkit.cluster``  where Ray runs
- ``labkit.course``   exercises, checks, widgets and plots of the notebooks
"""

__version__ = "0.1.0"
