"""`make hub`: a repository that Hugging Face's `kernels` loads, build/hub, from the wheels in a folder.

One wheel for each Python: the name of `_C` has the Python's version, and all other files are the same. `_C` knows no
torch, so the variant is the one for every PyTorch from the oldest on, called after its stable ABI.
"""

import argparse
import email
import json
import re
import shutil
import zipfile
from pathlib import Path

parser = argparse.ArgumentParser(prog="hub.py", description=__doc__)
parser.add_argument("wheels", type=Path, help="the folder that has them")
parser.add_argument("backend", help="cpu, or the CUDA that they are built with: cu130 for 13.0")
arguments = parser.parse_args()
if not re.fullmatch(r"cpu|cu\d{3}", arguments.backend):
    parser.error(f"backend must be cpu or as cu130, got {arguments.backend}")

wheels = sorted(arguments.wheels.glob("*.whl"))
kinds = {(name.split("-")[1], name.split("-")[-1]) for name in (wheel.stem for wheel in wheels)}
if len(kinds) != 1:
    parser.error(f"wheels must be of one version and one platform, {arguments.wheels} has {sorted(kinds) or 'none'}")

repository = Path("build/hub")
shutil.rmtree(repository, ignore_errors=True)
for wheel in wheels:
    name, version, *_, platform = wheel.stem.split("-")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(repository, [file for file in archive.namelist() if file.startswith("ewa_kernels/")])
        about = email.message_from_bytes(archive.read(f"{name}-{version}.dist-info/METADATA"))

torch = re.search(r"torch>=(\d+)\.(\d+)", " ".join(about.get_all("Requires-Dist")))
machine = re.fullmatch(r"manylinux_\d+_\d+_(\w+)", platform.split(".")[0])
variant = repository / "build" / f"torch-stable-abi{torch[1]}{torch[2]}-{arguments.backend}-{machine[1]}-linux"
variant.parent.mkdir()
(repository / "ewa_kernels").rename(variant)
metadata = {
    "id": f"_{name}_{version}_{arguments.backend}".replace(".", "_"),  # the name of the module
    "name": about["Name"],
    "version": int(version.split(".")[0]),
    "kernels-minver": "0.17.0",
    "license": about["License-Expression"],
    "python-depends": [],
    "backend": {"type": "cpu" if arguments.backend == "cpu" else "cuda"},
}
(variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
print(variant)
