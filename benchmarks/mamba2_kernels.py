"""Mamba-2's convolution, gated norm and scan on one GPU: every backend checked against float64, then timed.

    python benchmarks/mamba2_kernels.py [--out results.json] [--tokens 16384] [--profile]

Sizes are the 7B's, bf16; x, B, C, z and dt are views of one in_proj output, as in the model. Beside each time stands
its floor: bytes that must move at the measured copy rate, or operations at the measured matrix rate, if those are more.
Exits with 1 if any output or gradient of any backend is wrong. Backends that are not installed are left out.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch
from torch.nn import functional as F

from vamba.modeling.kernels import find_optional
from vamba.modeling.mamba2 import CONV_BACKENDS, NORM_BACKENDS, SSD_BACKENDS


H, P, G, K, WIDTH, CHUNK = 112, 64, 1, 128, 4, 256  # the 7B's
INNER, CONV = H * P, H * P + 2 * G * K
ROW = INNER + CONV + H  # in_proj's output: z, x, B, C, dt
CHECK_LENGTHS = [1, 37, 513, 1000, 2048]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
TF32_TOLERANCE = 5e-3  # mamba-ssm multiplies float32 in TF32


def gated_norm_mamba_ssm(y, gate, weight, n_groups, eps):
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    width = y.shape[-1] // n_groups
    return rmsnorm_fn(y, weight, None, z=gate, eps=eps, group_size=width, norm_before_gate=False)


def backends():
    """{part: {backend: function}}; "torch" is first, and in float64 it is the judge."""
    parts = {"conv": {**CONV_BACKENDS}, "norm": {**NORM_BACKENDS}, "scan": {**SSD_BACKENDS}}
    if find_optional("causal_conv1d", "causal_conv1d_fn") is None:
        del parts["conv"]["causal_conv1d"]
    if find_optional("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined") is None:
        del parts["scan"]["mamba_ssm"]
    else:
        parts["norm"]["mamba_ssm"] = gated_norm_mamba_ssm
    return parts


def inputs(part, B, S, dtype, heads=H, groups=G):
    """Leaves as views of wide rows, and the arguments after them that have no gradient."""
    inner = heads * P
    conv = inner + 2 * groups * K
    wide = torch.randn(B, S, inner + conv + heads, device="cuda").to(dtype)

    def vector(*shape, dtype=dtype):
        return torch.randn(*shape, device="cuda").to(dtype)

    if part == "conv":
        leaves = wide[..., inner : inner + conv], vector(conv, WIDTH) / 2, vector(conv) / 2, vector(B, WIDTH - 1, conv)
        rest = ()
    elif part == "norm":
        leaves, rest = (vector(B, S, inner), wide[..., :inner], 1 + vector(inner) / 4), (groups, 1e-5)
    else:
        x, Bm, Cm = vector(B, S, conv).split([inner, groups * K, groups * K], -1)
        dt = F.softplus(wide[..., -heads:].float() - 3)
        A = -(1 + 15 * torch.rand(heads, device="cuda"))
        views = Bm.unflatten(-1, (groups, K)), Cm.unflatten(-1, (groups, K))
        state = vector(B, heads, P, K, dtype=torch.float32)
        leaves = x.unflatten(-1, (heads, P)), dt, A, *views, vector(heads, dtype=torch.float32), state
        rest = (CHUNK,)
    return [t.detach().requires_grad_() for t in leaves], rest


def results(function, leaves, rest, weights):
    outputs = function(*leaves, *rest)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum((out * weight.to(out.dtype)).sum(dtype=torch.float64) for out, weight in zip(outputs, weights))
    return [*outputs, *torch.autograd.grad(loss, leaves)]


NAMES = {
    "conv": ["y", "dx", "dweight", "dbias", "dstate"],
    "norm": ["y", "dy", "dgate", "dweight"],
    "scan": ["y", "state", "dx", "ddt", "dA", "dB", "dC", "dD", "dstate"],
}


def check(part, name, function, S, dtype, groups):
    """{result: relative error}; memory that is handed out next is poisoned, so that what is not written shows."""
    torch.manual_seed(S)
    leaves, rest = inputs(part, 2, S, dtype, heads=8, groups=groups)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    judge = backends()[part]["torch"]
    outputs = judge(*exact, *rest)
    weights = [torch.randn_like(out) for out in (outputs if isinstance(outputs, tuple) else (outputs,))]
    expected = results(judge, exact, rest, weights)
    poison = torch.full((2**26,), float("nan"), device="cuda")
    del poison
    actual = results(function, leaves, rest, weights)
    errors = {}
    for label, a, b in zip(NAMES[part], actual, expected):
        errors[label] = ((a.double() - b).norm() / b.norm().clamp(min=1e-12)).item()
    return errors


def check_all(parts):
    rows, wrong = [], 0
    for part, choices in parts.items():
        for name, function in choices.items():
            for dtype in TOLERANCE:
                tolerance = TF32_TOLERANCE if (name, dtype) == ("mamba_ssm", torch.float32) else TOLERANCE[dtype]
                worst = {}
                for S in CHECK_LENGTHS:
                    for groups in (1,) if S != 513 else (1, 2):
                        try:
                            errors = check(part, name, function, S, dtype, groups)
                        except Exception as error:  # one backend's failure must not hide the others
                            errors = {f"{type(error).__name__}: {str(error)[:300]}": float("nan")}
                        for label, error in errors.items():
                            if not error <= worst.get(label, (0.0,))[0]:
                                worst[label] = error, S
                bad = sorted(label for label, (error, _) in worst.items() if not error < tolerance)
                wrong += bool(bad) and name not in ("mamba_ssm", "causal_conv1d")
                rows.append({"part": part, "backend": name, "dtype": str(dtype), "worst": worst, "wrong": bad})
                listed = " ".join(f"{label} {error:.0e}" for label, (error, _) in worst.items())
                print(f"{'WRONG' if bad else 'ok   '} {part:4} {name:13} {str(dtype)[6:]:8} {listed}", flush=True)
    return rows, wrong


def median_ms(function, repeats=20):
    """CUDA events around each call; the calls queue up behind writes that empty the L2, so launches are not timed."""
    flush = torch.empty(2**29, dtype=torch.int8, device="cuda")
    for _ in range(2):
        function()
    events = []
    for _ in range(repeats):
        for _ in range(4):
            flush.zero_()
        events.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
        events[-1][0].record()
        function()
        events[-1][1].record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def ceilings():
    source = torch.randn(2**29, device="cuda").bfloat16()
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / median_ms(lambda: target.copy_(source)) * 1e3
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    return copy, 2 * 8192**3 / median_ms(lambda: a @ b) * 1e3


def floors(S, copy, matrix):
    """ms forward, and forward + backward. The scan's operations are for chunks of 128, causal half only."""
    row = S * 2 / copy * 1e3  # ms to move one bf16 number of every token
    pairs, states = S * H * 128 * P / matrix * 1e3, 2 * S * H * P * K / matrix * 1e3
    projections = row * (2 * G * K + 2 * H)
    return {
        "conv": (2 * CONV * row, 5 * CONV * row),
        "norm": (3 * INNER * row, 8 * INNER * row),
        "scan": (
            max(2 * INNER * row + projections, pairs + 2 * states),
            max(5 * INNER * row + 3 * projections, 3 * pairs + 7 * states),
        ),
    }


def show(row):
    times = (f"{row[key]:9.3f}" for key in row if key.endswith("_ms"))
    print(f"{row['part']:6} {row['backend']:14}", *times, flush=True)


def time_all(parts, S, copy, matrix):
    rows, floor = [], floors(S, copy, matrix)
    for part, choices in parts.items():
        leaves, rest = inputs(part, 1, S, torch.bfloat16)
        for name, function in choices.items():

            def forward(function=function, leaves=leaves, rest=rest):
                with torch.no_grad():
                    out = function(*leaves, *rest)
                return out

            def both(function=function, leaves=leaves, rest=rest, dy=None):
                outputs = function(*leaves, *rest)
                outputs = outputs[0] if isinstance(outputs, tuple) else outputs
                return torch.autograd.grad(outputs, leaves, dy)

            out = forward()
            dy = torch.randn_like(out[0] if isinstance(out, tuple) else out)
            del out
            ms = median_ms(forward), median_ms(lambda both=both, dy=dy: both(dy=dy))
            rows.append({"part": part, "backend": name, "forward_ms": ms[0], "forward_backward_ms": ms[1]})
            rows[-1] |= {"forward_floor_ms": floor[part][0], "forward_backward_floor_ms": floor[part][1]}
            print(
                f"{part:6} {name:14} {ms[0]:8.3f} {floor[part][0]:8.3f} {ms[1]:9.3f} {floor[part][1]:8.3f}", flush=True
            )
            torch.cuda.empty_cache()
    for label in ("torch", "triton", "best"):
        row = {"part": "sum", "backend": label}
        for key in [key for key in rows[0] if key.endswith("_ms")]:
            chosen = [r for r in rows if label in ("best", r["backend"]) and r["part"] in parts]
            row[key] = sum(min(r[key] for r in chosen if r["part"] == part) for part in parts)
        show(row)
        rows.append(row)
    return rows


def profile(S):
    """GPU time of each kernel of the Triton backends, forward and backward."""
    table = {}
    for part, choices in backends().items():
        leaves, rest = inputs(part, 1, S, torch.bfloat16)

        def both(function=choices["triton"], leaves=leaves, rest=rest):
            outputs = function(*leaves, *rest)
            outputs = outputs[0] if isinstance(outputs, tuple) else outputs
            torch.autograd.grad(outputs, leaves, torch.ones_like(outputs))

        both()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
            for _ in range(5):
                both()
            torch.cuda.synchronize()
        for event in recorded.key_averages():
            if event.self_device_time_total / 5000 >= 0.005:
                label = f"{part} {event.key[:60]}"
                table[label] = event.self_device_time_total / 5000, event.count // 5
                print(f"{label:70} {table[label][0]:7.3f} ms in {table[label][1]}")
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="write the results as JSON")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--profile", action="store_true", help="also print the time of each kernel")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device")
    import triton

    torch.manual_seed(0)
    started = time.perf_counter()
    parts = backends()
    report = {
        "command": " ".join(sys.argv),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
    }
    report["checks"], wrong = check_all(parts)
    print(f"checked in {time.perf_counter() - started:.0f} s")
    copy, matrix = ceilings()
    report |= {"copy_bytes_per_s": copy, "matrix_flop_per_s": matrix, "tokens": arguments.tokens}
    print(f"{report['gpu']}: copy {copy / 1e12:.2f} TB/s, bf16 matrix product {matrix / 1e12:.0f} TFLOP/s")
    titles = (f"{title:>9}" for title in ("forward", "+backward", "floor", "floor"))
    print(f"{'part':6} {'backend':14}", *titles, f" ms, {arguments.tokens} tokens")
    if not wrong:
        report["times"] = time_all(parts, arguments.tokens, copy, matrix)
        if arguments.profile:
            report["kernels"] = profile(arguments.tokens)
    print(f"{time.perf_counter() - started:.0f} s in all")
    if arguments.out:
        with open(arguments.out, "w") as file:
            json.dump(report, file, indent=1)
    if wrong:
        sys.exit(f"{wrong} of our backends are wrong: not timed")


if __name__ == "__main__":
    main()
