"""The benchmark of updates: what it makes of its figures; no group is started."""

from __future__ import annotations

import json

import pytest

from benchmarks import bench_weights


def test_each_size_has_its_row_with_the_time_over_that_of_one_rank(capsys: pytest.CaptureFixture[str]) -> None:
    samples = {"mib": [100.0], "1 stand-ins": [0.5]}
    samples |= {f"{ranks} {kind}": [float(ranks)] for ranks in (1, 2) for kind in ("memory", "memory plain", "disk")}
    samples |= {f"{ranks} stand-ins": [0.1 * ranks, 0.3 * ranks, 0.2 * ranks] for ranks in (2, 4, 8)}
    bench_weights.report(samples, [1, 2], 512)
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines if line.startswith(("real", "stand-ins"))]
    assert len(table) == 10
    assert table[1][-4:] == ["2", "2.00", "50", "2.00"]
    assert table[-1] == ["stand-ins", "8", "1.60", "320", "3.20"]
    assert json.loads(lines[-1])["ratios"]["8 stand-ins over 1"] == 3.2
