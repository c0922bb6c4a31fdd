"""LoRA adapters on one loaded model (PEFT): many are held, the base is there once.

One adapter is active for all rows of a batch, or every row has its own where that can be (`Adapters.can_mix`).
Adapters of stacked experts (`target_parameters`) work as well, one at a time; PEFT asks that all such adapters of one
base target the same parameters. Refuses adapters that PEFT cannot put on this model, by their folder.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from posttrain.config import UserError

PROBE_SHAPE = (3, 5)  # rows and tokens of the batch that shows whether an adapter can mix
PROBE_GAP = 1e-3  # ||mixed - alone|| / ||alone|| of the backbone's output there, at most


class Adapters:
    """The adapters of ``model``, which is changed in place and stays usable without any."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._peft: Any = None
        self._names: dict[str, str] = {}  # adapter key -> PEFT's name
        self._num_loaded = 0
        self._active: str | None = None
        self._settled = True  # whether PEFT's own idea of the active adapter is that of `_active`
        self._mixable: set[str] = set()  # keys that `can_mix`

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
            if self._mixes(key):
                self._mixable.add(key)

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

        So it is for plain LoRA on linear layers that are fed whole rows, [rows, tokens, H]: projections of attention,
        dense MLPs. Experts and what sees the tokens of all rows in a line are not among them, and neither is the LM head,
        which the backbone does not call. Found when it was loaded, with a small batch of its own: there mixed rows must
        be what they are alone.
        """
        return key in self._mixable

    @contextmanager
    def rows(self, keys: Sequence[str | None]) -> Iterator[None]:
        """Within, while no adapter is active: row i of the input goes through the held adapter ``keys[i]``, None: the bare
        base. Each must be one that `can_mix`.

        A row gets what PEFT gives it when its adapter is active, rounded as there. (PEFT's own mixed batches,
        `adapter_names`, round the adapter's part and the sum apart: in bfloat16 0.004 nat on average in tiny models.)
        """
        assert self._active is None and self._settled
        of_name: dict[str, list[int]] = defaultdict(list)
        for row, key in enumerate(keys):
            if key is not None:
                of_name[self._names[key]].append(row)

        def add(layer: Any, args: Any, result: torch.Tensor) -> None:
            x = args[0]
            if len(x) != len(keys):
                raise ValueError(f"{type(layer).__name__} was fed {len(x)} rows, the batch has {len(keys)}")
            for name, rows in of_name.items():
                if name in layer.lora_A:
                    part = x[rows].to(layer.lora_A[name].weight.dtype)
                    delta = layer.lora_B[name](layer.lora_A[name](part)) * layer.scaling[name]
                    result[rows] = (result[rows] + delta).to(result.dtype)

        handles = [
            layer.register_forward_hook(add) for layer in self._layers() if of_name.keys() & _names_on(layer)
        ]
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

    def _mixes(self, key: str) -> bool:
        """See `can_mix`. Leaves no adapter active."""
        from peft.tuners.lora.layer import Linear

        name = self._names[key]
        own = [layer for layer in self._layers() if name in _names_on(layer)]
        if not all(type(layer) is Linear and name not in layer.lora_variant for layer in own):
            return False
        fed: dict[Any, set[Any]] = {layer: set() for layer in own}
        handles = [
            layer.register_forward_pre_hook(lambda layer, args: fed[layer].add(args and args[0].shape[:-1]))
            for layer in own
        ]
        try:
            self.use(key, None)
            adapted = self._probe()
        finally:
            for handle in handles:
                handle.remove()
        self.use(None, None)
        bare = self._probe()
        if any(shapes != {PROBE_SHAPE} for shapes in fed.values()):
            return False
        with self.rows([key, None, key]):
            mixed = self._probe()
        alone = torch.stack([adapted[0], bare[1], adapted[2]])
        return bool((mixed - alone).float().norm() < PROBE_GAP * alone.float().norm())

    @torch.no_grad()
    def _probe(self) -> torch.Tensor:
        """Output of the backbone [*PROBE_SHAPE, H] for a few tokens."""
        num_rows, num_tokens = PROBE_SHAPE
        device = next(self._model.parameters()).device
        ids = torch.arange(num_rows * num_tokens, device=device).view(PROBE_SHAPE)
        vocab_size = len(self._model.get_input_embeddings().weight)
        hidden: torch.Tensor = self._model.base_model(
            input_ids=ids % vocab_size, use_cache=False
        ).last_hidden_state
        return hidden

    def keep(self, keys: set[str]) -> None:
        """Free the adapters that are not among ``keys``."""
        for key in [key for key in self._names if key not in keys]:
            self._settled = False
            self._mixable.discard(key)
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
