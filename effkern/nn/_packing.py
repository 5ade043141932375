"""What a layer needs to keep a packed weight and never use a stale one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from effkern.ops._memo import Stamp, available, memo, packable


class HoldsPack(nn.Module):
    """A layer that keeps one pack of its parameters for inference.

    The pack is no parameter and no buffer: it is in no state_dict, no pickle and no copy. It is dropped by ``train()``,
    by whatever goes through ``_apply`` (``to``, ``half``, ``cuda``, ...) and by ``load_state_dict``, and it is made
    anew when the parameters' stamp says they changed (see :mod:`effkern.ops._memo`).

    :meth:`freeze_pack` promises that the parameters stay as they are: the stamp is no longer looked at, which saves
    about 10 us a call, and the pack becomes part of compiled and exported graphs, where no stamp can be looked at.
    """

    def __init__(self) -> None:
        super().__init__()
        # One attribute, so that threads sharing the layer never see the stamp of one pack next to another.
        self._held: tuple[Stamp, Tensor] | None = None
        self._frozen: Tensor | None = None
        self.register_load_state_dict_post_hook(_drop_after_load)

    def drop_pack(self) -> None:
        """Forget the pack, frozen or not."""
        self._held = self._frozen = None

    def freeze_pack(self) -> None:
        """Pack now and use this pack, here and in graphs compiled or exported from here on, whatever the parameters do.

        A later change of the parameters is seen only after another ``freeze_pack()``, and by exported graphs never.
        ``train()``, ``load_state_dict``, ``to`` and the like undo it.

        Raises:
            RuntimeError: in training mode, or where packs are not available (no native library, not on the CPU).
        """
        self._frozen = None
        self._frozen = self._packed()
        if self._frozen is None:
            raise RuntimeError(
                f"{type(self).__name__}.freeze_pack: needs eval mode, the native CPU library, EFFKERN_CACHE other than "
                f"off and plain CPU parameters; got training={self.training}, EFFKERN_CACHE={memo().mode}"
            )

    def _may_use_pack(self, x: Tensor, *differentiable: Tensor | None) -> bool:
        """Whether a call on ``x`` fits the pack: same dtype, no autocast, no gradient wanted in what is named."""
        weight = self._pack_sources()[0]
        if not x.is_cpu or weight is None or x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
            return False  # the plain op names what does not fit, and casts the weight
        return not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in differentiable)

    def _pack_sources(self) -> tuple[Tensor | None, ...]:
        """The parameters the pack is made of."""
        raise NotImplementedError

    def _make_pack(self) -> Tensor:
        """Pack the parameters; called without gradient recording."""
        raise NotImplementedError

    def _packed(self) -> Tensor | None:
        """The pack, if this call may use one; made here when there is none or it is stale.

        In graphs only a frozen pack is used: a graph cannot see that a parameter changed.
        """
        if self._frozen is not None or torch.compiler.is_compiling():
            return self._frozen
        sources = self._pack_sources()
        if self.training or memo().mode == "off" or not available() or not packable(*sources):
            return None
        held = self._held
        if held is None or held[0].invalidated() or not held[0].holds(sources):
            stamp = Stamp(sources)  # before packing: a change meanwhile is then seen by the next call
            # An inference tensor could not be saved for the gradient in x that a later call may want.
            with torch.inference_mode(False), torch.no_grad():
                held = (stamp, self._make_pack())
            if stamp.holds(sources):  # else another thread changed the parameters while they were packed
                self._held = held
        return held[1]

    def train(self, mode: bool = True) -> Any:
        """Set training mode; drops the pack."""
        if mode:
            self.drop_pack()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.drop_pack()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None, "_frozen": None}


def freeze_packs(model: nn.Module) -> nn.Module:
    """Freeze the packs of every layer of a network that is deployed as it is; see :meth:`HoldsPack.freeze_pack` and
    :meth:`effkern.nn.SkipBlock.freeze_pack`.

    Does nothing where packs are not available, and leaves layers on other devices than the CPU as they are, which run
    their weights in place. Returns ``model``, changed in place.
    """
    if available() and memo().mode != "off":
        for module in model.modules():
            freeze = getattr(module, "freeze_pack", None)
            if isinstance(module, HoldsPack) and not all(t is None or t.is_cpu for t in module._pack_sources()):
                continue
            if freeze is not None:
                freeze()
    return model


def _drop_after_load(module: nn.Module, incompatible_keys: Any) -> None:
    assert isinstance(module, HoldsPack)
    module.drop_pack()
