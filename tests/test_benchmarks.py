"""The benchmark runner, on a case whose clock is ours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import contenders, gpu_noise_ops, noise_ops, noise_ops_threads, provenance, runner, timing
from benchmarks.memory import peak_extra_bytes
from benchmarks.registry import Benchmark, Case, Contender, benchmarks
from guda_fast import _backends

QUICK = runner.Settings(repetitions=5, quick=True)


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


class Clock:
    """Time that passes only when a contender says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[str, int]] = []

    def __call__(self) -> float:
        return self.now

    def contender(self, name: str, seconds: float) -> Contender:
        def call(number: int) -> None:
            self.calls.append((name, number))
            self.now += seconds

        return Contender(name, "", call)


def test_measure_interleaves_and_rotates() -> None:
    clock = Clock()
    contenders = [clock.contender("a", 2.0), clock.contender("b", 0.5)]
    timings = timing.measure(contenders, 3, 4, partial(timing.host_stopwatch, clock=clock))
    assert [timing.median for timing in timings] == [2.0, 0.5]
    warm_up, timed = clock.calls[:6], clock.calls[6:]
    assert warm_up == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1), ("b", 2)]
    assert [name for name, _ in timed] == ["a", "b"] * 4
    assert [number for _, number in timed] == [1, 2, 0, 1, 2, 0, 1, 2]


def test_timing_quantiles() -> None:
    seconds = timing.Timing([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert seconds.median == 3.5
    assert seconds.quantile(0.2) == 2.0
    assert seconds.quantile(0.8) == 5.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="reads a GPU's events")
def test_cuda_stopwatch_waits_for_the_device() -> None:
    size = 4096
    a = torch.randn(size, size, device="cuda")
    torch.mm(a, a)
    one = timing.cuda_stopwatch(lambda: torch.mm(a, a))()
    ten = timing.cuda_stopwatch(lambda: [torch.mm(a, a) for _ in range(10)])()
    assert 5 * one < ten < 20 * one


def tiny_benchmark() -> Benchmark:
    def make_case() -> Case:
        value = torch.ones(8)
        own = [Contender("cpp", "baseline", lambda number: value + number)]
        return Case("op", "R=1", "float32", 64, 2, Contender("eager", "", lambda number: value * number), own)

    return Benchmark("tiny", lambda quick: [make_case])


def test_run_writes_every_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "tests_pass", lambda benchmark: True)
    assert runner.run(tiny_benchmark(), tmp_path / "new" / "x.csv", QUICK)
    rows = runner.read_csv(tmp_path / "new" / "x.csv")
    assert [row["backend"] for row in rows] == ["eager", "cpp"]
    assert list(rows[0]) == runner.COLUMNS
    assert rows[0]["ratio"] == "1"
    assert rows[1]["rival"] == "eager"
    assert rows[1]["repetitions"] == "5"
    assert rows[1]["torch"] == torch.__version__
    assert rows[1]["command"] == "python -m benchmarks run tiny --repetitions 5 --quick"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.csv"]


def test_a_benchmark_has_its_own_threads_and_repetitions(tmp_path: Path) -> None:
    """Which the command line overrides, and the command of a row names no more than was given."""
    own = replace(tiny_benchmark(), threads=2, repetitions=3)
    runner.measure_cases(own, tmp_path / "x.csv", runner.Settings(quick=True))
    rows = runner.read_csv(tmp_path / "x.csv")
    assert {(row["threads"], row["repetitions"]) for row in rows} == {("2", "3")}
    assert rows[0]["command"] == "python -m benchmarks run tiny --quick"
    runner.measure_cases(own, tmp_path / "x.csv", runner.Settings(1, 4, quick=True))
    rows = runner.read_csv(tmp_path / "x.csv")
    assert {(row["threads"], row["repetitions"]) for row in rows} == {("1", "4")}
    assert rows[0]["command"] == "python -m benchmarks run tiny --threads 1 --repetitions 4 --quick"


def test_nothing_is_measured_on_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "tests_pass", lambda benchmark: False)
    assert not runner.run(tiny_benchmark(), tmp_path / "x.csv", QUICK)
    assert list(tmp_path.iterdir()) == []
    assert "its tests fail, so nothing is measured" in capsys.readouterr().err


def test_rows_before_a_failing_case_are_kept_apart(tmp_path: Path) -> None:
    """A run that is cut off leaves what it measured, but never under the name of a complete one."""

    def fail() -> Case:
        raise RuntimeError("no memory")

    cases = [*tiny_benchmark().cases(True), fail]
    with pytest.raises(RuntimeError, match="no memory"):
        runner.measure_cases(Benchmark("tiny", lambda quick: cases), tmp_path / "x.csv", QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["x.partial"]
    assert [row["backend"] for row in runner.read_csv(tmp_path / "x.partial")] == ["eager", "cpp"]


def test_contenders_may_set_their_own_threads(tmp_path: Path) -> None:
    seen: list[int] = []

    def call(threads: int, number: int) -> None:
        torch.set_num_threads(threads)
        seen.append(torch.get_num_threads())

    def make_case() -> Case:
        one, two = (Contender("cpp", "", partial(call, threads), threads) for threads in (1, 2))
        return Case("op", "R=1", "float32", 0, 1, one, [two], flop=10**9)

    runner.measure_cases(Benchmark("tiny", lambda quick: [make_case]), tmp_path / "x.csv", QUICK)
    rows = runner.read_csv(tmp_path / "x.csv")
    assert [row["threads"] for row in rows] == ["1", "2"]
    assert rows[1]["rival"] == "cpp, 1 thread"
    assert float(rows[1]["tflop_per_s"]) > 0
    assert set(seen) == {1, 2}
    assert torch.get_num_threads() == 1


def test_cases_are_made_for_their_device() -> None:
    made: list[torch.device] = []

    def make_case() -> Case:
        made.append(torch.ones(1).device)
        raise StopIteration

    with pytest.raises(StopIteration):
        runner.measure_cases(Benchmark("x", lambda quick: [make_case], device="meta"), Path("x.csv"), QUICK)
    assert made == [torch.device("meta")]


def test_missing_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_gpu = Benchmark("x", lambda quick: [], device="cuda")
    assert "torch finds no GPU" in str(runner.missing_device(on_gpu, runner.Settings()))
    assert "it measures cuda" in str(runner.missing_device(on_gpu, runner.Settings(device="cpu")))
    assert runner.missing_device(on_gpu, runner.Settings(device="cpu", quick=True)) is None
    assert runner.missing_device(tiny_benchmark(), runner.Settings()) is None


def test_test_files_leave_out_what_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    (tmp_path / "test_a.py").write_text("import hypothesis\n")
    (tmp_path / "test_b.py").write_text("# import hypothesis\n")
    benchmark = Benchmark("x", lambda quick: [], ("test_*.py", "test_b.py", "test_cuda*.py"))
    assert runner.test_files(benchmark) == ([str(tmp_path / "test_a.py"), str(tmp_path / "test_b.py")], [])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert runner.test_files(benchmark) == ([str(tmp_path / "test_b.py")], ["test_a.py"])


@pytest.mark.parametrize("name", sorted(benchmarks()))
def test_every_benchmark_has_tests(name: str) -> None:
    files, _ = runner.test_files(benchmarks()[name])
    assert files


def test_tests_pass_reports_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    red = tmp_path / "test_red.py"
    red.write_text("def test_red():\n    assert False\n")
    green = tmp_path / "test_green.py"
    green.write_text("def test_green():\n    assert True\n")
    assert not runner.tests_pass(Benchmark("x", lambda quick: [], (red.name,)))
    assert runner.tests_pass(Benchmark("x", lambda quick: [], (green.name,)))
    assert not runner.tests_pass(Benchmark("x", lambda quick: [], ("test_absent.py",)))


@pytest.mark.parametrize("benchmark", [noise_ops.BENCHMARK, noise_ops_threads.BENCHMARK], ids=lambda entry: entry.name)
def test_noise_ops_contenders_agree(benchmark: Benchmark) -> None:
    """The same statistics from eager's own noise and from ours: both measure the same job."""
    torch.manual_seed(0)
    for make_case in benchmark.cases(True):
        case = make_case()
        results = [contender.call(0) for contender in (case.rival, *case.contenders)]
        tensors = [result.double() for result in results if isinstance(result, torch.Tensor)]
        assert len(tensors) == len(results)
        # Every case has 64 Ki elements: their means are within 5 % of each other (over five standard errors).
        expected = float(tensors[0].square().mean())
        for tensor in tensors[1:]:
            assert float(tensor.square().mean()) == pytest.approx(expected, rel=0.05)


def test_missing_backends_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A backend that this machine lacks is no contender, and no surprise either."""
    entries = [
        _backends.Availability("op", "cuda", "triton", None, ""),
        _backends.Availability("op", "cuda", "cuda", "not compiled", ""),
        _backends.Availability("op", "cpu", "cpp", None, ""),
    ]
    monkeypatch.setattr(contenders, "availability", lambda: entries)
    assert contenders.available_kernels.__wrapped__("op", "cuda") == ["triton"]
    assert capsys.readouterr().err == "op: backend cuda is not measured: not compiled\n"
    assert contenders.available_kernels.__wrapped__("op", "cpu") == ["cpp"]
    assert capsys.readouterr().err == "op: backend triton is not measured: it does not serve cpu tensors\n"


@pytest.mark.parametrize("size", [2**20, 2**25, 2**32])
def test_rotating_sets_exceed_the_cache(size: int) -> None:
    between_two_uses = (provenance.rotating_sets(size, quick=False) - 1) * size
    assert between_two_uses > 2 * provenance.last_level_cache_bytes()


def test_commit_where_there_is_no_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "absent"))
    assert provenance.commit() == ""
    monkeypatch.setenv("GUDA_FAST_COMMIT", "0123456789ab")
    assert provenance.commit() == "0123456789ab"


def test_eager_and_plain_rivals_compute_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the noise switched off, both forms of the GPU's rival are the op's formula."""
    inputs = gpu_noise_ops._inputs(3, 2, (3, 4, 5), torch.bfloat16, True)
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    monkeypatch.setattr(torch.Tensor, "normal_", torch.Tensor.zero_)
    x0_scale, eps_scale = inputs.columns()
    expected = (inputs.predictions.double() - (inputs.x0 * x0_scale).double()).square().flatten(2).sum(2)
    expected *= inputs.weight
    torch.testing.assert_close(gpu_noise_ops.eager_error(inputs), expected, rtol=1e-5, atol=0)
    plain = gpu_noise_ops.plain_error(inputs.predictions, inputs.x0, x0_scale, eps_scale, inputs.weight)
    torch.testing.assert_close(plain, expected, rtol=1e-5, atol=0)


def test_peak_extra_bytes() -> None:
    # ones() touches every page that it allocates; the slack is for what else the process touches or returns.
    peak = peak_extra_bytes(lambda: torch.ones(2**24))
    if peak is None:
        pytest.skip("needs /proc/self/clear_refs")
    assert abs(peak - 2**26) <= 2**23
