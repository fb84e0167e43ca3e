"""pytest plugin (`-p tools.gpu.pretend`), only to collect: the backend "cuda" seems available, so that its tests exist.

Import it before the tests read the table of backends.
"""

from tsae_kernels.backends import registry

registry._AVAILABLE.setdefault("cuda", registry._AVAILABLE["reference"])
registry._UNAVAILABLE.pop("cuda", None)
registry._AVAILABLE.setdefault("triton", registry._AVAILABLE["reference"])
registry._UNAVAILABLE.pop("triton", None)
