"""Where a method helps: items by popularity, users by activity, both as the training part shows them."""

import numpy as np

from llmrec_lib.splits import Split


def popularity_groups(split: Split) -> dict[str, np.ndarray]:
    """Item ids of "head", "middle" and "tail", the most popular items first, each with a third of the training events;
    and of "unseen", the items without one. A group may be empty."""
    order = 1 + np.argsort(-split.item_counts[1:], kind="stable")
    before = np.cumsum(split.item_counts[order]) - split.item_counts[order]
    third = np.minimum(3 * before // split.item_counts.sum(), 2)
    seen = split.item_counts[order] > 0
    groups = {name: np.sort(order[seen & (third == place)]) for place, name in enumerate(("head", "middle", "tail"))}
    return {**groups, "unseen": np.sort(order[~seen])}


def activity_groups(split: Split, users: np.ndarray) -> dict[str, np.ndarray]:
    """The users with "few", "some" and "many" training events: thirds of `users`, ties cut in the order of their ids."""
    order = users[np.argsort(split.user_counts[users], kind="stable")]
    return {name: np.sort(part) for name, part in zip(("few", "some", "many"), np.array_split(order, 3), strict=True)}
