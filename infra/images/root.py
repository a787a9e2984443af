"""A file tree under construction, in which commands run as root of the tree, without a container."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from infra.images.layers import MODIFIED

BUILD = "build"
"""Folder of the tree for what only the build needs; no layer has it."""
EMPTY = ("dev", "proc", "sys", "run", "tmp", BUILD)
"""Folders whose contents are of a running machine."""
LEFT_OUT = ("usr/share/man", "usr/share/locale", "usr/share/info")
"""Of the base; the licences in `usr/share/doc` stay."""
MERGED_USR = "/usr/share/mmdebstrap/hooks/merged-usr"
"""Makes `/bin` and its like links; without it, a package that does so brings Perl into the image."""
USER, USER_ID, HOME = "tessera", 10001, "home/tessera"
PATH = "/opt/tessera/bin:/usr/bin:/bin"
SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"

Stamp = tuple[int, int, int]


class Root:
    """A tree that starts as the base system."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install_base(self, suite: str, packages: Sequence[str]) -> None:
        """Fill the tree with Debian's essential packages and others, with its security updates; no apt is in it."""
        # A mount namespace: what mmdebstrap mounts in the tree cannot be deleted with a tree that is left half done.
        command = ["unshare", "--mount", "mmdebstrap", "--mode=root", "--variant=essential", "--format=directory"]
        command += [f"--hook-dir={MERGED_USR}", f"--include={','.join(packages)}", "--quiet", suite]
        environment = {**os.environ, "SOURCE_DATE_EPOCH": str(MODIFIED), "PATH": SYSTEM_PATH}
        subprocess.run([*command, str(self.folder)], check=True, env=environment)
        for name in LEFT_OUT:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for file, line in (("passwd", f"{USER}:x:{USER_ID}:{USER_ID}::/{HOME}:/usr/sbin/nologin"), ("group", "")):
            with (self.folder / "etc" / file).open("a") as stream:
                stream.write(f"{line or f'{USER}:x:{USER_ID}:'}\n")
        (self.folder / HOME).mkdir()
        os.chown(self.folder / HOME, USER_ID, USER_ID)
        for folder in list(self.folder.glob("usr/lib/python3*/**/__pycache__")):
            shutil.rmtree(folder)
        self.compile(str(path.relative_to(self.folder)) for path in self.folder.glob("usr/lib/python3*/**/*.py"))

    def run(self, *command: str, mounts: Mapping[str, Path] | None = None, standard_input: str | None = None) -> None:
        """Run a command in the tree, in a mount namespace of its own.

        Args:
            command: program and arguments.
            mounts: what of this machine the command sees, by its name in the folder `BUILD`.
            standard_input: text for the command.
        """
        folder = self.folder / BUILD
        folder.mkdir(exist_ok=True)
        script = ["set -e"]
        seen = {folder / name: source.resolve() for name, source in (mounts or {}).items()}
        for inside in ("dev", "proc", "etc/resolv.conf", "etc/ssl/certs"):
            seen[self.folder / inside] = Path("/", inside).resolve()
        added = [target for target in seen if not target.exists()]
        for target, source in seen.items():
            target.mkdir(exist_ok=True) if source.is_dir() else target.touch()
            script.append(f"mount --bind '{source}' '{target}'")
        script.append('exec chroot "$@"')
        whole = ["unshare", "--mount", "sh", "-c", "\n".join(script), "sh", str(self.folder), *command]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        environment = {**kept, "PATH": SYSTEM_PATH, "HOME": "/tmp", "PYTHONHASHSEED": "0", "LANG": "C.UTF-8"}
        try:
            subprocess.run(whole, check=True, env=environment, input=standard_input, text=True)
        finally:
            for target in added:
                target.rmdir() if target.is_dir() else target.unlink()

    def compile(self, paths: Iterator[str]) -> None:
        """Compile Python files to bytecode that names no time, and is not compared with its source at start."""
        command = ("python3", "-m", "compileall", "-qq", "--invalidation-mode", "unchecked-hash", "-i", "-")
        listed = "".join(f"/{path}\n" for path in sorted(paths))
        try:
            self.run(*command, standard_input=listed)
        except subprocess.CalledProcessError as error:
            if error.returncode != 1:  # some packages have templates that are not Python 3
                raise

    def paths(self, below: str = "") -> dict[str, Stamp]:
        """What is in the tree, by path, with what shows that a file was changed."""
        found: dict[str, Stamp] = {}
        for folder, folders, files in os.walk(self.folder / below):
            inside = Path(folder).relative_to(self.folder)
            if str(inside) in EMPTY:
                folders.clear()
                continue
            for name in (*folders, *files):
                status = os.lstat(Path(folder, name))
                found[str(inside / name)] = (status.st_mtime_ns, status.st_size, status.st_mode)
        found.pop(BUILD, None)
        return found
