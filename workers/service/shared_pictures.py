"""Prepared pictures for workers on other machines: through the store, file by file, never with the plan.

On the machine of the driver workers read its cache. On others each picture is copied from the store into the cache
there before the first task that needs it, so that Ray's object store holds none.
"""

from collections.abc import Iterable, Iterator

from sweep.core.batches import Picture, Plan
from sweep.core.errors import Unfit
from sweep.store.store import Store
from workers.data.pictures import picture_file, write_picture_file


def share_pictures(plans: Iterable[Plan], store: Store) -> None:
    """Put the pictures of plans into the store, as far as they are not there. Raises: StoreFailed."""
    for plan in plans:
        for picture in _in_files(plan):
            if not store.has_picture(picture.content):
                store.write_picture(picture.content, picture_file(picture.content).read_bytes())


def fetch_pictures(plan: Plan, store: Store) -> None:
    """Copy the pictures of a plan that this machine lacks out of the store.

    Raises: Unfit: one is neither here nor there.
    """
    for picture in _in_files(plan):
        path = picture_file(picture.content)
        if path.is_file():
            continue
        if (data := store.picture(picture.content)) is None:
            raise Unfit(
                f"A prepared picture of the data set is neither in {path.parent} nor in the store {store.uri}. "
                "Type the same sweep run again: it is prepared again."
            )
        write_picture_file(path, data)


def _in_files(plan: Plan) -> Iterator[Picture]:
    """The pictures of a plan whose values lie in files, each once."""
    seen: set[str] = set()
    for segment in plan.segments:
        for batch in segment:
            for picture in batch.all_pictures:
                if picture.values is None and picture.content not in seen:
                    seen.add(picture.content)
                    yield picture
