"""Builds ModelOpt's CUDA extensions where there is a compiler but no GPU, as in `docker build`; fails if one does not.

ModelOpt builds them at first use, 60-90 s each, and only on a machine with a GPU. Where they go: TORCH_EXTENSIONS_DIR;
for which GPUs: TORCH_CUDA_ARCH_LIST. Both must be the same when they are used.
"""

import os
from unittest.mock import patch


def main() -> None:
    """Build all three.

    Raises:
        SystemExit: a variable is not set.
        RuntimeError: ModelOpt's reason why an extension was not built.
    """
    for name in ("TORCH_CUDA_ARCH_LIST", "TORCH_EXTENSIONS_DIR"):
        if not os.environ.get(name):
            raise SystemExit(
                f"{name} is not set: extensions would be built for nobody. Set it here and at run time alike."
            )
    import torch
    from modelopt.torch.quantization import extensions

    # ModelOpt asks for a GPU before it compiles; compiling needs none.
    with patch.object(torch.cuda, "is_available", return_value=True):
        for build in (extensions.get_cuda_ext, extensions.get_cuda_ext_fp8, extensions.get_cuda_ext_mx):
            build(raise_if_failed=True)


if __name__ == "__main__":
    main()
