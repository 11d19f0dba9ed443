"""How large an upload may be, in each of the ways in which a small file can turn out large."""

from __future__ import annotations

from typing import Final

import msgspec

MIB: Final = 2**20
GIB: Final = 2**30


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    upload_bytes: int = 200 * MIB
    # What a container holds once it is expanded; an .xlsx is a container too.
    expanded_bytes: int = 2 * GIB
    members: int = 200_000
    rows: int = 1_000_000
    columns: int = 16_384 - 5  # a sheet has 16,384, and the answers need five
    # Of all columns together: they are part of the session's record in the store.
    names_chars: int = 1 * MIB
    # What Excel allows is 32,767; data URIs in .csv and .jsonl are longer.
    cell_chars: int = 64 * MIB
    # One picture, embedded or uploaded beside the workbook.
    picture_bytes: int = 64 * MIB
    # A part of an .xlsx that is read whole: everything but sheets and texts.
    part_bytes: int = 64 * MIB
