"""`dhellam simulate` and `dhellam plan schedule`."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.image import imread

from lightning_dhellam.commands.main import main
from lightning_dhellam.pipeline.schedules import SCHEDULES, Schedule
from lightning_dhellam.plan import BUILDERS, kind_of
from lightning_dhellam.plan.file import PlanFile
from lightning_dhellam.search.measure import measure
from tests.search.graphs import FINGERPRINT, FakeBench, costs, graphs_of, model, toy_costs

NAMES = ["1f1b", "interleaved-1f1b", "zb-v", "dualpipe-v", "fold", "searched"]


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """Of a layer of 70B, with embedding and head, at 200 GB/s."""
    graphs = graphs_of(model(1))
    shapes = {"micro_batch_size": 1, "sequence_length": 8192, "num_layers": 14}
    bench = FakeBench(costs(graphs, 200e9, True))
    measure(bench, graphs, replace(FINGERPRINT, shapes=shapes)).save(tmp_path / "p.json")
    return tmp_path / "p.json"


def simulate(profile: Path, *words: str) -> int:
    output = profile.parent / "out"
    if "--search" not in words:
        words = (*words, "--search", "0")
    return main(["simulate", "--profile", str(profile), "--output", str(output), *words])


def test_one_table_and_one_picture_of_all_schedules(
    profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = ("--memory", "40", "--p2p_takes", "0.1", "--search", "50")
    assert simulate(profile, "--stages", "4", "--micro_batches", "8", *memory) == 0
    printed = capsys.readouterr().out
    assert "1 embedding, 14 transformer, 1 head" in printed
    assert "8 of 8,192 tokens" in printed and "50 GB/s, 10 µs, 10.0% of compute" in printed
    assert "40 GiB a stage" in printed
    (best,) = re.findall(r"^best first: (.*)$", printed, re.MULTILINE)
    assert sorted(best.split(", ")) == sorted(NAMES)
    why = re.findall(r"^([\w-]+): .*(?:slower: |as fast|than its limit)", printed, re.MULTILINE)
    assert why == best.split(", ")[1:]
    rows = re.findall(r"^(\S.*?) {2,}[\d.]+ m?s +([\d.]+)× +([\d.]+)%(.*)$", printed, re.MULTILINE)
    assert [name for name, *_ in rows] == NAMES
    assert rows[0][1] == "1.00"
    for _, _, compute, others in rows:
        shares = [float(compute), *map(float, re.findall(r"([\d.]+)%", others))]
        assert len(shares) == 4 and sum(shares) == pytest.approx(100, abs=0.3)
    assert (
        len(re.findall(r"^(?:bubble|peak memory) of stage(?: +\d){4}$", printed, re.MULTILINE)) == 2
    )
    assert "interleaved-1f1b: left out" not in printed
    assert min(imread(profile.parent / "out" / "pipelines.png").shape[:2]) > 500
    fields = json.loads((profile.parent / "out" / "pipelines.json").read_text())
    assert list(fields["schedules"]) == NAMES
    assert fields["conditions"]["stages"] == 4
    for one in fields["schedules"].values():
        for stage in one["stages"]:
            parts = sum(stage[part] for part in ("compute", "exposed", "transfer", "bubble"))
            assert parts == pytest.approx(one["seconds"])
            assert stage["peak"] > 0 and one["memory"] == "bytes"
    assert fields["schedules"]["fold"]["stages"][3]["visits"][8][0] == "3F4+4B0"


def test_what_is_left_out_is_named_with_the_reason(
    profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("--stages", "3", "--micro_batches", "4")
    assert simulate(profile, *sizes, "--virtual", "7") == 0
    printed = capsys.readouterr().out
    assert "interleaved-1f1b: left out: 21 chunks need as many layers" in printed
    assert simulate(profile, "--stages", "17", "--micro_batches", "16") == 2
    assert "17 chunks need as many layers, and there are 16" in capsys.readouterr().err


def test_a_plan_file_is_offered_and_a_stale_one_refused(
    profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = model(1)
    plans = {
        kind_of(p.forward, p.backward): BUILDERS["dhellam"](p.forward, p.backward) for p in layers
    }
    file = profile.parent / "plan.json"
    PlanFile.of(plans, graphs_of(layers)).save(file)
    sizes = ("--stages", "1", "--micro_batches", "2", "--plans", str(file))
    assert simulate(profile, *sizes) == 0
    file.write_text(file.read_text().replace(layers[1].forward.fingerprint, "0" * 16))
    assert simulate(profile, *sizes) == 2
    assert "the plan file is stale" in capsys.readouterr().err


def test_mistakes_are_named_in_the_users_spelling(
    profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, message in (
        (("--stages", "0", "--micro_batches", "8"), "--stages: '0' must be a whole number"),
        (("--stages", "2", "--micro_batches", "x"), "--micro_batches: 'x' must be a whole"),
        (("--stages", "2"), "required: --micro_batches"),
        (("--stages", "2", "--micro_batches", "8", "--p2p_bandwidth", "0"), "--p2p_bandwidth: '0'"),
        (("--stages", "2", "--micro_batches", "8", "--p2p_latency", "-1"), "--p2p_latency: '-1'"),
        (("--stages", "2", "--micro_batches", "8", "--p2p_takes", "1"), "--p2p_takes: '1' must be"),
        (("--stages", "2", "--micro_batches", "8", "--search", "-1"), "--search: '-1' must be a"),
    ):
        with pytest.raises(SystemExit) as exit_:
            simulate(profile, *words)
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err
    sizes = ("--stages", "2", "--micro_batches", "8")
    assert simulate(tmp_path / "absent.json", *sizes) == 2
    assert "absent.json cannot be read as a profile" in capsys.readouterr().err
    toy, known = toy_costs({})
    bare = tmp_path / "bare.json"
    measure(FakeBench(known), graphs_of([toy]), replace(FINGERPRINT, shapes={})).save(bare)
    assert simulate(bare, *sizes, "--layers", "4") == 2
    assert "give --tokens" in capsys.readouterr().err
    assert simulate(bare, *sizes, "--tokens", "64") == 2
    assert "give --layers" in capsys.readouterr().err


def test_sizes_that_a_profile_does_not_know_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy, known = toy_costs({})
    bare = tmp_path / "bare.json"
    measure(FakeBench(known), graphs_of([toy]), replace(FINGERPRINT, shapes={})).save(bare)
    sizes = ("--stages", "2", "--micro_batches", "4", "--layers", "8", "--tokens", "64")
    assert simulate(bare, *sizes) == 0
    assert re.search(
        r"^peak memory of stage .*\n-+\n1f1b +8 layers +4 layers$",
        capsys.readouterr().out,
        re.MULTILINE,
    )


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_computed(
    profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("--stages", "2", "--micro_batches", "8")
    schedule = ["plan", "schedule", *sizes, "--output"]
    for output in (f"{profile}", f"{profile}/below/it"):
        words = ["simulate", *sizes, "--profile", str(profile), "--output", output]
        assert main(words) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert f"error: --output {output}: {profile} is not a folder" in printed.err
    assert main([*schedule, f"{profile}/x.png"]) == 2
    assert f"--output {profile}/x.png: {profile} is not a folder" in capsys.readouterr().err
    assert main([*schedule, str(profile.parent)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "is a folder, and a file is written" in printed.err


def test_the_fold_is_printed_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "fold.png"
    words = ["plan", "schedule", "--stages", "2", "--micro_batches", "3", "--output", str(picture)]
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines() == [
        "fold: 2 stages, 3 micro-batches of forward F and backward B",
        "↓ the first chunk of the stage forward, the second backward; ↑ the other way round",
        "stage 0, chunks 0 and 3   ↓F0     ↓F1             ↑F0     ↓F2 B0  ↑F1     ↓B1     ↑F2 B0"
        "  ↓B2     ↑B1             ↑B2",
        "stage 1, chunks 1 and 2           ↓F0     ↑F0     ↓F1     ↑F1     ↓F2 B0  ↑F2 B0  ↓B1"
        "     ↑B1     ↓B2     ↑B2",
        f"written to {picture}",
    ]
    assert min(imread(picture).shape[:2]) > 100
    with pytest.raises(SystemExit) as exit_:
        main(["plan", "schedule", "--stages", "2", "--micro_batches", "0"])
    assert exit_.value.code == 2
    assert "--micro_batches: '0' must be a whole number of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_any_schedule_is_printed_as_a_file_of_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("--stages", "2", "--micro_batches", "4")
    assert main(["plan", "schedule", name, *sizes]) == 0
    printed = capsys.readouterr().out
    assert Schedule.parse(printed) == SCHEDULES[name](2, 4)
    file = tmp_path / "mine.txt"
    file.write_text(printed)
    assert main(["plan", "schedule", str(file), *sizes]) == 0
    assert capsys.readouterr().out == printed
    assert main(["plan", "schedule", str(file), "--stages", "2", "--micro_batches", "5"]) == 2
    assert "mine.txt is of 2 stages and 4 micro-batches, not 2 and 5" in capsys.readouterr().err


def test_a_schedule_that_nobody_knows_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "schedule", "gpipe", "--stages", "2", "--micro_batches", "4"]) == 2
    message = "schedule 'gpipe' is neither a file nor one of 1f1b, interleaved-1f1b, zb-v"
    assert message in capsys.readouterr().err
