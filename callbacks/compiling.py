"""Compile the networks of any method."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from leanlight.contracts import CompilesNetworks, UserError, nearest

_VERSIONS = 64


class CompileNetworks(Callback):
    """Compiles the networks that training calls with ``torch.compile``; without a `backend` it does nothing.

    Weights, checkpoints and exports are those of the networks as they are written. What counts spikes or operations
    runs these uncompiled meanwhile.

    Args:
        backend: of ``torch.compile``: ``inductor``, or another that it lists; null compiles nothing.
        mode: of ``inductor``: ``default``, ``reduce-overhead`` (CUDA graphs), ``max-autotune``; its own by default.
        dynamic: whether sizes may change without compiling again; by default they may from their second value on.
        fullgraph: fail where a network cannot be one graph, instead of making several.
    """

    def __init__(
        self,
        backend: str | None = None,
        mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = None,
        dynamic: bool | None = None,
        fullgraph: bool = False,
    ) -> None:
        known = torch.compiler.list_backends(exclude_tags=()) if backend is not None else []
        if backend is not None and backend not in known:
            raise UserError(
                f"compile.backend: expected one of {sorted(known)}, got {backend!r}{nearest(backend, known)}"
            )
        if mode is not None and backend != "inductor":
            raise UserError(f"compile.mode: expected null without backend inductor, got {mode!r}")
        self.backend = backend
        self._options: dict[str, Any] = {"backend": backend, "mode": mode, "dynamic": dynamic, "fullgraph": fullgraph}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.backend is not None and stage == "fit" and not isinstance(pl_module, CompilesNetworks):
            raise UserError(
                f"compile.backend: {type(pl_module).__name__} does not say which networks to compile "
                "(compile_networks); use null"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.backend is not None:
            assert isinstance(pl_module, CompilesNetworks)
            # Every width of a federation, batch size and mode is a version; at 8 the compiler would give up unasked.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VERSIONS)
            pl_module.compile_networks(**self._options)
