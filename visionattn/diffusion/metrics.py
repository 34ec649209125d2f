"""How far apart two pictures are: PSNR, SSIM (scikit-image), LPIPS (the package lpips, if it is installed)."""

import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

METRICS = ("psnr", "ssim", "lpips")


class Metrics:
    """Called with two lists of frames (H, W, 3), uint8; gives the mean of each metric over the frames.

    - ``psnr``: 10 log10(255^2 / mean squared error), infinite for equal pictures;
    - ``ssim``: Wang et al. 2004 with their Gaussian window of 1.5 px, mean over the colours;
    - ``lpips``: Zhang et al. 2018 on AlexNet's features, whose weights that package fetches at its first use.

    ``notes`` says which are left out, and why; their values are None.
    """

    def __init__(self, device: Any = "cpu"):
        self.device = device
        self.notes: list[str] = []
        self._lpips: Any = None
        self.available = {"psnr"}
        if importlib.util.find_spec("skimage") is None:
            self.notes.append("SSIM is left out: scikit-image is missing (pip install 'visionattn[graph]')")
        else:
            self.available.add("ssim")
        if importlib.util.find_spec("lpips") is None:
            self.notes.append("LPIPS is left out: the package lpips is missing (pip install lpips)")
        else:
            self.available.add("lpips")

    def __call__(
        self, one: Sequence[np.ndarray], other: Sequence[np.ndarray], names: Sequence[str] = METRICS
    ) -> dict[str, float | None]:
        """
        Raises:
            ValueError: for pictures of different sizes or numbers.
        """
        if [a.shape for a in one] != [b.shape for b in other]:
            raise ValueError(
                f"{len(one)} pictures of {one[0].shape} and {len(other)} of {other[0].shape} can't be compared"
            )
        pairs = list(zip(one, other, strict=True))
        found: dict[str, float | None] = {}
        for name in names:
            values = [getattr(self, f"_{name}_of")(a, b) if name in self.available else None for a, b in pairs]
            found[name] = None if None in values else sum(values) / len(values)
        return found

    @staticmethod
    def _psnr_of(a: np.ndarray, b: np.ndarray) -> float:
        error = float(((a.astype(np.float64) - b.astype(np.float64)) ** 2).mean())
        return 10.0 * math.log10(255.0**2 / error) if error else math.inf

    @staticmethod
    def _ssim_of(a: np.ndarray, b: np.ndarray) -> float:
        from skimage.metrics import structural_similarity

        return float(
            structural_similarity(
                a, b, channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
            )
        )

    def _lpips_of(self, a: np.ndarray, b: np.ndarray) -> float | None:
        import torch

        if self._lpips is None:
            try:
                import lpips

                self._lpips = lpips.LPIPS(net="alex", verbose=False).eval().to(self.device)
            except Exception as e:  # no network for AlexNet's weights: the comparison goes on without
                self.available.discard("lpips")
                reason = (str(e).splitlines() or [type(e).__name__])[0]
                self.notes.append(f"LPIPS is left out: its network can't be loaded ({reason})")
                return None
        tensors = [torch.from_numpy(x.copy()).movedim(-1, 0)[None].to(self.device) / 127.5 - 1.0 for x in (a, b)]
        with torch.no_grad():
            return float(self._lpips(*tensors))
