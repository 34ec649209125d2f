"""timm's own model tests, from the source distribution of the timm release in use.

They are fetched from the package registry when they are needed and kept in ``.cache/``, outside version control.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import timm

CACHE = Path(__file__).resolve().parents[2] / ".cache"
FILES = ("test_models.py", "conftest.py")


class FetchError(RuntimeError):
    """The source distribution can't be had, or does not carry the tests."""


def fetch(cache: Path = CACHE) -> Path:
    """The folder with timm's ``test_models.py`` and nothing else of timm; downloads it on the first call.

    Safe for several processes at once: each unpacks into a folder of its own, and a rename publishes a complete one.

    Raises:
        FetchError: with pip's own words where the download fails.
    """
    target = cache / f"timm-{timm.__version__}-tests"
    if all((target / name).is_file() for name in FILES):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as folder:
        sdist = _download(Path(folder) / "sdist")
        unpacked = Path(folder) / "tests"
        unpacked.mkdir()
        with tarfile.open(sdist) as archive:
            for name in FILES:
                # timm/ must not stand beside its tests: they would import it instead of the installed one
                member = f"timm-{timm.__version__}/tests/{name}"
                try:
                    source = archive.extractfile(member)
                except KeyError:
                    raise FetchError(f"{sdist.name} does not carry tests/{name}: timm's layout changed") from None
                with source, open(unpacked / name, "wb") as file:
                    shutil.copyfileobj(source, file)
        try:
            os.rename(unpacked, target)
        except OSError:
            if not all((target / name).is_file() for name in FILES):  # not merely somebody who was faster
                raise
    return target


def _download(folder: Path) -> Path:
    requirement = f"timm=={timm.__version__}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "timm", "--dest", str(folder)]
    # pip builds the metadata of what it downloads, with timm's build backend: its own copy of it, else ours if any
    for isolation in ([], ["--no-build-isolation"]):
        run = subprocess.run(
            [*command, *isolation, requirement], stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        found = sorted(folder.glob("timm-*.tar.gz"))
        if run.returncode == 0 and found:
            return found[0]
    raise FetchError(f"pip could not download the source distribution of {requirement}:\n{run.stderr.strip()}")


if __name__ == "__main__":
    print(fetch())
