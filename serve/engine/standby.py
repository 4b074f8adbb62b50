"""What a standby worker does before it knows its model: sets up CUDA, cuBLAS and cuDNN, most of a start on a GPU.

The zygote runs this file in a child (zygote.py), where torch is imported already. Whatever it raises ends that child.
"""

import torch


def main() -> None:
    """Computes in the precisions that models are served in: each has kernels of its own."""
    with torch.inference_mode():
        for dtype in (torch.float16, torch.float32):
            square = torch.ones(1, 16, 64, 64, dtype=dtype, device="cuda")
            torch.nn.functional.conv2d(square @ square, square[:, :, :3, :3], padding=1)
        del square
        torch.cuda.synchronize()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
