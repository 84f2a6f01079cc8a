"""`orpo doctor`: what this machine has for training, tried where it can be tried, and how to get what is missing."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

from orpo_cli import __version__

DISTRIBUTION = "orpo-cli"
PYTHON = (3, 11)
GIB = 2**30
LITTLE_DISK = 10 * GIB
"""Free space below which a warning is due: a 7B model in bfloat16 takes 14 GiB."""
WRONG = 0.05
"""Relative error above which a result of half precision is not rounding any more."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `fails`: orpo cannot train; `lacks`: it can, all but something; `is`: a fact."""

    name: str
    state: Literal["ok", "is", "lacks", "fails"]
    what: str
    hint: str | None = None


def examine() -> Iterator[Finding]:
    """Everything, the cheap and the basic first; a finding that fails does not keep the others from being looked at."""
    yield Finding("orpo", "is", __version__)
    right = sys.version_info >= PYTHON
    wanted = ".".join(map(str, PYTHON))
    hint = None if right else f"install Python {wanted} or later"
    yield Finding("python", "ok" if right else "fails", platform.python_version(), hint)
    yield Finding("system", "is", f"{platform.system()} {platform.release()}, {platform.machine()}")
    yield from packages()
    yield from threads_and_memory()
    yield from devices()
    yield from disks_and_hub()


def report(findings: list[Finding]) -> str:
    """The findings as lines for people."""
    widest = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        state = "" if finding.state == "is" else finding.state
        lines.append(f"{state:<5}  {finding.name:<{widest}}  {finding.what}")
        if finding.hint:
            lines.append(f"{'':<{widest + 9}}{finding.hint}")
    return "\n".join(lines)


def as_json(findings: list[Finding]) -> dict[str, Any]:
    """The findings for programs."""
    return {"ok": not fails(findings), "findings": [asdict(finding) for finding in findings]}


def fails(findings: list[Finding]) -> bool:
    """Whether something is missing without which nothing can be trained."""
    return any(finding.state == "fails" for finding in findings)


# ---- packages


def packages() -> Iterator[Finding]:
    """The required packages and those of the extras, against what this release asks for."""
    try:
        requirements = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        yield Finding(DISTRIBUTION, "lacks", "not installed as a package", "pip install -c constraints.txt .")
        return
    for requirement in requirements:
        wanted, _, marker = (part.strip() for part in requirement.partition(";"))
        if extra := re.search(r"extra == ['\"](\w+)['\"]", marker):
            if extra[1] != "dev":
                yield package(wanted, f"for the extra {extra[1]}")
        else:
            yield package(wanted, None)


def package(requirement: str, use: str | None) -> Finding:
    """Whether `name>=1.2` is there; without it orpo fails, or `use` is lacking."""
    name, _, least = requirement.partition(">=")
    missing: Literal["lacks", "fails"] = "lacks" if use else "fails"
    why = f", {use}" if use else ""
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, missing, f"not installed{why}", f"pip install '{requirement}'")
    if _numbers(found) < _numbers(least):
        return Finding(name, missing, f"{found}, and {least} is needed{why}", f"pip install '{requirement}'")
    return Finding(name, "ok", found)


def _numbers(version_text: str) -> tuple[int, ...]:
    """`2.13.0+cpu` -> (2, 13, 0)."""
    return tuple(int(number) for number in re.findall(r"\d+", version_text.partition("+")[0])[:3])


# ---- the machine


def threads_and_memory() -> Iterator[Finding]:
    """Processors that this process may use, torch's threads on them, and main memory."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        import torch

        from orpo_cli.model.device import memory_limits
    except Exception as error:  # a broken installation may raise anything
        yield Finding("torch", "fails", f"cannot be imported: {_brief(error)}", "pip install -c constraints.txt torch")
        return
    used = torch.get_num_threads()
    too_many = used > usable
    yield Finding(
        "threads",
        "lacks" if too_many else "ok",
        f"{used} on {usable} processors, {torch.backends.cpu.get_cpu_capability()}",
        f"they wait for each other: set OMP_NUM_THREADS={usable}" if too_many else None,
    )
    total, free = min(memory_limits()), _available_memory()
    yield Finding("memory", "is", f"{_gib(total)}" + (f", {_gib(free)} free" if free is not None else ""))


def _available_memory() -> int | None:
    """Bytes that programs may still take (Linux)."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def devices() -> Iterator[Finding]:
    """Each device, with what it computes in rightly, tried on a small product; and 4-bit layers on the first one."""
    try:
        import torch
    except Exception:  # has been said
        return
    names = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    names += ["mps"] if torch.backends.mps.is_available() else []
    if not names and (nvidia := shutil.which("nvidia-smi")):
        what = f"torch {torch.__version__} finds no GPU, but there is {nvidia}"
        yield Finding("cuda", "lacks", what, "install a CUDA build of torch that suits the driver")
    for name in [*names, "cpu"]:
        device = torch.device(name)
        what = platform.processor() or platform.machine()
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            major, minor = torch.cuda.get_device_capability(device)
            what = f"{torch.cuda.get_device_name(device)}, compute {major}.{minor}, {_gib(total)}, {_gib(free)} free"
        yield Finding(name, "is", what)
        wrong = {dtype: error for dtype in ("float32", "bfloat16", "float16") if (error := product_error(name, dtype))}
        right = [dtype for dtype in ("float32", "bfloat16", "float16") if dtype not in wrong]
        yield Finding(f"{name} dtypes", "ok" if right else "fails", ", ".join(right) or "none")
        for dtype, error in wrong.items():
            yield Finding(f"{name} {dtype}", "lacks", error, f"choose another model.dtype than {dtype}")
    yield four_bit([*names, "cpu"][0])


def product_error(device: str, dtype: str) -> str | None:
    """What is wrong with a matrix product and its gradient in a dtype; None if nothing is."""
    import torch

    try:
        generator = torch.Generator().manual_seed(0)
        left, right = torch.randn(2, 64, 64, generator=generator)
        x = left.clone().to(device, getattr(torch, dtype)).requires_grad_()
        product = x @ right.to(device, getattr(torch, dtype))
        product.sum().backward()
        assert x.grad is not None
        for found, expected in ((product, left @ right), (x.grad, right.sum(1).expand(64, 64))):
            error = float((found.detach().float().cpu() - expected).norm() / expected.norm())
            if not error < WRONG:
                return f"a product is off by {error:.1%}"
    except Exception as error:  # whatever a driver raises
        return _brief(error)
    return None


def four_bit(device: str) -> Finding:
    """Whether 4-bit layers compute rightly, tried in another process: broken kernels kill theirs."""
    code = f"from orpo_cli.doctor import four_bit_error; print(four_bit_error({device!r}))"
    hint = "pip install -U bitsandbytes; without it train unquantised"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("4-bit", "lacks", f"on {device}: {_brief(error)}", hint)
    lines = done.stderr.strip().splitlines()
    if done.returncode != 0 or not done.stdout.strip():
        return Finding("4-bit", "lacks", f"on {device}: {lines[-1] if lines else f'exit code {done.returncode}'}", hint)
    off = float(done.stdout.split()[-1])
    if not off < WRONG:
        return Finding("4-bit", "lacks", f"on {device}: a product is off by {off:.1%}", hint)
    return Finding("4-bit", "ok", f"NF4 on {device}, forward and backward")


def four_bit_error(device: str) -> float:
    """The greatest relative error of an NF4 layer's output and input gradient against its own weights unpacked."""
    import bitsandbytes as bnb
    import torch

    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer = layer.to(device)
    weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().cpu()
    x = torch.randn(8, 128).to(device, torch.bfloat16).requires_grad_()
    output = layer(x)
    output.sum().backward()
    assert x.grad is not None
    pairs = ((output, x.detach().float().cpu() @ weight.T), (x.grad, weight.sum(0).expand(8, 128)))
    return max(float((a.detach().float().cpu() - b).norm() / b.norm()) for a, b in pairs)


# ---- disks and hub


def disks_and_hub() -> Iterator[Finding]:
    """Room for runs and for downloads, and how the hub would be reached. A token's value is never looked at."""
    yield _disk("disk here", Path.cwd(), "runs are written here; --output-dir names another place")
    try:
        import huggingface_hub
        from huggingface_hub import constants
    except Exception as error:
        what = f"huggingface_hub cannot be imported: {_brief(error)}"
        yield Finding("hub", "fails", what, "pip install huggingface_hub")
        return
    cache = Path(constants.HF_HUB_CACHE)
    yield _disk("hub cache", cache, "set HF_HOME to a place with more room")
    offline = constants.HF_HUB_OFFLINE
    yield Finding(
        "hub", "is", "offline: only what is in the cache" if offline else "online, where the cache has it not"
    )
    has_token = huggingface_hub.get_token() is not None
    token = "there is one" if has_token else "none; gated models need one (hf auth login, or HF_TOKEN)"
    yield Finding("hub token", "is", token)


def _disk(name: str, path: Path, hint: str) -> Finding:
    there = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK):
        return Finding(name, "fails", f"{path}: cannot be written to", hint)
    little = free < LITTLE_DISK
    return Finding(name, "lacks" if little else "ok", f"{path}: {_gib(free)} free", hint if little else None)


def _gib(count: int) -> str:
    return f"{count / GIB:,.1f} GiB"


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:150] if lines else ''}".removesuffix(": ")
