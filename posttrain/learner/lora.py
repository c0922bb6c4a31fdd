"""LoRA in the policy: PEFT's layers around frozen weights, the weights that both amount to, and the adapter's files.

Owns which weights are adapted, what they amount to and how they are written; the forward is PEFT's. Refuses targets that
do not exist, that are not one matrix product, or that PEFT would read otherwise when the adapter is loaded again. Live
weights are never merged: `Adapter.merged` makes new ones.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.config import LoraConfig, UserError
from posttrain.learner.moe.replay import RouterReplay

NAME = "default"  # of the adapter inside PEFT
ALL_LINEAR = "all-linear"
FOLDER = "adapter"  # inside a model directory
PEFT_PREFIX = "base_model.model."
_WRAPPING = re.compile(r"\.base_layer(?=\.|$)|\.lora_[AB]\.[^.]+(?=\.|$)")


@dataclass(kw_only=True, slots=True, eq=False)
class Adapter:
    """One adapted weight and its two factors, all of them as the engine holds them (ZeRO-3: partitioned)."""

    layer: Any  # PEFT's
    weight: nn.Parameter

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A [rank, in] and B [out, rank]; of E fused experts A [E * rank, in], the rows of an expert together, and
        B [out, rank * E], where column r * E + e belongs to expert e."""
        return self.layer.lora_A[NAME].weight, self.layer.lora_B[NAME].weight

    @property
    def num_stacked(self) -> int:
        """Experts that lie in the weight, 0 for a plain matrix."""
        shape = getattr(self.weight, "ds_shape", self.weight.shape)
        return int(shape[0]) if len(shape) == 3 else 0

    @property
    def scaling(self) -> float:
        return float(self.layer.scaling[NAME])

    def sides(self) -> tuple[Tensor, Tensor]:
        """Two matrices, or stacks of them, whose product has the shape of the weight. Factors must be whole here."""
        if self.num_stacked:
            left, right, _ = self.layer.get_delta_factors(NAME)
            return left, right
        first, second = self.factors
        return second, first

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The adapted weight in float32; weight and factors must be whole here."""
        left, right = (side.float() for side in self.sides())
        return self.weight.float() + self.scaling * (left @ right)


def adapters(model: nn.Module) -> list[Adapter]:
    """Of a model that `attach` has changed; empty for every other."""
    found = [(module, getattr(module, "lora_A", None)) for module in model.modules()]
    layers: list[Any] = [module for module, factors in found if isinstance(factors, nn.ModuleDict)]
    return [
        Adapter(layer=layer, weight=getattr(layer.get_base_layer(), _parameter_of(layer) or "weight"))
        for layer in layers
    ]


def _parameter_of(layer: Any) -> str | None:
    """Of the adapter of a parameter its name, of that of a linear module None."""
    return getattr(layer, "parameter_name", None)


def plain_name(name: str) -> str:
    """Name of a parameter, or of what a factor adapts, without what PEFT puts into it."""
    return _WRAPPING.sub("", name)


def attach(model: nn.Module, replay: RouterReplay | None, lora: LoraConfig, base: Path, seed: int) -> None:
    """Puts adapters that change nothing yet on ``model`` in place, equal on all ranks, and freezes everything else.
    Routing replay must be there first. Raises `UserError` naming the key for targets that cannot be adapted."""
    import peft

    modules = _modules(model, replay, lora.target_modules)
    parameters = _parameters(model, modules, lora.target_parameters)
    alpha = 2 * lora.rank if lora.alpha is None else lora.alpha
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        target_modules=_short(model, modules),
        target_parameters=sorted(lora.target_parameters) or None,
        base_model_name_or_path=str(base.resolve()),
        task_type="CAUSAL_LM",
    )
    _inject(model, config, seed)
    found = adapters(model)
    names = {id(p): plain_name(name) for name, p in model.named_parameters()}
    wanted = {f"{name}.weight" for name in modules} | parameters
    assert {names[id(a.weight)] for a in found} == wanted, "PEFT adapted other weights"
    model.requires_grad_(False)
    for adapter in found:
        for factor in adapter.factors:
            factor.requires_grad_(True)


def _inject(model: nn.Module, config: Any, seed: int) -> None:
    import peft

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        try:  # PEFT knows modules that it must not adapt (Mamba)
            peft.inject_adapter_in_model(config, model, NAME)
        except ValueError as error:
            line = " ".join(str(error).split())[:300]
            raise UserError(
                f"learner.lora: PEFT cannot adapt {type(model).__name__} ({line}); choose other target_modules or"
                " target_parameters"
            ) from error


# ---- targets ----


def _modules(model: nn.Module, replay: RouterReplay | None, targets: list[str]) -> list[str]:
    """Names of the modules to adapt."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    modules = dict(model.named_modules())
    taken = _renamed(model, {name.rpartition(".")[2] for name in (*modules, *targets)})
    chosen: list[str] = []
    for target in targets:
        if target == ALL_LINEAR:
            chosen += _all_linear(modules, replay, head, taken)
            continue
        found = _ending(modules, target)
        for name in found:
            _check_module(target, name, modules, head, type(model).__name__)
        if not found or target.rpartition(".")[2] in taken:
            raise _refused_module(model, target, modules, taken)
        chosen += found
    return list(dict.fromkeys(chosen))


def _all_linear(
    modules: dict[str, nn.Module], replay: RouterReplay | None, head: nn.Module, taken: set[str]
) -> list[str]:
    routers = {id(p) for router in (replay.routers if replay else []) for p in router.parameters()}
    return [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear)
        and module is not head
        and id(module.weight) not in routers
        and name.rpartition(".")[2] not in taken
        and not _is_in_mamba(name, modules)
    ]


def _is_in_mamba(name: str, modules: dict[str, nn.Module]) -> bool:
    """Mamba reads the weights of its linear modules without calling these: an adapter there would change nothing."""
    return "mamba" in type(modules[name.rpartition(".")[0]]).__name__.lower()


def _renamed(model: nn.Module, leaves: set[str]) -> set[str]:
    """Names that PEFT takes for fused experts or routers, wherever in this model they stand."""
    import peft
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    def is_kept(leaf: str) -> bool:
        config = peft.LoraConfig(target_modules=[leaf])
        try:  # it refuses one half of a fused pair
            convert_peft_config_for_transformers(config, model=model, conversions=None)
        except ValueError:
            return False
        return not config.target_parameters

    return {leaf for leaf in leaves if not is_kept(leaf)}


def _check_module(
    target: str, name: str, modules: dict[str, nn.Module], head: nn.Module, family: str
) -> None:
    key, module = "learner.lora.target_modules", modules[name]
    if module is head:
        raise UserError(f"{key}: {target!r} is the LM head of {family}, which has no adapter; leave it out")
    if type(module) is not nn.Linear:
        raise UserError(
            f"{key}: {target!r} is a {type(module).__name__} in {family}, not a linear module; give the names of linear"
            " modules, or its parameters in learner.lora.target_parameters"
        )
    if _is_in_mamba(name, modules):
        raise UserError(
            f"{key}: {target!r} is in a Mamba layer of {family}, whose kernels would pass the adapter by; give the full names"
            " of modules elsewhere"
        )


def _refused_module(
    model: nn.Module, target: str, modules: dict[str, nn.Module], taken: set[str]
) -> UserError:
    key, family = "learner.lora.target_modules", type(model).__name__
    if target.rpartition(".")[2] in taken:
        return UserError(
            f"{key}: PEFT takes {target!r} for the fused experts or the router of {family}; give their parameters in"
            " learner.lora.target_parameters, such as experts.gate_up_proj, experts.down_proj or gate.weight"
        )
    head = model.get_output_embeddings()  # type: ignore[operator]
    linear = [name for name, module in modules.items() if type(module) is nn.Linear and module is not head]
    leaves = {name.rpartition(".")[2] for name in linear}
    there = ", ".join(sorted(leaf for leaf in leaves - taken if not leaf.isdigit()))
    return UserError(f"{key}: no module of {family} is called {target!r}; there are {there}")


def _parameters(model: nn.Module, modules: list[str], targets: list[str]) -> set[str]:
    """Names of the parameters to adapt that are not those of ``modules``."""
    parameters = dict(model.named_parameters())
    chosen: set[str] = set()
    for target in targets:
        found = _ending(parameters, target)
        if not found or "." not in target:
            raise _refused_parameter(model, target)
        for name in found:
            _check_parameter(model, target, name, parameters[name], modules)
        chosen.update(found)
    return chosen


def _refused_parameter(model: nn.Module, target: str) -> UserError:
    fused = {".".join(name.split(".")[-2:]) for name, p in model.named_parameters() if p.dim() == 3}
    there = f"; fused ones are {', '.join(sorted(fused))}" if fused else ""
    return UserError(
        f"learner.lora.target_parameters: no parameter of {type(model).__name__} ends in {target!r} (give the name of its"
        f" module too){there}"
    )


def _check_parameter(
    model: nn.Module, target: str, name: str, parameter: nn.Parameter, modules: list[str]
) -> None:
    key, owner = "learner.lora.target_parameters", name.rpartition(".")[0]
    module, family = model.get_submodule(owner), type(model).__name__
    is_experts = "experts" in owner.split(".") and not isinstance(module, nn.Linear)
    if owner in modules:
        raise UserError(
            f"{key}: {target!r} is adapted by learner.lora.target_modules too; leave it out of one"
        )
    if module is model.get_output_embeddings() or isinstance(module, nn.Embedding):  # type: ignore[operator]
        raise UserError(f"{key}: {target!r} is an embedding or the LM head of {family}; leave it out")
    if parameter.dim() != (3 if is_experts else 2):
        raise UserError(
            f"{key}: {target!r} has shape {list(parameter.shape)} in {family}; adapters are for matrices, and for"
            " experts that are stacked along the first of three axes"
        )


def _ending(names: Iterable[str], target: str) -> list[str]:
    return [name for name in names if name == target or name.endswith(f".{target}")]


def _short(model: nn.Module, modules: list[str]) -> list[str]:
    """The last parts of the names where these say the same, as people write them and engines read them."""
    leaves = sorted({name.rpartition(".")[2] for name in modules})
    reached = [name for name, _ in model.named_modules() if any(_ending([name], leaf) for leaf in leaves)]
    return leaves if set(reached) == set(modules) else sorted(modules)


# ---- files ----


def settings(model: nn.Module) -> dict[str, Any]:
    """adapter_config.json as PEFT reads it."""
    written = model.peft_config[NAME].to_dict() | {"inference_mode": True}  # type: ignore[index, operator, union-attr]
    return {key: sorted(value) if isinstance(value, set) else value for key, value in written.items()}


def file_names(model: nn.Module) -> dict[str, nn.Parameter]:
    """Factors by their names in adapter_model.safetensors."""
    own = {id(factor) for adapter in adapters(model) for factor in adapter.factors}
    return {
        PEFT_PREFIX + name.removesuffix(f".{NAME}.weight") + ".weight": parameter
        for name, parameter in model.named_parameters()
        if id(parameter) in own
    }


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """An adapter directory as `peft` and `teachers.<domain>.adapter` take it."""
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
