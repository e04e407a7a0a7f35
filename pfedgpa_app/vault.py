"""Storage of clients' vectors, in memory or on disk."""

from collections import UserDict
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from torch import Tensor

from pfedgpa_app.state import link_or_copy, load_state, save_state, sync_to_disk, writing
from pfedgpa_app.stateful import Kept, Stateful, Vector

VECTOR_KIND = "pfedgpa-vector-2"


class MemoryVault(UserDict[int, Tensor], Stateful):
    """One vector ``(d,)`` per client, in memory."""

    data: Kept[dict[int, Vector]]

    def prune(self) -> None:
        """Do nothing: there are no files."""


class DiskVault(MutableMapping[int, Tensor], Stateful):
    """One vector ``(d,)`` per client, each in its own safetensors file.

    Files are never overwritten: a new vector gets a new file, and files of the last checkpoint stay
    until `prune` is called after the next one. The folder of ``<client>-<version>.safetensors`` is
    created with the first one; ``earlier`` is where the files of a restored state are.
    """

    versions: Kept[dict[int, int]]
    """The number of each client's file."""

    def __init__(self, folder: Path, earlier: Path | None = None) -> None:
        self.folder, self.earlier = folder, earlier or folder
        self.versions = {}
        self._next = 1

    def file(self, client: int) -> Path:
        """Return the file of a client's vector."""
        return self._file(client, self.versions[client])

    def _file(self, client: int, version: int) -> Path:
        return self.folder / f"{client}-{version}.safetensors"

    def complete_restored(self) -> None:
        """Link or copy the files of a restored state from ``earlier``.

        Raises `ValueError` if one is missing or damaged, or cannot be linked or copied.
        """
        files = {self.earlier / self.file(client).name: self.file(client) for client in self}
        for file in files:
            vector = load_state(file, VECTOR_KIND)[0].get("vector")
            if vector is None or not bool(vector.isfinite().all()):
                raise ValueError(f"{file} is damaged: its vector is missing or not finite")
        if files and self.earlier != self.folder:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                for file, target in files.items():
                    link_or_copy(file, target)
                sync_to_disk(self.folder)
            except OSError as error:
                raise ValueError(str(error)) from error
        self._next = max(self.versions.values(), default=0) + 1

    def prune(self) -> None:
        """Remove the files of older versions; raises `WriteError` if that fails."""
        current = {self.file(client).name for client in self}
        with writing(self.folder):
            for file in self.folder.iterdir() if self.folder.is_dir() else ():
                if file.name not in current:
                    file.unlink()

    def __setitem__(self, client: int, vector: Tensor) -> None:
        """Write a vector; if a `WriteError` is raised, the client keeps its previous one."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        save_state(self._file(client, self._next), VECTOR_KIND, {"vector": vector})
        self.versions[client] = self._next
        self._next += 1

    def __getitem__(self, client: int) -> Tensor:
        """Read a vector; a `ValueError` says that its file is missing or damaged."""
        return load_state(self.file(client), VECTOR_KIND)[0]["vector"]

    def __delitem__(self, client: int) -> None:
        """Remove a vector; its file stays until `prune`."""
        del self.versions[client]

    def __contains__(self, client: object) -> bool:
        """Return whether a client has a vector, without reading it."""
        return client in self.versions

    def __iter__(self) -> Iterator[int]:
        """Iterate over the clients."""
        return iter(self.versions)

    def __len__(self) -> int:
        """Return the number of clients."""
        return len(self.versions)


Vault = MemoryVault | DiskVault
