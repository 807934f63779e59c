"""The device code of one GPU: what was compiled ahead of time, and what is compiled when it is first asked for."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import torch

from fasttrain.kernels import emit_cuda, jit, nvrtc
from fasttrain.rule import Rule


class Code:
    """It starts kernels by their names, as `_native.DeviceCode`, which it has for each image.

    Arguments:
        driver: `_native.Driver`.
        ordinal: of the GPU.
        ahead: the image of the build, loaded there; None if the build has none.
    """

    def __init__(self, driver: Any, ordinal: int, ahead: Any):
        self.driver, self.ordinal, self.ahead = driver, ordinal, ahead
        self.lock = threading.Lock()
        self.images: dict[str, Any] = {}  # by source
        self.reasons: dict[str, str] = {}  # why a source has no image
        self.holding: dict[str, Any] = {}  # the image of a kernel

    def launch(self, kernel: str, **arguments: Any) -> None:
        (self.holding.get(kernel) or self.hold(kernel)).launch(kernel=kernel, **arguments)

    def usage(self, kernel: str, threads: int) -> dict[str, int]:
        return (self.holding.get(kernel) or self.hold(kernel)).usage(kernel, threads)

    def hold(self, kernel: str) -> Any:
        """The image of a kernel of the list.

        Raises:
            RuntimeError: there is none, and it cannot be compiled.
        """
        found, reason = (self.ahead, "") if self.ahead is not None else self.load(kernel, emit_cuda.listed(kernel))
        if found is None:
            raise RuntimeError(f"there is no CUDA kernel {kernel}: {reason}")
        self.holding[kernel] = found
        return found

    def find(self, listed: str | None, rule: Rule, dtypes: tuple[torch.dtype, ...],
             codecs: tuple[int, ...]) -> tuple[str | None, str]:
        """The kernel of such items, compiled if need be; or None and why there is none.

        Arguments:
            listed: its name, if it is of the list.
        """
        if listed is not None and self.ahead is not None:
            return listed, ""
        if listed is not None:
            name, text = listed, emit_cuda.listed(listed)
        elif reason := emit_cuda.why_not(rule, dtypes, codecs):
            return None, reason
        else:
            name, text = emit_cuda.own(rule, dtypes, codecs)
        found, reason = self.load(name, text)
        return (None if found is None else name), reason

    def load(self, kernel: str, text: str) -> tuple[Any, str]:
        """The image of a kernel's source, or None and why it cannot be had. Each is tried once."""
        with self.lock:
            if text not in self.images and text not in self.reasons:
                try:
                    self.images[text] = self.loaded(text)
                except (jit.Unavailable, OSError) as error:
                    self.reasons[text] = str(error)
                    if isinstance(error, nvrtc.Refused):
                        warnings.warn(f"the CUDA kernel {kernel} could not be compiled, so Triton steps in its place. "
                                      f"The reason: {error}", RuntimeWarning, stacklevel=6)
            found = self.images.get(text)
            if found is not None:
                self.holding[kernel] = found
            return found, self.reasons.get(text, "")

    def loaded(self, text: str) -> Any:
        capability = self.driver.capability(self.ordinal)
        try:
            return self.driver.load(nvrtc.image(text, capability), self.ordinal)
        except RuntimeError:
            pass  # whole, and yet not to be loaded: it may be of a toolkit that was repaired, or of another driver
        try:
            return self.driver.load(nvrtc.image(text, capability, anew=True), self.ordinal)
        except RuntimeError as error:
            raise nvrtc.Refused(f"the driver refused what NVRTC made: {error}") from None
