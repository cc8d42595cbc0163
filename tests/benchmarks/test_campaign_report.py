from benchmarks.campaign_report import render

RATIO = {"median": 1.234, "low": 1.2, "high": 1.3}


def record(stage: str, group: str, results=None, **more) -> dict:
    return {
        **{"stage": stage, "group": group, "title": f"title of {stage}", "status": "done", "results": results},
        **{"seconds": 12.3, "message": "", "command": "python scripts/bench.py campaign --out x", "commit": "abc123"},
        **{"date": "2026-11-25T14:00:00+00:00", "versions": {"jax": "0.11.2"}, "machine": {"python": "3.12.3"}},
        **more,
    }


def side(seconds: float, **more) -> dict:
    return {
        **{"step_seconds": seconds, "tokens_per_second": 32768 / seconds, "mfu": 0.435, "peak_bytes": 30.25e9},
        **{"compile_seconds": 41.0, "precision": "bfloat16"},
        **more,
    }


def compared(ours: float, theirs: float, **more) -> dict:
    model = {"n_layer": 12, "n_embd": 768, "block_size": 1024}
    return {"batch": 32, "model": model, "parameters": 124_439_808, "sides": [side(ours), side(theirs)],
            "ratio": RATIO} | more  # fmt: skip


def lines_of(records, start: str) -> list[str]:
    return [line for line in render(records).splitlines() if line.startswith(start)]


def test_without_results_it_says_so():
    assert render([]) == "# Campaign\n\nNothing has been measured.\n"


def test_the_head_says_what_was_measured_where():
    rates = {"jax": {"device": "NVIDIA H200", "precision": "bfloat16", "matmul_flops": 788e12, "bandwidth": 4.3e12}}
    gpu = {"name": "NVIDIA H200", "driver_version": "580.1"}
    text = render([record("environment", "environment", {"rates": rates, "gpu": gpu})])
    assert "2026-11-25, commit abc123, Python 3.12.3, jax 0.11.2" in text
    assert "GPU: name NVIDIA H200, driver_version 580.1" in text
    assert "| a large matrix product, TFLOP/s | 788.00 (bfloat16) |" in text
    assert "| a pass over memory, GB/s read and written | 4,300 |" in text
    assert "commit unknown" in render([record("environment", "environment", status="failed", commit=None)])


def test_stages_of_different_devices_are_told_apart():
    on = [record(name, "train", compared(1, 1, sides=[side(1, device=device), side(1, device=device)]))
          for name, device in (("a", "NVIDIA H200"), ("b", "NVIDIA H100"), ("c", "NVIDIA H200"))]  # fmt: skip
    assert "**Measured on different devices**: NVIDIA H200: a, c; NVIDIA H100: b" in render(on)
    assert "different devices" not in render([on[0], on[2]])


def test_the_headline_is_against_the_faster_pytorch():
    records = [
        record("train-flash", "train", compared(0.07, 0.09)),
        record("train-cudnn", "train", compared(0.07, 0.08)),
    ]
    text = render(records)
    assert "JAX is **1.23 (1.20 to 1.30)** times as fast as the faster PyTorch (title of train-cudnn)" in text
    row = "| title of train-cudnn | 80.0 ms | 409,600 | 43.5% | 30.2 GB | 41 s | 1.23 (1.20 to 1.30) |"
    assert row in text.splitlines()


def profiled(kinds: dict[str, float]) -> dict:
    kernels = [{"name": "a|b", "kind": "attention", "source": "", "ms": 1.5, "launches": 12.0}]
    return {"kinds": {kind: {"ms": ms, "launches": 24.0} for kind, ms in kinds.items()}, "busy_ms": 58.0,
            "gaps_ms": 2.0, "step_ms": 60.0, "launches": 480.0, "kernels": kernels}  # fmt: skip


def test_profiles_stand_side_by_side_with_their_difference():
    jax = record("profile-jax", "profile", profiled({"products, bfloat16": 40.0, "norms": 3.0}))
    torch = record("profile-torch", "profile", profiled({"products, bfloat16": 38.5, "loss": 5.0}))
    assert lines_of([jax, torch], "| products") == ["| products, bfloat16 | 40.00 | 24 | 38.50 | 24 | +1.50 |"]
    assert lines_of([jax, torch], "| loss") == ["| loss | 0.00 |  | 5.00 | 24 | -5.00 |"]
    assert lines_of([jax, torch], "| gaps") == ["| gaps | 2.00 |  | 2.00 |  | +0.00 |"]
    assert lines_of([jax], "| norms") == ["| norms | 3.00 | 24 |"]
    assert lines_of([jax], "| `a") == ["| `a\\|b` | attention |  | 1.50 | 12 |"]


def test_the_floor_stands_beside_the_step():
    group = {"source": "forward: Linear", "kind": "fusion, loop", "launches": 12, "ms": 0.5}
    found = {
        "floor_ms": 50.0,
        "step_ms": 60.0,
        "kernels": 900,
        "parts_ms": {"products": 40.0, "rest": 10.0},
        "groups": [group],
    }
    text = render([record("floor", "floor", found)])
    assert "is 50.00 ms (products 40.00, rest 10.00; 900 kernels). It takes 60.00 ms: **1.20** times" in text
    assert "| forward: Linear | fusion, loop | 12 | 0.50 |" in text


def test_variants_flags_and_sizes_have_a_row_each():
    records = [
        record("variant-remat", "variants", compared(0.08, 0.07)),
        record("flag-x", "flags", compared(0.07, 0.07)),
    ]
    text = render(records)
    assert "| title of variant-remat | 80.0 ms | 70.0 ms | 1.23 (1.20 to 1.30) | 30.2 GB | 30.2 GB |" in text
    assert "## XLA's flags" in text
    sizes = [
        record("size-b", "sizes", compared(1, 1, parameters=9)),
        record("size-a", "sizes", compared(1, 1, parameters=7)),
    ]
    assert [line.split("|")[1] for line in lines_of(sizes, "| title")] == [" title of size-b ", " title of size-a "]


def test_generation_parity_and_the_run():
    row = {"side": "jax", "batch": 1, "prefill": 9000.0, "decode": 400.0, "prefill_ratio": None, "decode_ratio": RATIO,
           "bandwidth_share": 0.61}  # fmt: skip
    check = {"check": "forward", "case": "float64", "measured": 1e-3, "limit": 1e-12, "where": None}
    run = {"losses": {"0": 10.9, "50": 5.0, "51": 0.1}, "published": {"0": 10.97, "50": 5.25, "100": 3.74},
           "target": 0.01, "bytes": 1_115_394, "text": "t", "steps": 52,
           "tokens_per_second": 5e5, "seconds": 90.0}  # fmt: skip
    text = render([
        record("generate-1", "generate", {"sides": [row, row | {"decode": None, "decode_ratio": None}]}),
        record("parity", "parity", {"passed": False, "cases": 3, "failed": [check], "seconds": 61.0}),
        record("overfit", "overfit", run),
    ])  # fmt: skip
    assert "| jax | 1 | 9,000 |  | 400.0 | 1.23 (1.20 to 1.30) | 61% |" in text
    assert "| jax | 1 | 9,000 |  |  |  | 61% |" in text  # too few tokens to say how fast decoding is
    assert "3 cases, **1 failed**, 61 s" in text and "| forward | float64 | 0.001 | 1e-12 |" in text
    assert "| 50 | 5.0000 | 5.2500 |" in text and "| 100 |" not in text and "**not yet** 0.01" in text


def test_what_was_not_measured_says_why():
    failed = record("profile-jax", "profile", status="out of time", message="killed after 9 s")
    assert "| profile-jax | out of time | 12 s | killed after 9 s |" in render([failed])
