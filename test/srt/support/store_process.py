"""A process that does to a store what it reads from its standard input: one of several that race each other."""

from __future__ import annotations

import json
import sys

from embedding_relay.batch.store.contract import Store
from embedding_relay.batch.store.opening import open_store

FOREVER = 1000.0


def add(value: bytes, text: str) -> bytes:
    return json.dumps([*json.loads(value), text]).encode()


def do(store: Store, me: str, verb: str, key: str, text: str) -> object:
    match verb:
        case "create":
            return store.create(key, json.dumps([text]).encode(), FOREVER)
        case "append":
            after = store.change(key, FOREVER, lambda value: add(value, text))
            return None if after is None else json.loads(after)
        case "delete":
            return store.delete(key)
        case "claim":
            return store.claim(key, me, FOREVER)
        case "release":
            return store.release(key, me)
        case _:
            raise ValueError(verb)


def main() -> None:
    """Each line: a list of steps; answered by the list of what they returned."""
    where, me = sys.argv[1:]
    store = open_store(where)
    for line in sys.stdin:
        print(json.dumps([do(store, me, *step) for step in json.loads(line)]), flush=True)
    store.close()


if __name__ == "__main__":
    main()
