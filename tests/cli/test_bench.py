"""Rehearsals of the benchmarks on the CPU: the whole path, at sizes that mean nothing."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_dhellam.bench.checkpoint import run as checkpoint_bench
from lightning_dhellam.bench.checkpoint import steps as checkpoint_steps
from lightning_dhellam.bench.checkpoint.report import rows_of
from lightning_dhellam.bench.convert import run as convert_bench
from lightning_dhellam.bench.kernels import run as kernel_bench
from lightning_dhellam.bench.processes import Budget
from lightning_dhellam.bench.throughput.modules import Theirs
from lightning_dhellam.bench.throughput.settings import CASES, Case, Job, Settings
from lightning_dhellam.bench.throughput.worker import result_of
from lightning_dhellam.bench.throughput.workers import Workers
from lightning_dhellam.bench.timing import seconds
from lightning_dhellam.commands.main import main
from lightning_dhellam.models import parameter_count, preset
from tests.ranks import run_ranks
from tests.strategy.runs import join

TINY = "llama-tiny:2:512:64:2"


def _report(folder: Path, name: str) -> dict[str, Any]:
    (file,) = folder.glob(f"{name}-*.json")
    assert file.with_suffix(".txt").read_text().count(name) >= 1
    report: dict[str, Any] = json.loads(file.read_text())
    return report


def test_throughput_trains_both_sides_to_the_same_losses(tmp_path: Path) -> None:
    words = ["--device=cpu", f"--cases=['{TINY}']", "--sides=[ours, 'ours:current', eager]"]
    words += ["--steps=2", "--warm_up=1", "--budget=1e6", "--limit=1e6", f"--output={tmp_path}"]
    assert main(["bench", "throughput", *words]) == 0
    report = _report(tmp_path, "throughput")
    ours, current, eager = report["rows"]
    assert (ours["side"], eager["side"]) == ("ours", "eager")
    assert current["over bf16"] == pytest.approx(current["tokens/s"] / ours["tokens/s"])
    assert 0 < abs(current["last loss"] / ours["last loss"] - 1) < 1e-2, "it computes in 8 bits"
    assert report["device"].startswith("CPU") and report["versions"]["torch"]
    assert ours["ratio"] == pytest.approx(ours["tokens/s"] / eager["tokens/s"])
    assert ours["tokens/s"] == pytest.approx(2 * 2 * 64 / ours["seconds"])
    # The same weights and batches; fp32 against bf16 master weights part slowly.
    assert len(ours["losses"]) == len(eager["losses"]) == 3
    assert ours["loss apart"] < 1e-3 and abs(ours["loss"] - 6.3) < 0.2
    assert ours["grad norm"] == pytest.approx(eager["grad norm"], rel=5e-3)
    operators = {row["operator"]: row for row in report[f"operators of {TINY} ours"]}
    assert operators["forward/qkv.gemm"]["calls"] == 2 * 2
    assert operators["backward/output.wgrad"]["ms"] > 0


def test_folders_are_written_and_read_beside_plain_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--preset=llama-tiny", "--layers=2", "--rounds=2", f"--output={tmp_path}"]
    assert main(["bench", "convert", *words]) == 0
    report = _report(tmp_path, "convert")
    rows = {(row["does"], row["by"]): row for row in report["rows"]}
    assert len(rows) == 6
    assert report["parameters"] == parameter_count(preset("llama-tiny", num_layers=2))
    for (does, by), row in rows.items():
        assert row["lowest"] <= row["of the disk"] <= row["highest"], (does, by)
        assert (row["of the disk"] == 1) is (by == "disk")
    (left,) = {path.name.rpartition(".")[0] for path in tmp_path.iterdir()}
    assert left.startswith("convert-")

    def wrong(*_: Any) -> None:
        """Reads nothing."""

    monkeypatch.setattr(convert_bench, "import_huggingface", wrong)
    assert main(["bench", "convert", *words]) == 1
    failed = [row for row in _report(tmp_path, "convert")["rows"] if "failed" in row]
    assert [(row["does"], row["by"]) for row in failed] == [("read", "ours"), ("write", "ours")]
    assert {row["failed"] for row in failed} == {"what is read is not what was written"}


def _bandwidth(rank: int, place: Path) -> tuple[int, dict[str, dict[str, float]]]:
    join(rank, 2)
    settings = checkpoint_bench.Settings(
        processes=2,
        pipeline_parallel_size=1,
        layers=1,
        hidden=64,
        vocabulary=128,
        repeats=1,
        parts=("bandwidth",),
    )
    found = checkpoint_bench._measured(settings, place)
    with pytest.raises(RuntimeError, match="a: w is not read as it was written"):
        checkpoint_bench._check("a", {"w": torch.ones(2)}, lambda: lambda: {"w": torch.zeros(2)})
    return found


def test_a_state_is_saved_and_loaded_in_each_way(tmp_path: Path) -> None:
    """Each of which must read what it has written."""
    (size, times), _ = run_ranks(2, _bandwidth, tmp_path)
    rows = {row["way"]: row for row in rows_of(times, size)}
    assert list(rows) == ["checkpoint", "plain DCP", "file per rank"]
    for row in rows.values():
        assert row["save GB/s"] == pytest.approx(size / row["save s"] / 1e9)
        assert row["load ratio"] == pytest.approx(row["load s"] / rows["checkpoint"]["load s"])
    assert not list(tmp_path.glob("*-[01]"))


def test_steps_that_save_are_timed_beside_others(tmp_path: Path) -> None:
    words = ["--device=cpu", "--parts=[steps]", f"--case={TINY}", "--steps=1"]
    assert main(["bench", "checkpoint", *words, f"--output={tmp_path}"]) == 0
    first, beside, at_once = _report(tmp_path, "checkpoint")["steps"]
    assert (first["way"], beside["way"], at_once["way"]) == checkpoint_steps.WAYS
    for row in (at_once, first, beside):
        assert row["ratio"] == pytest.approx(row["saves ms"] / row["normal ms"])
        assert row["GB"] >= 3 * 4 * row["parameters"] / 1e9 and row["next ms"] > 0
    # Which writes nothing, so that it is never whole.
    assert first["whole s"] is None and first["meanwhile ms"] is None
    assert beside["whole s"] > 0 and beside["meanwhile ms"] > 0
    assert at_once["saves ms"] >= 1e3 * at_once["whole s"]  # training has waited for all of it
    (left,) = {path.name.rpartition(".")[0] for path in tmp_path.iterdir()}
    assert left.startswith("checkpoint-")


def test_what_was_measured_before_an_end_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(settings: Any, place: Path, device: Any, tell: Any) -> None:
        tell({"way": "beside"})
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_bench, "measure_steps", measure)
    with pytest.raises(KeyboardInterrupt):
        main(["bench", "checkpoint", "--device=cpu", "--parts=[steps]", f"--output={tmp_path}"])
    assert _report(tmp_path, "checkpoint")["steps"] == [{"way": "beside"}]
    assert not any(path.is_dir() for path in tmp_path.iterdir())


def test_a_side_that_fails_costs_its_own_row_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: Workers, job: Job, *, more: bool = True) -> dict[str, Any]:
        return result_of(job)  # here: what processes are for has tests of its own

    monkeypatch.setattr(Workers, "run", run)
    words = ["--device=cpu", "--sides=[ours, eager]", "--steps=1", "--warm_up=1"]
    words += ["--plan=no-such-plan", f"--cases=['{TINY}']", f"--output={tmp_path}"]
    assert main(["bench", "throughput", *words]) == 1
    ours, eager = _report(tmp_path, "throughput")["rows"]
    assert "no-such-plan" in ours["failed"] and "tokens/s" in eager


def test_throughput_trains_adapters_and_names_peft_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: Workers, job: Job, *, more: bool = True) -> dict[str, Any]:
        return result_of(job)

    monkeypatch.setattr(Workers, "run", run)
    monkeypatch.setitem(sys.modules, "peft", None)
    words = ["--device=cpu", "--sides=[ours, eager]", "--steps=1", "--warm_up=1"]
    words += [f"--cases=['{TINY}:lora4']", f"--output={tmp_path}"]
    assert main(["bench", "throughput", *words]) == 1
    ours, eager = _report(tmp_path, "throughput")["rows"]
    assert eager["failed"] == (
        "ValueError: their side of a case with adapters needs peft: pip install peft"
    )
    full, frozen = Case.parse(TINY), Case.parse(f"{TINY}:lora4")
    assert frozen.lora is not None and frozen.lora.rank == 4
    assert 0.66 < frozen.flops_per_token / full.flops_per_token < 0.75
    rate = ours["tokens/s"] * frozen.flops_per_token
    assert ours["TFLOP/s"] == pytest.approx(rate / 1e12)
    assert abs(ours["loss"] - 6.3) < 0.2 and ours["grad norm"] > 0


def test_both_sides_may_make_activations_again() -> None:
    found = {}
    for side in ("ours", "eager"):
        plain, again = (
            result_of(Job(case, side, "cpu", "interleaved", warm_up=1, steps=1))
            for case in (TINY, f"{TINY}:auto")
        )
        assert again["losses"] == plain["losses"], side
        found[side] = again["losses"]
    assert found["ours"] == pytest.approx(found["eager"], rel=1e-3)
    for case, is_so in ((TINY, False), (f"{TINY}:none", False), (f"{TINY}:full", True)):
        theirs = Theirs(Case.parse(case), torch.device("cpu"), compiled=False)
        assert theirs.net.is_gradient_checkpointing is is_so


def test_a_process_that_dies_costs_its_own_row_only(tmp_path: Path) -> None:
    job = Job(TINY, "eager", "cpu", "sequential", warm_up=1, steps=1)
    with Workers(tmp_path / "log", Budget(3600), 3600) as workers:
        process = workers._next
        assert process is not None
        process.kill()
        process.wait()
        found = workers.run(job, more=False)
    assert found == {"failed": f"its process ended with code {-signal.SIGKILL} and no result"}


def test_jobs_stop_at_their_limit_and_at_the_budget(tmp_path: Path) -> None:
    job = Job("llama-tiny:4:512:1024:64", "eager", "cpu", "sequential", warm_up=100, steps=100)
    with Workers(tmp_path / "log", Budget(3600), 2.0, shortest=1.0) as workers:
        process = workers._next
        assert process is not None
        stage = Path(workers._folder.name) / f"{process.pid}.stage"
        stage.write_text("before it has begun")
        found = workers.run(job, more=False)
        # It may have come farther by then, and says so.
        assert found == {"failed": f"stopped after 2 s {stage.read_text()}"}
        assert process.returncode is not None, "it still runs"
    with Workers(tmp_path / "log", Budget(1.0), 60.0) as workers:
        assert workers.run(job, more=False)["failed"].startswith("not begun")


def test_the_most_important_comes_first() -> None:
    found = Settings().jobs()
    jobs = [(job.case, job.side) for job in found]
    assert jobs[:2] == [(CASES[0], "ours"), (CASES[0], "eager")]
    assert jobs.index((CASES[0], "compiled")) < jobs.index((CASES[2], "ours"))
    assert len(set(jobs)) == 3 * len(CASES)
    assert [job.operators for job in found] == [True] + [False] * (len(jobs) - 1)


@pytest.mark.parametrize("case", CASES)
def test_cases_name_real_shapes(case: str) -> None:
    shape = Case.parse(case)
    assert shape.length == shape.config.max_sequence_length
    # Six FLOPs for each weight and token, four for a frozen one, and attention.
    assert shape.flops_per_token > (4 if shape.lora else 6) * (
        parameter_count(shape.config) - 2 * shape.config.vocab_size * shape.config.hidden_size
    )


@pytest.mark.parametrize(
    "case",
    ["llama-3-8b", "llama-3-8b:8:32000:8192:x", "llama-9:1:2:3:4", "llama-3-8b:8:9:64:2:qlora"],
)
def test_a_case_that_is_none_is_refused(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "throughput", "--device=cpu", f"--cases=['{case}']"]) == 2
    assert case.split(":")[0] in capsys.readouterr().err


def test_an_output_that_is_no_folder_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    assert main(["bench", "launch", "--device", "cpu", "--output", str(file)]) == 2
    said = capsys.readouterr()
    assert f"--output {file}: {file} is not a folder" in said.err
    assert not said.out


def test_kernels_are_checked_and_timed(tmp_path: Path) -> None:
    words = ["--device=cpu", "--hidden=[64]", "--tokens=[16]", "--vocabulary=[100]"]
    assert main(["bench", "kernels", *words, "--compiled=false", f"--output={tmp_path}"]) == 0
    rows = _report(tmp_path, "kernels")["rows"]
    names = {row["kernel"] for row in rows}
    assert {"rms_norm grad", "rope", "gelu", "layer_norm", "loss with grad"} <= names
    assert {"cast to fp8", "cast to fp8 by rows", "cast to fp8 by squares"} <= names
    assert {"permute", "unpermute", "unpermute grad", "weighted swiglu grad"} <= names
    assert all(row["ours GB/s"] > 0 and row["eager GB/s"] > 0 for row in rows)


def test_a_wrong_kernel_gets_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(kernels: Any, operator: str, device: torch.device) -> list[str]:
        return ["gelu: y is off"] if operator == "gelu" else []

    monkeypatch.setattr(kernel_bench, "check", check)
    words = ["--device=cpu", "--hidden=[64]", "--tokens=[16]", "--vocabulary=[]"]
    assert main(["bench", "kernels", *words, "--compiled=false", f"--output={tmp_path}"]) == 1
    for row in _report(tmp_path, "kernels")["rows"]:
        if row["kernel"].startswith("gelu") and "tanh" not in row["kernel"]:
            assert row["failed"] == "gelu: y is off" and "ours GB/s" not in row
        else:
            assert row["ours GB/s"] > 0


def test_gemms_of_a_layer_and_the_head(tmp_path: Path) -> None:
    words = ["--device=cpu", "--preset=llama-tiny", "--tokens=8", "--vocabulary=[40]"]
    assert main(["bench", "gemms", *words, f"--output={tmp_path}"]) == 0
    rows = _report(tmp_path, "gemms")["rows"]
    layer = [("qkv", 512, 256), ("proj", 256, 256), ("fc1", 1536, 256), ("fc2", 256, 768)]
    assert [(r["library"], r["gemm"], r["out"], r["in"]) for r in rows] == [
        *(("cpu", *gemm) for gemm in [*layer, ("output 40", 40, 256)]),
        *(("fp8 reference, current", *gemm) for gemm in layer),
        *(("fp8 reference, blockwise", *gemm) for gemm in layer),
    ]
    assert all(row[f"{kind} TFLOP/s"] > 0 for row in rows for kind in ("forward", "dgrad", "wgrad"))


def test_gemms_of_experts(tmp_path: Path) -> None:
    words = ["--device=cpu", "--preset=moe-tiny", "--tokens=8", "--vocabulary=[]"]
    assert main(["bench", "gemms", *words, f"--output={tmp_path}"]) == 0
    rows = [r for r in _report(tmp_path, "gemms")["rows"] if r["gemm"].startswith("experts")]
    assert [(r["library"], r["gemm"]) for r in rows] == [
        (f"reference, {share}", f"experts {gemm}")
        for gemm in ("fc1", "fc2")
        for share in ("even", "uneven")
    ]
    assert all(row["tokens"] == 16 and row["wgrad TFLOP/s"] > 0 for row in rows)


def test_launch_separates_the_engine_from_the_launches(tmp_path: Path) -> None:
    words = ["--device=cpu", "--repeats=2", "--plans=[interleaved]", f"--output={tmp_path}"]
    assert main(["bench", "launch", *words]) == 0
    (row,) = _report(tmp_path, "launch")["rows"]
    assert 0 < row["engine us"] < row["launch us"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_error_names_the_rehearsal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--device=cuda"]) == 2
    assert "--device=cpu rehearses" in capsys.readouterr().err


def test_times_are_of_one_call() -> None:
    calls: list[int] = []
    assert seconds([lambda: calls.append(1)] * 4, torch.device("cpu")) > 0
    assert len(calls) % 4 == 0
