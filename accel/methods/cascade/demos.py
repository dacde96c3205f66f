"""Demonstrations as an artifact: what a teacher did, once, for any number of students.

A folder with ``accel.json`` and ``demonstrations.jsonl``. Vectors are not part of it: each student's side has its own
embedder, and keeps what it embedded in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from accel.artifacts import Artifact, BaseModel, Manifest, cache_folder, json_digest, save
from accel.errors import ArtifactError, OptionError
from accel.methods.cascade.embedding import Embedder
from accel.methods.cascade.prompt import PLAIN, Layout
from accel.methods.cascade.store import Demonstration, DemonstrationStore

FILE = "demonstrations.jsonl"


@dataclass(frozen=True)
class Demos:
    """Demonstrations, how they were asked for (``system``, ``layout``), and where they came from."""

    kind: ClassVar[str] = "demos"

    demonstrations: tuple[Demonstration, ...]
    teacher: BaseModel
    system: str = ""
    layout: Layout = PLAIN
    made: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.demonstrations:
            raise OptionError("no demonstrations: an artifact needs one at least")

    def save(self, folder: str | Path) -> Artifact:
        """Write the artifact's folder."""
        parameters = {
            "demonstrations": len(self.demonstrations),
            "steps": sum(len(each.steps) for each in self.demonstrations),
            "system": self.system,
            "layout": vars(self.layout),
        }
        manifest = Manifest(self.kind, self.teacher, parameters, self.made, self.measured)
        return save(folder, manifest, {}, {FILE: "".join(each.to_json() + "\n" for each in self.demonstrations)})

    @classmethod
    def load(cls, artifact: Artifact) -> Demos:
        """Read an artifact whose digest is right; ArtifactError where it holds something else."""
        where = str(artifact.path)
        if artifact.kind != cls.kind:
            raise ArtifactError(f"{where} is a {artifact.kind}: demonstrations are wanted")
        lines = artifact.file(FILE).read_bytes().splitlines()
        manifest = artifact.manifest
        raw = manifest.parameters
        try:
            layout = Layout(**raw.get("layout", {}))
            kept = tuple(Demonstration.from_json(each, f"{FILE}:{n}") for n, each in enumerate(lines, 1) if each)
            return cls(kept, manifest.base, str(raw.get("system", "")), layout, manifest.made, manifest.measured)
        except (OptionError, TypeError) as error:
            raise ArtifactError(f"{where}: {error}") from error

    def digest(self) -> str:
        return json_digest([each.to_json() for each in self.demonstrations])


def store_of(
    demos: Sequence[Demos], embedder: Embedder, path: str | Path | None = None, *, device: str = "cpu"
) -> DemonstrationStore:
    """A store with all of them; in the user's cache where no ``path`` is given. What is there already stays."""
    if path is None:
        name = json_digest([sorted(each.digest() for each in demos), embedder.digest])[:24]
        path = cache_folder() / "demos" / f"{name}.db"
        path.parent.mkdir(parents=True, exist_ok=True)
    store = DemonstrationStore(path, embedder, device=device)
    try:
        for each in demos:
            store.add(each.demonstrations)
    except BaseException:
        store.close()
        raise
    return store
