"""Mamba-2's convolution, gated norm and scan on one GPU: every backend checked against float64, then timed.

    python benchmarks/mamba2_kernels.py [--out results.json] [--tokens 16384] [--profile]

Sizes are the 7B's, bf16; x, B, C, z and dt are views of one in_proj output, as in the model. Beside each time stands
its floor: bytes that must move at the measured copy rate, or operations at the measured matrix rate, if those are more.
Exits with 1 if any output or gradient of any backend is wrong. Backends that are not installed are left out.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import triton
from torch.nn import functional as F

from vamba.bench.clock import kernels_of, machine, measure_rates, seconds_of
from vamba.modeling.kernels import find_optional
from vamba.modeling.mamba2 import CONV_BACKENDS, NORM_BACKENDS, SSD_BACKENDS


DEVICE = torch.device("cuda")
H, P, G, K, WIDTH, CHUNK = 112, 64, 1, 128, 4, 256  # the 7B's
INNER, CONV = H * P, H * P + 2 * G * K
ROW = INNER + CONV + H  # in_proj's output: z, x, B, C, dt
CHECKED = [(1, 1), (37, 1), (513, 1), (513, 2), (1000, 1), (2048, 1)]  # tokens, groups
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
TIMED = ("forward", "forward_backward")
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
    wide = torch.randn(B, S, inner + conv + heads, device=DEVICE).to(dtype)

    def vector(*shape, dtype=dtype):
        return torch.randn(*shape, device=DEVICE).to(dtype)

    if part == "conv":
        leaves = wide[..., inner : inner + conv], vector(conv, WIDTH) / 2, vector(conv) / 2, vector(B, WIDTH - 1, conv)
        rest = ()
    elif part == "norm":
        leaves, rest = (vector(B, S, inner), wide[..., :inner], 1 + vector(inner) / 4), (groups, 1e-5)
    else:
        x, Bm, Cm = vector(B, S, conv).split([inner, groups * K, groups * K], -1)
        dt = F.softplus(wide[..., -heads:].float() - 3)
        A = -(1 + 15 * torch.rand(heads, device=DEVICE))
        views = Bm.unflatten(-1, (groups, K)), Cm.unflatten(-1, (groups, K))
        state = vector(B, heads, P, K, dtype=torch.float32)
        leaves = x.unflatten(-1, (heads, P)), dt, A, *views, vector(heads, dtype=torch.float32), state
        rest = (CHUNK,)
    return [t.detach().requires_grad_() for t in leaves], rest


NAMES = {
    "conv": ["y", "dx", "dweight", "dbias", "dstate"],
    "norm": ["y", "dy", "dgate", "dweight"],
    "scan": ["y", "state", "dx", "ddt", "dA", "dB", "dC", "dD", "dstate"],
}


def outputs_of(function, leaves, rest):
    outputs = function(*leaves, *rest)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def results(function, leaves, rest, weights):
    """The outputs, and the gradients of their weighted sum."""
    outputs = outputs_of(function, leaves, rest)
    loss = sum((out * weight.to(out.dtype)).sum(dtype=torch.float64) for out, weight in zip(outputs, weights))
    return [*outputs, *torch.autograd.grad(loss, leaves)]


def check(part, judge, function, S, dtype, groups):
    """{result: relative error}; memory that is handed out next is poisoned, so that what is not written shows."""
    torch.manual_seed(S)
    leaves, rest = inputs(part, 2, S, dtype, heads=8, groups=groups)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    weights = [torch.randn_like(out) for out in outputs_of(judge, exact, rest)]
    expected = results(judge, exact, rest, weights)
    poison = torch.full((2**26,), float("nan"), device=DEVICE)
    del poison
    actual = results(function, leaves, rest, weights)
    return {
        label: ((a.double() - b).norm() / b.norm().clamp(min=1e-12)).item()
        for label, a, b in zip(NAMES[part], actual, expected)
    }


def check_all(parts):
    """The worst error of each result of each backend over all lengths, and how many of ours are wrong."""
    cases = [(part, name, dtype) for part in parts for name in parts[part] for dtype in TOLERANCE]
    rows, wrong = [], 0
    for part, name, dtype in cases:
        tolerance = TF32_TOLERANCE if (name, dtype) == ("mamba_ssm", torch.float32) else TOLERANCE[dtype]
        worst = {}
        for S, groups in CHECKED:
            try:
                errors = check(part, parts[part]["torch"], parts[part][name], S, dtype, groups)
            except Exception as error:  # one backend's failure must not hide the others
                errors = {f"{type(error).__name__}: {str(error)[:300]}": math.nan}
            for label, error in errors.items():
                if not error <= worst.get(label, -1):  # NaN is worse than any number
                    worst[label] = error
        bad = sorted(label for label, error in worst.items() if not error < tolerance)
        wrong += bool(bad) and name not in ("mamba_ssm", "causal_conv1d")
        rows.append({"part": part, "backend": name, "dtype": str(dtype), "worst": worst, "wrong": bad})
        listed = " ".join(f"{label} {error:.0e}" for label, error in worst.items())
        print(f"{'WRONG' if bad else 'ok   '} {part:4} {name:13} {str(dtype)[6:]:8} {listed}", flush=True)
    return rows, wrong


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


def milliseconds(function):
    """The calls queue up behind writes that empty the L2, so launches are not timed."""
    flush = torch.empty(2**29, dtype=torch.int8, device=DEVICE)

    def empty():
        for _ in range(4):
            flush.zero_()

    return 1e3 * seconds_of(function, DEVICE, repeats=20, before=empty)


def time_backend(function, leaves, rest):
    """ms forward, and forward + backward."""

    @torch.no_grad()
    def forward():
        return outputs_of(function, leaves, rest)

    gradient = torch.randn_like(forward()[0])
    return milliseconds(forward), milliseconds(
        lambda: torch.autograd.grad(outputs_of(function, leaves, rest)[0], leaves, gradient)
    )


def time_all(parts, S, rates):
    rows, floor = [], floors(S, rates["copied_bytes_per_s"], rates["matrix_per_s"])
    for part, choices in parts.items():
        leaves, rest = inputs(part, 1, S, torch.bfloat16)
        for name, function in choices.items():
            times = {f"{what}_ms": ms for what, ms in zip(TIMED, time_backend(function, leaves, rest))}
            times |= {f"{what}_floor_ms": ms for what, ms in zip(TIMED, floor[part])}
            rows.append({"part": part, "backend": name, **times})
            show(rows[-1])
            torch.cuda.empty_cache()
    for label in ("torch", "triton", "best"):
        row, chosen = {"part": "sum", "backend": label}, [r for r in rows if label in ("best", r["backend"])]
        for key in times:
            row[key] = sum(min(r[key] for r in chosen if r["part"] == part) for part in parts)
        show(row)
        rows.append(row)
    return rows


def show(row):
    times = (f"{row[key]:9.3f}" for key in row if key.endswith("_ms"))
    print(f"{row['part']:6} {row['backend']:14}", *times, flush=True)


def profile(parts, S):
    """GPU time of each kernel of the Triton backends, forward and backward."""
    table = {}
    for part, choices in parts.items():
        leaves, rest = inputs(part, 1, S, torch.bfloat16)

        def both(function=choices["triton"], leaves=leaves, rest=rest):
            outputs = outputs_of(function, leaves, rest)[0]
            torch.autograd.grad(outputs, leaves, torch.ones_like(outputs))

        both()
        for row in kernels_of(both, DEVICE, calls=5):
            if row["ms"] >= 0.005:
                label = f"{part} {row['kernel'][:60]}"
                table[label] = row["ms"], row["calls"]
                print(f"{label:70} {row['ms']:7.3f} ms in {row['calls']}")
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--profile", action="store_true", help="also print the time of each kernel")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device")
    torch.manual_seed(0)
    started = time.perf_counter()
    parts, report = backends(), machine(DEVICE) | {"triton": triton.__version__}
    report["checks"], wrong = check_all(parts)
    print(f"checked in {time.perf_counter() - started:.0f} s")
    rates = measure_rates(DEVICE, torch.bfloat16)
    report |= {**rates, "tokens": arguments.tokens}
    copied, matrix = rates["copied_bytes_per_s"] / 1e12, rates["matrix_per_s"] / 1e12
    print(f"{report['device']}: copy {copied:.2f} TB/s, bf16 matrix product {matrix:.0f} TFLOP/s")
    titles = (f"{title:>9}" for title in ("forward", "+backward", "floor", "floor"))
    print(f"{'part':6} {'backend':14}", *titles, f" ms, {arguments.tokens} tokens")
    if not wrong:
        report["times"] = time_all(parts, arguments.tokens, rates)
        if arguments.profile:
            report["kernels"] = profile(parts, arguments.tokens)
    print(f"{time.perf_counter() - started:.0f} s in all")
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1))
    if wrong:
        sys.exit(f"{wrong} of our backends are wrong: not timed")


if __name__ == "__main__":
    main()
