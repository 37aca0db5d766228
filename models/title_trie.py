"""The catalogue's titles as a trie of tokens: what generation may say, and what scoring computes only once.

Nodes are numbered breadth first with siblings in token order, so the children of a node are one run of ids,
and so is a level. Node 0 is the root (nothing said yet); a leaf is the EOS of a title.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TrieBlocks:
    """The inner nodes cut into R blocks of T slots, each of which runs through a decoder as one row.

    A block is a stretch of the depth-first order behind the ancestors of its first node. Each inner node is
    owned by one block; in others it is only there to be attended to. Slots past a block's end hold node 0.
    """

    nodes: Tensor  # [R, T] node ids
    tokens: Tensor  # [R, T] their tokens
    depths: Tensor  # [R, T] their depths; the first token of a title has depth 1
    visible: Tensor  # [R, T, T] bool: slot i attends to slot j (its ancestors and itself)
    slots: Tensor  # [inner] where each inner node, in depth-first order, is owned: row * T + slot
    row_start: np.ndarray  # [R + 1] row r owns the inner nodes row_start[r] .. row_start[r + 1] - 1
    edge_start: np.ndarray  # [inner + 1] inner node i has the edges edge_start[i] .. edge_start[i + 1] - 1
    edge_owners: Tensor  # [edges] the inner node, by its place in depth-first order, that each edge leaves
    edge_tokens: Tensor  # [edges] the token said on it
    edge_children: Tensor  # [edges] the node id it leads to


@dataclass(frozen=True, eq=False)
class TitleTrie:
    """A catalogue's titles, one leaf for each distinct title."""

    token: Tensor  # [nodes] int64; the root's is 0 and means nothing
    parent: Tensor  # [nodes] int64; the root's is 0
    child_start: Tensor  # [nodes + 1] int64; the children of node i are child_start[i] .. child_start[i + 1] - 1
    leaf_of_item: Tensor  # [N + 1] int64; items with equal titles share a leaf; entry 0 is the root
    level_start: tuple[int, ...]  # nodes of depth d are level_start[d] .. level_start[d + 1] - 1
    _on_device: dict[torch.device, TitleTrie] = field(default_factory=dict, repr=False)
    _blocks: dict[int, TrieBlocks] = field(default_factory=dict, repr=False)
    _decisions: list[TitleTrie] = field(default_factory=list, repr=False)  # one, once it was asked for

    @classmethod
    def build(cls, offsets: np.ndarray, ids: np.ndarray) -> TitleTrie:
        """Trie of the tokens `ids[offsets[i - 1]:offsets[i]]` of items i = 1..N, each title ending with EOS.

        Raises ValueError for an item without tokens and for a title that is the beginning of another one.
        """
        offsets, ids = np.asarray(offsets, np.int64), np.asarray(ids, np.int64)
        lengths = np.diff(offsets)
        if len(lengths) == 0 or lengths.min() < 1:
            raise ValueError("every item needs at least one title token (its EOS), and a catalogue needs an item")
        vocabulary = int(ids.max()) + 1
        tokens, parents, level_start = [np.zeros(1, np.int64)], [np.zeros(1, np.int64)], [0, 1]
        node_of_item = np.zeros(len(lengths), np.int64)
        for position in range(int(lengths.max())):
            alive = np.flatnonzero(lengths > position)
            steps = node_of_item[alive] * vocabulary + ids[offsets[alive] + position]
            distinct, which = np.unique(steps, return_inverse=True)
            node_of_item[alive] = level_start[-1] + which
            parents.append(distinct // vocabulary)
            tokens.append(distinct % vocabulary)
            level_start.append(level_start[-1] + len(distinct))
        parent = np.concatenate(parents)
        num_children = np.bincount(parent[1:], minlength=len(parent))
        continued = np.flatnonzero(num_children[node_of_item])
        if len(continued):
            raise ValueError(
                f"the title of item {continued[0] + 1} is the beginning of another: end every title with EOS"
            )
        return cls(
            token=torch.from_numpy(np.concatenate(tokens)),
            parent=torch.from_numpy(parent),
            child_start=torch.from_numpy(1 + np.concatenate([[0], np.cumsum(num_children)])),
            leaf_of_item=torch.from_numpy(np.concatenate([[0], node_of_item])),
            level_start=tuple(level_start),
        )

    @property
    def num_nodes(self) -> int:
        return len(self.token)

    @property
    def num_items(self) -> int:
        return len(self.leaf_of_item) - 1

    @property
    def max_depth(self) -> int:
        """Tokens in the longest title, EOS included."""
        return len(self.level_start) - 2

    def to(self, device: torch.device) -> TitleTrie:
        """The same trie on `device`, copied at the first call."""
        if self.token.device == device:
            return self
        if device not in self._on_device:
            self._on_device[device] = TitleTrie(
                token=self.token.to(device),
                parent=self.parent.to(device),
                child_start=self.child_start.to(device),
                leaf_of_item=self.leaf_of_item.to(device),
                level_start=self.level_start,
            )
        return self._on_device[device]

    def blocks(self, size: int) -> TrieBlocks:
        """The inner nodes in blocks of `size` slots, or of twice the trie's depth if that is more."""
        if size not in self._blocks:
            self._blocks[size] = _cut_blocks(self, max(size, 2 * self.max_depth))
        return self._blocks[size]

    def decisions(self) -> TitleTrie:
        """This trie without the ends that leave no choice: a title's leaf is the first node that no other one shares.

        A few per cent of the nodes are left, and they decide everything that constrained generation decides.
        """
        if not self._decisions:
            self._decisions.append(_cut_ends(self))
        return self._decisions[0]

    def is_leaf(self, nodes: Tensor) -> Tensor:
        """Whether each node ends a title: bool, the shape of `nodes`."""
        return self.child_start[nodes + 1] == self.child_start[nodes]

    def children(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """What may follow each of `nodes` [n]: (tokens, child nodes), both [n, C], padded with node 0."""
        start, end = self.child_start[nodes], self.child_start[nodes + 1]
        width = int((end - start).max())
        child = start[:, None] + torch.arange(width, device=nodes.device)
        child = child.masked_fill(child >= end[:, None], 0)
        return self.token[child], child

    def first_items(self, nodes: Tensor) -> Tensor:
        """The lowest item id at each of `nodes` (any shape); N + 1 where no title ends, 0 at the root."""
        items = torch.arange(self.num_items + 1, device=nodes.device)
        first = torch.full((self.num_nodes,), self.num_items + 1, device=nodes.device)
        return first.scatter_reduce(0, self.leaf_of_item, items, "amin")[nodes]


def _cut_ends(trie: TitleTrie) -> TitleTrie:
    parent = trie.parent.cpu().numpy()
    num_children = np.diff(trie.child_start.cpu().numpy())
    levels = [slice(*bounds) for bounds in zip(trie.level_start[1:-1], trie.level_start[2:], strict=True)]
    leads_to_choice = num_children > 1
    leads_to_choice[0] = True
    for level in reversed(levels):
        np.logical_or.at(leads_to_choice, parent[level], leads_to_choice[level])
    kept = leads_to_choice[parent]
    # Of every node's path, the deepest node that is kept; it stands for the titles below.
    deepest_kept = np.where(kept, np.arange(trie.num_nodes), 0)
    for level in levels:
        deepest_kept[level] = np.where(kept[level], deepest_kept[level], deepest_kept[parent[level]])
    new_id = np.cumsum(kept) - 1
    num_children = np.where(leads_to_choice, num_children, 0)[kept]
    level_start = [int(kept[:start].sum()) for start in trie.level_start]

    def on_device(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(trie.token.device)

    return TitleTrie(
        token=trie.token[on_device(kept)],
        parent=on_device(new_id[parent[kept]]),
        child_start=on_device(1 + np.concatenate([[0], np.cumsum(num_children)])),
        leaf_of_item=on_device(new_id[deepest_kept])[trie.leaf_of_item],
        level_start=tuple(dict.fromkeys(level_start)),  # deep levels may be empty now
    )


def _depth_first(trie: TitleTrie) -> tuple[np.ndarray, np.ndarray]:
    """Every node's rank among the inner nodes in depth-first order, and the number of inner nodes under it.

    A node counts itself. The root has rank -1: it is never run, the prompt stands for it.
    """
    parent, child_start = trie.parent.cpu().numpy(), trie.child_start.cpu().numpy()
    size = (np.diff(child_start) > 0).astype(np.int64)
    levels = [slice(*bounds) for bounds in zip(trie.level_start[1:-1], trie.level_start[2:], strict=True)]
    for level in reversed(levels):
        np.add.at(size, parent[level], size[level])
    rank = np.full(trie.num_nodes, -1)
    for level in levels:
        before = np.cumsum(size[level]) - size[level]
        before_siblings = before - before[child_start[parent[level]] - level.start]
        rank[level] = rank[parent[level]] + 1 + before_siblings
    return rank, size


def _cut_blocks(trie: TitleTrie, size: int) -> TrieBlocks:
    rank, subtree = _depth_first(trie)
    child_start, token = trie.child_start.cpu().numpy(), trie.token.cpu().numpy()
    depth = np.repeat(np.arange(trie.max_depth + 1), np.diff(trie.level_start))
    inner = 1 + np.flatnonzero(subtree[1:])
    inner = inner[np.argsort(rank[inner])]
    nodes, slots, row_start = _fill_rows(trie.parent.cpu().numpy(), inner, size)

    # j is an ancestor of i, or i itself, if i lies in the stretch of the depth-first order that is under j
    first, end = rank[nodes], rank[nodes] + subtree[nodes]
    visible = (first[:, None, :] <= first[:, :, None]) & (first[:, :, None] < end[:, None, :])
    visible &= (nodes > 0)[:, None, :]
    visible |= np.eye(nodes.shape[1], dtype=bool)  # a slot past the end sees itself: its softmax needs something

    num_children = child_start[inner + 1] - child_start[inner]
    edge_start = np.concatenate([[0], np.cumsum(num_children)])
    children = np.repeat(child_start[inner] - edge_start[:-1], num_children) + np.arange(edge_start[-1])

    def on_device(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(trie.token.device)

    return TrieBlocks(
        nodes=on_device(nodes),
        tokens=on_device(token[nodes]),
        depths=on_device(depth[nodes]),
        visible=on_device(visible),
        slots=on_device(slots),
        row_start=row_start,
        edge_start=edge_start,
        edge_owners=on_device(np.repeat(np.arange(len(inner)), num_children)),
        edge_tokens=on_device(token[children]),
        edge_children=on_device(children),
    )


def _fill_rows(parent: np.ndarray, inner: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lay the inner nodes out in rows: (nodes [R, T], slots [inner], row_start [R + 1]) of `TrieBlocks`."""
    rows: list[np.ndarray] = []
    places, row_start = [np.zeros(0, np.int64)], [0]
    while row_start[-1] < len(inner):
        ancestors: list[int] = []
        node = parent[inner[row_start[-1]]]
        while node:
            ancestors.insert(0, node)
            node = parent[node]
        owned = inner[row_start[-1] : row_start[-1] + size - len(ancestors)]
        places.append(np.arange(len(owned)) + len(ancestors))
        rows.append(np.concatenate([np.array(ancestors, np.int64), owned]))
        row_start.append(row_start[-1] + len(owned))
    width = max((len(row) for row in rows), default=0)
    nodes = np.zeros((len(rows), width), np.int64)
    for index, row in enumerate(rows):
        nodes[index, : len(row)] = row
    row_of_node = np.repeat(np.arange(len(rows)), np.diff(row_start))
    return nodes, row_of_node * width + np.concatenate(places), np.array(row_start)
