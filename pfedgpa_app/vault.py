"""Vectors of clients that are seldom needed, in memory or on disk."""

from collections import UserDict
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from torch import Tensor

from pfedgpa_app.state import link_or_copy, load_state, save_state, sync_to_disk, writing
from pfedgpa_app.stateful import Kept, Stateful, Vector

VECTOR_KIND = "pfedgpa-vector-1"


class MemoryVault(UserDict[int, Tensor], Stateful):
    """A vector ``(d,)`` a client, all of them in memory."""

    data: Kept[dict[int, Vector]]

    def sweep(self) -> None:
        """Do nothing: there are no files."""


class DiskVault(MutableMapping[int, Tensor], Stateful):
    """A vector ``(d,)`` a client, each in a safetensors file of its own.

    A file is never written again: what a client is given anew goes to a new one, and what the last
    checkpoint counts on stays until `sweep` is called after the next.

    Parameters
    ----------
    folder
        Of the files, ``<client>-<version>.safetensors``. It is made with the first one.
    earlier
        Where the files of a restored state are; ``folder`` by default.

    Attributes
    ----------
    versions
        The number of each client's file.
    """

    versions: Kept[dict[int, int]]

    def __init__(self, folder: Path, earlier: Path | None = None) -> None:
        self.folder, self.earlier = folder, earlier or folder
        self.versions = {}
        self._next = 1

    def file(self, client: int) -> Path:
        """Return the file of a client's vector."""
        return self.folder / f"{client}-{self.versions[client]}.safetensors"

    def complete_restored(self) -> None:
        """Take over the files, which stay where they are as well.

        Raises
        ------
        ValueError
            If one is missing or damaged.
        """
        for client in self:
            file = self.earlier / self.file(client).name
            vector = load_state(file, VECTOR_KIND)[0].get("vector")
            if vector is None or not bool(vector.isfinite().all()):
                raise ValueError(f"{file} is damaged: its vector is missing or not finite")
        if self.versions and self.earlier != self.folder:
            try:
                self._take_over()
            except OSError as error:
                raise ValueError(str(error)) from error
        self._next = max(self.versions.values(), default=0) + 1

    def sweep(self) -> None:
        """Remove the files that nothing counts on any more.

        Raises
        ------
        WriteError
            If that fails.
        """
        counted_on = {self.file(client).name for client in self}
        with writing(self.folder):
            for file in self.folder.iterdir() if self.folder.is_dir() else ():
                if file.name not in counted_on:
                    file.unlink()

    def _take_over(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for client in self:
            link_or_copy(self.earlier / self.file(client).name, self.file(client))
        sync_to_disk(self.folder)

    def __setitem__(self, client: int, vector: Tensor) -> None:
        """Write a vector.

        Raises
        ------
        WriteError
            If that fails; the client then has what it had.
        """
        before = self.versions.get(client)
        self.versions[client] = self._next
        try:
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            save_state(self.file(client), VECTOR_KIND, {"vector": vector})
        except OSError:
            del self.versions[client]
            if before is not None:
                self.versions[client] = before
            raise
        self._next += 1

    def __getitem__(self, client: int) -> Tensor:
        """Read a vector.

        Raises
        ------
        KeyError
            If the client has none.
        ValueError
            If its file is missing or damaged.
        """
        return load_state(self.file(client), VECTOR_KIND)[0]["vector"]

    def __delitem__(self, client: int) -> None:
        """Forget a vector; its file stays until `sweep`."""
        del self.versions[client]

    def __contains__(self, client: object) -> bool:
        """Tell whether a client has a vector, without reading it."""
        return client in self.versions

    def __iter__(self) -> Iterator[int]:
        """Iterate over the clients."""
        return iter(self.versions)

    def __len__(self) -> int:
        """Return the number of clients."""
        return len(self.versions)


Vault = MemoryVault | DiskVault
