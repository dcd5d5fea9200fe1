"""Configuration: a YAML file, or the name of a policy, to a checked, frozen value."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import ArrayLike, NDArray

from fate_policy import checks, prefetch_rule, registry
from fate_policy.base import Policy
from fate_policy.errors import PolicyConfigError
from fate_policy.prefetch_rule import Prefetch

MODES = ("table", "callback", "off")
AUTO = "auto"
PREFETCHES = (AUTO, "off", *prefetch_rule.KINDS)

_MAX_COUNT = 2**31 - 1  # the engine's int32
_MAX_BYTES = 2**59

_SLOTS_ALLOWED = (
    "a count of 1 to 2147483647 (8), a share (25%), the pool's size (4GiB, 512MiB), "
    "a count for each layer ([8, 8, 16]), or auto"
)
_SIZE_ALLOWED = "a size: bytes, 512MiB or 8GiB"
_UNITS = {"": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("", 1024), ("i", 1024), ("iB", 1024), ("B", 1000))
}


@dataclass(frozen=True)
class Slots:
    """How many experts of each layer have a slot, as configured.

    kind : "count", "percent", "bytes", "list" or "auto"
    values : the count, the percentage, the bytes of the whole pool, the count of each layer, or nothing
    """

    kind: str
    values: tuple[Fraction, ...] = ()

    @classmethod
    def parse(cls, value: Any) -> Slots:
        """Read 8, "25%", "4GiB", [4, 8, 8], "4,8,8" or "auto"."""
        if isinstance(value, Slots):
            return value
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MAX_COUNT:
            return cls("count", (Fraction(value),))
        if isinstance(value, (list, tuple)) and value:
            try:
                counts = [cls.parse(item) for item in value]
            except PolicyConfigError:
                raise checks.bad_value("slots", value, _SLOTS_ALLOWED) from None
            if all(count.kind == "count" for count in counts):
                return cls("list", tuple(count.values[0] for count in counts))
        if isinstance(value, str):
            return cls._parse_text(value)
        raise checks.bad_value("slots", value, _SLOTS_ALLOWED)

    @classmethod
    def _parse_text(cls, text: str) -> Slots:
        plain = text.replace(" ", "")
        if plain == "auto":
            return cls("auto")
        if re.fullmatch(r"\d{1,20}", plain) and 0 < int(plain) <= _MAX_COUNT:
            return cls("count", (Fraction(plain),))
        if re.fullmatch(r"\d{1,20}(,\d{1,20})+", plain):
            return cls.parse([int(count) for count in plain.split(",")])
        match = re.fullmatch(r"(\d{1,20}(?:\.\d{1,20})?)(%|[KMGT](?:iB?|B)?|B)", plain)
        if match and (amount := Fraction(match[1])) > 0:
            if match[2] == "%":
                if amount <= 100:
                    return cls("percent", (amount,))
            elif (size := amount * _UNITS["" if match[2] == "B" else match[2]]) <= _MAX_BYTES:
                return cls("bytes", (size,))
        raise checks.bad_value("slots", text, _SLOTS_ALLOWED)

    def resolve(self, n_experts: ArrayLike, k: ArrayLike, expert_bytes: ArrayLike) -> NDArray[np.int32]:
        """Return the slots of each layer of a model, int32 (n_layers,), never more than its experts.

        Bytes are shared out as the same number of slots in every layer. `auto` is, as in the engine, half of
        each layer's experts and at least those of a token.
        Fewer slots than a layer's experts per token, or a count above every layer's experts, is an error.
        """
        experts = np.asarray(n_experts, np.int64)
        least = np.asarray(k, np.int64)
        if not len(experts):
            return np.empty(0, np.int32)
        if self.kind == "count" or self.kind == "list":
            slots = np.array([int(value) for value in self.values], np.int64)
            if self.kind == "list" and len(slots) != len(experts):
                raise checks.bad_value("slots", str(self), f"{len(experts)} counts, one for each layer")
            limit = experts if self.kind == "list" else experts.max()
            if (slots > limit).any():
                raise checks.bad_value(
                    "slots", str(self), f"at most {int(experts.max())}, the number of experts in a layer"
                )
            slots = np.minimum(slots, experts)
        elif self.kind == "percent":
            slots = np.array([int(n * self.values[0] / 100) for n in experts.tolist()], np.int64)
        elif self.kind == "auto":
            slots = np.maximum(experts // 2, least)
        else:
            slots = self._share_out(experts, np.asarray(expert_bytes, np.int64))
        if (slots < least).any():
            layer = int(np.argmax(slots < least))
            raise PolicyConfigError(
                f"slots: {self} gives layer {layer} {slots[layer]} slots for {experts[layer]} experts, but a "
                f"token uses {least[layer]} of them; {self._minimum(experts, least, expert_bytes)}"
            )
        return slots.astype(np.int32)

    def _share_out(self, experts: NDArray[np.int64], expert_bytes: NDArray[np.int64]) -> NDArray[np.int64]:
        capacity = int(self.values[0])
        low, high = 0, int(experts.max())
        while low < high:
            middle = (low + high + 1) // 2
            if int((np.minimum(middle, experts) * expert_bytes).sum()) <= capacity:
                low = middle
            else:
                high = middle - 1
        return np.minimum(low, experts)

    def _minimum(self, experts: NDArray[np.int64], least: NDArray[np.int64], expert_bytes: ArrayLike) -> str:
        if self.kind == "bytes":
            need = int((np.minimum(least.max(), experts) * np.asarray(expert_bytes, np.int64)).sum())
            return f"the minimum is {need} bytes"
        if self.kind == "percent":
            share = max(
                Fraction(100 * need, n) for need, n in zip(least.tolist(), experts.tolist(), strict=True)
            )
            return f"the minimum is {float(share):g}%"
        return f"the minimum is {least.max()}"

    def __str__(self) -> str:
        if self.kind == "auto":
            return "auto"
        text = ",".join(f"{float(value):g}" if value.denominator > 1 else str(value) for value in self.values)
        return text + {"percent": "%", "bytes": "B"}.get(self.kind, "")


def parse_size(name: str, value: Any) -> int:
    """Return the bytes that a value such as 1073741824, "8GiB" or "512M" means; 0 is allowed."""
    if re.fullmatch(r"\d{1,20}", str(value)) and int(value) <= _MAX_BYTES:
        return int(value)
    try:
        size = Slots.parse(value)
    except PolicyConfigError:
        raise checks.bad_value(name, value, _SIZE_ALLOWED) from None
    if size.kind != "bytes":
        raise checks.bad_value(name, value, _SIZE_ALLOWED)
    return int(size.values[0])


@dataclass(frozen=True)
class Config:
    """A checked configuration; only the policy's own parameters are left to `make_policy` to check."""

    policy: str
    params: Mapping[str, Any]
    mode: str
    slots: Slots
    sync: bool
    refresh_tokens: int
    miss_timeout_seconds: float = 3.0
    page_lock: bool = True
    vram: int | None = None
    vram_margin: int = 2**30
    prefetch: str = AUTO
    prefetch_threshold: float | None = None
    """None: `auto`."""
    prefetch_experts: int = Prefetch.experts

    chose_prefetch: bool = False
    """`prefetch` was `auto` before `settled`."""
    passed_over: str = ""
    """A fitted model that `auto` did not take, as it is worse than LRU."""

    def __post_init__(self) -> None:
        if self.prefetches and self.mode == "callback":
            raise PolicyConfigError(
                f"prefetch: {self.prefetch} works in table mode, and mode is callback here; use mode: table, "
                "or prefetch: off"
            )

    @property
    def prefetches(self) -> bool:
        return self.prefetch not in (AUTO, "off")

    def settled(self, trained: Path | None = None) -> Config:
        """Return it with what `auto` leaves open decided: the policy, and whether it prefetches.

        trained : a fitted model that lies where `auto` looks for one: it is taken unless it is known to be
            worse than LRU on text that it was not fitted on
        """
        from fate_policy import model  # which loads more than a configuration needs

        config = self
        if config.policy == AUTO:
            named = config.params.get("model")
            trained = trained if named is None else Path(named)
            if trained is not None and not model.is_worse_than_lru(trained):
                params = {**config.params, "model": str(trained)}
                config = replace(config, policy="classifier", params=params)
            elif config.asks_policy:
                why = (
                    "found no fitted model" if trained is None else f"found that {trained} hits less than lru"
                )
                raise PolicyConfigError(
                    f"prefetch: {config.prefetch} needs a policy that predicts, and policy auto {why}; fit "
                    "one with `fate train`, name a policy that predicts, or use prefetch: layer"
                )
            else:
                config = replace(config, policy="lru", params={}, passed_over=str(trained or ""))
        if config.prefetch == AUTO:
            chosen = "off"  # copies that a token waits for do not pay
            if config.mode == "table" and not config.sync:
                is_native = config.policy == "classifier" and config.refresh_tokens == 1
                chosen = "token" if is_native else "layer"
            config = replace(config, prefetch=chosen, chose_prefetch=True)
        return config

    @property
    def asks_policy(self) -> bool:
        """Whether the policy is asked what the coming token will use, for which it needs `predict`."""
        return self.prefetch in prefetch_rule.ASK_POLICY

    @property
    def looks_ahead(self) -> bool:
        """Whether routers of the next layers are asked inside the token, whatever the policy."""
        return self.prefetch in prefetch_rule.LOOK_AHEAD

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, fit for JSON or YAML, that say what was resolved."""
        return {
            "policy": self.policy,
            "params": dict(self.params),
            "mode": self.mode,
            "slots": str(self.slots),
            "sync": self.sync,
            "refresh_tokens": self.refresh_tokens,
            "miss_timeout_seconds": self.miss_timeout_seconds,
            "page_lock": self.page_lock,
            "vram": self.vram,
            "vram_margin": self.vram_margin,
            "prefetch": self.prefetch,
            "prefetch_threshold": AUTO if self.prefetch_threshold is None else self.prefetch_threshold,
            "prefetch_experts": self.prefetch_experts,
        }


_FILES = (("static", "profile"),)  # names of files: relative ones are beside the file that names them


@functools.cache
def _reference() -> dict[str, Any]:
    text = Path(__file__).with_name("reference.yaml").read_text(encoding="utf-8")
    reference: dict[str, Any] = yaml.safe_load(text)
    return reference


def load(path_or_name: str | Path = AUTO, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a configuration file, or take a policy's name and the defaults.

    Parameters
    ----------
    path_or_name
        A .yaml or .yml file, or anything with a path separator in it, is a file; all else names a policy.
    overrides
        Keys of the file that win over it, such as `{"slots": "25%", "frequency": {"lfru": True}}`; a
        mapping is merged into the file's.
    """
    reference = _reference()
    text = str(path_or_name)
    is_file = (
        isinstance(path_or_name, Path) or text.endswith((".yaml", ".yml")) or "/" in text or "\\" in text
    )
    given = _read(Path(text)) if is_file else {"policy": text}
    merged = dict(reference)
    for source in (given, overrides or {}):
        for key, value in source.items():
            merged[key] = _merge(key, merged, value)
    policy = merged["policy"]
    if not isinstance(policy, str):
        raise checks.bad_value("policy", policy, "a name")
    takes = "classifier" if policy == AUTO else policy  # whose parameters count
    params = merged[takes] if takes in registry.BUILT_IN else merged["params"]
    if policy == AUTO and params != reference[takes]:  # its faults are told even where lru is chosen
        registry.get(takes)(**{**params, "model": params["model"] or AUTO})
    if policy in (AUTO, *registry.BUILT_IN) and merged["params"]:
        raise PolicyConfigError(
            f"params: is for own policies, and policy is {policy}; write parameters under `{takes}:`"
        )
    slots = Slots.parse(merged["slots"])
    vram = None if merged["vram"] is None else parse_size("vram", merged["vram"])
    if vram is not None and slots.kind != "auto":
        raise PolicyConfigError(f"vram: is for slots: auto, which takes what fits; slots is {slots} here")
    # YAML 1.1 reads a bare `off` as false
    mode, prefetch = ("off" if merged[key] is False else merged[key] for key in ("mode", "prefetch"))
    return Config(
        policy=policy,
        params=dict(params),
        mode=checks.choice("mode", mode, MODES),
        slots=slots,
        sync=checks.flag("sync", merged["sync"]),
        refresh_tokens=checks.integer("refresh_tokens", merged["refresh_tokens"], minimum=1),
        miss_timeout_seconds=checks.number("miss_timeout_seconds", merged["miss_timeout_seconds"], above=0),
        page_lock=checks.flag("page_lock", merged["page_lock"]),
        vram=vram,
        vram_margin=parse_size("vram_margin", merged["vram_margin"]),
        prefetch=checks.choice("prefetch", prefetch, PREFETCHES),
        prefetch_threshold=_threshold(merged["prefetch_threshold"]),
        prefetch_experts=checks.integer(
            "prefetch_experts", merged["prefetch_experts"], minimum=1, maximum=prefetch_rule.MOST
        ),
    )


def _threshold(value: Any) -> float | None:
    if value == AUTO:
        return None
    try:
        return checks.share("prefetch_threshold", value, above_zero=True)
    except PolicyConfigError:
        raise checks.bad_value("prefetch_threshold", value, f"{AUTO}, or a number above 0, up to 1") from None


def make_policy(config: Config) -> Policy:
    """Construct the policy that a configuration names."""
    config = config.settled()
    policy = registry.get(config.policy)
    known = registry.params_of(policy)
    for key in config.params:
        if key not in known:
            raise checks.unknown_name(f"parameter of policy {config.policy}:", key, known)
    if config.policy not in registry.BUILT_IN:  # those check themselves, and say more
        registry.check_params(policy, config.params)
    return policy(**config.params)


def _merge(key: Any, merged: Mapping[str, Any], value: Any) -> Any:
    reference = _reference()
    if key not in reference:
        raise checks.unknown_name("key", key, reference)
    if not isinstance(reference[key], dict):
        return value
    if value is None:
        value = {}
    if not isinstance(value, Mapping):
        raise checks.bad_value(key, value, "a mapping of parameters")
    for parameter in value:
        if key != "params" and parameter not in reference[key]:
            raise checks.unknown_name(f"key under {key}:", parameter, reference[key])
    return {**merged[key], **value}


class _TwiceError(yaml.YAMLError):
    pass


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML would silently take the last."""

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if (key.tag, key.value) in seen:
                before = seen[key.tag, key.value]
                raise _TwiceError(f"key {key.value!r} is given twice, at lines {before} and {line}")
            seen[key.tag, key.value] = line
        return node


def _read(path: Path) -> dict[Any, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise PolicyConfigError(f"policy file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyConfigError(f"policy file {path} cannot be read: {error}") from None
    except yaml.constructor.ConstructorError as error:
        where = f" at line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise PolicyConfigError(
            f"policy file {path}: only plain values are allowed, no tags or objects{where}: {error.problem}"
        ) from None
    except _TwiceError as error:
        raise PolicyConfigError(f"policy file {path}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        raise PolicyConfigError(f"policy file {path} is not YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise PolicyConfigError(
            f"policy file {path}: expected keys and values, found {type(content).__name__}"
        )
    for block, key in _FILES:
        if isinstance(given := content.get(block), dict) and isinstance(name := given.get(key), str) and name:
            given[key] = str(path.parent / name)
    return content
