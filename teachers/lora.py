"""LoRA adapters on one loaded model (PEFT): many are held, at most one is active, the base is there once.

Adapters of stacked experts (`target_parameters`) work as well; PEFT asks that all such adapters of one base target
the same parameters. Refuses adapters that PEFT cannot put on this model, by their folder.
"""

from __future__ import annotations

import warnings
from typing import Any

from posttrain.config import UserError


class Adapters:
    """The adapters of ``model``, which is changed in place and stays usable without any."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._peft: Any = None
        self._names: dict[str, str] = {}  # adapter key -> PEFT's name
        self._num_loaded = 0
        self._active: str | None = None
        self._settled = True  # whether PEFT's own idea of the active adapter is that of `_active`

    @property
    def keys(self) -> list[str]:
        """Keys of the adapters that are held."""
        return list(self._names)

    def on(self, layer: Any) -> str | None:
        """PEFT's name of the active adapter if it changes ``layer``, else None. No other adapter ever has that name."""
        name = self._names.get(self._active or "")
        return name if name in getattr(layer, "lora_A", {}) else None

    def use(self, key: str | None, folder: str | None) -> None:
        """Make the adapter ``key`` active, loading it from ``folder`` if it is not held; None: the bare base.

        Raises `UserError` for an adapter that does not fit; it may then be on the model in part: throw the model away.
        """
        if key is not None and key not in self._names:
            assert folder is not None
            self._load(key, folder)
        if self._peft is None or (key == self._active and self._settled):
            return
        from peft.tuners.tuners_utils import BaseTunerLayer

        for layer in self._model.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.enable_adapters(key is not None)
                if key is not None:
                    layer.set_adapter([self._names[key]], inference_mode=True)
        self._active, self._settled = key, True

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


def _refuse(folder: str, model: Any, problem: str) -> UserError:
    return UserError(
        f"teacher adapter={folder!r}: PEFT cannot put it on {type(model).__name__} ({problem}); give the adapter's own"
        " base as path"
    )
