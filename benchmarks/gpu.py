"""Everything about the GPU kernels in one command:  python benchmarks/gpu.py

With a CUDA device: runs the kernels' tests on it, then times every kernel and whole paths (gpu_paths.py) at
several batch sizes against plain torch, torch.compile and (if installed) fbgemm-gpu, each called and replayed
from a CUDA graph, says what share of the device's measured ceilings it reaches, and appends
benchmarks/results/gpu.csv.

Without one it says so, and does what needs none: compiles every kernel for the shipped targets, checks the
gates, and writes benchmarks/results/gpu_static.json.

--interpret goes through the timing part with tiny inputs and Triton's CPU interpreter: a rehearsal, whose
times mean nothing and go nowhere.
"""

import argparse
import csv
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FIELDS = [
    "date", "device", "torch", "triton", "case", "samples", "candidate", "mode", "p20_us", "p50_us", "p80_us",
    "roofline_share", "max_error", "note",
]  # fmt: skip


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", help="batch sizes (default 1 128 2048)")
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--targets", nargs="+", help="static part: sm_80 sm_90 sm_100 gfx942 (default: all)")
    parser.add_argument("--tune", action="store_true", help="first choose tile sizes by timing them")
    parser.add_argument("--no-tests", action="store_true", help="do not run the kernels' tests first")
    parser.add_argument("--static", action="store_true", help="the static part even if there is a GPU")
    parser.add_argument("--interpret", action="store_true", help="rehearse the timing part on the CPU")
    parser.add_argument("--output", type=Path, help="where to write (default: benchmarks/results/)")
    args = parser.parse_args(argv)
    if args.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
        os.environ["MPREC_CACHE_DIR"] = tempfile.mkdtemp(prefix="mprec-rehearsal-")
    import torch

    if args.interpret or (torch.cuda.is_available() and not args.static):
        return timings(args)
    if not args.static:
        print("No CUDA device here: nothing can be timed. Compiling every kernel for absent ones instead.\n")
    return static_part(args)


# -------------------------------------------------------------------------------------------- without a GPU


def static_part(args) -> int:
    import torch
    from mprec.triton_kernels import catalogue, static

    rows, failures = [], 0
    for target in args.targets or static.TARGETS:
        for case in catalogue.CASES:
            if args.cases not in case.name or not case.serves(target):
                continue
            try:
                call = case.make(torch.device("cpu"), case.samples)
                with static.recorded(target) as launches:
                    call.run()
                described = [static.describe(launch, target) for launch in launches]
            except Exception as error:
                print(f"{target:7} {case.name}: {type(error).__name__}: {str(error)[:200]}")
                rows.append({"case": case.name, "target": target, "error": type(error).__name__})
                failures += 1
                continue
            for facts in described:
                rows.append({"case": case.name, **facts})
                print(line_of(case.name, facts), flush=True)
    path = args.output or RESULTS / "gpu_static.json"
    if args.cases or args.targets:
        print("\nA part of the catalogue: not written." if args.output is None else f"\n{path}")
    if args.output is not None or not (args.cases or args.targets):
        document = {
            "command": "python benchmarks/gpu.py",
            "triton": __import__("triton").__version__,
            "launches": rows,
        }
        with opened(path, "w") as file:
            file.write(json.dumps(document, indent=1) + "\n")
    return 1 if failures else 0


def opened(path: Path, mode: str):
    """The file to write results to: `path`, or one in the temporary folder where that cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open(mode, newline="")
    except OSError as error:
        print(f"\n{path} cannot be written: {error}")
        handle, name = tempfile.mkstemp(prefix=f"{path.stem}-", suffix=path.suffix)
        file = os.fdopen(handle, "w", newline="")
        path = Path(name)
    print(f"\nwriting {path}")
    return file


def line_of(name: str, facts: dict) -> str:
    """One launch in one line."""
    parts = [f"{facts['target']:7} {name:40} {facts['kernel']:27}"]
    parts.append(f"regs {facts['registers']:3} spill {facts['spill_bytes']:4} smem {facts['shared']:6}")
    if facts["mma"]:
        parts.append(facts["mma"])
    for key in ("mma_per_useful", "slots_per_hash", "row_load_ratio"):
        if key in facts:
            parts.append(f"{key} {facts[key]}")
    return "  ".join(parts)


# ----------------------------------------------------------------------------------------------- with a GPU


def timings(args) -> int:
    import gpu_paths
    import torch
    import triton
    from mprec.triton_kernels import catalogue, tuning

    device = torch.device("cpu" if args.interpret else "cuda")
    name = "interpreter" if args.interpret else torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, triton {triton.__version__}")
    failures = 0 if args.no_tests else run_tests(args.interpret)
    if args.interpret:
        catalogue.FEATURES, catalogue.SHRINK = 2, 16
    ceilings = measure_ceilings(device)
    print(f"ceilings: {ceilings[0] / 1e12:.1f} TFLOP/s (bf16 product), {ceilings[1] / 1e9:.0f} GB/s (copy)\n")
    path = args.output or (Path(os.devnull) if args.interpret else RESULTS / "gpu.csv")
    file = opened(path, "a")
    writer = csv.DictWriter(file, FIELDS)
    if not file.tell():
        writer.writeheader()
    stamp = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    for case in (*catalogue.CASES, *gpu_paths.CASES):
        if args.cases not in case.name or not case.serves(tuning.target_of(device)):
            continue
        for samples in args.samples or ([1, 3] if args.interpret else [1, 128, 2048]):
            if args.tune:
                tune(case, samples, device)
            for row in case_rows(case, samples, device, ceilings):
                writer.writerow({**stamp, "case": case.name, "samples": samples, **row})
                file.flush()  # what is measured stays, whatever happens next
                failures += row["note"].startswith("error")
                print(f"{case.name:42} {samples:5} {row['candidate']:14} {row['mode']:6}"
                      f" {row['p50_us']:>10} us  roofline {row['roofline_share']:>6}"
                      f"  {row['note']}", flush=True)  # fmt: skip
    file.close()
    print(f"{failures} failures" if failures else "no failures")
    return 1 if failures else 0


def tune(case, samples: int, device) -> None:
    """Time the tile sizes of a case that has a choice; the fastest are kept in the user's cache directory."""
    try:
        work = case.make(device, samples)
        if work.tune is not None:
            steps, seconds = work.tune(stopwatch(device))
            print(f"tuned {case.name}, {samples} samples: {steps}, {seconds * 1e6:.1f} us")
    except Exception as failure:
        print(f"tuning {case.name}: {type(failure).__name__}: {str(failure)[:200]}")


def run_tests(interpret: bool) -> int:
    """The kernels' tests, in a process of their own; 1 if any failed."""
    selection = ["-k", "test_every_key_is_found or test_max_keeps_nan"] if interpret else []
    command = [sys.executable, "-m", "pytest", "-q", str(ROOT / "tests" / "triton"), *selection]
    print("$", " ".join(command))
    return int(subprocess.run(command, cwd=ROOT, check=False).returncode != 0)


def stopwatch(device):
    """A function that times calls: [seconds per call of each round]."""
    import torch

    def on_cpu(call, rounds=1):
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return times

    def on_gpu(call, rounds=30):
        for _ in range(3):
            call()
        cold = torch.empty(256 << 20, dtype=torch.uint8, device=device)  # written between calls: empties L2
        pairs = []
        for _ in range(rounds):
            cold.zero_()
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            call()
            pair[1].record()
            pairs.append(pair)
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) * 1e-3 for begin, end in pairs]

    return on_gpu if device.type == "cuda" else on_cpu


def captured(call, device):
    """The call as a CUDA graph's replay; on a CPU, the call."""
    import torch

    if device.type != "cuda":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure_ceilings(device) -> tuple[float, float]:
    """(FLOP/s of a large bf16 matrix product, bytes/s of a large copy) on this device."""
    import torch

    size = 8192 if device.type == "cuda" else 128
    a = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    source = torch.empty(size * size * 4, dtype=torch.uint8, device=device)
    target, clock = torch.empty_like(source), stopwatch(device)
    product = statistics.median(clock(lambda: a @ a))
    copy = statistics.median(clock(lambda: target.copy_(source)))
    return 2 * size**3 / product, 2 * source.numel() / copy


def case_rows(case, samples: int, device, ceilings):
    """Measured rows of every candidate; what fails is a row too, and stops nothing else."""
    import torch

    try:
        work = case.make(device, samples)
        candidates = {"mprec": work.run}
        if work.reference is not None:
            candidates["torch"] = work.reference
            if device.type == "cuda":
                candidates["torch.compile"] = torch.compile(work.reference)
        floor = max(work.flops / ceilings[0], work.bytes / ceilings[1])
        errors = {"mprec": deviation(work)}
        for candidate, call in work.calls.items():
            candidates[candidate] = call
            errors[candidate] = deviation(work._replace(run=call))
    except Exception as failure:
        yield row_of("mprec", "call", note=f"error: {type(failure).__name__}: {str(failure)[:120]}")
        return
    try:
        if case.peer is not None and (peer := case.peer(device, samples)) is not None:
            candidates["fbgemm"] = peer
    except Exception as failure:  # a release that is made otherwise, say
        yield row_of("fbgemm", "call", note=f"not possible: {type(failure).__name__}: {str(failure)[:120]}")
    clock = stopwatch(device)
    for candidate, call in candidates.items():
        for mode in ("call",) if candidate in work.calls else ("call", "graph"):
            try:
                times = clock(call if mode == "call" else captured(call, device))
            except Exception as failure:
                # a peer that cannot be captured is its own affair
                kind = "error" if candidate in errors else "not possible"
                yield row_of(candidate, mode, note=f"{kind}: {type(failure).__name__}: {str(failure)[:120]}")
                continue
            yield row_of(candidate, mode, times, floor, errors.get(candidate, ""))


def deviation(work) -> str:
    """Largest difference from the reference, relative to the reference's largest value."""
    import torch

    if work.reference is None:
        return ""
    got, want = work.run(), work.reference()
    if isinstance(got, torch.Tensor):
        got, want = [got], [want]
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        scale = max(float(b.double().abs().max()), 1e-30)
        worst = max(worst, float((a.double().cpu() - b.double().cpu()).abs().max()) / scale)
    if not worst < 0.05:
        raise ValueError(f"differs from the reference by {worst:.3g} of its largest value")
    return f"{worst:.2e}"


def row_of(candidate, mode, times=None, floor=0.0, error="", note="") -> dict:
    row = {"candidate": candidate, "mode": mode, "max_error": error, "note": note, "roofline_share": ""}
    if times is None:
        return row | {"p20_us": "", "p50_us": "", "p80_us": ""}
    times = sorted(times)
    at = {q: times[min(len(times) - 1, int(q / 100 * len(times)))] for q in (20, 50, 80)}
    row["roofline_share"] = f"{floor / at[50]:.3f}"
    return row | {f"p{q}_us": f"{seconds * 1e6:.1f}" for q, seconds in at.items()}


if __name__ == "__main__":
    sys.exit(main())
