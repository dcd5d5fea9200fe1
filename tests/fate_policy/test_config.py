from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fate_policy import config as config_module
from fate_policy import registry
from fate_policy.config import Config, Slots, load, make_policy
from fate_policy.cost import untrained
from fate_policy.errors import PolicyConfigError
from fate_policy.frequency import Frequency
from fate_policy.lru import LRU
from fate_policy.prefetch_rule import Prefetch

CLASSIFIER = {"model": None, "learn": True, "evict_by": "scores", "table_mb": 256}
REFERENCE = Path(config_module.__file__).with_name("reference.yaml")


def written(folder: Path, text: str) -> Path:
    path = folder / "policy.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_reference_is_the_defaults() -> None:
    assert load(REFERENCE) == load() == Config("auto", CLASSIFIER, "table", Slots("auto"), False, 1)


def test_reference_has_a_block_for_every_built_in_policy() -> None:
    keys = yaml.safe_load(REFERENCE.read_text(encoding="utf-8"))
    general = {"policy", "mode", "slots", "vram", "vram_margin", "sync", "refresh_tokens", "params"}
    general |= {"miss_timeout_seconds", "page_lock", "prefetch", "prefetch_threshold", "prefetch_experts"}
    assert set(keys) - general == set(registry.BUILT_IN)


def test_a_file_says_what_differs(tmp_path: Path) -> None:
    path = written(tmp_path, "policy: frequency\nslots: 25%\nfrequency: {half_life_tokens: 64}\n")
    assert load(path).as_dict() == {
        "policy": "frequency",
        "params": {"half_life_tokens": 64, "lfru": False},
        "mode": "table",
        "slots": "25%",
        "sync": False,
        "refresh_tokens": 1,
        "miss_timeout_seconds": 3.0,
        "page_lock": True,
        "vram": None,
        "vram_margin": 2**30,
        "prefetch": "auto",
        "prefetch_threshold": "auto",
        "prefetch_experts": 8,
    }
    policy = make_policy(load(str(path)))
    assert isinstance(policy, Frequency)
    assert policy.half_life_tokens == 64


def test_overrides_win_and_merge(tmp_path: Path) -> None:
    path = written(tmp_path, "policy: frequency\nslots: 25%\nfrequency: {half_life_tokens: 64}\n")
    config = load(path, {"slots": 8, "mode": "callback", "frequency": {"lfru": True}})
    assert (str(config.slots), config.mode) == ("8", "callback")
    assert config.params == {"half_life_tokens": 64, "lfru": True}


def test_a_threshold_is_a_number_or_auto() -> None:
    assert load("lru").prefetch_threshold is None
    assert load("lru", {"prefetch_threshold": "auto"}).prefetch_threshold is None
    assert load("lru", {"prefetch_threshold": 0.3}).as_dict()["prefetch_threshold"] == 0.3


def test_a_name_is_enough() -> None:
    assert load("random").params == {"seed": 0}
    assert load("random", {"random": {"seed": 3}}).params == {"seed": 3}


def test_auto_is_lru_without_a_fitted_model() -> None:
    config = load().settled()
    assert (config.policy, config.params, config.prefetch) == ("lru", {}, "layer")
    assert type(make_policy(load())) is LRU
    with pytest.raises(PolicyConfigError, match="policy is auto; write parameters under `classifier:`"):
        load("auto", {"params": {"a": 1}})


def test_auto_takes_a_fitted_model_unless_it_is_worse_than_lru(tmp_path: Path) -> None:
    none = [([], np.zeros((0, 2), np.float32), np.zeros((0, 2, n), np.float16)) for n in (16 + 16, 16)]
    fitted = replace(untrained([8, 8], [2, 2]), tables=tuple(none))
    for name, sync, taken in (("unknown", None, True), ("better", 0.7, True), ("worse", 0.5, False)):
        row = {"share": 0.25, "lru": 0.6, "optimum": 0.8, "sync": sync, "delayed": sync}
        meta = {"held_out": {"test": [row]}} if sync else {}
        path = tmp_path / f"{name}.npz"
        replace(fitted, meta=meta).save(path)
        config = load().settled(path)
        assert config.policy == ("classifier" if taken else "lru")
        assert config.params == ({**CLASSIFIER, "model": str(path)} if taken else {})
        assert config.passed_over == ("" if taken else str(path))
        assert config.prefetch == ("token" if taken else "layer")
        assert load("lru").settled(path).policy == "lru"
        given = load("auto", {"classifier": {"learn": False, "model": str(path)}}).settled()
        assert given.params == ({**CLASSIFIER, "learn": False, "model": str(path)} if taken else {})
        if not taken:
            with pytest.raises(PolicyConfigError, match="prefetch: token needs a policy that predicts"):
                load("auto", {"prefetch": "token"}).settled(path)
    with pytest.raises(PolicyConfigError, match="evict_by: 7 is not allowed"):
        load("auto", {"classifier": {"evict_by": 7}})
    with pytest.raises(PolicyConfigError, match="is not a fitted model"):
        load().settled(written(tmp_path, "not a model"))
    with pytest.raises(PolicyConfigError, match="cannot be read: Is a directory"):
        load().settled(tmp_path)


@pytest.mark.parametrize(
    ("policy", "given", "prefetch"),
    [
        ("classifier", {}, "token"),
        ("classifier", {"sync": True}, "off"),
        ("classifier", {"mode": "callback"}, "off"),
        ("classifier", {"refresh_tokens": 4}, "layer"),
        ("classifier", {"prefetch": "off"}, "off"),
        ("classifier", {"prefetch": "both"}, "both"),
        ("frequency", {}, "layer"),
        ("frequency", {"sync": True}, "off"),
        ("frequency", {"mode": "callback"}, "off"),
        ("frequency", {"prefetch": "off"}, "off"),
        ("frequency", {"prefetch": "layer"}, "layer"),
    ],
)
def test_prefetch_is_chosen_where_it_is_not_given(policy: str, given: dict[str, Any], prefetch: str) -> None:
    config = load(policy, given)
    settled = config.settled()
    assert settled.prefetch == prefetch
    assert settled.chose_prefetch == ("prefetch" not in given)
    assert settled.settled() == settled


def test_off_may_be_bare(tmp_path: Path) -> None:
    """YAML 1.1 reads a bare `off` as false."""
    assert load(written(tmp_path, "mode: off")).mode == "off"
    assert load("lru", {"mode": "off"}).mode == "off"
    assert load(written(tmp_path, "prefetch: off")).prefetch == "off"


@pytest.mark.parametrize(
    ("kind", "asks_policy", "looks_ahead"),
    [("off", False, False), ("token", True, False), ("layer", False, True), ("both", True, True)],
)
def test_who_tells_what_is_brought_in_ahead(
    tmp_path: Path, kind: str, asks_policy: bool, looks_ahead: bool
) -> None:
    chosen = load(written(tmp_path, f"prefetch: {kind}"))
    assert chosen.as_dict()["prefetch"] == kind
    assert (chosen.asks_policy, chosen.looks_ahead) == (asks_policy, looks_ahead)
    assert chosen.prefetches == (kind != "off")
    if kind == "off":
        with pytest.raises(
            PolicyConfigError, match="prefetch: 'off' is not allowed; expected one of token, la"
        ):
            Prefetch(kind=kind)
    else:
        same = Prefetch(kind=kind)
        assert (same.asks_policy, same.looks_ahead) == (asks_policy, looks_ahead)


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load(written(tmp_path, "# nothing\n")) == load()
    assert load(written(tmp_path, "lru:\nparams:\n")) == load()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("polcy: lru", "unknown key 'polcy'; did you mean 'policy'"),
        (
            "frequency: {half_life: 3}",
            "unknown key under frequency: 'half_life'; did you mean 'half_life_tokens'",
        ),
        ("3: lru", "unknown key 3"),
        ("lru: {seed: 1}", "unknown key under lru: 'seed'"),
        ("policy: [lru]", r"policy: \['lru'\] is not allowed; expected a name"),
        (
            "mode: tabel",
            "mode: 'tabel' is not allowed; expected one of table, callback, off; did you mean 'table'",
        ),
        ("mode: [table]", "mode"),
        ("sync: 1", "sync: 1 is not allowed; expected true or false"),
        ("refresh_tokens: 0", "refresh_tokens: 0 is not allowed; expected a whole number, 1 or more"),
        ("refresh_tokens: 2.5", "refresh_tokens: 2.5 is not allowed"),
        (
            "miss_timeout_seconds: 0",
            "miss_timeout_seconds: 0 is not allowed; expected a number greater than 0",
        ),
        (
            "prefetch: tokens",
            "prefetch: 'tokens' is not allowed; expected one of auto, off, token, layer, both; did you mean",
        ),
        ("prefetch: true", "prefetch: True is not allowed"),
        (
            "prefetch_threshold: 1.5",
            "prefetch_threshold: 1.5 is not allowed; expected auto, or a number above 0, up to 1",
        ),
        (
            "prefetch_threshold: half",
            "prefetch_threshold: 'half' is not allowed; expected auto, or a number above 0, up to 1",
        ),
        ("prefetch_threshold: .nan", "prefetch_threshold: nan is not allowed"),
        ("prefetch_threshold: 0", "prefetch_threshold: 0 is not allowed"),
        ("prefetch_experts: 17", "prefetch_experts: 17 is not allowed; expected a whole number, 1 to 16"),
        ("prefetch_experts: 0", "prefetch_experts: 0 is not allowed"),
        (
            "prefetch: token\nmode: callback",
            "prefetch: token works in table mode, and mode is callback here; use mode: table, or",
        ),
        ("prefetch: layer\nmode: callback", "prefetch: layer works in table mode, and mode is callback here"),
        ("prefetch: both\nmode: callback", "prefetch: both works in table mode, and mode is callback here"),
        ("frequency: 16", "frequency: 16 is not allowed; expected a mapping"),
        ("slots: many", "slots: 'many' is not allowed; expected a count"),
        ("params: {a: 1}", "params: is for own policies, and policy is auto; write parameters under `cl"),
        ("policy: lru\nparams: {a: 1}", "and policy is lru; write parameters under `lru:`"),
        ("- lru", "expected keys and values, found list"),
        ("lru", "expected keys and values, found str"),
        ("policy: 'lru", "is not YAML"),
        ("policy: lru\n\tmode: off", "is not YAML"),
        ("slots: 2020-13-45", "is not YAML"),
        ("policy: !!python/object/apply:os.system ['true']", "only plain values are allowed.*line 1"),
        ("policy: lru\nlru: !!python/name:os.system", "only plain values are allowed.*line 2"),
        ("policy: !own lru", "only plain values are allowed"),
        ("slots: 4\nmode: table\nslots: 8", "key 'slots' is given twice, at lines 1 and 3"),
        ("frequency: {lfru: true, 'lfru': false}", "key 'lfru' is given twice, at lines 1 and 1"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, fault: str) -> None:
    with pytest.raises(PolicyConfigError, match=f"(?s){fault}"):
        load(written(tmp_path, text))


@pytest.mark.parametrize(
    ("name", "params", "fault"),
    [
        (
            "frequency",
            {"half_life_tokens": 0},
            "half_life_tokens: 0 is not allowed; expected a number greater than 0",
        ),
        ("frequency", {"half_life_tokens": "16"}, "half_life_tokens: '16'"),
        (
            "classifier",
            {"model": "m.npz", "evict_by": "fifo"},
            "evict_by: 'fifo' is not allowed; expected one of scores, lru",
        ),
        ("frequency", {"half_life_tokens": True}, "half_life_tokens: True"),
        ("frequency", {"half_life_tokens": float("inf")}, "half_life_tokens: inf"),
        ("frequency", {"lfru": "yes"}, "lfru: 'yes' is not allowed; expected true or false"),
        ("random", {"seed": -1}, "seed: -1 is not allowed; expected a whole number, 0 or more"),
        ("random", {"seed": 1.0}, "seed: 1.0"),
        ("static", {}, "profile: None is not allowed; expected the path"),
        ("static", {"profile": 3}, "profile: 3"),
    ],
)
def test_bad_parameters(name: str, params: dict[str, Any], fault: str) -> None:
    with pytest.raises(PolicyConfigError, match=fault):
        make_policy(load(name, {name: params}))


OWN = """
from __future__ import annotations
from typing import TYPE_CHECKING, Optional
from fate_policy import Policy
if TYPE_CHECKING:
    from nowhere import Unknown

class Typed(Policy):
    def __init__(self, *, n: int = 1, x: float = 0.5, on: bool = False, name: str = "a",
                 some: int | None = None, other: Optional[float] = None, odd: list[int] = (),
                 far: Unknown = None, bare=3, implicit: str = None) -> None:
        self.n = n
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "typed_policy.py").write_text(OWN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield "typed_policy:Typed"
    sys.modules.pop("typed_policy", None)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("n", "5", "a whole number"),
        ("n", 5.0, "a whole number"),
        ("n", True, "a whole number"),
        ("n", None, "a whole number"),
        ("x", "0.5", "a number"),
        ("x", False, "a number"),
        ("on", 1, "true or false"),
        ("on", "yes", "true or false"),
        ("name", 3, "text"),
        ("some", "1", "a whole number or null"),
        ("other", [1.0], "a number or null"),
        ("implicit", 3, "text"),
    ],
)
def test_a_parameter_of_an_own_policy_has_the_type_of_its_annotation(
    own: str, key: str, value: Any, expected: str
) -> None:
    """A quoted number once reached the policy as a string, and failed at the first token."""
    with pytest.raises(PolicyConfigError) as caught:
        make_policy(load(own, {"params": {key: value}}))
    assert str(caught.value) == f"params: {key}: {value!r} is not allowed; expected {expected}"


@pytest.mark.parametrize(
    "params",
    [
        {"n": 5, "x": 2, "on": True, "name": "b", "some": None, "other": 1},
        {"other": None, "odd": "anything", "far": 3, "bare": "x", "implicit": None},
    ],
)
def test_what_has_no_simple_annotation_is_left_to_the_policy(own: str, params: dict[str, Any]) -> None:
    make_policy(load(own, {"params": params}))


def test_merged_yaml_mappings_may_be_overridden(tmp_path: Path) -> None:
    text = "static: &a {profile: x}\nparams: {}\nfrequency: {lfru: true}\n"
    assert load(written(tmp_path, text)).policy == "auto"
    merged = "policy: frequency\nfrequency:\n  <<: {lfru: true, half_life_tokens: 4}\n  half_life_tokens: 8\n"
    assert load(written(tmp_path, merged)).params == {"half_life_tokens": 8, "lfru": True}


def test_a_relative_profile_is_beside_the_file_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    path = written(tmp_path / "sub", "policy: static\nstatic: {profile: scores.npy}\n")
    assert load(path).params == {"profile": str(tmp_path / "sub" / "scores.npy")}
    monkeypatch.chdir(tmp_path)
    assert load("sub/policy.yaml").params == {"profile": str(Path("sub") / "scores.npy")}
    assert load("static", {"static": {"profile": "scores.npy"}}).params == {"profile": "scores.npy"}
    absolute = written(tmp_path, f"policy: static\nstatic: {{profile: {tmp_path}/scores.npy}}\n")
    assert load(absolute).params == {"profile": f"{tmp_path}/scores.npy"}


def test_static_without_a_profile_says_where_it_goes() -> None:
    with pytest.raises(PolicyConfigError, match=r"a YAML file with `static: \{profile: FILE\}`"):
        make_policy(load("static"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", str(tmp_path / "none"), "none.yml"):
        with pytest.raises(PolicyConfigError, match=r"none.* does not exist"):
            load(path)


def test_a_folder_or_binary_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PolicyConfigError, match="cannot be read"):
        load(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00policy")
    with pytest.raises(PolicyConfigError, match="cannot be read"):
        load(tmp_path / "binary.yaml")


def test_an_unreadable_file_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    load()
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(PolicyConfigError, match=r"cannot be read: .*Permission denied"):
        load(tmp_path / "policy.yaml")


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (8, "count", "8"),
        ("8", "count", "8"),
        ("25%", "percent", "25%"),
        ("12.5 %", "percent", "12.5%"),
        ("4GiB", "bytes", "4294967296B"),
        ("1G", "bytes", "1073741824B"),
        ("512MiB", "bytes", "536870912B"),
        ("1.5KB", "bytes", "1500B"),
        ("100B", "bytes", "100B"),
        ([4, 8, 8], "list", "4,8,8"),
        ("4, 8,8", "list", "4,8,8"),
        ("auto", "auto", "auto"),
    ],
)
def test_slots_parse(value: Any, kind: str, text: str) -> None:
    slots = Slots.parse(value)
    assert (slots.kind, str(slots)) == (kind, text)
    assert Slots.parse(text) == slots


@pytest.mark.parametrize(
    "value",
    [
        0,
        -1,
        0.5,
        1.0,
        True,
        None,
        "",
        "0",
        "0%",
        "101%",
        "-5%",
        "8x",
        "4 GiBs",
        "0GiB",
        [],
        [4, 0],
        [4, "25%"],
        "4,",
        "4,0",
        {},
        2**31,
        10**20,
        "99999999999999999999",
        "9" * 5000,
        [4, 2**31],
        "4,99999999999",
        "999999999TiB",
    ],
)
def test_slots_refuse(value: Any) -> None:
    with pytest.raises(PolicyConfigError, match=r"^slots: "):
        Slots.parse(value)


@pytest.mark.parametrize(
    ("value", "slots"),
    [
        (8, [8, 8]),
        (20, [20, 16]),
        ("50%", [16, 8]),
        ("33.3%", [10, 5]),
        ("100%", [32, 16]),
        ([4, 16], [4, 16]),
        ("3000B", [10, 10]),
        ("3299B", [10, 10]),
        ("1GiB", [32, 16]),
        ("5200B", [20, 16]),
    ],
)
def test_slots_resolve(value: Any, slots: list[int]) -> None:
    assert Slots.parse(value).resolve([32, 16], [4, 4], [100, 200]).tolist() == slots


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (3, "gives layer 0 3 slots for 32 experts.*the minimum is 4"),
        ("10%", "gives layer 0 3 slots.*the minimum is 25%"),
        ("1000B", "the minimum is 1200 bytes"),
        ([4, 2], "gives layer 1 2 slots"),
        (33, "slots: '33' is not allowed; expected at most 32"),
        ([33, 4], "expected at most 32"),
        ([8, 8, 8], "expected 2 counts"),
    ],
)
def test_slots_that_do_not_fit(value: Any, fault: str) -> None:
    with pytest.raises(PolicyConfigError, match=fault):
        Slots.parse(value).resolve([32, 16], [4, 4], [100, 200])


def test_auto_slots_are_half_of_the_experts_and_enough_for_a_token() -> None:
    assert Slots.parse("auto").resolve([32, 17, 6], [4, 4, 4], [0, 0, 0]).tolist() == [16, 8, 4]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *(("8GiB", 2**33), ("512M", 2**29), ("8589934592", 2**33), ("0", 0)),
        *((1024, 1024), (5 * 10**9, 5 * 10**9), (0, 0), (None, None)),
    ],
)
def test_vram_is_a_size(value: object, expected: int | None) -> None:
    assert load("lru", {"vram": value}).vram == expected


def test_vram_margin_is_a_gib_by_default() -> None:
    assert load("lru").vram_margin == 2**30
    assert load("lru", {"vram_margin": "256MiB"}).vram_margin == 2**28


@pytest.mark.parametrize("value", ["half", "50%", -1, [1, 2], "auto", 1.5, True, 2**60, "8,8"])
def test_vram_that_is_no_size_is_told(value: object) -> None:
    for key in ("vram", "vram_margin"):
        with pytest.raises(PolicyConfigError, match=rf"{key}.*8GiB"):
            load("lru", {key: value})


def test_vram_is_for_auto() -> None:
    with pytest.raises(PolicyConfigError, match="slots: auto"):
        load("lru", {"vram": "8GiB", "slots": "50%"})
