"""The part of Dockerfiles that Dockerfile.dev uses, read and, in a bare Debian, done."""

import json
import re
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from tests.deploy.debian import Root

KNOWN = {"FROM", "RUN", "USER", "WORKDIR", "ENV", "COPY", "EXPOSE", "HEALTHCHECK", "CMD"}


@dataclass(frozen=True)
class Instruction:
    """One instruction: its name, what stands behind it, and the line on which it begins."""

    name: str
    text: str
    line: int

    def __str__(self) -> str:
        return f"{self.name} {self.text}"

    def flags(self) -> tuple[dict[str, str], list[str]]:
        """Leading --name=value, and the words behind."""
        words = shlex.split(self.text)
        n_flags = next((i for i, word in enumerate(words) if not word.startswith("--")), len(words))
        return dict(word[2:].split("=", 1) for word in words[:n_flags]), words[n_flags:]

    def command(self) -> list[str]:
        """The words of an exec form, or a shell with the shell form."""
        text = self.text[self.text.index("[") :] if self.name == "HEALTHCHECK" else self.text
        return list(json.loads(text)) if text.startswith("[") else ["/bin/sh", "-c", text]


def parse(text: str) -> list[Instruction]:
    """The instructions of a Dockerfile. Raises ValueError for one that is not known here."""
    found, words, first = [], "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("#") or (not line.strip() and not words):
            continue
        first = first if words else number
        words += line.strip().removesuffix("\\")
        if line.rstrip().endswith("\\"):
            continue
        name, _, rest = words.partition(" ")
        if name not in KNOWN:
            raise ValueError(f"line {first}: {name} is not known here")
        found.append(Instruction(name, rest.strip(), first))
        words = ""
    return found


def ignored(patterns: list[str], path: Path) -> bool:
    """Whether .dockerignore keeps `path`, relative to the context, out: by a pattern for it or a folder above."""
    for pattern in patterns:
        anywhere = pattern.startswith("**/")
        for part in (path, *path.parents):
            name = part.name if anywhere else str(part)
            if fnmatchcase(name, pattern.removeprefix("**/")):
                return True
    return False


def ignore_patterns(text: str) -> list[str]:
    """The lines of a .dockerignore. Raises ValueError for what `ignored` does not know."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    for line in lines:
        if line.startswith("!") or "/" in line.removeprefix("**/"):
            raise ValueError(f"{line}: not known here")
    return lines


@dataclass
class Build:
    """An image in the making: `context` is the folder of the sources, `root` what FROM has made."""

    context: Path
    root: Root
    ignore: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    user: str = "root"
    cwd: str = "/"
    instructions: dict[str, Instruction] = field(default_factory=dict)

    def do(self, step: Instruction) -> None:
        """Raises CalledProcessError, FileNotFoundError or ValueError."""
        self.instructions[step.name] = step
        match step.name:
            case "RUN":
                self.root.run(step.command(), self.whole_environment(), self.user, self.cwd)
            case "USER":
                self.user = step.text
            case "WORKDIR":
                self.cwd = step.text
                self.root.resolve(self.cwd).mkdir(parents=True, exist_ok=True)
            case "ENV":
                self.environment |= dict(re.findall(r"(\w+)=(\S+)", step.text))
            case "COPY":
                self._copy(step)

    def whole_environment(self) -> dict[str, str]:
        """With the home of the user, which Docker sets too."""
        users = dict((row := line.split(":"), row)[1][0:6:5] for line in self._passwd())
        return {"HOME": users[self.user], **self.environment}

    def _passwd(self) -> list[str]:
        return self.root.resolve("/etc/passwd").read_text().splitlines()

    def _copy(self, step: Instruction) -> None:
        flags, (*sources, target) = step.flags()
        if set(flags) - {"chown"}:
            raise ValueError(f"line {step.line}: {step} is not known here")
        into = self.root.resolve(str(Path(self.cwd, target)))
        for source in (self.context / name for name in sources):
            if not source.exists():
                raise FileNotFoundError(f"line {step.line}: {source}")
            # As Docker does it: a folder's content goes into the target, a file below a target that ends with a slash.
            if source.is_dir():
                shutil.copytree(source, into, symlinks=True, dirs_exist_ok=True, ignore=self._left_out)
            elif not ignored(self.ignore, source.relative_to(self.context)):
                file = into / source.name if target.endswith("/") or into.is_dir() else into
                file.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, file)
        if "chown" in flags:
            # Docker leaves what was there as it is; all of the folder belongs to this user here.
            self.root.run(["chown", "-R", flags["chown"], str(Path(self.cwd, target))], {}, cwd="/")

    def _left_out(self, folder: str, names: list[str]) -> set[str]:
        relative = Path(folder).relative_to(self.context)
        return {name for name in names if ignored(self.ignore, relative / name)}


def read(context: Path) -> tuple[list[Instruction], list[str]]:
    """Dockerfile.dev and .dockerignore of a checkout."""
    return parse((context / "Dockerfile.dev").read_text()), ignore_patterns((context / ".dockerignore").read_text())


if __name__ == "__main__":
    print(*read(Path.cwd())[0], sep="\n", file=sys.stdout)
