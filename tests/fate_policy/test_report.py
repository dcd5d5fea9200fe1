"""The page about a trace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from policy_contract import real_trace, synthetic_trace, with_predictions

from fate_policy.compare import make, replay_policy
from fate_policy.errors import FateError
from fate_policy.recall import measure
from fate_policy.report import page, write


def test_the_page_holds_every_part_and_needs_nothing_else(tmp_path: Path) -> None:
    write(real_trace(), tmp_path / "page.html", "<real>", "50%")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    titles = re.findall("<h2>(.*?)</h2>", text)
    assert titles == [
        "Skew",
        "Overlap",
        "Reuse distance",
        "Locality by layer",
        "Hit rate by capacity",
        "Slots per layer",
    ]
    assert "Routing of &lt;real&gt;" in text
    sources = re.findall('src="(.{22})', text)
    assert sources == ["data:image/png;base64,"] * 8
    assert "http" not in re.sub('src=".*?"', "", text)
    rate = replay_policy(real_trace(), make("lru"), 16).hit_rate
    assert f"equal slots hit {rate:.3f}" in text


def test_what_was_named_inside_tokens_is_there_where_it_was_recorded() -> None:
    routed = with_predictions(synthetic_trace(200))
    text = page(routed, "synthetic", "75%")
    assert "<h2>Predictions inside the token</h2>" in text
    for one in measure(routed):
        assert one.absent is not None
        for name, named in (("all", one.used), ("absent", one.absent)):
            shares = "".join(f"<td>{value:.3f}</td>" for value in named.shares())
            assert f"<td>{one.horizon}</td><td>{name}</td><td>{named.n:,}</td>{shares}" in text


def test_a_trace_with_prompts_and_unequal_layers_is_no_exception() -> None:
    assert "<h2>Slots per layer</h2>" in page(synthetic_trace(200), "synthetic", "75%")


def test_an_empty_trace_is_refused() -> None:
    with pytest.raises(FateError, match="trace none holds no tokens"):
        page(real_trace().slice(0, 0), "none")
