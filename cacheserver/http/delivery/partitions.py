"""Which namespaces share a partition's pictures, and whether whoever has a key may fetch them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from cacheserver.errors import PermissionDeniedError
from cacheserver.model import AnswerFrom, Caller, Namespace, Permission


class Partitions:
    """Partitions as image delivery sees them. One that no namespace has is as private as any other."""

    def __init__(self, namespaces: Iterable[Namespace]) -> None:
        self.replace(namespaces)

    def replace(self, namespaces: Iterable[Namespace]) -> None:
        """From now on these are the namespaces."""
        self._sharing: dict[str, list[Namespace]] = {}
        self._names: set[str] = set()
        for namespace in namespaces:
            self._names.add(namespace.name)
            # A key names one picture, however it came to be: what may be derived is asked where prompts are.
            reader = replace(namespace, answer_from=frozenset(AnswerFrom))
            self._sharing.setdefault(namespace.partition, []).append(reader)

    def is_public(self, partition: str) -> bool:
        """Whether every namespace of it lets whoever has a key fetch the picture."""
        sharing = self._sharing.get(partition)
        return sharing is not None and all(namespace.public_images for namespace in sharing)

    def any_of(self, partition: str) -> Namespace | None:
        """A namespace that its pictures may be read in; None if there is none any more."""
        sharing = self._sharing.get(partition)
        return sharing[0] if sharing else None

    def read_by(self, caller: Caller, partition: str) -> Namespace:
        """The namespace that this caller reads its pictures in.

        Raises:
            PermissionDeniedError: there is none.
        """
        for namespace in self._sharing.get(partition, ()):
            if caller.may(Permission.READ, namespace.name):
                return namespace
        raise PermissionDeniedError("This caller may not read in a namespace of this image.")

    def are_shared_by(self, namespace: str) -> bool:
        """Whether there is a namespace of this name."""
        return namespace in self._names
