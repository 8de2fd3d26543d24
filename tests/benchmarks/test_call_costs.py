import asyncio
from pathlib import Path

import pytest

from benchmarks.call_costs import Costs, call_table, decode_table, measure_calls, server
from benchmarks.call_costs_peers import TOKEN


@pytest.mark.parametrize("kind", ["bare", "ours"])
def test_both_servers_answer_calls_and_streams(kind: str, tmp_path: Path) -> None:
    token_file = tmp_path / "tokens"
    token_file.touch(0o600)
    token_file.write_text(f"{TOKEN}\n")
    with server(kind, token_file) as address:
        unary, message = asyncio.run(measure_calls(address, calls=3, streams=1))
    assert 0 < message < unary < 1e6


def test_ratios_of_calls_are_taken_within_each_run() -> None:
    calls: dict[str, list[Costs]] = {
        "bare": [(100.0, 10.0), (200.0, 10.0), (100.0, 10.0)],
        "ours": [(140.0, 9.0), (320.0, 9.0), (130.0, 9.0)],
    }
    _, _, unary, streaming = call_table(calls)
    assert unary == "| unary call | 100 | 140 | 1.40 | ≤ 1.5: reached |"
    assert streaming == "| message of a stream | 10 | 9 | 0.90 |  |"


def test_ratios_of_decoding_are_taken_within_each_run() -> None:
    rates = {"a": {1: [100.0, 50.0, 80.0]}, "b": {1: [99.0, 45.0, 80.0]}}
    assert decode_table(rates, "a", "b")[-1] == "| 1 | 80.0 | 80.0 | 0.990 | 0.900 to 1.000 | ≥ 0.98: reached |"
    rates["b"][1] = [97.0, 45.0, 80.0]
    assert decode_table(rates, "a", "b")[-1] == "| 1 | 80.0 | 80.0 | 0.970 | 0.900 to 1.000 | ≥ 0.98: **missed** |"
