"""LoRA adapters on one loaded model (PEFT): many are held, the base is there once.

One adapter is active for all rows of a batch, or every row has its own where PEFT can do that (`Adapters.can_mix`).
Adapters of stacked experts (`target_parameters`) work as well, one at a time; PEFT asks that all such adapters of one
base target the same parameters. Refuses adapters that PEFT cannot put on this model, by their folder.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from posttrain.config import UserError

PROBE_SHAPE = (3, 5)  # rows and tokens of the batch that shows what the layers of an adapter are fed


class Adapters:
    """The adapters of ``model``, which is changed in place and stays usable without any."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._peft: Any = None
        self._names: dict[str, str] = {}  # adapter key -> PEFT's name
        self._num_loaded = 0
        self._active: str | None = None
        self._settled = True  # whether PEFT's own idea of the active adapter is that of `_active`
        self._mixable: dict[str, bool] = {}  # by PEFT's name, as far as it was asked

    @property
    def keys(self) -> list[str]:
        """Keys of the adapters that are held."""
        return list(self._names)

    def on(self, layer: Any) -> str | None:
        """PEFT's name of the active adapter if it changes ``layer``, else None. No other adapter ever has that name."""
        name = self._names.get(self._active or "")
        return name if name in getattr(layer, "lora_A", {}) else None

    def hold(self, key: str, folder: str | None) -> None:
        """Load the adapter ``key`` from ``folder`` if it is not held. Raises as `use`."""
        if key not in self._names:
            assert folder is not None
            self._load(key, folder)

    def use(self, key: str | None, folder: str | None) -> None:
        """Make the adapter ``key`` active, loading it from ``folder`` if it is not held; None: the bare base.

        Raises `UserError` for an adapter that does not fit; it may then be on the model in part: throw the model away.
        """
        if key is not None:
            self.hold(key, folder)
        if self._peft is None or (key == self._active and self._settled):
            return
        for layer in self._layers():
            layer.enable_adapters(key is not None)
            if key is not None:
                layer.set_adapter([self._names[key]], inference_mode=True)
        self._active, self._settled = key, True

    def can_mix(self, key: str) -> bool:
        """Whether rows of a batch with the held adapter ``key`` may stand beside rows of others.

        PEFT does this for plain LoRA on linear layers that are fed whole rows, [rows, tokens, ...]: projections of
        attention, dense MLPs. Experts and what sees the tokens of all rows in a line are not among them, and neither is
        the LM head, which the backbone does not call. Found with a small forward of the backbone, once an adapter.
        """
        name = self._names[key]
        if name not in self._mixable:
            self._mixable[name] = self._find_out(name)
        return self._mixable[name]

    def mix(self) -> None:
        """No adapter is active but by `rows`, until the next `use`."""
        self._active, self._settled = None, self._peft is None

    @contextmanager
    def rows(self, keys: Sequence[str | None]) -> Iterator[None]:
        """Within, after `mix`: row i of the input goes through the held adapter ``keys[i]``, None: the bare base. Each
        must be one that `can_mix`; PEFT raises ValueError for layers that are fed another number of rows."""
        names = [self._names[key] if key is not None else "__base__" for key in keys]  # PEFT's word for none
        used = set(names)

        def give_names(_layer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, kwargs | {"adapter_names": names}

        handles = []
        for layer in self._layers():
            is_used = bool(used & _names_on(layer))
            if is_used:
                handles.append(layer.register_forward_pre_hook(give_names, with_kwargs=True))
            if is_used == layer.disable_adapters:
                layer.enable_adapters(is_used)
                layer.requires_grad_(False)  # PEFT makes what it enables trainable
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _layers(self) -> list[Any]:
        """All layers with an adapter."""
        if self._peft is None:
            return []
        from peft.tuners.tuners_utils import BaseTunerLayer

        return [layer for layer in self._model.modules() if isinstance(layer, BaseTunerLayer)]

    @torch.no_grad()
    def _find_out(self, name: str) -> bool:
        """See `can_mix`."""
        from peft.tuners.lora.layer import Linear

        own = [layer for layer in self._layers() if name in _names_on(layer)]
        if not all(type(layer) is Linear and name not in layer.lora_variant for layer in own):
            return False
        fed: dict[Any, set[tuple[int, ...]]] = {layer: set() for layer in own}
        handles = [
            layer.register_forward_pre_hook(lambda layer, args: fed[layer].add(tuple(args[0].shape[:-1])))
            for layer in own
        ]
        try:
            ids = torch.zeros(PROBE_SHAPE, dtype=torch.long, device=next(self._model.parameters()).device)
            self._model.base_model(input_ids=ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return all(shapes == {PROBE_SHAPE} for shapes in fed.values())

    def keep(self, keys: set[str]) -> None:
        """Free the adapters that are not among ``keys``."""
        for key in [key for key in self._names if key not in keys]:
            self._settled = False
            self._peft.delete_adapter(self._names.pop(key))

    def _load(self, key: str, folder: str) -> None:
        from peft import LoraConfig, PeftModel

        name = f"teacher_{self._num_loaded}"  # a former name is never used again
        self._num_loaded += 1
        self._settled = False  # PEFT decides which adapter of a new layer is active
        try:  # files of someone else; PEFT raises ValueError, RuntimeError and more for what does not fit
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = LoraConfig.from_pretrained(folder)
                config.inference_mode = True
                if self._peft is None:
                    self._peft = PeftModel(self._model, config, adapter_name=name)
                else:
                    self._peft.add_adapter(name, config)
                # PEFT reads the model by way of this name, and lets that of a deleted adapter stand there.
                self._peft.active_adapter = name
                device = str(next(self._model.parameters()).device)
                result = self._peft.load_adapter(folder, name, torch_device=device)
        except Exception as error:
            raise _refuse(folder, self._model, " ".join(str(error).split())[:400]) from error
        if result.missing_keys or result.unexpected_keys:
            problem = f"missing {result.missing_keys[:2]}, not in the model {result.unexpected_keys[:2]}"
            raise _refuse(folder, self._model, problem)
        self._model.requires_grad_(False).eval()
        self._names[key] = name


def _names_on(layer: Any) -> set[str]:
    """PEFT's names of the adapters on ``layer``, of whatever kind it is."""
    return {name for kind in layer.adapter_layer_names for name in getattr(layer, kind)}


def _refuse(folder: str, model: Any, problem: str) -> UserError:
    return UserError(
        f"teacher adapter={folder!r}: PEFT cannot put it on {type(model).__name__} ({problem}); give the adapter's own"
        " base as path"
    )
