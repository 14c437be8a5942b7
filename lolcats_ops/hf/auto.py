"""convert and restore, and converted models as a model type that transformers' auto classes load.

A converted model's config.json says `"model_type": "lolcats"`, `"base_model_type": "llama"` and,
under `"lolcats"`, the `LolcatsConfig`. Without this library the auto classes refuse such a
checkpoint by name, instead of loading a softmax model with unused weights. For each base family a
config class and a model class are derived when first needed.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import find_adapter_config_file

from lolcats_ops.hf.config import LolcatsConfig
from lolcats_ops.hf.patch import attention_layers, convert_layers, restore_layers

MODEL_TYPE = "lolcats"
# Names of model classes without a language model head; those of a user's own classes may be any.
OTHER_HEAD = re.compile(r"For(?!CausalLM)[A-Z]|(?<!LMHead)Model$")


class LolcatsModelConfig(PreTrainedConfig):
    """The entry of model type "lolcats": hands over to the class derived for the base family."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> PreTrainedConfig:
        """The config of a converted model.

        Raises:
            ValueError: it lacks what `convert` adds, or its base family is unknown.
        """
        for key in ("base_model_type", "lolcats"):
            if not config_dict.get(key):
                raise ValueError(f"the config of a converted model lacks {key!r}")
        family = config_dict["base_model_type"]
        if family not in CONFIG_MAPPING:
            raise ValueError(
                f"a converted {family!r} model: transformers {transformers.__version__} does not "
                "know that family; it is perhaps too old, or the family's code came with the "
                "model, which convert warned of"
            )
        return config_class(CONFIG_MAPPING[family]).from_dict(config_dict, **kwargs)


AutoConfig.register(MODEL_TYPE, LolcatsModelConfig)


@cache
def config_class(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The config class of converted models of a family, registered with the auto classes."""
    own = {"model_type": MODEL_TYPE, "__module__": __name__, "_auto_class": None}
    derived = type(f"Lolcats{base.__name__}", (base,), own)
    if base in MODEL_FOR_CAUSAL_LM_MAPPING:
        AutoModelForCausalLM.register(
            derived, _model_class(MODEL_FOR_CAUSAL_LM_MAPPING[base], derived)
        )
    return derived


def _model_class(
    base: type[PreTrainedModel], config: type[PreTrainedConfig]
) -> type[PreTrainedModel]:
    def __init__(
        self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any
    ) -> None:
        base.__init__(self, config, *args, **kwargs)
        convert(self, LolcatsConfig.from_dict(config.lolcats))

    def initialize_weights(self: PreTrainedModel) -> None:
        """Of parameters that a checkpoint lacks."""
        for attention in attention_layers(self):
            attention.reset_parameters()
            attention._is_hf_initialized = True  # type: ignore[assignment]
        base.initialize_weights(self)

    strict = {*(base._keep_in_fp32_modules_strict or ()), "lolcats"}
    namespace = {
        "__init__": __init__,
        "initialize_weights": initialize_weights,
        "__module__": __name__,
        "config_class": config,
        "_auto_class": None,  # else a model with code of its own would save this file as that
        "_keep_in_fp32_modules_strict": strict,
    }
    derived = type(f"Lolcats{base.__name__}", (base,), namespace)
    _share_conversions(derived, base)
    return derived


def _share_conversions(derived: type[PreTrainedModel], base: type[PreTrainedModel]) -> None:
    """Weights of a family that checkpoints have under other names, or in other shapes (a mixture's
    experts one by one), are found there by the derived class, too."""
    own = base.__name__, getattr(base.config_class, "model_type", "")
    found = (get_checkpoint_conversion_mapping(name) for name in own)
    mapping = next((each for each in found if each is not None), None)
    if mapping is not None:
        register_checkpoint_conversion_mapping(derived.__name__, mapping, overwrite=True)


def __getattr__(name: str) -> Any:
    """A derived class, for pickle in a process that has not derived it yet."""
    base: Any = getattr(transformers, name.removeprefix("Lolcats"), None)
    if name.startswith("Lolcats") and name.endswith("Config") and base is not None:
        return config_class(base)
    family = getattr(base, "config_class", None)
    if name.startswith("Lolcats") and family in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[config_class(family)]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def convert(model: PreTrainedModel, config: LolcatsConfig | None = None) -> PreTrainedModel:
    """Replaces the attention of `model` by hybrid linear attention, in place, and returns it.

    The pretrained weights are untouched; each converted layer gains fp32 parameters
    (`lolcats.feature_q`, `lolcats.feature_k`, `lolcats.gate`). `model.save_pretrained` then writes
    a checkpoint that `lo.hf.from_pretrained` and `AutoModelForCausalLM.from_pretrained` load
    converted. Local (sliding window) layers beside global ones, as in Gemma, are linear already and
    stay.

    The model then takes masks of padding [B, past + T], beside which positions that are not given
    count real tokens, or of causality and padding [B, H | 1, T, Tk] (bool, or additive with 0 and
    -inf). A call with another raises NotImplementedError; with
    one that hides tokens which its cache holds, or shows padding of before, ValueError. Compiled
    calls check neither. Positions that restart mean packed sequences without a cache alone, as in
    transformers; programs of torch.export know these by `cu_seq_lens_q` only.

    Only causal language models load converted. A base model, or the language model inside a
    composite one, can be converted, but a checkpoint of it, or of what holds it, loads without:
    keep its `state_dict`, and convert again after loading.

    Raises:
        ValueError, TypeError: naming the model and the reason, if it cannot be converted; nothing
            is changed then.

    Warns:
        UserWarning: the model's attention has dropout, which will not apply to converted layers;
            the model has no language model head, is of a family that AutoModelForCausalLM does
            not load or that came with the model (remote code), or holds an adapter, which is all
            that save_pretrained then writes: it will not load converted.

    >>> from lolcats_ops.hf import attention_layers
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = LlamaConfig(
    ...     hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    ... )
    >>> model = convert(LlamaForCausalLM(tiny), LolcatsConfig(window=8, feature_dim=16))
    >>> [tuple(layer.feature_q.shape) for layer in attention_layers(model)]
    [(2, 16, 16), (2, 16, 16)]
    """
    config = LolcatsConfig() if config is None else config
    if not isinstance(config, LolcatsConfig):
        raise TypeError(f"convert: config is a {type(config).__name__}, needs a LolcatsConfig")
    convert_layers(model, config)
    # The model's config says what it is, so that saving the model saves that. One that was read
    # from a file has the file's model_type besides that of its class.
    vars(model.config).pop("model_type", None)
    if model.config.model_type != MODEL_TYPE:
        model.config.base_model_type = model.config.model_type
        model.config.__class__ = config_class(model.config.__class__)
    model.config.lolcats = config.to_dict()
    if gap := _gap(model):
        warnings.warn(
            f"{type(model).__name__} {gap}: neither a checkpoint of it nor of "
            "a model that holds it will load converted. Keep its `lolcats` parameters by other "
            "means (state_dict, then convert after loading)",
            stacklevel=2,
        )
    return model


def _gap(model: PreTrainedModel) -> str | None:
    """Why no checkpoint of a converted model will load converted, if so."""
    family = model.config.base_model_type
    if model.get_output_embeddings() is None:
        return "has no language model head"
    if type(model.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "is of a family that AutoModelForCausalLM does not load"
    if family not in CONFIG_MAPPING or not isinstance(model.config, CONFIG_MAPPING[family]):
        return "is of a family whose code came with it (remote code)"
    if getattr(model, "_hf_peft_config_loaded", False):
        return "holds an adapter (PEFT), which is all that save_pretrained writes"
    return None


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Takes `convert` back exactly, in place: modules, hooks and config are what they were; those
    of a model that was loaded converted, what its base family's are.

    Raises:
        TypeError: no PreTrainedModel, such as a PEFT model: restore the model in it.
        ValueError: the model is not converted.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = LlamaConfig(
    ...     hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    ... )
    >>> model = convert(LlamaForCausalLM(tiny), LolcatsConfig(window=8))
    >>> type(restore(model).config).__name__, attention_layers(model)
    ('LlamaConfig', [])
    """
    restore_layers(model)
    del model.config.lolcats, model.config.base_model_type
    model.config.__class__ = type(model.config).__mro__[1]
    vars(model.config).pop("model_type", None)  # of the file that it was read from
    if type(model).__module__ == __name__:
        model.__class__ = type(model).__mro__[1]
    return model


def from_pretrained(path: str, **kwargs: Any) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained` for a converted checkpoint, whatever its family.

    Args:
        path: a folder written by `model.save_pretrained`, or a hub id; or of an adapter (PEFT) on
            such a model, which is loaded with it.
        kwargs: `dtype`, `device_map`, `revision`, `subfolder`, `config`, ... of transformers. The
            parameters of `lo.hf` stay fp32.

    Raises:
        ValueError: the checkpoint is not a converted causal language model, is of a family that
            this transformers does not know, or lacks weights that the model has; or an adapter
            does not say which model it is on, or that is not there.

    >>> model = from_pretrained("out/demo/model")  # doctest: +SKIP
    """
    config = kwargs.get("config") or AutoConfig.from_pretrained(_base_of(path, kwargs), **kwargs)
    if getattr(config, "lolcats", None) is None:
        raise ValueError(
            f"from_pretrained: {path} holds a {config.model_type} model, not a converted one"
        )
    if config.model_type != MODEL_TYPE:
        raise ValueError(
            f"from_pretrained: {path} has the settings of a converted model, but was saved as a "
            f"{config.model_type} model, without its features"
        )
    kinds = config.architectures or []
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if not known or any(OTHER_HEAD.search(kind) for kind in kinds):
        raise ValueError(
            f"from_pretrained: {path} holds a {' or '.join(kinds)}; only causal language models "
            "load converted, of families that AutoModelForCausalLM loads"
        )
    wants_info = kwargs.pop("output_loading_info", False)
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **kwargs)
    refuse_gaps("from_pretrained", path, info["missing_keys"])
    return (model, info) if wants_info else model


# Where on the hub, and how.
HUB = ("token", "revision", "cache_dir", "local_files_only", "force_download", "proxies")


def _base_of(path: str, kwargs: dict[str, Any]) -> str:
    """Where the config is: of an adapter alone, with the model that it is on."""
    hub = {name: kwargs[name] for name in HUB if name in kwargs}
    said = find_adapter_config_file(path, **{**hub, **(kwargs.get("adapter_kwargs") or {})})
    if said is None or Path(said).with_name("config.json").is_file():
        return path
    try:
        base = json.loads(Path(said).read_bytes())["base_model_name_or_path"]
    except (KeyError, TypeError, ValueError):
        base = None
    if not isinstance(base, str):
        raise ValueError(f"from_pretrained: {said} does not say which model the adapter is on")
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise ValueError(f"from_pretrained: the adapter in {path} is on {base}, which is not there")
    return base


def refuse_gaps(caller: str, path: str, missing_keys: Iterable[str]) -> None:
    """Raises ValueError where a checkpoint lacks weights, which transformers makes up."""
    lost = sorted(missing_keys)
    if lost:
        raise ValueError(
            f"{caller}: {path} lacks weights that the model has, {len(lost)} in all: "
            f"{', '.join(lost[:3])}"
        )
