"""What `fsck` checks before it looks into a generation: names, roots, counters.

Owns which namespaces and generations there are to check. It reads only, and must not know what is
in a generation.
"""

from worker.index.fsck_notes import Counters, counter
from worker.index.keys import LAYOUT, LAYOUTS, NAMESPACES, SALT, Keys, decode, encode
from worker.index.space import exists
from worker.index.store import Store

ROOTS = "{*}:root"
"""What the keys of all roots look like."""
END = b"}:root"
COUNTERS = ("sequence", "version", "cluster")


def namespaces(store: Store) -> tuple[list[str], list[str]]:
    """All namespaces, and what does not hold of the set that names them."""
    rooted = _rooted(store)  # before the set is read: the name of a new one is noted first
    listed, problems = set[str](), list[str]()
    for name in sorted(_members(store)):
        if (namespace := _namespace(name)) is None:
            problems.append(f"{NAMESPACES} holds {name!r}, which is no namespace")
        else:
            listed.add(namespace)
    there = {name for name in listed if _type(store, Keys(name, "").root) != "none"}
    # Of a namespace whose making was cut short there is nothing but its name.
    lost = [name for name in sorted(listed - there) if _has_keys_only(store, name)]
    problems += [f"namespace {name!r} has keys, but no root" for name in lost]
    return sorted(rooted | there), problems


def _listing(store: Store, namespace: str) -> list[str]:
    """What does not hold of how a namespace is listed: others are told of it by that only."""
    if (kind := _type(store, NAMESPACES)) not in ("set", "none"):
        return [f"{NAMESPACES} is a {kind}, not a set"]
    if not store.command("SISMEMBER", NAMESPACES, encode(namespace)):
        return [f"{NAMESPACES} does not list {namespace!r}"]
    return []


def generations(store: Store, namespace: str) -> tuple[dict[str, Keys], list[str]]:
    """By role, `serving` and `building`, the generations to check; and what is wrong with them."""
    root = Keys(namespace, "").root
    if (kind := _type(store, root)) not in ("hash", "none"):
        return {}, [f"{root} is a {kind}, not a hash"]
    fields = store.command("HGETALL", root)
    if not fields:
        return {}, [f"namespace {namespace!r} does not exist"]
    found, problems = {}, _listing(store, namespace) + _topics(root, fields)
    if b"serving" not in fields:
        problems.append(f"{root} names no generation that answers")
    for role in ("serving", "building"):
        name = fields.get(role.encode())
        if name is not None and not name.isascii():
            problems.append(f"{root} names as {role} {name!r}, which is no generation")
        elif name is not None:
            found[role] = keys = Keys(namespace, name.decode())
            model = fields.get(f"model:{keys.generation}".encode(), b"")
            if not model or not model.isascii():
                problems.append(f"{root} names no model of generation {keys.generation}")
    return found, problems


def _topics(root: str, fields: dict[bytes, bytes]) -> list[str]:
    """Topics whose number is none, or another's as well, or will be the next one's."""
    numbers = [number for name, number in fields.items() if name.startswith(b"topic:")]
    count = fields.get(b"topics", b"0")
    known = count.isdigit() and all(each.isdigit() and int(each) < int(count) for each in numbers)
    if known and len(set(numbers)) == len(numbers):
        return []
    return [f"{root} does not tell topics apart"]


def counters(store: Store, keys: Keys) -> tuple[Counters | None, list[str]]:
    """The counters of a generation, None where they cannot be used, and what is wrong with them."""
    if not store.command("EXISTS", keys.meta):
        return None, [f"generation {keys.generation} is empty: there is no {keys.meta}"]
    layout = store.command("HGET", keys.root, f"layout:{keys.generation}")
    if not layout:
        return None, [f"{keys.root} names no record layout of generation {keys.generation}"]
    if layout not in [each.encode() for each in LAYOUTS]:
        known = " and ".join(LAYOUTS)
        return None, [
            f"generation {keys.generation} has record layout {layout!r}, this version knows {known}"
        ]
    salt = store.command("HGET", keys.meta, "salt")
    problems = []
    if len(salt or b"") != SALT and (salt is not None or layout == LAYOUT.encode()):
        problems.append(f"{keys.meta} has no salt of {SALT} bytes")
    counts = {name: counter(store, keys, name) for name in COUNTERS}
    odd = [name for name, count in counts.items() if count is None]
    problems += [f"the counter {name!r} in {keys.meta} is no number, or missing" for name in odd]
    if problems:
        return None, problems
    sequence, version = counts["sequence"] or 0, counts["version"] or 0
    key, first = keys.record(sequence)
    # Records are never removed; without the last one, there is no telling where they end.
    if sequence and not store.command("HEXISTS", key, first):
        return None, [f"the last sequence handed out, {sequence}, has no record"]
    return Counters(sequence, version, salt), []


def _rooted(store: Store) -> set[str]:
    """The namespaces that have a generation that answers."""
    found = set[str]()
    for page in store.pages(ROOTS):
        # Somebody else's key may look like one.
        names = [_namespace(key[1 : -len(END)]) for key in page if key.endswith(END)]
        spaces = [name for name in names if name is not None]
        kinds = store.commands([("TYPE", Keys(name, "").root) for name in spaces])
        hashes = [name for name, kind in zip(spaces, kinds, strict=True) if kind == b"hash"]
        found |= {name for name in hashes if exists(store, name)}
    return found


def _namespace(name: bytes) -> str | None:
    """The namespace that is encoded so; None where none is."""
    if not name or not name.isascii():
        return None
    namespace = decode(name.decode())
    return namespace if encode(namespace) == name.decode() else None


def _members(store: Store) -> set[bytes]:
    """What the set of namespaces holds, if it is one."""
    members: set[bytes] = set()
    if _type(store, NAMESPACES) == "set":
        members |= store.command("SMEMBERS", NAMESPACES)
    return members


def _has_keys_only(store: Store, namespace: str) -> bool:
    keys = any(True for _ in store.pages(f"{{{encode(namespace)}}}:"))
    # It may have been made meanwhile.
    return keys and _type(store, Keys(namespace, "").root) == "none"


def _type(store: Store, key: str) -> str:
    """What a key is: `none` where there is none."""
    return str(store.command("TYPE", key).decode())
