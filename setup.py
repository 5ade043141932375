"""Builds effkern's native libraries. Metadata lives in pyproject.toml; no file here names an op.

`_C.so`       csrc/*/*.cpp: LibTorch stable ABI, runs on any torch from 2.10.
`_C_cuda.so`  csrc/*/*.cu and *_cuda.cpp: the same for CUDA, built when nvcc is found (EFFKERN_CUDA=auto|0|1).
`_host`       csrc/host/: pybind11 module for host-side work on NumPy arrays.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
BUILDS = {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"} & set(sys.argv)
# Oldest torch the libraries run on (major, minor as two bytes): see torch/csrc/stable/version.h.
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
ARCHS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
CXX = [
    "-O3",
    "-std=c++20",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",  # vectors wider than the baseline's registers never cross a function boundary of ours
    "-ffp-contract=fast",  # a * b + c is one FMA where the instruction set has it
    "-fvisibility=hidden",
    f"-ffile-prefix-map={ROOT}=.",
]


def sources(pattern: str, leave_out: tuple[str, ...] = ("host", "tests")) -> list[str]:
    found = sorted(p.relative_to(ROOT) for p in ROOT.glob(pattern))
    return [str(p) for p in found if p.parts[1] not in leave_out and not p.stem.endswith("_cuda")]


def cuda_sources() -> list[str]:
    """Kernels, the host code of their ops, and the checks that both libraries share."""
    host = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*_cuda.cpp"))
    return [*sources("csrc/*/*.cu"), *host, "csrc/common/arguments.cpp", "csrc/sliced_conv/slice.cpp"]


def cuda_home() -> str | None:
    places = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):  # may be a wrapper script far from the toolkit
        places.append(str(Path(nvcc).resolve().parent.parent))
    return next((p for p in places if p and (Path(p) / "include/cuda_runtime.h").exists()), None)


def cuda_archs(home: str) -> str:
    """The default architectures this nvcc knows; the newest also as PTX for cards yet to come."""
    listing = subprocess.run([f"{home}/bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = {line.removeprefix("compute_") for line in listing.split()}
    archs = [a for a in ARCHS if a.replace(".", "") in known]
    return ";".join(archs) + "+PTX"


def cuda_choice() -> tuple[str | None, str]:
    """Where the CUDA toolkit is, or None, and the line that says why."""
    wish = os.environ.get("EFFKERN_CUDA", "auto").lower()
    if wish not in {"auto", "0", "1"}:
        raise SystemExit(f"EFFKERN_CUDA must be auto, 0 or 1, got {wish!r}")
    home = cuda_home()
    if wish == "0":
        return None, "effkern: no CUDA library (EFFKERN_CUDA=0)"
    if home is None:
        if wish == "1":
            raise SystemExit("EFFKERN_CUDA=1, but no CUDA toolkit was found: put nvcc on PATH or set CUDA_HOME")
        return None, "effkern: no CUDA library (EFFKERN_CUDA=auto and no nvcc found)"
    if not sources("csrc/*/*.cu"):
        return None, "effkern: no CUDA library (no CUDA sources)"
    return home, f"effkern: CUDA library with the toolkit in {home} (EFFKERN_CUDA={wish})"


def extensions() -> list:
    try:
        from torch.utils import cpp_extension as ce
    except ImportError:
        raise SystemExit(
            "effkern compiles against the torch you have and found none.\n"
            "  pip install torch && pip install --no-build-isolation effkern"
        ) from None
    try:
        from pybind11 import get_include
    except ImportError:
        raise SystemExit(
            "effkern compiles with pybind11 and found none (without build isolation nothing is fetched).\n"
            "  pip install 'pybind11>=2.12' ninja numpy && pip install --no-build-isolation effkern"
        ) from None

    exts = [
        ce.CppExtension(
            "effkern._C",
            sources("csrc/*/*.cpp"),
            py_limited_api=True,
            extra_compile_args={"cxx": [*CXX, TARGET]},
        )
    ]
    host = sources("csrc/host/*.cpp", leave_out=())
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        print("effkern: no _host module (no Python.h here): k-means and packing run in Python", file=sys.stderr)
    elif host:
        exts.append(
            ce.CppExtension("effkern._host", host, include_dirs=[get_include()], extra_compile_args={"cxx": CXX})
        )
    home, why = cuda_choice()
    print(why, file=sys.stderr)
    if home:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", cuda_archs(home))
        ce.CUDA_HOME = home  # torch's CPU wheel leaves it None
        exts.append(
            ce.CppExtension(
                "effkern._C_cuda",
                cuda_sources(),
                py_limited_api=True,
                include_dirs=[f"{home}/include"],
                library_dirs=[f"{home}/lib64"],
                libraries=["cudart_static", "dl", "rt", "pthread"],
                # libtorch.so brings libtorch_cuda.so where torch has one; scope.h asks it for one weak symbol.
                extra_link_args=["-Wl,--no-as-needed", "-ltorch"],
                extra_compile_args={
                    "cxx": [*CXX, TARGET],
                    "nvcc": [
                        "-O3",
                        "-std=c++20",
                        TARGET,
                        "-DUSE_CUDA",
                        f"-Xcompiler=-ffile-prefix-map={ROOT}=.",
                    ],
                },
            )
        )
    return exts


def build_command() -> type:
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def get_ext_filename(self, name: str) -> str:
            self.no_python_abi_suffix = name.split(".")[-1] != "_host"  # only _host uses CPython's own ABI
            return super().get_ext_filename(name)

        def build_extension(self, ext: object) -> None:
            # A torch without CUDA does not have nvcc tell ninja which headers it read.
            headers = [p.stat().st_mtime for p in ROOT.glob("csrc/**/*.*h")]
            for source in (s for s in ext.sources if s.endswith(".cu")):
                built = Path(self.build_temp) / Path(source).with_suffix(".o")
                if built.exists() and built.stat().st_mtime < max(headers):
                    built.unlink()
            super().build_extension(ext)

        def get_export_symbols(self, ext: object) -> list[str]:
            return []  # _C has no PyInit_: it is loaded by torch.ops.load_library, not imported

    return Build


setup(
    ext_modules=extensions() if BUILDS else [],
    cmdclass={"build_ext": build_command()} if BUILDS else {},
    package_data={"effkern": ["py.typed", "*.pyi", "recipes/*/*.toml"]},
)
