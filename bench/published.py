"""Times that others have published for linear attention, and the shapes they chose."""

from __future__ import annotations

Shape = tuple[int, int, int, int]  # B, T, H, D

# bf16, q and k as they are, on a GPU with this in its name.
GPU = "H100"
SOURCES = ("flash-linear-attention", "Helion")
MILLISECONDS: dict[Shape, dict[str, tuple[float, float]]] = {
    (1, 8192, 96, 128): {"forward": (0.726, 0.682), "forward+backward": (3.367, 2.010)},
    (2, 16384, 16, 128): {"forward": (0.609, 0.457), "forward+backward": (2.585, 1.355)},
    (4, 2048, 16, 128): {"forward": (0.148, 0.149), "forward+backward": (1.547, 0.956)},
    (4, 4096, 64, 128): {"forward": (0.950, 0.900), "forward+backward": (4.530, 2.659)},
    (8, 2048, 32, 256): {"forward": (1.338, 1.271), "forward+backward": (8.981, 3.994)},
    (8, 1024, 8, 64): {"forward": (0.137, 0.143), "forward+backward": (0.796, 0.755)},
}
