"""Retrieval by similarity. Shapes: N rows, M rows of a block, D width of the space."""

from __future__ import annotations

import numpy as np
import torch

_BLOCK = 1024


def ranks(queries_ND: np.ndarray, candidates_ND: np.ndarray, ids_N: np.ndarray) -> np.ndarray:
    """ranks_N: how many wrong candidates stand before the best right one, by dot product.

    Row i's right candidates are all rows with its id: where images share a caption, any of them is right. A wrong
    candidate that ties with the best right one, or whose similarity is not a number, stands before it: embeddings that
    have collapsed into one find nothing, whatever the order of rows. Recall@k is the share of ranks below k. Works on
    blocks of rows: memory is M x N.
    """
    queries, candidates = torch.from_numpy(queries_ND).float(), torch.from_numpy(candidates_ND).float()
    ids = torch.from_numpy(np.ascontiguousarray(ids_N))
    found = []
    for start in range(0, len(queries), _BLOCK):
        similar_MN = queries[start : start + _BLOCK] @ candidates.T
        right_MN = ids[start : start + _BLOCK, None] == ids[None]
        best_M1 = similar_MN.masked_fill(~right_MN, -torch.inf).amax(1, keepdim=True)
        found.append((~(similar_MN < best_M1) & ~right_MN).sum(1))
    return torch.cat(found).numpy()
