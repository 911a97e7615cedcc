"""Which libraries take part, and how those that are not ours get into an environment of their own."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

LIBFM = "https://github.com/srendle/libfm"
INSTALL_SECONDS = 1800
MODELS = ("nfm", "ifm", "afm", "fm")


@dataclass(frozen=True, kw_only=True)
class Library:
    """What `benchmarks/peers/<script>` trains, with the interpreter that it needs."""

    name: str
    script: str
    models: tuple[str, ...] = MODELS
    python: Path = Path(sys.executable)
    program: str = ""
    precision: str = "float32"


OURS = Library(name="factorlens", script="with_factorlens.py")


def libraries(environment: Path, device: str) -> list[Library]:
    """Ours first, then those that are to be had; the others are named, with the reason."""
    python = environment / "bin" / "python"
    if not python.exists():
        _must(_error_of(sys.executable, "-m", "venv", environment), "the peers' environment")
    # The same torch for all, and first: a peer must not choose another.
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    _must(_error_of(*pip, f"torch=={torch.__version__.partition('+')[0]}"), "torch for the peers")
    _must(_error_of(*pip, "deepctr-torch==0.3.0"), "DeepCTR-Torch")
    found = [OURS]
    if device == "cuda":
        found.append(Library(name="in bfloat16", script=OURS.script, precision="bfloat16"))
    found.append(Library(name="DeepCTR-Torch", script="with_deepctr.py", models=("nfm", "ifm", "afm"), python=python))
    if _had(_error_of(*pip, "fuxictr==2.3.10"), "FuxiCTR"):
        found.append(Library(name="FuxiCTR", script="with_fuxictr.py", models=("nfm", "afm"), python=python))
    if device == "cuda":
        print("without libFM, which has no GPU path\n")
    elif program := _libfm(environment / "libfm"):
        found.append(Library(name="libFM", script="with_libfm.py", models=("fm",), program=program))
    return [*found, Library(name="plain PyTorch", script="with_pytorch.py")]


def last_lines(text: str) -> str:
    return "\n".join("    " + line for line in text.strip().splitlines()[-5:])


def _libfm(source: Path) -> str:
    """Its program, built where it is not there yet; nothing where it cannot be had."""
    program = source / "bin" / "libFM"
    had = program.exists() or _had(
        _error_of("git", "clone", "--quiet", "--depth", "1", LIBFM, source) or _error_of("make", "-C", source), "libFM"
    )
    return str(program) if had else ""


def _error_of(*command: str | Path) -> str:
    """Run an installer; what it said in the end where it failed, else nothing."""
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except subprocess.CalledProcessError as error:
        return last_lines(error.stderr or error.stdout) or f"exit status {error.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return ""


def _had(error: str, what: str) -> bool:
    if error:
        print(f"without {what}, which could not be installed:\n{error}\n")
    return not error


def _must(error: str, what: str) -> None:
    if error:
        raise SystemExit(f"{what} could not be installed:\n{error}")
