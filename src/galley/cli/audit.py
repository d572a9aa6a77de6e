"""`galley audit`: the log of requests that nobody can rewrite unseen."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from galley.cli.session import Session
from galley.cli.terminal import print_json, print_table
from galley.errors import GalleyError, InvalidRequest, NotFound

if TYPE_CHECKING:
    from galley.audit.tiles import Tree
    from galley.audit.verifier import Report

KEY = click.option(
    "--key", metavar="VKEY", help="The log's verifier key, or a file with it; default: its own."
)
JSON = click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")


class NotVerified(GalleyError):
    """The log, or a proof from it, does not verify."""

    code = "audit_not_verified"


@click.group()
def audit() -> None:
    """Verify, prove from, export and erase in the audit log.

    Exit code 0 only when everything verifies; else 1, and the first bad entry is named. Whoever does not
    trust this installation verifies with galley/audit/verifier.py alone: it imports nothing of Galley.
    """


@audit.command()
@KEY
@click.option(
    "--seen",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A checkpoint noted earlier; may be repeated.",
)
@click.option(
    "--witness", "witnesses", multiple=True, metavar="VKEY", help="A witness that must have cosigned."
)
@click.option("--deep", is_flag=True, help="Also check that every entry is canonical JSON.")
@JSON
@click.pass_obj
def verify(
    session: Session,
    *,
    key: str | None,
    seen: tuple[Path, ...],
    witnesses: tuple[str, ...],
    deep: bool,
    as_json: bool,
) -> None:
    """Verify every entry, tile and signature of the log."""
    report = checked(session, key, seen=seen, witnesses=witnesses, deep=deep, as_json=as_json)
    if as_json:
        print_json({"verified": True, **vars(report)})
        return
    click.echo(f"{report.origin}: {report.size} entries verify, root {report.root}")
    for name, seconds in report.witnesses.items():
        click.echo(f"  cosigned by {name} at {seconds}")
    if report.unsigned_bytes:
        click.echo(f"  {report.unsigned_bytes} bytes of entries wait for the next checkpoint")


@audit.command()
@click.argument("receipt", metavar="RECEIPT")
@KEY
@click.option("--out", type=click.Path(path_type=Path), help="Write the proof (C2SP tlog-proof) to a file.")
@JSON
@click.pass_obj
def prove(session: Session, *, receipt: str, key: str | None, out: Path | None, as_json: bool) -> None:
    """Prove that a request's entry is in the log, to whoever has the log's verifier key.

    The proof holds the entry, its path to the root and the signed checkpoint; `verifier.py proof FILE` checks
    it without the log.
    """
    from galley.audit.merkle import inclusion_path
    from galley.audit.verifier import Wrong, verify_proof

    report = checked(session, key, as_json=as_json)
    tree, note = opened(session)
    found = [(index, entry) for index, entry in entries_of(tree) if told_of(entry) == receipt]
    if not found:
        raise NotFound(f"There is no entry of {receipt[:100]!r} among the {report.size} signed ones.")
    index, entry = found[-1]  # after its begin, in strict mode
    path = inclusion_path(tree, index, tree.size)
    lines = ["c2sp.org/tlog-proof@v1", f"extra {base64.b64encode(entry).decode()}", f"index {index}"]
    lines += [base64.b64encode(each).decode() for each in path]
    text = "\n".join(lines) + "\n\n" + note
    try:
        verify_proof(text.encode(), key_of(session, key))
    except Wrong as wrong:
        raise NotVerified(str(wrong)) from wrong
    if out is not None:
        out.write_text(text, encoding="utf-8")
    if as_json:
        print_json(
            {"index": index, "size": tree.size, "hashes": len(path), "entry": plain(entry), "proof": text}
        )
    elif out is None:
        click.echo(text, nl=False)
    else:
        click.echo(f"entry {index} of {tree.size}, {len(path)} hashes: {out}")


@audit.command()
@click.argument("earlier", metavar="CHECKPOINT", type=click.Path(path_type=Path))
@KEY
@JSON
@click.pass_obj
def consistency(session: Session, *, earlier: Path, key: str | None, as_json: bool) -> None:
    """Prove that the log still begins with what CHECKPOINT, a file noted earlier, was signed over."""
    import json

    from galley.audit.merkle import consistency_path
    from galley.audit.note import parse_checkpoint
    from galley.audit.verifier import Wrong, verify_consistency

    checked(session, key, as_json=as_json)
    tree, note = opened(session)
    try:
        text = earlier.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{earlier} cannot be read: {error}") from error
    old = parse_checkpoint(text)
    path = consistency_path(tree, old.size, tree.size) if old.size <= tree.size else []
    proof = {"old": text, "new": note, "path": [base64.b64encode(each).decode() for each in path]}
    try:
        first, second = verify_consistency(json.dumps(proof).encode(), key_of(session, key))
    except Wrong as wrong:
        raise failed(wrong, as_json=as_json) from wrong
    if as_json:
        print_json(proof)
    else:
        click.echo(f"{second.origin}: the tree of {second.size} entries begins with that of {first.size}")


@audit.command()
@KEY
@JSON
@click.pass_obj
def export(session: Session, *, key: str | None, as_json: bool) -> None:
    """Verify the log and write out its entries, oldest first; with --json one object a line."""
    checked(session, key, as_json=False)
    tree, _ = opened(session)
    if as_json:
        for index, entry in entries_of(tree):
            leaf = tree.leaf(index).hex()
            print_json({"index": index, "leaf": leaf, "entry": plain(entry)}, lines=True)
        return
    rows = []
    for index, entry in entries_of(tree):
        said = plain(entry)
        usage = said.get("usage") or {}
        rows.append(
            (
                str(index),
                str(said.get("type")),
                str(said.get("id") or said.get("subject") or "-"),
                str((said.get("actor") or {}).get("subject") or "-"),
                str(said.get("model") or said.get("asked_model") or "-"),
                str(usage.get("prompt", "-")),
                str(usage.get("completion", "-")),
                str(said.get("status") or "-"),
            )
        )
    print_table(("ENTRY", "TYPE", "ID", "SUBJECT", "MODEL", "PROMPT", "OUTPUT", "STATUS"), rows)


@audit.command()
@JSON
@click.pass_obj
def key(session: Session, as_json: bool) -> None:
    """Show the log's verifier key: what others need to verify, and should get from you directly."""
    found = key_of(session, None)
    print_json({"key": found}) if as_json else click.echo(found)


@audit.command()
@click.argument("folder", type=click.Path(path_type=Path))
@KEY
@click.option("--name", metavar="NAME", help="Of the witness, when its key is made.")
@JSON
@click.pass_obj
def witness(session: Session, *, folder: Path, key: str | None, name: str | None, as_json: bool) -> None:
    """Cosign the log's checkpoint, if it continues the one cosigned last; FOLDER holds the witness's key and
    memory. Run it elsewhere and often, over a copy or a mount of the log."""
    from galley.audit.witness import Witness

    made = Witness(folder, key_of(session, key), name=name)
    seen = made.cosign(session.config.audit.folder)
    if as_json:
        print_json({"size": seen.size, "root": seen.root.hex(), "witness": made.signer.vkey})
    else:
        click.echo(f"cosigned {seen.size} entries of {seen.origin}; witness key: {made.signer.vkey}")


@audit.command()
@JSON
@click.pass_obj
def subjects(session: Session, as_json: bool) -> None:
    """List whom the entries are about: the ids in the log, with the names behind them."""
    from galley.audit.subjects import Subjects

    found = list(Subjects(session.config.audit.folder / "keys").all())
    if as_json:
        print_json(found)
        return
    print_table(("SUBJECT", "TENANT", "USER"), [(e["id"], e["tenant"], e["user"] or "-") for e in found])


@audit.command()
@click.option("--tenant", default="local", show_default=True, metavar="NAME", help="As on the receipts.")
@click.option("--user", metavar="NAME", help="As on the receipts; default: the tenant's own requests.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@JSON
@click.pass_obj
def erase(session: Session, *, tenant: str, user: str | None, yes: bool, as_json: bool) -> None:
    """Destroy a subject's name and key. The log stays valid; what it says of them can never be opened again.

    The erasure itself becomes an entry when the log is next written.
    """
    from galley.audit.subjects import Subjects

    if not yes:
        click.confirm(f"Destroy the key of tenant {tenant!r}, user {user!r}, for ever?", abort=True, err=True)
    id = Subjects(session.config.audit.folder / "keys").erase(tenant, user)
    if as_json:
        print_json({"subject": id, "erased": True})
    else:
        click.echo(f"{id} erased")


def key_of(session: Session, given: str | None) -> str:
    """The verifier key to trust: as given, else of the signing key of this installation, else as the log
    itself says, which proves nothing against whoever wrote the log."""
    from galley.audit import verifier
    from galley.audit.note import Signer

    config = session.config.audit
    if given is not None:
        try:
            return verifier.key_of(given)
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"The key {given!r} cannot be read: {error}") from error
    if config.signing_key.exists():
        return Signer.kept(config.signing_key).vkey
    try:
        found = (config.folder / "vkey").read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise NotFound(
            f"There is no audit log in {config.folder}.", hint="Set audit.mode = on, and serve."
        ) from None
    click.echo("galley: warning: trusting the key that lies beside the log; give --key", err=True)
    return found


def failed(wrong: Any, *, as_json: bool) -> NotVerified:
    """What to raise for something that does not verify."""
    if as_json:
        print_json({"verified": False, "entry": wrong.entry, "where": wrong.where, "why": wrong.why})
    return NotVerified(f"NOT VERIFIED: {wrong}")


def checked(
    session: Session,
    key: str | None,
    *,
    as_json: bool,
    seen: tuple[Path, ...] = (),
    witnesses: tuple[str, ...] = (),
    deep: bool = False,
) -> "Report":
    """The verified log. Raises NotVerified naming the first bad entry, NotFound."""
    from galley.audit import verifier

    folder = session.config.audit.folder
    vkey = key_of(session, key)
    try:
        return verifier.verify_log(
            folder,
            vkey,
            seen=[path.read_bytes() for path in seen],
            witnesses=[verifier.key_of(each) for each in witnesses],
            deep=deep,
        )
    except verifier.Wrong as wrong:
        raise failed(wrong, as_json=as_json) from wrong
    except OSError as error:
        raise NotVerified(f"NOT VERIFIED: {error}") from error


def opened(session: Session) -> "tuple[Tree, str]":
    """The signed tree and its checkpoint."""
    from galley.audit.note import parse_checkpoint
    from galley.audit.tiles import Tiles, Tree

    folder = session.config.audit.folder
    note = (folder / "checkpoint").read_text(encoding="utf-8")
    return Tree(Tiles(folder), parse_checkpoint(note).size), note


def entries_of(tree: "Tree") -> Iterator[tuple[int, bytes]]:
    """All signed entries, oldest first."""
    index = 0
    for bundle in tree.bundles():
        for entry in bundle:
            yield index, entry
            index += 1


def told_of(entry: bytes) -> str | None:
    """The receipt an entry is about."""
    found = plain(entry)
    return found.get("id") if found.get("type") in ("begin", "request") else None


def plain(entry: bytes) -> dict[str, Any]:
    """An entry as an object."""
    import msgspec

    found: dict[str, Any] = msgspec.json.decode(entry)
    return found
